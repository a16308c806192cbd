"""The same factors in lycoris-lora and in peft give the same update and gradients, in both directions of a file.

Where these libraries compute something else than their own definition, the case stands in a test whose name begins
with `test_known_wrong`, asserted to be wrong in just that way: it fails when they mend it.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import lycoris.kohya
import pytest
import torch
from helpers_numeric import (
    ALPHA,
    DIM,
    KINDS,
    MULTIPLIER,
    Case,
    Zoo,
    assert_close,
    cases,
    layers_of,
    make_input,
    make_network,
    randomise,
)
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.modules.glora import GLoRAModule
from lycoris.wrapper import network_module_dict
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from registry import ALGORITHMS, data_of
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.algos import ALGOS
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.tensors.factor import factorization

pytestmark = pytest.mark.reference


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


LYCORIS = {algo: _class(data.lycoris) for algo, data in ALGORITHMS.items() if data.lycoris}
LYCORIS_CASES = [case for case in cases() if case.algo in LYCORIS]
# LyCORIS and PEFT pad with zeros whatever the padding_mode says: test_known_wrong_padding_mode.
PADDED = ("conv_reflect", "conv_same_circular")
RIGHT = tuple(kind for kind in KINDS if kind not in PADDED)
# Its GLoRA has factors for all input channels of a grouped convolution: test_known_wrong_lycoris_glora.
KINDS_OF = dict.fromkeys(LYCORIS, RIGHT) | {"glora": tuple(kind for kind in RIGHT if kind != "conv_grouped")}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def lycoris_twin(case: Case, base: nn.Module, layer: AdaptedLayer, bypass: bool = False) -> nn.Module:
    """LyCORIS' module on `base` (not attached) with the factors of ours."""
    module = LYCORIS[case.algo](
        "twin", base, MULTIPLIER, case.dim, ALPHA, bypass_mode=bypass, rs_lora=case.rs_lora, **case.options
    ).double()
    theirs, ours = dict(module.named_parameters()), layer.adapter
    names = {name: "scalar" if name == "scalar" else ours.spec.keys[name] for name, _ in ours.named_parameters()}
    assert theirs.keys() == set(names.values()), "the same parameters under the same names"
    with torch.no_grad():
        for name, p in ours.named_parameters():
            assert theirs[names[name]].shape == p.shape, name
            theirs[names[name]].copy_(p)
    return module


def compare(base: nn.Module, twin_base: nn.Module, x: Tensor, ours: AdaptedLayer, theirs: dict[str, Tensor]) -> None:
    """Outputs and all gradients of two attached layers; `theirs`: our parameter name -> their parameter."""
    found = []
    weights = None
    for layer in (base, twin_base):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        weights = torch.randn_like(y) if weights is None else weights
        (y * weights).sum().backward()
        found.append((y, leaf.grad))
    assert_close(found[0][0], found[1][0], "forward")
    assert_close(found[0][1], found[1][1], "gradient of the input")
    for name, p in ours.adapter.named_parameters():
        assert p.grad is not None and theirs[name].grad is not None, name
        assert_close(p.grad, theirs[name].grad.reshape(p.shape), f"gradient of {name}")


# -- LyCORIS


@pytest.mark.parametrize("case", LYCORIS_CASES, ids=str)
def test_lycoris_forward_and_gradients(case: Case) -> None:
    kinds = KINDS_OF[case.algo]
    model = Zoo(kinds)
    twin = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    network.attach()
    for kind, layer in layers_of(network).items():
        module = lycoris_twin(case, twin.get_submodule(kind), layer)
        module.apply_to()
        named = dict(module.named_parameters())
        theirs = {
            n: named["scalar" if n == "scalar" else layer.adapter.spec.keys[n]] for n in layer.adapter.laid_out.shapes
        }
        if layer.adapter.laid_out.rank is None:
            assert module.scale == 1.0
        compare(model.get_submodule(kind), twin.get_submodule(kind), make_input(kind), layer, theirs)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        (algo, {name: True for name in names})
        for algo in LYCORIS
        for names in ((), ("use_scalar",), ("use_tucker",))
        if ALGOS[algo].spec.options.issuperset(names)
    ],
    ids=str,
)
def test_lycoris_bypass_forward(algo: str, options: dict[str, bool]) -> None:
    """Its factored form, on the layers where it works."""
    model, case = Zoo(("linear", "conv_3x3")), Case(algo, options)
    twin = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    network.attach()
    for kind, layer in layers_of(network).items():
        lycoris_twin(case, twin.get_submodule(kind), layer, bypass=True).apply_to()
        x = make_input(kind)
        assert_close(model.get_submodule(kind)(x), twin.get_submodule(kind)(x), kind)


# What its loader cannot read stands in test_known_wrong_lycoris_loader.
LOADED = [
    case
    for case in LYCORIS_CASES
    if len(case.options) < 2
    and not (case.algo == "lokr" and {"unbalanced_factorization", "use_tucker"} & case.options.keys())
]


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_lycoris_reads_our_file(case: Case, tmp_path: Path) -> None:
    """The loader that the trainers' generation scripts use gives our forward pass."""
    kinds = KINDS_OF[case.algo]
    model = Zoo(kinds)
    twin = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    with torch.no_grad():
        for layer in network.adapted_layers:
            for name, p in layer.adapter.named_parameters():
                p.copy_(torch.tensor(0.5) if name == "scalar" else p.float())  # it loads into fp32
    network.save(tmp_path / "ours.safetensors")
    network.attach()
    loaded, _ = lycoris.kohya.create_network_from_weights(
        MULTIPLIER, str(tmp_path / "ours.safetensors"), None, None, twin
    )
    assert len(loaded.unet_loras) == len(kinds)
    loaded.apply_to(None, twin, False, True)
    for module in loaded.unet_loras:
        module.double()
    for kind in kinds:
        x = make_input(kind)
        difference = model.get_submodule(kind)(x) - twin.get_submodule(kind)(x)
        assert float(difference.detach().abs().max()) < 1e-9 * float(
            twin.get_submodule(kind)(x).detach().abs().max()
        ), kind


@pytest.mark.parametrize("case", [c for c in LYCORIS_CASES if not (c.algo == "glora" and c.rs_lora)], ids=str)
def test_we_read_a_lycoris_file(case: Case, tmp_path: Path) -> None:
    """Folded rs_lora alpha, unbalanced factors, Tucker cores, folded scalars: our merge is its forward."""
    kinds = KINDS_OF[case.algo]
    model = Zoo(kinds)
    network = make_network(case, model)
    randomise(network)
    tensors: dict[str, Tensor] = {}
    modules = {}
    for kind, layer in layers_of(network).items():
        modules[kind] = lycoris_twin(case, model.get_submodule(kind), layer)
        for key, value in modules[kind].state_dict().items():
            value = value.detach().float() if key == "alpha" else value.detach()
            tensors[f"lora_unet_{kind}.{key}"] = value.clone().contiguous()
    save_file(tensors, tmp_path / "theirs.safetensors")
    read, _ = reader.read_tensors(tmp_path / "theirs.safetensors")
    saved, unknown = codec.decode(read)
    assert not unknown and len(saved) == len(kinds)
    for kind, module in modules.items():
        W = model.get_submodule(kind).weight
        x = make_input(kind)
        update = merged_weight(saved[f"lora_unet_{kind}"], W, MULTIPLIER) - W
        if case.algo == "lora":
            expected = module.make_weight() * module.scale
        else:
            expected = module.make_weight() if case.algo == "glora" else module.get_weight(W.shape) * module.scalar
        assert_close(update, expected * MULTIPLIER, kind)
        module.apply_to()
        theirs = model.get_submodule(kind)(x) - module.org_forward(x)
        module.restore()
        assert_close(
            network.adapted_layers[0].adapter.geometry.of(model.get_submodule(kind)).op(x, update), theirs, kind
        )
    # The same file into a network for training.
    fresh = make_network(case, model)
    assert len(fresh.load(tmp_path / "theirs.safetensors").matched) == len(kinds)
    for kind, layer in layers_of(fresh).items():
        W = model.get_submodule(kind).weight
        other = layers_of(network)[kind].new_weight(W, 1.0) - W
        assert_close(layer.new_weight(W, 1.0) - W, other, kind)


def test_known_wrong_lycoris_glora() -> None:
    """Under rs_lora it saves alpha as given, so its own file comes back at 1 / sqrt(rank) of what was trained; with
    groups its two terms have different numbers of channels."""
    model = Zoo(("linear", "conv_grouped"))
    network = make_network(Case("glora", rs_lora=True), model)
    randomise(network)
    network.float().double()  # it loads into fp32
    module = lycoris_twin(Case("glora", rs_lora=True), model.linear, layers_of(network)["linear"])
    saved = {key: value.detach() for key, value in module.state_dict().items()}
    again = GLoRAModule.make_module_from_state_dict(
        "again", model.linear, *(saved.get(f"{name}.weight") for name in ("a1", "a2", "b1", "b2", "bm")), saved["alpha"]
    ).double()
    assert_close(again.make_weight() * DIM**0.5, module.make_weight(), "read back")
    ours = {key: value.detach() for key, value in codec.encode([layers_of(network)["linear"]]).items()}
    assert float(ours["lora_unet_linear.alpha"]) == ALPHA * DIM**0.5
    grouped = GLoRAModule("x", model.conv_grouped, 1.0, DIM, ALPHA).double()
    with pytest.raises(RuntimeError):
        grouped.make_weight()


def test_a_lycoris_file_whose_alpha_overflowed_loads() -> None:
    """LyCORIS casts alpha to the save dtype: a full-matrix LoKr with dim 1e13 has alpha = inf in an fp16 file. There is
    no rank to divide by, so the value does not matter."""
    base = nn.Linear(8, 8).double().requires_grad_(False)
    w1, w2 = torch.randn(2, 2, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    for alpha in (float("inf"), float("nan"), 0.0, 1e13):
        tensors = {"x.lokr_w1": w1, "x.lokr_w2": w2, "x.alpha": torch.tensor(alpha)}
        saved = codec.decode(tensors)[0]["x"]
        assert_close(merged_weight(saved, base.weight) - base.weight, torch.kron(w1, w2), f"alpha {alpha}")


@pytest.mark.parametrize("factor", (-1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 1000))
def test_factorization_is_that_of_lycoris(factor: int) -> None:
    for dimension in (*range(1, 601), 640, 768, 1024, 1280, 2048, 2304, 3072, 5120, 10240, 12288):
        assert factorization(dimension, factor) == lycoris_factorization(dimension, factor), dimension


# -- PEFT

PEFT_KINDS = ("linear", "linear_no_bias", "conv1d", "conv_1x1", "conv_3x3")
PEFT_CASES = [
    (Case("lora"), LoraConfig(r=DIM, lora_alpha=3)),
    (Case("lora", rs_lora=True), LoraConfig(r=DIM, lora_alpha=3, use_rslora=True)),
    (Case("lora", dim=16), LoraConfig(r=16, lora_alpha=3)),
    (Case("loha"), LoHaConfig(r=DIM, alpha=3)),
    (Case("lokr"), LoKrConfig(r=DIM, alpha=3)),
    (Case("lokr", {"use_tucker": True}), LoKrConfig(r=DIM, alpha=3, use_effective_conv2d=True)),
    (Case("lokr", {"decompose_both": True}), LoKrConfig(r=DIM, alpha=3, decompose_both=True)),
    (Case("lokr", {"factor": 9}), LoKrConfig(r=DIM, alpha=3, decompose_factor=9)),
    (
        Case("lokr", {"factor": 9, "decompose_both": True}),
        LoKrConfig(r=DIM, alpha=3, decompose_factor=9, decompose_both=True),
    ),
]


def peft_parameters(layer: nn.Module, adapter: Any) -> dict[str, Tensor]:
    """Our parameter name -> PEFT's parameter."""
    if adapter.spec.name == "lora":
        return {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
    return {
        name: getattr(layer, key)["default"]
        for name, key in adapter.spec.keys.items()
        if name in adapter.laid_out.shapes
    }


def peft_twin(config: Any, model: nn.Module, network: Any) -> dict[str, dict[str, Tensor]]:
    """PEFT's adapters injected into `model`, with our factors; per kind, our parameter name -> its parameter."""
    kinds = [kind for kind, _ in model.named_children()]
    config = copy.deepcopy(config)
    config.target_modules = kinds
    inject_adapter_in_model(config, model)
    model.double()
    found = {}
    for kind, layer in layers_of(network).items():
        found[kind] = peft_parameters(model.get_submodule(kind), layer.adapter)
        with torch.no_grad():
            for name, p in layer.adapter.named_parameters():
                found[kind][name].copy_(
                    p.reshape(found[kind][name].shape)
                )  # Conv1d Tucker cores are [R, R, K, 1] there
    return found


@pytest.mark.parametrize("case, config", PEFT_CASES, ids=[str(case) for case, _ in PEFT_CASES])
def test_peft_forward_and_gradients(case: Case, config: Any) -> None:
    model = Zoo(PEFT_KINDS)
    twin = copy.deepcopy(model)
    network = make_network(case, model, multiplier=1.0)  # PEFT has none
    randomise(network)
    network.attach()
    theirs = peft_twin(config, twin, network)
    for kind, layer in layers_of(network).items():
        if layer.adapter.laid_out.rank is not None:
            compare(model.get_submodule(kind), twin.get_submodule(kind), make_input(kind), layer, theirs[kind])


# -- what they are known to compute wrongly


def known_wrong(case: Case, kind: str) -> tuple[Zoo, Zoo, AdaptedLayer, Tensor]:
    """Our attached layer on a model, and an untouched copy of the model."""
    model = Zoo((kind,))
    twin = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    network.attach()
    return model, twin, network.adapted_layers[0], make_input(kind)


@pytest.mark.parametrize("algo", ("loha", "lokr"))
def test_known_wrong_lycoris_merge(algo: str) -> None:
    """get_weight holds the scale already, get_diff_weight multiplies by it again, and nobody by the scalar."""
    case = Case(algo, {"use_scalar": True})
    _, twin, layer, _ = known_wrong(case, "linear")
    module, W = lycoris_twin(case, twin.linear, layer), twin.linear.weight.clone()
    right = layer.new_weight(W) - W
    wrong = right * layer.scale / layer.adapter.scalar
    assert_close(module.get_merged_weight(MULTIPLIER, W.shape)[0] - W, wrong, "get_merged_weight")
    module.merge_to(MULTIPLIER)
    assert_close(twin.linear.weight - W, wrong, "merge_to")


def test_lycoris_merge_of_lora_is_right() -> None:
    case = Case("lora", {"use_scalar": True})
    _, twin, layer, _ = known_wrong(case, "linear")
    module, W = lycoris_twin(case, twin.linear, layer), twin.linear.weight.clone()
    module.merge_to(MULTIPLIER)
    assert_close(twin.linear.weight - W, layer.new_weight(W) - W, "merge_to")


@pytest.mark.parametrize("dim", (4, 9))
def test_known_wrong_lycoris_full_lokr_under_rs_lora(dim: int) -> None:
    """A LoKr of two whole factors has scale 1; with rs_lora LyCORIS makes it sqrt(dim), in training and in the file
    (alpha = dim * sqrt(dim), which plain readers ignore): its samples and its file differ."""
    case = Case("lokr", {"full_matrix": True}, dim=dim, rs_lora=True)
    model, twin, layer, x = known_wrong(case, "linear")
    lycoris_twin(case, twin.linear, layer).apply_to()
    plain = torch.nn.functional.linear(x, twin.linear.weight, twin.linear.bias)
    assert_close(twin.linear(x) - plain, (model.linear(x) - plain) * dim**0.5, "its update")


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("algo", LYCORIS)
def test_known_wrong_padding_mode(algo: str, kind: str) -> None:
    """LyCORIS' op gets the padding but not the mode: the update is computed with zeros around the input."""
    case = Case(algo)
    model, twin, layer, x = known_wrong(case, kind)
    base = twin.get_submodule(kind)
    zeros = torch.nn.functional.conv2d(
        x, layer.new_weight(base.weight) - base.weight, None, base.stride, base.padding, base.dilation
    )
    plain = base(x)
    lycoris_twin(case, base, layer).apply_to()
    assert_close(base(x) - plain, zeros, "its update is that of zero padding")
    assert float((model.get_submodule(kind)(x) - base(x)).abs().max()) > 1e-3


def test_known_wrong_lycoris_bypass_of_a_dilated_convolution() -> None:
    """Its LoCon bypass leaves the dilation out: the update has another size than the output."""
    _, twin, layer, x = known_wrong(Case("lora"), "conv_strided_dilated")
    lycoris_twin(Case("lora"), twin.conv_strided_dilated, layer, bypass=True).apply_to()
    with pytest.raises(RuntimeError, match="must match"):
        twin.conv_strided_dilated(x)


@pytest.mark.parametrize(
    "option, kind, error",
    [("unbalanced_factorization", "linear", RuntimeError), ("use_tucker", "conv_3x3", AttributeError)],
)
def test_known_wrong_lycoris_loader(option: str, kind: str, error: type[Exception], tmp_path: Path) -> None:
    """It guesses the factor from the shapes: for unbalanced factors none gives them, and of a Tucker w2_a [R, B] it
    takes R for B. We read such files, its own too: test_we_read_a_lycoris_file."""
    model = Zoo((kind,))
    network = make_network(Case("lokr", {option: True}), model)
    network.save(tmp_path / "ours.safetensors")
    with pytest.raises(error):
        lycoris.kohya.create_network_from_weights(1.0, str(tmp_path / "ours.safetensors"), None, None, model)


def test_known_wrong_peft_full_lokr() -> None:
    """PEFT scales a LoKr of two whole factors by alpha / r; everybody else by 1."""
    case, config = Case("lokr", dim=16), LoKrConfig(r=16, alpha=3)
    model = Zoo(("linear",))
    twin = copy.deepcopy(model)
    network = make_network(case, model, multiplier=1.0)
    assert network.adapted_layers[0].adapter.laid_out.rank is None
    randomise(network)
    network.attach()
    peft_twin(config, twin, network)
    x = make_input("linear")
    plain = network.adapted_layers[0].sites[0].below(x)
    assert_close(twin.linear(x) - plain, (model.linear(x) - plain) * 3 / 16, "its update")


def test_known_wrong_peft_gradient_of_tucker_loha() -> None:
    """The forward is right; the backward of the output factor of one half multiplies by the other half's input side."""
    case, config = Case("loha", {"use_tucker": True}), LoHaConfig(r=DIM, alpha=3, use_effective_conv2d=True)
    model = Zoo(("conv_3x3",))
    twin = copy.deepcopy(model)
    network = make_network(case, model, multiplier=1.0)
    randomise(network)
    network.attach()
    theirs = peft_twin(config, twin, network)["conv_3x3"]
    x = make_input("conv_3x3")
    y = model.conv_3x3(x)
    assert_close(twin.conv_3x3(x), y, "forward")
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (twin.conv_3x3(x) * weights).sum().backward()
    p = dict(network.adapted_layers[0].adapter.named_parameters())
    for name in ("w1_b", "w2_b", "t1", "t2"):
        assert_close(theirs[name].grad, p[name].grad, name)
    for name in ("w1_a", "w2_a"):
        assert float((theirs[name].grad - p[name].grad).norm() / p[name].grad.norm()) > 0.1, f"{name} is right now"
    G = torch.nn.grad.conv2d_weight(x, model.conv_3x3.weight.shape, weights, padding=1) * 0.75
    with torch.no_grad():
        side = torch.einsum("ab...,bi->ai...", p["t2"], p["w2_b"])  # should be t1 and w1_b
        other = torch.einsum("ao,ai...->oi...", p["w2_a"], side)
        assert_close(theirs["w1_a"].grad, torch.einsum("aixy,oixy->ao", side, other * G), "its gradient of w1_a")


def test_known_wrong_peft_lora_on_a_dilated_convolution() -> None:
    """Its down convolution is made without the dilation: the update has another size than the output."""
    model = Zoo(("conv_strided_dilated",))
    network = make_network(Case("lora"), model, multiplier=1.0)
    randomise(network)
    twin = copy.deepcopy(model)
    peft_twin(LoraConfig(r=DIM, lora_alpha=3), twin, network)
    with pytest.raises(RuntimeError, match="must match"):
        twin.conv_strided_dilated(make_input("conv_strided_dilated"))


def test_what_lycoris_has_too_is_compared() -> None:
    both = ALGOS.keys() & network_module_dict.keys()
    missing = {algo for algo in both if not (data_of(algo).lycoris or data_of(algo).unlike_lycoris)}
    assert not missing, f"tests/registry.py: name the class of LyCORIS for {missing}, or why it is unlike"
