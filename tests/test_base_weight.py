"""Base layers in every form: read, merge, restore, train and refuse, against formulas of our own."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numeric import FACTORED, Case, assert_close, dense_update, learn_lengths, make_network, randomise
from quantised_layers import (
    FLOAT8,
    FORMS,
    IN,
    OUT,
    bits,
    linear4bit,
    linear8bit,
    plain_linear,
    quantised,
    scaled_float8,
)
from registry import data_of
from tiny_parts import draw, sd_unet
from torch import Tensor, nn

import networks.lora
from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.max_norm import update_norm
from networks.layers.runtime import Runtime
from networks.network.network import Network
from networks.tensors import base_weight
from networks.tensors.fused import unfused
from networks.tensors.geometry import Geometry

ADDITIVE = [algo for algo in FACTORED if not ALGOS[algo].spec.saved_as]  # those have their own forms


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adapted(base: nn.Module, algo: str = "lora", dora: str = "", size: float = 0.1) -> AdaptedLayer:
    geometry = Geometry.of(base)
    assert geometry is not None and geometry.weight_shape == (OUT, IN)
    adapter = ALGOS[algo](geometry, 4)
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 0.75, runtime=Runtime(0.7), dora=dora)
    adapter.rescale_(size / float(update_norm(layer)))
    if dora:
        layer.load_magnitude(None)
        learn_lengths(layer)
    return layer


def autocast(form: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if FORMS[form].autocast else contextlib.nullcontext()


def dense_linear(form: str, base: nn.Module) -> nn.Linear:
    """A plain fp32 Linear with the weight that this layer stands for."""
    lin = nn.Linear(IN, OUT).requires_grad_(False)
    lin.weight.copy_(FORMS[form].dense(base))
    lin.bias.copy_(base.bias.to(torch.float32))
    return lin


def described(base: nn.Module) -> dict[str, Any]:
    """Names, dtypes and shapes of what a layer saves; one entry of bitsandbytes is text of any length."""
    state = {name: t for name, t in base.state_dict().items() if "bitsandbytes__" not in name}
    return {name: (t.dtype, t.shape) for name, t in state.items()}


# -- reading and writing


@pytest.mark.parametrize("form", FORMS)
def test_read_is_the_dequantised_weight(form: str) -> None:
    base = quantised(form)
    weight = base_weight.read(base)
    assert weight.dtype == (torch.float64 if form == "float64" else torch.float32) and not weight.requires_grad
    assert_close(weight.double(), FORMS[form].dense(base), "read", 2e-7)
    before = bits(base)
    weight.zero_()
    assert bits(base) == before or form in ("float64", "float32"), "what was read shares memory with the layer"


@pytest.mark.parametrize("algo", ADDITIVE)
@pytest.mark.parametrize("form", FORMS)
def test_merge_is_one_quantisation_of_the_exact_weight(form: str, algo: str) -> None:
    base = quantised(form)
    layer = adapted(base, algo, size=4.0)  # about the size of W: half of the values change a lot
    wanted = FORMS[form].dense(base) + dense_update(layer, 0.7).detach().double()
    before, kept = bits(base), described(base)
    layer.merge()
    error = (FORMS[form].dense(base) - wanted).abs() / FORMS[form].error(wanted).clamp(min=1e-12)
    assert float(error.max()) <= 1.0, f"{form}: {float(error.max()):.3f} of the allowed error"
    assert bits(base) != before
    assert described(base) == kept


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
def test_a_merged_4_bit_layer_has_the_bits_of_a_layer_quantised_from_the_merged_weight(
    quant_type: str, nested: bool
) -> None:
    base = linear4bit(plain_linear(), quant_type, nested, torch.bfloat16)
    layer = adapted(base, size=4.0)
    wanted = plain_linear()
    wanted.weight.copy_(layer.new_weight(base_weight.read(base)))
    layer.merge()
    assert bits(base) == bits(linear4bit(wanted, quant_type, nested, torch.bfloat16))
    base = linear4bit(plain_linear().to(torch.bfloat16), quant_type, nested, torch.bfloat16)
    adapted(base, size=4.0).merge()
    assert base.weight.quant_state.dtype == torch.bfloat16  # what its forward dequantises to


@pytest.mark.parametrize("nested", (False, True))
def test_4_bit_codes_that_were_packed_anew_for_a_processor(nested: bool) -> None:
    """bitsandbytes does that in the first forward in eval mode, where the processor has bf16; scales become bf16."""
    from bitsandbytes import functional

    base = linear4bit(plain_linear().to(torch.bfloat16), "nf4", nested, torch.bfloat16)
    dense, state = FORMS["bnb_nf4"].dense(base), base.weight.quant_state
    base.weight.data, _ = functional._convert_weight_packed_for_cpu(base.weight.data, state)
    packed = bits(base)
    assert_close(base_weight.read(base).double(), dense, "read", 4e-3)
    assert bits(base) == packed
    layer = adapted(base, size=4.0)
    layer.backup()
    wanted = base_weight.read(base).double() + dense_update(layer, 0.7).detach().double()
    layer.merge()
    form = "bnb_nf4_nested" if nested else "bnb_nf4"
    assert ((FORMS[form].dense(base) - wanted).abs() <= FORMS[form].error(wanted)).all()
    assert base.weight.quant_state is state and state.dtype == torch.bfloat16 and state.nested == nested
    layer.restore()
    assert bits(base) == packed and base.weight.quant_state is state


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_merge_changes_no_bit(form: str) -> None:
    base = quantised(form)
    layer, before = adapted(base, size=4.0), bits(base)
    layer.merge(multiplier=0)
    layer.runtime.multiplier = 0.0
    layer.merge()
    layer.adapter.get_parameter("lora_up").zero_() if hasattr(layer.adapter, "lora_up") else layer.adapter.rescale_(0.0)
    layer.merge(multiplier=1.0)
    assert bits(base) == before


@pytest.mark.parametrize("form", FORMS)
def test_storing_what_was_read_keeps_it(form: str) -> None:
    """A second quantisation to the same values: no drift when many files are merged one after the other."""
    base = quantised(form)
    first = base_weight.read(base).clone()
    base_weight.write(base, first)
    again = base_weight.read(base)
    # Whose scales are rounded themselves (bf16, 8 bits), or made by another rule (torchao's), may round once more.
    share = 1.0 if any(word in form for word in ("bf16", "nested", "torchao")) else 1e-3
    assert ((again - first).abs() <= share * FORMS[form].error(first.double()).clamp(min=1e-9)).all()


# -- backup


@pytest.mark.parametrize("forward_first", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_backup_pre_calculation_and_restore_are_exact_to_the_bit(form: str, forward_first: bool) -> None:
    model = nn.Module()
    model.layer = quantised(form)  # type: ignore[assignment]
    base, x = model.layer, torch.randn(3, IN).to(FORMS[form].input)

    def call() -> Tensor:
        with torch.no_grad(), autocast(form):
            return base(x)

    base.train(not forward_first)  # in eval mode bitsandbytes packs 4-bit codes anew on some processors
    before_output = call() if forward_first else None
    before = bits(base)
    networks_ = [make_network(Case(algo), model) for algo in ("lora", "loha")]
    for network in networks_:
        randomise(network)
        for layer in network.adapted_layers:
            layer.adapter.rescale_(2.0 / float(update_norm(layer)))
    for network in networks_:
        network.pre_calculation()
    assert bits(base) != before
    merged_output = call()
    for network in networks_:
        network.restore_weights()
    assert bits(base) == before
    if before_output is not None:
        assert torch.equal(call(), before_output) and not torch.equal(merged_output, before_output)
    for network in networks_:  # and again: a backup is not used up
        network.pre_calculation()
        network.restore_weights()
    assert bits(base) == before


def test_a_backup_survives_that_the_host_replaces_the_tensors() -> None:
    base = quantised("scaled_block")
    layer, before = adapted(base, size=4.0), bits(base)
    layer.backup()
    layer.merge()
    base.weight.data = base.weight.data.clone()  # block swap
    base.scale_weight = base.scale_weight.clone()
    layer.restore()
    assert bits(base) == before


# -- training


@pytest.mark.parametrize("algo", ADDITIVE)
@pytest.mark.parametrize("form", FORMS)
def test_training_on_it_is_training_on_the_dequantised_weight(form: str, algo: str) -> None:
    """Gradients of adapter and input, against the same adapter on a plain fp32 layer.

    The loss is linear in the output, so the base's own rounding does not reach the adapter's gradients.
    """
    with unfused():
        plain = _train_on_both(form, algo)
    if not FORMS[form].autocast:
        _train_on_both(form, algo)
        return
    # One function rounds sums less often than two passes, so that bits differ: it is at least as near the exact result.
    found, errors = _train_on_both(form, algo, alike=False), torch.zeros(2)
    for ours, other, exact in zip(found[0], plain[0], found[1], strict=True):
        size = exact.square().mean().sqrt()
        errors += torch.stack([(each.double() - exact).square().mean().sqrt() / size for each in (ours, other)]).float()
    assert errors[0] <= 1.05 * errors[1], errors


def _train_on_both(form: str, algo: str, alike: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients on it, and on the plain layer; which must be the same, or else is in float64."""
    torch.manual_seed(0)
    exact = torch.float64 if form == "float64" or not alike else torch.float32
    wide = torch.float64 if form == "float64" else torch.float32
    low = FORMS[form].input
    base = quantised(form)
    reference = dense_linear(form, base).to(exact)
    layers = [adapted(module, algo) for module in (base, reference)]
    layers[1].adapter.to(exact).load_state_dict(layers[0].adapter.state_dict())
    x, probe = torch.randn(5, IN, dtype=wide).to(low).to(wide), torch.randn(5, OUT, dtype=wide).to(low).to(wide)
    results = []
    for layer, module, dtype in zip(layers, (base, reference), (low, exact), strict=True):
        layer.attach()
        own = x.to(dtype, copy=True).requires_grad_()
        with autocast(form):
            y = module(own)
        (y * probe.to(y.dtype)).sum().backward()
        trained = [p for name, p in layer.adapter.named_parameters() if name not in layer.adapter.spec.frozen]
        results.append([t.detach().to(exact) for t in (y, own.grad, *(p.grad for p in trained))])
    assert all(p.grad is None for p in base.parameters())
    if alike:
        _assert_alike(form, algo, *results, rounded=low != wide)
    return results[0], results[1]


def _assert_alike(form: str, algo: str, found: list[Tensor], wanted: list[Tensor], rounded: bool) -> None:
    # fp16 and bf16 layers compute in their dtype; int8 ones round their input to 8 bits; autocast rounds both alike
    tolerance = {"float16": 5e-3, "bfloat16": 4e-2, "scaled_block_bf16": 1e-2}.get(form, 2e-6)
    base_tolerance = tolerance if FORMS[form].exact else 2e-2
    assert_close(found[0], wanted[0], "output", base_tolerance)
    assert_close(found[1], wanted[1], "gradient of the input", base_tolerance)
    for ours, theirs in zip(found[2:], wanted[2:], strict=True):
        assert_close(ours, theirs, "gradient of the adapter", tolerance * data_of(algo).rounding if rounded else 2e-6)


@pytest.mark.parametrize("form", ("scaled_block_bf16", "bnb_nf4", "bnb_int8", "torchao_int8", "bfloat16"))
@pytest.mark.parametrize("mixed", (False, True))
def test_bf16_activations_with_and_without_autocast(form: str, mixed: bool) -> None:
    """Adapters stay fp32; the output has the dtype which the base alone gives."""
    lin = plain_linear().to(torch.bfloat16)
    base = {
        "bnb_nf4": lambda: linear4bit(lin, "nf4", False, torch.bfloat16),
        "bnb_int8": lambda: linear8bit(lin),
    }.get(form, lambda: FORMS[form].make(lin if "scaled" not in form else plain_linear()))()
    base.requires_grad_(False)
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        plain = base(x)
    layer = adapted(base, size=4.0)
    layer.attach()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y = base(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    update = x.detach().double() @ dense_update(layer, 0.7).detach().double().T
    assert_close((y - plain).detach().double(), update, "update", 2e-2)
    y.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("side", ("output", "input"))
@pytest.mark.parametrize("form", FORMS)
def test_dora_reads_the_dequantised_weight(form: str, side: str) -> None:
    """Forward of the attached layer = a plain layer with W + m ((W + s dW) g / n - W), n by torch's own norm."""
    base = quantised(form)
    layer = adapted(base, dora=side, size=3.0)
    wide = torch.float64 if form == "float64" else torch.float32
    W = FORMS[form].dense(base)
    whole = W + dense_update(layer, 1.0).detach().double()
    norms = whole.norm(dim=1 if side == "output" else 0, keepdim=True)
    wanted = W + 0.7 * (whole * (layer.magnitude.detach().double() / norms) - W)
    x = torch.randn(5, IN, dtype=wide)
    layer.attach()
    with torch.no_grad(), autocast(form):
        y = base(x.to(FORMS[form].input))
    expected = F.linear(x.double(), wanted, base.bias.to(torch.float32).double())
    tolerance = {"float16": 3e-3, "bfloat16": 3e-2, "scaled_block_bf16": 1e-2}.get(form, 1e-5)
    if FORMS[form].autocast or not FORMS[form].exact:
        tolerance = 3e-2
    assert_close(y.double(), expected, "forward", tolerance)
    layer.detach()
    layer.merge()
    error = (FORMS[form].dense(base) - wanted).abs() / FORMS[form].error(wanted).clamp(min=1e-9)
    assert float(error.max()) <= 1.001


# -- what hosts do


def test_a_weight_that_moves_between_calls_is_read_where_it_is() -> None:
    """Block swap re-binds the codes; Krea 2's sampling overwrites them."""
    base, other = quantised("scaled_row"), quantised("scaled_row", seed=1)
    layer = adapted(base, dora="output", size=3.0)
    layer.attach()
    base.weight.data, base.scale_weight = other.weight.data, other.scale_weight
    assert_close(base_weight.read(base).double(), FORMS["scaled_row"].dense(other), "read", 2e-7)
    whole = FORMS["scaled_row"].dense(other) + dense_update(layer, 1.0).detach().double()
    wanted = whole * layer.magnitude.detach().double() / whole.norm(dim=1, keepdim=True)
    W = FORMS["scaled_row"].dense(other)
    x = torch.randn(3, IN)
    expected = F.linear(x.double(), W + 0.7 * (wanted - W), base.bias.double())
    assert_close(base(x).detach().double(), expected, "forward after the swap", 1e-5)


@pytest.mark.parametrize("dtype", FLOAT8.values(), ids=FLOAT8)
def test_a_host_casts_its_model_to_fp8_after_apply_to(dtype: torch.dtype) -> None:
    """--fp8_base: the adapters are no part of the model, so they stay fp32 and train under autocast."""
    unet = sd_unet().requires_grad_(False)
    network = networks.lora.create_network(1.0, 4, 1.0, None, None, unet)
    network.apply_to(None, unet, False, True)
    randomise(network)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and "time_embedding" not in name:
            module.to(dtype)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert any(p.dtype == dtype for p in unet.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = draw(unet).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_base_weights_merge_into_a_model_that_is_fp8_already(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """--base_weights with --fp8_base on a trainer that loads fp8: the host's own calls."""
    unet = sd_unet().requires_grad_(False)
    trained = networks.lora.create_network(1.0, 4, 1.0, None, None, unet)
    randomise(trained)
    file = str(tmp_path / "base.safetensors")
    trained.save_weights(file, None, {})
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.float8_e4m3fn)
    wanted = {}
    for layer in trained.adapted_layers:
        W = layer.base.weight.to(torch.float32).double()
        wanted[layer.lora_name] = W + dense_update(layer, 0.8).detach().double()
    network, weights = networks.lora.create_network_from_weights(0.8, file, None, None, unet, for_inference=True)
    with torch.autocast("cpu", torch.bfloat16):  # some hosts merge inside it
        network.merge_to(None, unet, weights, torch.float32, "cpu")
    for layer in trained.adapted_layers:
        stored, exact = layer.base.weight, wanted[layer.lora_name]
        if stored.dtype == torch.float32:  # that of a convolution, which has the rounding of fp32 arithmetic
            assert_close(stored.double(), exact, layer.lora_name, 1e-6)
        else:
            assert torch.equal(stored.to(torch.float32), exact.float().to(stored.dtype).to(torch.float32))


# -- what is lost, and what is refused


@pytest.mark.parametrize(("size", "told"), ((0.02, True), (8.0, False)))
def test_a_merge_that_rounding_eats_is_told(size: float, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Updates below half a step of fp8 vanish: the share that stays is measured, by <stored - W, dW> / ||dW||^2."""
    model = nn.Module()
    model.layer = quantised("scaled_row")  # type: ignore[assignment]
    network = make_network(Case("lora"), model)
    randomise(network)
    (layer,) = network.adapted_layers
    layer.adapter.rescale_(size / float(update_norm(layer)))
    before = FORMS["scaled_row"].dense(layer.base)
    update = dense_update(layer, float(network.runtime.multiplier)).detach().double()
    with caplog.at_level(logging.WARNING):
        network.merge()
    moved = FORMS["scaled_row"].dense(layer.base) - before
    share = float((moved * update).sum() / update.square().sum())
    assert (share < 0.9) == told
    assert [f"kept {share:.0%} of the update" in r.getMessage() for r in caplog.records] == [True] * told


class LooksLikeBf16(Tensor):
    """A wrapper whose dtype is not that of its data, as quanto makes them."""

    @staticmethod
    def __new__(cls, data: Tensor) -> LooksLikeBf16:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data: Tensor) -> None:
        self.codes = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].codes) if func is torch.ops.aten.detach.default else NotImplemented

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None


def _packed_torchao() -> nn.Module:
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    base = plain_linear()
    weight = int4_tensor.Int4Tensor(
        torch.zeros(OUT, IN // 2, dtype=torch.int8), torch.ones(IN // 32, OUT), torch.zeros(IN // 32, OUT),
        [1, 32], torch.Size([OUT, IN]),
    )  # fmt: skip
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def _without(base: nn.Module, holder: Callable[[Any], Any], name: str) -> nn.Module:
    setattr(holder(base), name, None)
    return base


def _with_weight(weight: Tensor) -> nn.Module:
    base = plain_linear()
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def _with_buffer(name: str, scale: Tensor) -> nn.Module:
    base = _with_weight(plain_linear().weight.to(torch.float8_e4m3fn))
    base.register_buffer(name, scale)
    return base


def _lost_quant_state() -> nn.Module:
    base = linear4bit(plain_linear(), "nf4", False)
    base.weight.quant_state = base.quant_state = None
    return base


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "integers": (lambda: _with_weight(torch.ones(OUT, IN, dtype=torch.int32)), "int32"),
    "a scale of another host": (lambda: _with_buffer("weight_scale_inv", torch.ones(1)), "weight_scale_inv beside it"),
    "an odd scale": (lambda: _with_buffer("scale_weight", torch.ones(7, 1)), r"scale_weight of shape \(7, 1\)"),
    "int8 without scale": (
        lambda: _without(_without(linear8bit(plain_linear()), lambda m: m.weight, "SCB"), lambda m: m.state, "SCB"),
        "SCB",
    ),
    "4 bits without state": (_lost_quant_state, "quant_state"),
    "packed for a kernel": (_packed_torchao, "Int4Tensor is packed"),
    "a wrapper": (lambda: _with_weight(LooksLikeBf16(torch.zeros(OUT, IN, dtype=torch.int8))), "LooksLikeBf16"),
    "sharded": (lambda: _with_weight(torch.empty(0)), "sharded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_remedy(case: str) -> None:
    make, words = REFUSED[case]
    base = make()
    for call in (base_weight.read, base_weight.backup, lambda m: base_weight.write(m, torch.zeros(OUT, IN))):
        with pytest.raises(ValueError, match=words) as caught:
            call(base)
        assert any(
            remedy in str(caught.value) for remedy in ("fp32, fp16 or bf16", "whole state", "model that is whole")
        )


@pytest.mark.parametrize(
    ("form", "value", "words"),
    (
        ("float8_e4m3fn", 500.0, "ends at 448"),
        ("float16", 7e4, "ends at 65504"),
        ("float32", float("nan"), "NaN"),
        ("bnb_nf4", float("inf"), "infinite"),
        ("scaled_row", float("nan"), "NaN"),
    ),
)
def test_a_weight_that_does_not_fit_its_form_is_refused(form: str, value: float, words: str) -> None:
    base = quantised(form)
    before, weight = bits(base), base_weight.read(base).clone()
    weight[3, 4] = value
    with pytest.raises(ValueError, match=words):
        base_weight.write(base, weight)
    assert bits(base) == before


def test_one_layer_that_cannot_be_merged_stops_the_merge_before_it_began() -> None:
    model = nn.Module()
    model.first = plain_linear()  # type: ignore[assignment]
    model.second = _with_weight(plain_linear().weight.to(torch.float8_e4m3fn))  # type: ignore[assignment]
    network: Network = make_network(Case("lora"), model)
    randomise(network)
    model.second.register_buffer("input_scale", torch.ones(1))
    before = bits(model.first)
    for call in (network.merge, network.pre_calculation):
        with pytest.raises(ValueError, match="second.*input_scale"):
            call()
        assert bits(model.first) == before


def test_a_scale_too_small_for_its_dtype_still_covers_the_weight() -> None:
    """fp16 scales end at 6e-8: they are rounded upwards, codes are divided by what is stored."""
    base = scaled_float8(plain_linear(), "row", torch.float8_e4m3fn, torch.float16)
    weight = torch.randn(OUT, IN) * 1e-5
    weight[5] = 0.0
    base_weight.write(base, weight)
    stored = base.weight.to(torch.float32).double() * base.scale_weight.double()
    assert torch.isfinite(stored).all() and (base.scale_weight > 0).all()
    bound = torch.maximum(weight.abs() * 2**-4, base.scale_weight.float() * 2**-10).double()
    assert ((stored - weight.double()).abs() <= bound * 1.001).all()


def test_int8_layers_that_keep_fp16_weights_forget_their_codes() -> None:
    import bitsandbytes

    base = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    base.load_state_dict(plain_linear().state_dict())
    base.eval().requires_grad_(False)
    x = torch.randn(2, IN)
    with torch.no_grad():
        before = base(x)
        base_weight.write(base, base_weight.read(base) * 2)
        assert_close(base(x) - base.bias, 2 * (before - base.bias), "forward after the merge", 2e-2)


# -- selection


@pytest.mark.parametrize("form", FORMS)
def test_a_network_finds_and_trains_the_layer_in_place(form: str) -> None:
    """The same targets, names and shapes as on the plain model."""
    unet = sd_unet()
    names = [row.saved_name for row in networks.lora.create_network(1.0, 4, 1.0, None, None, unet).plan.trained]
    holder = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    holder.to_q = copy.deepcopy(quantised(form)) if "torchao" not in form else quantised(form)
    plan = networks.lora.create_network(1.0, 4, 1.0, None, None, unet).plan
    assert [row.saved_name for row in plan.trained] == names
    (row,) = [
        row
        for row in plan.trained
        if row.saved_name.endswith("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
    ]
    assert row.shape == (OUT, IN) and row.kind == "Linear"


def test_a_linear_that_nobody_calls_is_no_target() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert Geometry.of(attention.out_proj) is None and Geometry.of(nn.Linear(8, 8)) is not None
