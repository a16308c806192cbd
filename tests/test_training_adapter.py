"""`training_adapter`: in training the base, the adapters and the trained network add up; elsewhere there is none."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import (
    DIM,
    FOR_LINEARS,
    Case,
    Zoo,
    assert_close,
    dense_bias,
    dense_update,
    layers_of,
    learn_lengths,
    make_input,
    make_network,
    options_for,
    randomise,
)
from registry import data_of
from safetensors.torch import load_file, save_file
from tiny_denoisers import MODELS
from tiny_parts import inputs, sd_unet, text_encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_models import signal, toy

import networks.lora
from networks import api
from networks.args.coerce import coerce
from networks.args.table import BY_NAME
from networks.files.adapter_file import FileTensors
from networks.files.explain import explain
from networks.hosts.file_arguments import arguments_of
from networks.network.network import Network
from networks.network.training_adapters import KEY, TrainingAdapter
from networks.plan.plan import Plan

STRENGTH = 0.5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# -- the formula, on single layers in float64


def made(zoo: nn.Module, algo: str, dora: str = "", multiplier: float = 0.7) -> Network:
    """A network of random values on every layer of the zoo."""
    found = make_network(Case(algo, options_for(algo, {}), max(DIM, data_of(algo).least_dim)), zoo, multiplier)
    if dora:
        plan = Plan("Zoo", tuple(replace(row, dora=dora) for row in found.plan.rows))
        modules = {row.saved_name: zoo.get_submodule(row.dotted_name) for row in plan.rows}
        found = Network(plan, modules, {"unet": zoo}, multiplier=multiplier).double()
    randomise(found)
    for layer in found.adapted_layers if dora else ():
        learn_lengths(layer)
    return found


def beside(*networks: Network) -> list[TrainingAdapter]:
    return [TrainingAdapter(one.requires_grad_(False), "a", 1.0, "", "unet") for one in networks]


def change(layer: Any, multiplier: float) -> Tensor:
    """multiplier * (W' - W) on the bare base weight, differentiable, with DoRA by its formula."""
    W = layer.base.weight
    assert torch.equal(layer.whole_weight(), W), "what a layer stands on is the bare base weight"
    if not layer.side:
        return dense_update(layer, multiplier)
    V = W + dense_update(layer, 1.0)
    axes = [i for i in range(V.dim()) if i != (0 if layer.side == "output" else 1)]
    return multiplier * (V * layer.magnitude / torch.linalg.vector_norm(V.detach(), dim=axes, keepdim=True) - W)


PAIRS = [
    *((algo, "", "lora", "") for algo in FOR_LINEARS),
    *(("lora", "", algo, "") for algo in FOR_LINEARS),
    *(("lokr", side, algo, dora) for side in ("output", "input") for algo, dora in (("lora", ""), ("loha", "input"))),
    *(("diag-oft", "", algo, dora) for algo, dora in (("boft", ""), ("lora", "output"))),
    ("norm", "", "norm", ""),
]


@pytest.mark.parametrize(("algo", "dora", "lower", "lower_dora"), PAIRS)
def test_changes_of_the_base_layer_add_up(algo: str, dora: str, lower: str, lower_dora: str) -> None:
    """Outputs and gradients in training; in samples the trained network alone, bit for bit."""
    zoo = Zoo(("layer_norm",) if algo == "norm" else ("linear", "conv_3x3"))
    trained, frozen = made(zoo, algo, dora), made(zoo, lower, lower_dora, STRENGTH)
    trained.accompany(beside(frozen))
    bare = {kind: copy.deepcopy(layer) for kind, layer in zoo.named_children()}
    given = {kind: make_input(kind).requires_grad_() for kind in bare}
    trained.attach()
    outputs = zoo(given)
    seen = [*given.values(), *(p for p in trained.parameters() if p.requires_grad)]
    found = torch.autograd.grad(sum(y.sin().sum() for y in outputs.values()), seen, allow_unused=True)
    wanted = {}
    for kind, layer in bare.items():
        upper, under = layers_of(trained)[kind], layers_of(frozen)[kind]
        W = layer.weight + change(upper, 0.7) + change(under, STRENGTH)
        b, base = layer.bias, layer.bias
        for one, m in ((upper, 0.7), (under, STRENGTH)):
            b = b + dense_bias(one, m) - base
        wanted[kind] = torch.func.functional_call(layer, {"weight": W, "bias": b}, (given[kind],))
        assert_close(outputs[kind], wanted[kind], kind)
    exact = torch.autograd.grad(sum(y.sin().sum() for y in wanted.values()), seen, allow_unused=True)
    for one, other in zip(found, exact, strict=True):
        if one is not None and other is not None and bool(other.any()):
            assert_close(one, other, "gradient", 1e-8)
    with torch.no_grad():
        sampled = zoo(given)
    trained.detach()
    trained.accompany(())
    trained.attach()
    with torch.no_grad():
        alone = zoo(given)
    for kind, y in alone.items():
        assert_close(sampled[kind], y, kind)  # by one function for base and update, or by two passes
        assert (y - outputs[kind]).abs().max() > 1e-3 * y.abs().max(), kind


# -- the trainers' calls, on a UNet

FEW = {"only_patterns": ".*attn1.*"}
SHOWN = "training adapter a.safetensors at strength 0.5: 16 layers, 9.8 KiB, in training, not in samples and files"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters a and b of the tiny UNet, and one for FLUX.1."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate("ab"):
        network, _ = unet_network(only_patterns=".*attn.*to_[qv]")
        torch.manual_seed(number)
        for p in network.parameters():
            p.data.normal_(std=0.2)
        network.save_weights(str(folder / f"{name}.safetensors"), None, {})
    model = toy("flux")["dit"]
    api.apply(model, blocks="0").save(folder / "flux.safetensors")
    return folder


def unet_network(encoder: nn.Module | None = None, **kwargs: Any) -> tuple[Any, nn.Module]:
    """Attached as sd-scripts does it."""
    unet = sd_unet().requires_grad_(False)
    torch.manual_seed(0)
    network = networks.lora.create_network(1.0, 4, 2, None, encoder, unet, **kwargs)
    network.apply_to(encoder, unet, encoder is not None, True)
    return network, unet


def shown(unet: nn.Module) -> Tensor:
    return unet(*inputs()).sample


@torch.no_grad()
def drawn(unet: nn.Module) -> Tensor:
    return shown(unet)


@pytest.mark.parametrize("more", [{"use_dora": "True"}, {"algo": "diag-oft"}, {"init": "pissa"}], ids=str)
def test_samples_are_those_without_it(more: Mapping[str, str], files: Path) -> None:
    """Also at the start, bit for bit; validation has it, and so has a teacher, for which the network is off."""
    network, unet = unet_network(training_adapter=f"{files / 'a.safetensors'}=0.5", **FEW, **more)
    _, bare = unet_network(**FEW, **more)
    _, alone = unet_network(training_adapter=f"{files / 'a.safetensors'}=0.5", **FEW)
    assert torch.equal(drawn(unet), drawn(bare))
    assert_close(shown(unet), shown(alone), "training starts from the base and the adapter", 1e-5)
    assert float((shown(unet) - shown(bare)).detach().abs().max()) > 0.01
    wanted = shown(unet).detach()
    network.eval()
    assert torch.equal(drawn(unet), wanted), "validation"
    network.train()
    assert torch.equal(drawn(unet), drawn(bare)), "samples"
    network.set_multiplier(0.0)
    assert_close(drawn(unet), shown(alone), "a teacher at multiplier 0", 1e-5)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert_close(drawn(unet), shown(alone), "a teacher's pass without the network", 1e-5)


def test_what_is_saved_and_trained_has_nothing_of_it(files: Path, tmp_path: Path) -> None:
    network, _ = unet_network(training_adapter=f"{files / 'a.safetensors'}=0.5", **FEW)
    plain, _ = unet_network(**FEW)
    for own, other in (
        (network.state_dict(), plain.state_dict()),
        (dict(network.named_parameters()), dict(plain.named_parameters())),
        (dict(network.named_modules()), dict(plain.named_modules())),
    ):
        assert list(own) == list(other)
    rates = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-3, 1e-3)[0]
    assert sum(len(group["params"]) for group in rates) == len([*plain.parameters()])
    given = {"ss_network_args": json.dumps({"training_adapter": str(files / "a.safetensors"), "dropout": "0.1"})}
    network.save_weights(str(tmp_path / "with.safetensors"), None, given)
    plain.save_weights(str(tmp_path / "plain.safetensors"), None, given)
    saved, told = load_file(tmp_path / "with.safetensors"), explain(tmp_path / "with.safetensors")
    bare = load_file(tmp_path / "plain.safetensors")
    assert saved.keys() == bare.keys() and all(torch.equal(saved[key], one) for key, one in bare.items())
    digest = hashlib.sha256((files / "a.safetensors").read_bytes()).hexdigest()
    assert json.loads(told["metadata"][KEY]) == [{"file": "a.safetensors", "strength": 0.5, "sha256": digest}]
    arguments = {"training_adapter": "a.safetensors:0.5", "dropout": "0.1"}
    assert json.loads(told["metadata"]["ss_network_args"]) == arguments
    again = arguments_of(FileTensors(tmp_path / "with.safetensors"), None, sd_unet(), "sd_scripts").line
    assert arguments.items() <= again.args.items(), "--as_args"
    assert "a.safetensors" in told["origin"]["trained beside"] and str(files) not in str(told["metadata"])


@pytest.mark.parametrize("reentrant", (True, False))
def test_recomputation_has_it(reentrant: bool, files: Path) -> None:
    """Whichever checkpointing, and although a sample is drawn between the passes."""
    network, unet = unet_network(training_adapter=str(files / "a.safetensors"), use_dora="True", **FEW)
    unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
    unet.train()
    latents, times, text = inputs()
    output = unet(latents.requires_grad_(), times, text).sample
    drawn(unet)
    output.square().sum().backward()
    found = [p.grad for p in network.parameters()]
    reference, plain = unet_network(training_adapter=str(files / "a.safetensors"), use_dora="True", **FEW)
    shown(plain).square().sum().backward()
    for one, other in zip(found, reference.parameters(), strict=True):
        assert torch.allclose(one, other.grad, rtol=1e-4, atol=1e-5)


def test_compiled_in_one_graph() -> None:
    """The whole model with its hooks, in training and in samples."""
    zoo = Zoo(("linear",))
    trained, frozen = made(zoo, "lora", "output"), made(zoo, "lokr", "", STRENGTH)
    trained.accompany(beside(frozen))
    trained.attach()
    given = {"linear": make_input("linear")}
    call = torch.compile(zoo, backend="eager", fullgraph=True)
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            assert_close(call(given)["linear"], zoo(given)["linear"], f"{grad}", 1e-12)
    torch._dynamo.reset()


def steps(network: Any, unet: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        shown(unet).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_is_bit_equal(files: Path) -> None:
    arguments = {"training_adapter": f"{files / 'a.safetensors'}:0.5", "use_dora": "True", **FEW}
    runs = []
    for parts in ((2,), (1, 1)):
        state: Any = None
        for count in parts:
            network, unet = unet_network(**arguments)
            optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
            if state is not None:
                network.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            steps(network, unet, optimizer, count)
            state = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
        runs.append(state[0])
    assert all(torch.equal(one, runs[1][key]) for key, one in runs[0].items())


def test_several_files_in_any_form(files: Path, tmp_path: Path) -> None:
    """Each at its strength; one under diffusers' names, and one in 16 bits, held as such."""
    other_names, _ = unet_network(save_format="diffusers")
    other_names.load_weights(str(files / "a.safetensors"))
    other_names.save_weights(str(tmp_path / "a2.safetensors"), None, {})
    assert not load_file(files / "a.safetensors").keys() & load_file(tmp_path / "a2.safetensors").keys()
    half = {key: t.bfloat16() if t.dim() else t for key, t in load_file(files / "b.safetensors").items()}
    save_file(half, tmp_path / "b2.safetensors")
    given = f"{tmp_path / 'a2.safetensors'}=0.5,{tmp_path / 'b2.safetensors'}=-0.25"
    network, unet = unet_network(training_adapter=given, **FEW)
    wide, other = unet_network(training_adapter={files / "a.safetensors": 0.5, files / "b.safetensors": -0.25}, **FEW)
    held = [{p.dtype for p in one.network.parameters()} for one in network.training_adapters.adapters]
    assert held == [{torch.float32}, {torch.bfloat16}]
    assert_close(shown(unet), shown(other), "both", 2e-3)
    network.to(torch.bfloat16)
    assert [{p.dtype for p in one.network.parameters()} for one in network.training_adapters.adapters] == held
    assert_close(shown(unet), shown(other), "both", 2e-3)
    network.to("meta")
    assert all(p.is_meta for one in network.training_adapters.adapters for p in one.network.parameters())
    network.detach()
    assert torch.equal(shown(unet), shown(sd_unet()))


def test_parts_that_are_not_trained(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The denoiser is called with gradients whatever is trained; a text encoder only where it is."""
    whole, _ = unet_network(text_encoder())
    torch.manual_seed(3)
    for p in whole.parameters():
        p.data.normal_(std=0.2)
    whole.save_weights(str(tmp_path / "both.safetensors"), None, {})
    given = {"training_adapter": str(tmp_path / "both.safetensors")}
    unet, encoder = sd_unet().requires_grad_(False), text_encoder().requires_grad_(False)
    for train_encoder, train_unet in ((False, True), (True, False)):
        caplog.clear()
        network = networks.lora.create_network(1.0, 4, 2, None, encoder, unet, **given)
        network.apply_to(encoder, unet, train_encoder, train_unet)
        told = "12 of its 60 layers never act, since text_encoder is not trained"
        assert (told in caplog.text) == (not train_encoder), caplog.text
        assert not torch.equal(shown(unet), shown(sd_unet()))
        ids = torch.arange(5)[None]
        changed = not torch.equal(encoder(ids)[0], text_encoder()(ids)[0])
        assert changed == train_encoder
        network.detach()


@pytest.mark.parametrize("own_class", (True, False), ids=("the trainer's class", "diffusers' class"))
def test_on_fused_layers(own_class: bool, tmp_path: Path) -> None:
    """Also where a fused layer has an adapter for each projection, or is several modules with their rows."""
    model = toy("flux")["dit"] if own_class else MODELS["flux"][0]()
    model.double().requires_grad_(False)
    lower, upper, both = (copy.deepcopy(model) for _ in range(3))
    frozen = api.apply(lower, dim=4, algo="lokr", factor=4, use_dora=True)
    randomise(frozen)
    frozen.save(tmp_path / "a.safetensors")
    frozen.detach()
    api.load(lower, tmp_path / "a.safetensors", strength=0.5)
    form: Any = {"split_qkv": True} if own_class else {"use_dora": True}
    alone = api.apply(upper, dim=4, **form)
    network = api.apply(both, dim=4, training_adapter=f"{tmp_path / 'a.safetensors'}=0.5", **form)
    randomise(alone)
    network.load_state_dict(alone.state_dict())
    changed = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            x = torch.randn(2, layer.in_features, dtype=torch.float64)
            y, *found = (one.get_submodule(name)(x) for one in (model, lower, upper, both))
            wanted = sum(one - y for one in found[:2])
            changed += bool(wanted.any())
            assert float((found[2] - y - wanted).abs().max()) <= 1e-6 * float(1e-3 + wanted.abs().max()), name
    assert changed > 10


# -- how it is written, and what is wrong with it


def test_how_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "a,b=2"  # a folder of PEFT, say
    (tmp_path / odd).touch()
    cases: dict[Any, Any] = {
        "a.safetensors": [("a.safetensors", 1)],
        " a.safetensors = 0.5 , b.safetensors:-2": [("a.safetensors", 0.5), ("b.safetensors", -2)],
        r"C:\loras\a.safetensors": [(r"C:\loras\a.safetensors", 1)],
        r"C:\loras\a.safetensors:0.5": [(r"C:\loras\a.safetensors", 0.5)],
        r"D:/x=1/a.safetensors=1e-1,C:a.safetensors": [("D:/x=1/a.safetensors", 0.1), ("C:a.safetensors", 1)],
        "['a, b.safetensors', 'c.safetensors=2']": [("a, b.safetensors", 1), ("c.safetensors", 2)],
        '{"C:/a,b=1.safetensors": 0.5}': [("C:/a,b=1.safetensors", 0.5)],
        odd: [(odd, 1)],
        f"['{odd}:0.5']": [(odd, 0.5)],
        "none": [],
        "": [],
    }  # fmt: skip
    row = BY_NAME["training_adapter"]
    for text, wanted in cases.items():
        assert coerce(row, text) == tuple(wanted), text
    assert coerce(row, {Path("a.safetensors"): 2}) == (("a.safetensors", 2),)
    assert coerce(row, [Path("a.safetensors"), "b.safetensors:3"]) == (("a.safetensors", 1), ("b.safetensors", 3))
    wrong = {
        "a.safetensors=half": "has 'half' as the strength of 'a.safetensors', which is no number; write FILE=0.5",
        "a.safetensors=nan": "is no number",
        "{'a.safetensors': 0}": "has strength 0 for 'a.safetensors', at which it does nothing: leave it out",
        "a.safetensors,a.safetensors=2": "has 'a.safetensors' twice; write it once, with the sum of the strengths",
        "[1]": "has 1, which is no file; write FILE",
        "{'a.safetensors': None}": "has None as the strength",
    }
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            coerce(row, text)


def test_mistakes_are_told_before_anything_is_trained(files: Path, tmp_path: Path) -> None:
    """By a plan, too, and beside the other mistakes of the call."""
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"x": torch.ones(2)}, tmp_path / "none.safetensors")
    wrong = {
        tmp_path / "away.safetensors": "there is no file .*away.safetensors",
        tmp_path / "broken.safetensors": "broken.safetensors",
        tmp_path / "none.safetensors": "has no adapter that we know",
        files / "flux.safetensors": "flux.safetensors .*choose a file of this architecture",
    }
    unet = sd_unet()
    for path, message in wrong.items():
        for call in (
            lambda **kwargs: networks.lora.plan(4, 1, None, unet, **kwargs),
            lambda **kwargs: networks.lora.create_network(1.0, 4, 1, None, None, unet, **kwargs),
            lambda **kwargs: networks.lora.create_network(1.0, 4, 1, None, None, unet, dry_run="True", **kwargs),
        ):
            with pytest.raises(ValueError, match=re.escape(f"training_adapter={path}: ") + f".*{message}") as caught:
                call(training_adapter=str(path), diagnose_steps="-1")
            assert "diagnose_steps=-1" in str(caught.value)


def test_it_is_told(files: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"training_adapter": f"{files / 'a.safetensors'}=0.5"}
    unet = sd_unet()
    plan = networks.lora.plan(4, 1, None, unet, **given)
    assert SHOWN in plan.to_text().splitlines() and SHOWN in plan.keep(["unet"]).to_text()
    told = {"name": "a.safetensors", "strength": 0.5, "layers": 16, "bytes": 9984}
    assert plan.to_json()["training_adapters"] == [told]
    with pytest.raises(SystemExit):
        networks.lora.create_network(1.0, 4, 1, None, None, unet, dry_run="True", **given)
    assert SHOWN in capsys.readouterr().out
    with caplog.at_level(logging.INFO, logger="networks"):
        unet_network(**given)
    assert [record.getMessage() for record in caplog.records].count(SHOWN) == 1
    caplog.clear()
    network, _ = networks.lora.create_network_from_weights(
        1.0, str(files / "b.safetensors"), None, None, unet, for_inference=True, **given
    )
    assert not network.training_adapters and "training_adapter: no effect on a network which a file" in caplog.text


def test_from_python(files: Path) -> None:
    """A reference pass without the network has it, pictures in eval mode have not."""
    unet = sd_unet().requires_grad_(False)
    network = api.apply(unet, dim=4, training_adapter=files / "a.safetensors")
    wanted, bare = shown(unet).detach(), shown(sd_unet())
    network.set_multiplier(0.7)
    with network.off(), torch.no_grad():
        assert torch.equal(shown(unet), wanted)
    network.eval()
    assert torch.equal(drawn(unet), drawn(sd_unet())) and not torch.equal(wanted, bare)


def test_it_is_there_in_musubi_too(tmp_path: Path) -> None:
    """The trainer cuts its arguments at each =, casts the network, and draws its samples in train mode."""
    model = toy("flux")["dit"].requires_grad_(False)
    made = networks.lora.create_arch_network(1.0, 4, 1, None, None, model)
    made.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    for p in made.parameters():
        p.data.normal_(std=0.2)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    made.detach()
    with torch.no_grad():
        bare = model(signal())
    argument = f"training_adapter={tmp_path / 'a.safetensors'}:0.5"
    key, value = argument.split("=")
    network = networks.lora.create_arch_network(1.0, 4, 1, None, None, model, **{key: value})
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    network.to(torch.float16)
    assert not torch.equal(model(signal()), bare)
    with torch.no_grad():
        assert torch.equal(model(signal()), bare)
