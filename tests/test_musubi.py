"""The calls of musubi-tuner and its forks, in their order and with their arguments, on stand-ins of their models."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import randomise, sd_unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_models import signal, toy

import networks.loha
import networks.lokr
import networks.lora

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {"lora": networks.lora, "loha": networks.loha, "lokr": networks.lokr}
MODEL = "flux"


def split_by_the_trainer(network_args: list[str]) -> dict[str, str]:
    """What these trainers make of --network_args: exactly one `=` each, twice."""
    kwargs = {}
    for argument in network_args:
        key, value = argument.split("=")
        kwargs[key] = value
    return kwargs


def dit(seed: int = 0) -> nn.Module:
    return toy(MODEL, seed=seed)["dit"].eval().requires_grad_(False)


def create(model: nn.Module, *network_args: str, algo: str = "lora", dim: int = 4, alpha: float = 1) -> Any:
    """The trainer's call; network_alpha is an int unless it was given."""
    kwargs = split_by_the_trainer(list(network_args))
    return ENTRIES[algo].create_arch_network(1.0, dim, alpha, None, None, model, neuron_dropout=None, **kwargs)


def attached(model: nn.Module, *network_args: str, **kwargs: Any) -> Any:
    network = create(model, *network_args, **kwargs)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return network


def entries() -> Iterator[str]:
    for file in sorted((ROOT / "networks").glob("[!_]*.py")):
        if "Entry(" in file.read_text(encoding="utf-8"):
            yield file.stem


@pytest.mark.parametrize("name", entries())
def test_every_entry_offers_the_functions_of_both_hosts(name: str) -> None:
    module = importlib.import_module(f"networks.{name}")
    for function in (
        "create_network",
        "create_network_from_weights",
        "create_arch_network",
        "create_arch_network_from_weights",
        "prepare_network",
        "plan",
    ):
        assert getattr(module, function).__name__ == function
        assert getattr(module, function).__self__.name == f"networks.{name}"


@pytest.mark.parametrize("algo", ENTRIES)
def test_training_sequence(algo: str, tmp_path: Path) -> None:
    """Section by section what the trainer does, with a resume from a file; the loss falls."""
    model = dit()
    base = model(signal())
    network = attached(model, algo=algo)
    assert type(network) is not nn.Module and isinstance(network, nn.Module)
    network.enable_gradient_checkpointing()
    result = network.prepare_optimizer_params(unet_lr=2e-3)
    assert type(result) is tuple
    groups, descriptions = result
    assert descriptions == ["dit"] and [g["lr"] for g in groups] == [2e-3]
    network.prepare_grad_etc(model)
    network.on_epoch_start(model)
    assert network.training
    optimizer = torch.optim.AdamW(groups)
    target, losses = model(signal()).detach() + 0.3, []
    for _ in range(6):
        network.on_step_start()
        loss = (model(signal()) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scaled, mean, largest = network.apply_max_norm_regularization(50.0, torch.device("cpu"))
        assert scaled == 0 and 0 <= mean <= largest < 50
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert not any(p.requires_grad for p in model.parameters())

    wanted = model(signal()).detach()
    metadata = {"ss_network_dim": "4"}  # the host keeps using this dict
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), torch.float32, metadata)
    assert metadata == {"ss_network_dim": "4"}
    network.set_enabled(False)
    assert torch.equal(model(signal()), base) and network.training
    network.set_enabled(True)
    network.detach()

    again = attached(model, algo=algo)
    assert "layers loaded" in str(again.load_weights(str(file)))
    torch.testing.assert_close(model(signal()), wanted)


def test_a_fork_sends_a_text_encoder_rate() -> None:
    network = attached(dit())
    groups, _ = network.prepare_optimizer_params(text_encoder_lr=0, unet_lr=1e-3)
    assert [g["lr"] for g in groups] == [1e-3]
    with pytest.raises(ValueError, match="every learning rate is 0"):
        network.prepare_optimizer_params(unet_lr=0.0)


@pytest.mark.parametrize("algo", ENTRIES)
@pytest.mark.parametrize("call", ["training", "inference"])
def test_base_weights_are_merged(algo: str, call: str, tmp_path: Path) -> None:
    model = dit()
    network = attached(model, algo=algo, alpha=3)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    network.set_multiplier(0.7)
    applied = model(signal()).detach()
    network.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    module = ENTRIES[algo].create_arch_network_from_weights(0.7, tensors, unet=model, for_inference=True)
    if call == "training":
        module.merge_to(None, model, tensors, torch.float32, "cpu")
    else:
        module.merge_to(None, model, tensors, device=torch.device("cpu"), non_blocking=True)
    torch.testing.assert_close(model(signal()), applied)


def test_what_a_trainer_adds_to_the_arguments_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A branch and a fork name the architecture in each call, and hand over network_args with a file, too, for base
    weights as for dims; LoKr's factor they read from the metadata."""
    model, module = dit(), networks.lokr
    words: dict[str, Any] = split_by_the_trainer(["rank_dropout=0.1", "loraplus_lr_ratio=4"])
    with caplog.at_level(logging.INFO, logger="networks"):
        network = module.create_arch_network(
            1.0, 4, 1, None, None, model, neuron_dropout=None, architecture="fk", **words
        )
    assert "architecture=fk is not looked at: the model's class decides" in caplog.text
    assert {row.plus_ratio for row, _ in network.layers} == {4}
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    randomise(network)
    network.eval()
    wanted = model(signal()).detach()
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    network.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    words |= {"architecture": "fk", "metadata_factor": 8}
    again = module.create_arch_network_from_weights(1, tensors, unet=model, **words)
    again.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    again.load_weights(str(tmp_path / "a.safetensors"))
    again.eval()
    torch.testing.assert_close(model(signal()), wanted)
    again.detach()
    merging = module.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True, **words)
    merging.merge_to(None, model, tensors, torch.bfloat16, "cpu")
    torch.testing.assert_close(model(signal()), wanted)
    with pytest.raises(ValueError, match="no argument is called architektur"):
        create(model, "architektur=fk")


def test_a_teacher_without_the_network_within_a_step() -> None:
    """MiniMax-H3: through the wrapper, without gradients, before the pass that learns; then gradients are measured."""
    model = dit()
    base = model(signal())
    network = attached(model, "rank_dropout=0.2")
    randomise(network)
    network.on_epoch_start(model)
    unwrapped = nn.DataParallel(network).module
    assert hasattr(unwrapped, "set_enabled")
    network.on_step_start()
    unwrapped.set_enabled(False)
    try:
        with torch.no_grad():
            teacher = model(signal())
    finally:
        unwrapped.set_enabled(True)
    assert torch.equal(teacher, base)
    (model(signal()) - teacher).square().mean().backward()
    measured = [p.grad.detach() for p in network.parameters() if p.grad is not None]
    assert len(measured) == len(list(network.parameters()))
    assert float(torch.stack([g.norm() for g in measured]).norm()) > 0


def test_branches_of_a_generator(tmp_path: Path) -> None:
    """Files as further branches beside a quantised model: attached twice, loaded strictly, cast and moved as one."""
    model = dit()
    network = attached(model)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.bfloat16, {})
    network.detach()
    base, file = model(signal()), load_file(tmp_path / "a.safetensors")
    branches = []
    for strength in (0.7, -0.7):
        one = networks.lora.create_arch_network_from_weights(strength, file, unet=model, for_inference=True)
        assert one.unet_loras
        one.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        one.load_state_dict(file, strict=True)
        one.eval().requires_grad_(False).to(torch.device("cpu"))
        branches.append(one)
        assert torch.allclose(model(signal()), base, rtol=1e-4, atol=1e-4) == (len(branches) == 2)
    assert not any(p.requires_grad for one in branches for p in one.parameters())


def test_files_hold_what_these_readers_want(tmp_path: Path) -> None:
    """Floating 0-d alpha although network_alpha is the int 1, whole lokr_w1, no further keys."""
    wanted = {
        "lora": {"lora_down.weight", "lora_up.weight", "alpha"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
    }
    for algo, suffixes in wanted.items():
        file = tmp_path / f"{algo}.safetensors"
        create(dit(), algo=algo, dim=1).save_weights(str(file), torch.bfloat16, {"ss_network_dim": "1"})
        tensors = load_file(file)
        assert {key.partition(".")[2] for key in tensors} <= suffixes and all("." in key for key in tensors)
        assert {key.partition(".")[2] for key in tensors} >= suffixes - {"lokr_w2"}
        alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
        assert all(alpha.is_floating_point() and alpha.shape == () and alpha == 1 for alpha in alphas)


def test_conv_defaults_follow_the_host() -> None:
    """conv_dim and conv_alpha: off and 1 in sd-scripts, network_dim and network_alpha here."""
    unet = sd_unet()
    theirs = {row.saved_name: row for row in networks.lora.plan(8, 2, None, unet).trained}
    here = {row.saved_name: row for row in networks.lora.plan(8, 2, None, unet, host="musubi").trained}
    kernels = [row for row in here.values() if row.geometry.has_kernel]
    assert kernels and not any(row.saved_name in theirs for row in kernels)
    assert {(row.dim, row.alpha) for row in here.values()} == {(8, 2.0)}
    assert len(create(unet, dim=8, alpha=2).layers) == len(here)
    assert len(create(unet, "conv_dim=0", dim=8, alpha=2).layers) == len(theirs)
    given = networks.lora.plan(8, 2, None, unet, host="musubi", conv_dim="4", conv_alpha="3").trained
    assert {(row.dim, row.alpha) for row in given if row.geometry.has_kernel} == {(4, 3.0)}
    half = networks.lora.plan(8, 2, None, unet, host="musubi", conv_alpha="3").trained
    assert {(row.dim, row.alpha) for row in half if row.geometry.has_kernel} == {(8, 3.0)}


def test_a_model_without_convolutions_does_not_mind(caplog: pytest.LogCaptureFixture) -> None:
    assert create(dit()).layers
    with caplog.at_level(logging.WARNING, logger="networks"):
        assert create(dit(), "conv_dim=4").layers
    assert "networks.lora: without effect here, so not used: conv_dim (no trained layer is in" in caplog.text


# -- values with "=", and how they get through


DIMS = [
    ("network_reg_dims={'.*img_attn.*': 2, '.*txt_mlp.*': 3}", None),
    ('network_reg_dims={".*img_attn.*": 2, ".*txt_mlp.*": 3}', None),
    ("network_reg_dims=@{}", ("dims.toml", "'.*img_attn.*' = 2\n'.*txt_mlp.*' = 3\n")),
    ("network_reg_dims=@{}", ("dims.json", '{".*img_attn.*": 2, ".*txt_mlp.*": 3}')),
    ("network_reg_dims=@{}", ("dims.txt", "# kind=dim\n.*img_attn.*=2\n.*txt_mlp.*=3\n")),
]


@pytest.mark.parametrize("argument,file", DIMS, ids=["python", "json", "toml file", "json file", "lines"])
def test_dims_by_expression_without_a_second_equals_sign(
    argument: str, file: tuple[str, str] | None, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / file[0]).write_text(file[1], encoding="utf-8")
        argument = argument.format(tmp_path / file[0])
    dims = {row.dotted_name: row.dim for row in create(dit(), argument).plan.trained}
    assert {dim for name, dim in dims.items() if "img_attn" in name} == {2}
    assert {dim for name, dim in dims.items() if "txt_mlp" in name} == {3}
    assert {dim for name, dim in dims.items() if "img_attn" not in name and "txt_mlp" not in name} == {4}


def test_the_spelling_of_the_other_host_does_not_survive_here() -> None:
    with pytest.raises(ValueError, match="too many values"):
        create(dit(), "network_reg_dims=.*img_attn.*=2")


@pytest.mark.parametrize("name", ["network_reg_alphas", "network_reg_lrs"])
def test_numbers_by_expression(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("'.*img_attn.*' = 0.5\n", encoding="utf-8")
    for value in ("{'.*img_attn.*': 0.5}", '{".*img_attn.*": 5e-1}', f"@{tmp_path / 'x.toml'}"):
        rows = create(dit(), f"{name}={value}").plan.trained
        got = {row.lr if name.endswith("lrs") else row.alpha for row in rows if "img_attn" in row.dotted_name}
        assert got == {0.5}


@pytest.mark.parametrize("name", ["exclude_patterns", "only_patterns"])
def test_an_equals_sign_inside_an_expression(name: str, tmp_path: Path) -> None:
    """A look-ahead, `(?=`: by the escape of Python or JSON, or from a file."""
    wanted = {
        row.dotted_name for row in create(dit()).plan.trained if ("img_attn" in row.dotted_name) == (name[0] == "o")
    }
    (tmp_path / "x.txt").write_text(r".*(?=img_attn).*" + "\n", encoding="utf-8")
    for value in (r"['.*(?\x3dimg_attn).*']", r'[".*(?\u003dimg_attn).*"]', f"@{tmp_path / 'x.txt'}"):
        assert {row.dotted_name for row in create(dit(), f"{name}={value}").plan.trained} == wanted


# -- what these trainers do to a model that has adapters


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


VARIANTS = {"lora": [], "loha": ["algo=loha"], "lokr": ["algo=lokr"], "dora": ["use_dora=True"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_swap(variant: str) -> None:
    """Weights are where they belong only while their layer runs: outside, the storage is another one."""
    model = dit()
    network = attached(model, *VARIANTS[variant])
    randomise(network)
    wanted = model(signal())
    wanted.square().mean().backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    stored = {module: module.weight.data for module in linears(model)}
    for module, weight in stored.items():
        module.weight.data = torch.full_like(weight, torch.nan)

    def swapping(layer: nn.Linear) -> Any:
        inner = layer.forward  # ours

        def bring() -> None:
            layer.weight.data = stored[layer].clone()

        def forward(x: Tensor) -> Tensor:
            bring()
            y = inner(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: bring())  # the backward wants it, too
            layer.weight.data = torch.full_like(stored[layer], torch.nan)
            return y

        return forward

    for layer in linears(model):
        layer.forward = swapping(layer)
    again = model(signal())
    torch.testing.assert_close(again, wanted)
    again.square().mean().backward()
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def to_scaled_fp8(model: nn.Module) -> nn.Module:
    """What --fp8_scaled does before a network exists: the class stays, a scale per row, a forward of the instance."""
    for layer in linears(model):
        scale = layer.weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        layer.weight = nn.Parameter((layer.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.register_buffer("scale_weight", scale)

        def forward(x: Tensor, layer: nn.Linear = layer) -> Tensor:
            return nn.functional.linear(x, layer.weight.to(layer.scale_weight.dtype) * layer.scale_weight, layer.bias)

        layer.forward = forward
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_fp8(variant: str, tmp_path: Path) -> None:
    """The network is that of the dequantised model, in outputs and gradients; its file merges into fp8 (how exactly:
    test_base_weight.py)."""
    low, dense = to_scaled_fp8(dit()), dit()
    for quantised, layer in zip(linears(low), linears(dense), strict=True):
        layer.weight = nn.Parameter(quantised.weight.float() * quantised.scale_weight, requires_grad=False)
    outputs, gradients = [], []
    for model in (low, dense):
        network = attached(model, *VARIANTS[variant])
        randomise(network)
        outputs.append(model(signal()))
        outputs[-1].square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
        network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {"ss_network_dim": "4"})
        network.detach()
    torch.testing.assert_close(outputs[0], outputs[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    tensors = load_file(tmp_path / "a.safetensors")
    module = networks.lora.create_arch_network_from_weights(1.0, tensors, unet=low, for_inference=True)
    before = [layer.base.weight.float() * layer.base.scale_weight for layer in module.adapted_layers]
    module.merge_to(None, low, tensors, torch.bfloat16, "cpu")
    after = [layer.base.weight.float() * layer.base.scale_weight for layer in module.adapted_layers]
    assert all(layer.weight.dtype == torch.float8_e4m3fn for layer in linears(low))
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("algo", ENTRIES)
def test_an_expert_is_swapped_in(algo: str) -> None:
    """Wan 2.2: the whole state of the other expert, loaded strictly and by assignment."""
    model, other = dit(), dit(seed=1)
    keys = set(model.state_dict())
    network = attached(model, algo=algo)
    randomise(network)
    assert set(model.state_dict()) == keys
    states = [{key: t.clone() for key, t in m.state_dict().items()} for m in (model, other)]
    file = {key: t.clone() for key, t in network.state_dict().items()}
    first = model(signal())
    model.load_state_dict(states[1], strict=True, assign=True)
    second = model(signal())
    assert not torch.allclose(first, second)
    plain = attached(other, algo=algo)
    plain.load_state_dict(file)
    torch.testing.assert_close(other(signal()), second)
    model.load_state_dict(states[0], strict=True, assign=True)
    assert torch.equal(model(signal()), first)


@pytest.mark.parametrize("way", ["copied", "data"])
def test_weights_are_overwritten_while_sampling(way: str) -> None:
    """Krea 2 with a turbo model: every named parameter and buffer, in place or by its data."""
    model, turbo = dit(), dit(seed=1)
    network = attached(model)
    randomise(network)
    other = attached(turbo)
    other.load_state_dict(network.state_dict())
    wanted = turbo(signal())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    first = model(signal())
    for weights, output in ((dict(turbo.named_parameters()), wanted), (kept, first)):
        for name, tensor in tensors.items():
            if way == "copied":
                with torch.no_grad():
                    tensor.copy_(weights[name])
            else:
                tensor.data = weights[name].detach().clone()
        torch.testing.assert_close(model(signal()), output)


def test_blocks_compiled_before_the_network_exists() -> None:
    """Kandinsky 5: an OptimizedModule around each block does not show in names, and both run the same."""
    plain = create(dit())
    model = dit()
    for name in ("double_blocks", "single_blocks"):
        blocks = model.get_submodule(name)
        for number, block in list(blocks.named_children()):
            setattr(blocks, number, torch.compile(block, backend="eager"))
    network = attached(model)
    assert [row.saved_name for row in network.plan.trained] == [row.saved_name for row in plain.plan.trained]
    assert not any("_orig_mod" in key for key in network.state_dict())


def test_a_compiled_layer_runs_without_a_graph_break() -> None:
    """These trainers compile each block, whole, after the network is attached."""
    model = dit()
    network = attached(model)
    randomise(network)
    layer = linears(model)[3]
    x = torch.randn(2, 3, layer.in_features)
    wanted = layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_off(variant: str) -> None:
    """Ideogram 4's default: a bf16 model, adapters in fp32, no autocast."""
    model = dit().to(torch.bfloat16)
    network = attached(model, *VARIANTS[variant])
    randomise(network)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    x = signal().to(torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    torch.testing.assert_close(inside.float(), out.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_without_reentry(variant: str) -> None:
    model = dit()
    network = attached(model, *VARIANTS[variant])
    randomise(network)
    gradients = []
    for run in (lambda x: model(x), lambda x: checkpoint(model, x, use_reentrant=False)):
        network.zero_grad()
        run(signal()).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_only_the_network_is_kept_in_a_state() -> None:
    """The hooks of save and resume keep what is an instance of the network's own class."""
    model = dit()
    network = attached(model)
    assert [m for m in (model, network) if isinstance(m, type(network))] == [network]


def test_samples_are_drawn_in_train_mode_without_dropout() -> None:
    model = dit()
    network = attached(model, "rank_dropout=0.5", "module_dropout=0.5")
    randomise(network)
    network.on_epoch_start(model)
    with torch.no_grad():
        first, second = model(signal()), model(signal())
    assert torch.equal(first, second)
    assert not torch.equal(model(signal()), model(signal()))


# -- the trainer's own options


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"optimizer_type": "AdamW8bit", "dit_high_noise": None, **given})


def test_dora_is_refused_with_two_experts() -> None:
    """Its magnitudes belong to the weights of one of them."""
    network = create(dit(), "use_dora=True")
    networks.lora.prepare_network(network, options())
    with pytest.raises(ValueError, match="use_dora does not go with two experts"):
        network.prepare_network(options(dit_high_noise="high.safetensors"))
    create(dit()).prepare_network(options(dit_high_noise="high.safetensors"))
    create(dit()).prepare_network(argparse.Namespace())


@pytest.mark.parametrize(
    "arguments,given,warning",
    [
        (["loraplus_lr_ratio=8"], {"optimizer_type": "prodigyopt.Prodigy"}, "loraplus_mode=reparam does LoRA"),
        (["network_reg_lrs={'.*img_mlp.*': 1}"], {"optimizer_type": "DAdaptAdam"}, "expects one learning rate"),
        (["use_dora=True", "dora_lr_ratio=0.5"], {"optimizer_type": "Prodigy"}, "expects one learning rate"),
        (["loraplus_lr_ratio=8", "loraplus_mode=reparam"], {"optimizer_type": "Prodigy"}, ""),
        (["loraplus_lr_ratio=8", "loraplus_mode=reparam"], {"optimizer_type": "SGDNesterov"}, "square of the ratio"),
        (["loraplus_lr_ratio=8"], {"optimizer_type": "AdamW"}, ""),
        (["use_dora=True"], {"turbo_dit": "turbo.safetensors"}, "other base weights"),
        ([], {"turbo_dit": "turbo.safetensors"}, ""),
    ],
)
def test_options_that_are_seldom_meant(
    arguments: list[str], given: dict[str, str], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = create(dit(), *arguments)
    caplog.clear()
    network.prepare_network(options(**given))
    assert warning in caplog.text if warning else not caplog.text
