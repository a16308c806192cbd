"""Each of sd-scripts' trainers and generators by its own calls, and what they do to models."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_parts import draw, inputs, randomise, sd_unet, sdxl_unet, text_encoder
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora
import networks.lora_flux

# architecture -> (entry, text encoders as its trainer hands them over)
ENCODERS = {
    "flux": ("lora_flux", ["text_encoder1", "text_encoder3"]),
    "chroma": ("lora_flux", [None, "text_encoder3"]),
    "sd3": ("lora_sd3", ["text_encoder1", "text_encoder2", "text_encoder3"]),
    "lumina": ("lora_lumina", ["text_encoder"]),
    "hunyuan_image": ("lora_hunyuan_image", ["qwen", "byt5"]),
    "anima": ("lora_anima", ["text_encoder"]),
}


def models(arch: str, seed: int = 0) -> tuple[list[nn.Module], nn.Module]:
    """(text encoders, denoiser); an encoder that is not trained is a module without layers of ours."""
    roots = toy(arch, seed=seed)
    denoiser = roots.pop(next(name for name in roots if not name.startswith("text_encoder")))
    return [roots.get(name or "", nn.Embedding(2, 2)) for name in ENCODERS[arch][1]], denoiser


def run(models: list[nn.Module]) -> Tensor:
    """One number that depends on every layer."""
    return sum((m(signal()).square().mean() for m in models if not isinstance(m, nn.Embedding)), torch.zeros(()))


@pytest.mark.sweep
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("arch", ENCODERS)
def test_train_save_resume_and_generate(arch: str, algo: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"networks.{ENCODERS[arch][0]}")
    encoders, denoiser = models(arch)
    network = module.create_network(1.0, 4, 1, None, encoders, denoiser, neuron_dropout=None, algo=algo, dropout=None)
    assert not hasattr(network, "weight_norms") and not hasattr(network, "update_norms")
    if arch in ("flux", "sd3", "chroma"):
        assert network.train_t5xxl is False
    with_encoders = any(row.part.startswith("text_encoder") for row in network.plan.trained)
    assert with_encoders == (arch not in ("hunyuan_image", "chroma"))
    network.apply_to(encoders, denoiser, with_encoders, True)
    network.enable_gradient_checkpointing()
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-2)
    assert len(groups) == len(descriptions)
    everything = [*encoders, denoiser]
    for model in everything:
        model.requires_grad_(False)
    network.prepare_grad_etc(encoders[0] if len(encoders) == 1 else encoders, denoiser)
    optimizer, losses = torch.optim.SGD(groups, lr=1e-2, momentum=0.9), []
    metadata = {"ss_network_module": f"networks.{ENCODERS[arch][0]}"}
    for step in range(3):
        network.on_epoch_start(None, denoiser)  # the encoders are dropped to save memory
        network.on_step_start(None, denoiser)
        loss = (run(everything) - 3).square()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        network.save_weights(str(tmp_path / f"{step}.safetensors"), torch.bfloat16 if step == 1 else None, metadata)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(key.startswith(("ss_", "sshs_")) for key in metadata)  # the host's own dict, used at every save
    network.set_multiplier(0.0)  # the base's prediction, for differential output preservation
    base = run(everything).detach()
    network.set_multiplier(1.0)
    wanted = run(everything).detach()
    assert not torch.allclose(wanted, base)
    file = str(tmp_path / "2.safetensors")
    network.detach()
    assert torch.equal(run(everything), base)

    for kwargs in ({"algo": algo}, {"algo": algo, "rank_dropout": "0.1", "loraplus_lr_ratio": "4"}):
        resumed, _ = module.create_network_from_weights(1, file, None, encoders, denoiser, **kwargs)
        resumed.apply_to(encoders, denoiser, with_encoders, True)
        assert not resumed.load_weights(file).missing
        torch.testing.assert_close(run(everything) if len(kwargs) == 1 else run_eval(resumed, everything), wanted)
        resumed.detach()
    other = module.create_network(1.0, 3, 1, None, encoders, denoiser, algo=algo)
    other.apply_to(encoders, denoiser, with_encoders, True)
    with pytest.raises(ValueError, match="(use|give) the dim .*--dim_from_weights"):
        other.load_weights(file)
    other.detach()

    tensors = load_file(file)
    applied, given = module.create_network_from_weights(1.0, None, None, encoders, denoiser, tensors, True)
    assert given is tensors
    applied.apply_to(encoders, denoiser)
    assert not any(applied.load_state_dict(tensors, strict=True))
    applied.eval()
    applied.to("cpu")
    torch.testing.assert_close(run(everything), wanted)
    applied.set_multiplier(0.0)
    assert torch.equal(run(everything), base)
    applied.detach()
    alone, _ = module.create_network_from_weights(1.0, None, None, None, models(arch)[1], tensors, True)
    assert {row.part for row in alone.plan.trained} == {alone.arch.denoiser.name}
    merged, _ = module.create_network_from_weights(1.0, None, None, encoders, denoiser, tensors, True)
    merged.merge_to(encoders, denoiser, tensors)
    torch.testing.assert_close(run(everything), wanted)


def test_steps_that_nobody_announces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LECO's scripts: the average follows each step of the optimizer once, however often the strength is set; noise
    that needs more calls is told, and layers are watched. Where steps are announced, setting is no step."""
    encoders, denoiser = models("flux")
    arguments = {"ema_decay": "0.5", "ggpo_sigma": "0.1", "ggpo_beta": "0.1"}
    network = networks.lora_flux.create_network(1.0, 4, 4, None, encoders, denoiser, **arguments)
    network.apply_to(encoders, denoiser, apply_text_encoder=False, apply_unet=True)
    network.set_multiplier(0.0)
    groups, _ = network.prepare_optimizer_params(None, 1e-2, 1e-2)
    optimizer = torch.optim.AdamW(groups)
    network.prepare_grad_etc(encoders, denoiser)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        for strength in (1.0, 0.0, 1.0):
            network.set_multiplier(strength)
        run([denoiser]).backward()
        optimizer.step()
        network.set_multiplier(0.0)
    assert network.average.steps == 3
    assert "ggpo_sigma and ggpo_beta have no effect" in caplog.text and "nor in LECO" in caplog.text
    assert network.diagnosis.steps == 3
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert network.average.is_saved
    network.on_step_start(encoders, denoiser)
    before = network.average.steps
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    network.set_multiplier(1.0)
    assert network.average.steps == before
    network.on_step_start(encoders, denoiser)
    assert network.average.steps == before + 1


def run_eval(network: nn.Module, everything: list[nn.Module]) -> Tensor:
    network.eval()
    return run(everything)


@pytest.mark.parametrize("sdxl", [False, True])
def test_base_weights_are_merged_before_training(sdxl: bool, tmp_path: Path) -> None:
    """The network which is trained on top of them has its own targets, not theirs."""
    unet = sdxl_unet() if sdxl else sd_unet()
    encoders: Any = [text_encoder(), text_encoder(projection=True)] if sdxl else text_encoder()
    first = networks.lora.create_network(1.0, 4, 2, None, encoders, unet, conv_dim="2")
    randomise(first)
    first.save_weights(tmp_path / "base.safetensors", torch.float32, {})
    targets = len(networks.lora.create_network(1.0, 4, 1, None, encoders, unet).adapted_layers)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    merging, tensors = networks.lora.create_network_from_weights(
        0.5, str(tmp_path / "base.safetensors"), None, encoders, unet, for_inference=True
    )
    merging.merge_to(encoders, unet, tensors, torch.float32, "cpu")
    for row, layer in first.layers:
        if row.part == "unet":
            name = f"{row.dotted_name}.weight"
            torch.testing.assert_close(unet.get_parameter(name), layer.new_weight(before[name], 0.5))
    assert len(networks.lora.create_network(1.0, 4, 1, None, encoders, unet).adapted_layers) == targets


def test_sdxl_minimal_inference(tmp_path: Path) -> None:
    unet, encoders = sdxl_unet(), [text_encoder(), text_encoder(projection=True)]
    network = networks.lora.create_network(1.0, 4, 2, None, encoders, unet)
    randomise(network)
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, torch.float32, None)
    before = copy.deepcopy(unet.state_dict())
    merging, tensors = networks.lora.create_network_from_weights(0.8, file, None, encoders, unet, None, True)
    merging.merge_to(encoders, unet, tensors, torch.float32, torch.device("cpu"))
    changed = [name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(network.unet_loras)


@pytest.mark.parametrize(
    "text", ["exclude_patterns=['.*attn1.*'];verbose=True", "verbose = yes; exclude_patterns = .*attn1.*"]
)
def test_options_survive_the_splitting_of_image_generation(text: str, tmp_path: Path) -> None:
    """One string for each network, cut at every ";" and "=": a second "=" in a pair stops the host itself."""
    networks.lora.create_network(1.0, 4, 1, None, None, sd_unet()).save_weights(tmp_path / "a.safetensors", None, None)
    pairs = [pair.split("=") for pair in text.split(";")]
    kwargs = {key: value for key, value in pairs}
    network, _ = networks.lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [None], sd_unet(), for_inference=True, **kwargs
    )
    assert network.adapted_layers and not any("attn1" in layer.lora_name for layer in network.adapted_layers)


@pytest.mark.parametrize("form", ["model", "list", "gaps", "none", "meta"])
def test_forms_of_the_text_encoders(form: str) -> None:
    """Meta: a trainer hands over encoders whose weights are gone, and goes on with stand-ins."""
    unet = sdxl_unet()
    pair = [text_encoder(), text_encoder(projection=True)]
    given: Any = {
        "model": pair[0],
        "list": pair,
        "gaps": [None, pair[1]],
        "none": None,
        "meta": [encoder.to("meta") for encoder in pair],
    }[form]
    network = networks.lora.create_network(1.0, 4, 1, None, given, unet)
    network.apply_to(given, unet, True, True)
    wanted = {"model": {1}, "list": {1, 2}, "gaps": {2}, "none": set(), "meta": {1, 2}}[form]
    assert {row.part for row, _ in network.layers} == {"unet", *(f"text_encoder{i}" for i in wanted)}
    network.prepare_optimizer_params_with_multiple_te_lrs([1e-3, 1e-3], 1e-3, 1e-3)
    assert not any(p.is_meta for p in network.parameters())


def test_text_encoder_only(tmp_path: Path) -> None:
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, rank_dropout="0.1")
    network.apply_to(encoder, unet, True, False)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    assert descriptions == ["text_encoder"]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in network.parameters()}
    randomise(network)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    assert all(key.startswith("lora_te_") for key in load_file(tmp_path / "a.safetensors"))
    assert networks.lora.create_network_from_weights(1, str(tmp_path / "a.safetensors"), None, encoder, unet)


@pytest.mark.parametrize(
    "rates", [(["1e-4"], 1e-3, 1e-3), ("1e-4", 1e-3, 1e-3), (None, "1e-3", 1e-3), (None, None, "x")]
)
def test_no_type_error_leaves_the_optimizer_call(rates: Any) -> None:
    """The host answers a TypeError with a second call without the default rate, and the reason is lost."""
    network = networks.lora.create_network(1.0, 4, 1, None, text_encoder(), sd_unet())
    for call in (network.prepare_optimizer_params_with_multiple_te_lrs, network.prepare_optimizer_params):
        with pytest.raises(ValueError, match="is no learning rate: write a number"):
            call(*rates)


def test_the_older_optimizer_call() -> None:
    network = networks.lora.create_network(1.0, 4, 1, None, text_encoder(), sd_unet())
    groups, descriptions = network.prepare_optimizer_params(1e-4, 1e-3)
    assert dict(zip(descriptions, [g["lr"] for g in groups], strict=True)) == {"text_encoder": 1e-4, "unet": 1e-3}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    """The network is wrapped although its forward is never called; the host averages the gradients by hand."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, network_reg_lrs=".*attn1.*=0")
    network.apply_to(None, unet, False, True)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-2)
    unet.requires_grad_(False)
    wrapped = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(groups)
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):
        draw(unet).square().mean().backward()
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(wrapped.module.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wrapped.module.apply_max_norm_regularization(10.0, "cpu")
    moved = {name for name, value in wrapped.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any("attn1" in name for name in moved)
    state = {name.removeprefix("module."): value for name, value in wrapped.state_dict().items()}
    again = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), network_reg_lrs=".*attn1.*=0")
    assert not any(again.load_state_dict(state))


def test_one_wrapper_for_all_models() -> None:
    """DeepSpeed takes a single module: the host puts models and network in a ModuleDict, and replaces each forward."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, [encoder], unet)
    network.apply_to([encoder], unet, True, True)
    randomise(network)
    wanted, own = autocast(draw)(unet).detach(), len(list(network.parameters()))
    base = len(list(unet.parameters())) + len(list(encoder.parameters()))
    children = {"unet": unet, "text_encoders": nn.ModuleList([encoder]), "network": network}
    for child in (unet, encoder, network):
        assert callable(child.forward)
        child.forward = autocast(child.forward)
    wrapper = nn.ModuleDict(children)
    assert len(list(wrapper.parameters())) == own + base  # nothing is shared, nothing is counted twice
    found = draw(unet)
    torch.testing.assert_close(found, wanted)
    found.square().mean().backward()
    assert all(p.grad is not None for layer in network.unet_loras for p in layer.parameters())


def autocast(forward: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    return call


@pytest.mark.parametrize("kwargs", [{}, {"algo": "loha"}, {"algo": "lokr"}, {"use_dora": "True"}], ids=str)
@pytest.mark.parametrize("arch", ["flux", "sd3"])
def test_block_swap(arch: str, kwargs: dict[str, str]) -> None:
    """Between calls the weights of a block lie elsewhere: here NaN stands for them, so that reading it would show."""
    denoiser = models(arch)[1].requires_grad_(False)
    network = networks.lora.create_network(1.0, 4, 2, None, None, denoiser, **kwargs)
    network.apply_to(None, denoiser, False, True)
    randomise(network)
    wanted = denoiser(signal()).detach()
    stored: dict[nn.Module, Tensor] = {}

    def fetch(module: nn.Module, args: Any) -> None:
        if module in stored:
            module.weight.data = stored.pop(module)

    def send(module: nn.Module, *args: Any) -> None:
        stored[module] = module.weight.data
        module.weight.data = torch.full_like(module.weight.data, float("nan"))

    for _, layer in network.layers:
        send(layer.base)
        layer.base.register_forward_pre_hook(fetch)
        layer.base.register_forward_hook(send)
    network.detach()
    network.apply_to(None, denoiser, False, True)  # and while they are away
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-2)
    optimizer = torch.optim.SGD(groups)
    for step in range(2):
        found = denoiser(signal())
        assert step or torch.equal(found.detach(), wanted)
        found.square().mean().backward() if not step else None
        optimizer.step()
        network.apply_max_norm_regularization(5.0, "cpu")
    assert len(stored) == len(network.layers) and not torch.equal(found.detach(), wanted)
    assert network.state_dict() and all(v.device.type == "cpu" for v in network.state_dict().values())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("compiled_first", [True, False])
def test_compile(compiled_first: bool, tmp_path: Path) -> None:
    """One graph for the whole model, names without `_orig_mod`, and the host's unwrapped model is adapted, too."""
    torch._dynamo.reset()  # its limit of recompilations is shared by all models of a class
    denoiser = toy("flux", blocks=1)["dit"].requires_grad_(False)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    given = compiled if compiled_first else denoiser
    kwargs = {"only_patterns": ".*attn.*", "rank_dropout": "0.1", "module_dropout": "0.1"}
    network = networks.lora_flux.create_network(1.0, 4, 2, None, None, given, **kwargs)
    network.apply_to(None, given, False, True)
    randomise(network)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "a.safetensors"))
    network.train()
    torch.manual_seed(0)
    trained = compiled(signal())
    trained.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():  # a sample image
        wanted = denoiser(signal())
        torch.testing.assert_close(compiled(signal()), wanted)
    assert not torch.allclose(trained, wanted)
    network.detach()
    assert not torch.allclose(denoiser(signal()), wanted)


def test_blocks_compiled_one_by_one() -> None:
    unet = sd_unet()
    wanted = {row.saved_name for row in networks.lora.create_network(1.0, 4, 2, None, None, unet).plan.trained}
    for i, block in enumerate(unet.down_blocks):
        unet.down_blocks[i] = torch.compile(block, backend="eager")
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet)
    assert {row.saved_name for row in network.plan.trained} == wanted


def test_samples_are_drawn_in_train_mode_under_autocast() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, rank_dropout="0.5", module_dropout="0.3")
    network.apply_to(None, unet, False, True)
    randomise(network)
    network.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = unet(*inputs()).sample, unet(*inputs()).sample
    assert torch.equal(first, second)


def test_full_half_precision() -> None:
    """--full_bf16: the host casts the network, then the base; the saved strength does not move."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 3, 1, None, None, unet)
    network.apply_to(None, unet, False, True)
    network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    network.to(torch.bfloat16)
    unet.to(torch.bfloat16)
    x, t, text = inputs()
    out = unet(x.bfloat16(), t, text.bfloat16()).sample
    out.square().mean().backward()
    assert out.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in network.parameters())
    assert {layer.scale for layer in network.adapted_layers} == {1 / 3}


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin"])
def test_pickled_files_are_refused(name: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / name)
    network = networks.lora.create_network(1.0, 3, 1, None, None, sd_unet())
    for call in (
        lambda: network.load_weights(str(tmp_path / name)),
        lambda: networks.lora.create_network_from_weights(1.0, str(tmp_path / name), None, None, sd_unet()),
    ):
        with pytest.raises(ValueError, match="can run code when opened; convert it to safetensors"):
            call()


def test_a_partly_matching_file_is_told_apart_by_part_and_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of the UNet's attention, for a network of both parts; and more in the file than the network has."""
    unet, encoder = sd_unet(), text_encoder()
    small = networks.lora.create_network(1.0, 2, 1, None, None, unet, only_patterns=".*attn1.*")
    small.save_weights(tmp_path / "small.safetensors", None, None)
    large = networks.lora.create_network(1.0, 2, 1, None, encoder, unet)
    large.save_weights(tmp_path / "large.safetensors", None, None)
    with caplog.at_level(logging.WARNING, logger="networks"):
        large.load_weights(str(tmp_path / "small.safetensors"))
    encoders, rest = len(large.text_encoder_loras), len(large.unet_loras) - len(small.unet_loras)
    assert f"{encoders + rest} layers of this network are not in it ({encoders} lora_te: " in caplog.text
    assert "2 mlp_fc1" in caplog.text and f"; {rest} lora_unet: " in caplog.text and "attn2_to_q" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="networks"):
        report = str(small.load_weights(str(tmp_path / "large.safetensors")))
    assert "large.safetensors" not in caplog.text
    assert f"{encoders} of its layers are for models that are not here ({encoders} of lora_te)" in report
    assert f"{rest} of its layers are left out by the arguments" in report
