"""DoRA (2402.09353): forward, gradients, merge and file against the definition and against peft, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import (
    KINDS,
    MULTIPLIER,
    assert_close,
    delta_of,
    learn_lengths,
    make_input,
    make_layer,
    named_tensors,
    options_for,
    randomise,
    scale_for,
    with_weight,
)
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from registry import data_of
from tiny_parts import draw, sd_unet
from tiny_parts import randomise as randomise_network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import networks.lora
from networks.algos import ALGOS
from networks.files import codec
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors.geometry import Geometry

SIDES = ("output", "input")
DORA = [algo for algo, cls in ALGOS.items() if "use_dora" in cls.spec.features]
OPTIONS: list[dict[str, Any]] = [{}, {"use_tucker": True}, {"use_scalar": True}]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def single(kind: str, algo: str, side: str, multiplier: Any = MULTIPLIER, **options: Any) -> AdaptedLayer:
    base = make_layer(kind)
    adapter = ALGOS[algo](Geometry.of(base), 4, options_for(algo, options)).double()
    randomise(adapter)
    scale = scale_for(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, scale, runtime=Runtime(multiplier), dora=side).double()
    layer.load_magnitude(None)
    return layer


def definition(layer: AdaptedLayer, W: Tensor, m: float) -> Tensor:
    """W + m ((W + s dW) g / n - W), from the file's tensors, n by torch's own norm."""
    adapter = layer.adapter
    scalar = 1.0 if adapter.scalar is None else adapter.scalar
    whole = W + delta_of(adapter)(named_tensors(adapter, W), tuple(W.shape)) * scalar * layer.scale
    rows = whole.flatten(1) if layer.on_output else whole.transpose(0, 1).flatten(1)
    norms = torch.stack([row.norm() for row in rows]).detach()
    ratio = (layer.magnitude.flatten() / norms).reshape(layer.magnitude.shape)
    return W + m * (whole * ratio - W)


CASES = [(kind, {}) for kind in KINDS] + [("conv_3x3", options) for options in OPTIONS[1:]]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("kind", "options", "algo"),
    [(*case, algo) for case in CASES for algo in DORA if case[1].keys() <= ALGOS[algo].spec.options],
    ids=str,
)
def test_forward_merge_and_file_are_the_definition(kind: str, options: dict[str, Any], algo: str, side: str) -> None:
    layer = single(kind, algo, side, **options)
    base, x = layer.base, make_input(kind)
    plain, W = copy.deepcopy(base), base.weight.clone()
    learn_lengths(layer)
    expected = definition(layer, W, MULTIPLIER)
    assert_close(layer.new_weight(W) - W, expected - W, "new_weight")
    saved = codec.decode(codec.encode([layer]))[0]["lora_unet_x"]
    assert saved.side(layer.adapter.geometry) == side
    assert_close(merged_weight(saved, W, MULTIPLIER) - W, expected - W, "merge from the file")
    layer.attach()
    y = base(x)
    assert_close(y - plain(x), with_weight(plain, expected)(x) - plain(x), "forward")
    layer.detach()
    layer.merge()
    assert torch.equal(base.weight, layer.new_weight(W))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("algo", DORA)
@pytest.mark.parametrize("kind", ["linear", "conv_3x3", "conv_grouped"])
def test_gradients_are_those_of_the_definition(kind: str, algo: str, side: str) -> None:
    layer = single(kind, algo, side)
    plain, W, x = copy.deepcopy(layer.base), layer.base.weight.clone(), make_input(kind).requires_grad_()
    learn_lengths(layer)
    names, values = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    geometry = layer.adapter.geometry
    bias = 0 if plain.bias is None else geometry.on_outputs(plain.bias)
    wanted_y = geometry.op(x, definition(layer, W, MULTIPLIER)) + bias
    upstream = torch.randn_like(wanted_y)
    wanted = torch.autograd.grad(wanted_y, (x, *values), upstream)
    layer.attach()
    found = torch.autograd.grad(layer.base(x), (x, *values), upstream)
    for name, a, b in zip(("x", *names), found, wanted, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("kind", ["linear", "conv_1x1", "conv_3x3"])
def test_peft_has_the_same_forward_gradients_and_merge(kind: str) -> None:
    base, x = make_layer(kind), make_input(kind)
    config = LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=["layer"])
    twin = inject_adapter_in_model(config, nn.ModuleDict({"layer": copy.deepcopy(base)}))
    theirs = twin["layer"].double()
    adapter = ALGOS["lora"](Geometry.of(base), 4, {}).double()
    randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, 0.75, dora="output").double()
    layer.load_magnitude(None)
    learn_lengths(layer)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(adapter.down)
        theirs.lora_B["default"].weight.copy_(adapter.up)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(layer.magnitude.reshape(magnitude.shape))
    layer.attach()
    y, wanted = base(x), theirs(x)
    assert_close(y, wanted, "forward")
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted.backward(upstream)
    assert_close(adapter.down.grad, theirs.lora_A["default"].weight.grad, "down")
    assert_close(adapter.up.grad, theirs.lora_B["default"].weight.grad, "up")
    assert_close(layer.magnitude_change.grad.flatten(), magnitude.grad.flatten(), "magnitude")
    with torch.no_grad():
        delta = theirs.base_layer.weight.clone()
        theirs.merge()
        assert_close(layer.new_weight(delta, 1.0), theirs.base_layer.weight, "merge")


def test_peft_has_no_dora_for_loha() -> None:
    """So the definition is the only judge there; if this fails, compare."""
    assert not hasattr(LoHaConfig(), "use_dora")


@pytest.mark.parametrize("side", SIDES)
def test_norms_build_no_update(side: str) -> None:
    """LoRA's norms need W and products with its factors: no tensor of O x I appears beside W."""
    base = nn.Linear(512, 768).requires_grad_(False)
    adapter = ALGOS["lora"](Geometry.of(base), 4, {})
    layer = AdaptedLayer("x", base, adapter, 1.0, dora=side)
    built = []
    original = type(adapter).delta
    try:
        type(adapter).delta = lambda self, mask=None: built.append(1) or original(self, mask)
        layer.attach()
        base(torch.randn(5, 512)).sum().backward()
    finally:
        type(adapter).delta = original
    assert not built


@pytest.mark.parametrize("side", SIDES)
def test_start_is_the_base_and_multiplier_0_is_bit_exact(side: str) -> None:
    base = nn.Linear(24, 32).requires_grad_(False)
    x, plain = torch.randn(5, 24), copy.deepcopy(base)
    layer = AdaptedLayer("x", base, ALGOS["lora"](Geometry.of(base), 4, {}), 0.5, dora=side)
    layer.attach()
    torch.testing.assert_close(base(x), plain(x), rtol=1e-6, atol=1e-6)
    randomise(layer)
    layer.runtime.multiplier = 0.0
    assert torch.equal(base(x), plain(x))
    assert layer.new_weight(base.weight) is base.weight


@pytest.mark.parametrize("algo", DORA)
@pytest.mark.parametrize("side", SIDES)
def test_a_module_with_its_rows_in_another_order(side: str, algo: str) -> None:
    """As in diffusers' last modulation: shift and scale stand the other way round than in the layer."""
    base = nn.Linear(24, 48, dtype=torch.float64).requires_grad_(False)
    adapter = ALGOS[algo](Geometry.of(base), 4, options_for(algo, {})).double()
    site = Site(base, ((24, 48), (0, 24)))
    layer = AdaptedLayer("x", [site], adapter, 0.5, runtime=Runtime(MULTIPLIER), dora=side).double()
    randomise(layer)
    x, plain = torch.randn(5, 24, dtype=torch.float64), copy.deepcopy(base)
    expected = definition(layer, site.select_rows(base.weight), MULTIPLIER)  # swapped twice = the layer's order
    layer.attach()
    y = base(x)
    assert_close(y - plain(x), with_weight(plain, site.select_rows(expected))(x) - plain(x), "forward")
    layer.detach()
    layer.merge()
    assert_close(base.weight, site.select_rows(expected), "merge")


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_row_of_zeros_keeps_the_factor_1(side: str) -> None:
    """Or a column: it acts, and learns, as without DoRA."""
    base = nn.Linear(24, 32).double().requires_grad_(False)
    rows = base.weight if side == "output" else base.weight.T
    rows[3] = 0
    layer = AdaptedLayer("x", base, ALGOS["lora"](Geometry.of(base), 4, {}), 0.5, dora=side).double()
    up, down = layer.adapter.up, layer.adapter.down
    with torch.no_grad():
        up.normal_()
        (up[3] if side == "output" else down[:, 3]).zero_()
    layer.load_magnitude(None)  # the lengths as they are: every factor is 1
    layer.attach()
    x, weights = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    y = base(x)
    assert_close(y, x @ base.weight.T + base.bias + 0.5 * x @ down.T @ up.T, "output")
    (y * weights).sum().backward()
    assert_close(up.grad, 0.5 * weights.T @ (x @ down.T), "up")
    assert_close(down.grad, 0.5 * up.T @ weights.T @ x, "down")
    assert (
        bool((up.grad[3] if side == "output" else down.grad[:, 3]).any())
        and layer.magnitude_change.grad.isfinite().all()
    )
    changed = layer.new_weight(base.weight)
    assert not bool((changed if side == "output" else changed.T)[3].any()) and changed.isfinite().all()


def test_base_weights_loaded_between_creation_and_attachment_count() -> None:
    """Some hosts create the network first and load the model's weights afterwards; training is never undone."""
    base = nn.Linear(24, 32).requires_grad_(False)
    layer = AdaptedLayer("x", base, ALGOS["lora"](Geometry.of(base), 4, {}), 0.5, dora="output")
    base.weight.normal_()
    layer.attach()
    torch.testing.assert_close(layer.magnitude.flatten(), base.weight.norm(dim=1))
    with torch.no_grad():
        layer.magnitude_change.add_(1)
    kept = layer.magnitude.clone()
    layer.detach()
    layer.attach()
    assert torch.equal(layer.magnitude, kept)


@pytest.mark.parametrize("side", SIDES)
def test_module_dropout_leaves_out_the_whole_change(side: str) -> None:
    layer = single("linear", "lora", side)
    layer.dropouts = Dropouts(module_dropout=0.5)
    plain, x = copy.deepcopy(layer.base), make_input("linear")
    learn_lengths(layer)
    layer.attach()
    whole = {False: plain(x), True: with_weight(plain, layer.new_weight(plain.weight))(x)}
    seen = set()
    for _ in range(20):
        y = layer.base(x)
        seen.add(next(on for on, wanted in whole.items() if torch.allclose(y, wanted)))
    assert seen == {False, True}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("algo", DORA)
def test_compiled_without_a_graph_break(algo: str, side: str) -> None:
    """The norm reads the base weight in every pass: that, too, must be something that dynamo can follow."""
    torch._dynamo.reset()
    layer = single("linear", algo, side)
    x = make_input("linear")
    layer.attach()
    layer.eval()
    wanted = layer.base(x)
    assert_close(torch.compile(layer.base, fullgraph=True, backend="eager")(x), wanted, "compiled")


@pytest.mark.parametrize("side", SIDES)
def test_one_multiplier_per_sample_and_checkpointing(side: str) -> None:
    values = torch.tensor([0.25, -0.5], dtype=torch.float64)
    layer = single("conv_3x3", "lora", side, values)
    plain, x = copy.deepcopy(layer.base), make_input("conv_3x3")
    layer.attach()
    y = checkpoint(layer.base, x, use_reentrant=False)
    for i, value in enumerate(values.tolist()):
        wanted = with_weight(plain, layer.new_weight(plain.weight, value))(x[i : i + 1])
        assert_close(y[i : i + 1], wanted, f"sample {i}")


def test_two_networks_on_one_layer_are_two_merges() -> None:
    base = make_layer("linear")
    x, plain, layers = make_input("linear"), copy.deepcopy(base), []
    W = plain.weight
    for side in SIDES:
        adapter = ALGOS["lora"](Geometry.of(base), 4, {}).double()
        randomise(adapter)
        layer = AdaptedLayer("x", base, adapter, 0.75, runtime=Runtime(0.6), dora=side).double()
        layer.load_magnitude(torch.rand_like(layer.magnitude) + 0.5)
        layers.append(layer)
        layer.attach()
    y = base(x)
    for layer in layers:
        W = layer.new_weight(W)
    assert_close(y, with_weight(plain, W)(x), "one above the other")


def network(**kwargs: str) -> tuple[Any, nn.Module]:
    unet = sd_unet()
    made = networks.lora.create_network(1.0, 4, 2, None, None, unet, **kwargs)
    made.apply_to(None, unet, False, True)
    return made, unet


@pytest.mark.sweep(2)
@pytest.mark.parametrize("algo", DORA)
@pytest.mark.parametrize("side", ["True", "False"])
def test_files_load_with_and_without_the_arguments(algo: str, side: str, tmp_path: Path) -> None:
    steady = {name: str(value) for name, value in data_of(algo).steady.items()}
    made, unet = network(algo=algo, use_dora="True", wd_on_output=side, conv_dim="2", **steady)
    randomise_network(made)
    wanted = draw(unet).detach()
    file = str(tmp_path / "a.safetensors")
    made.save_weights(file, None, {})
    magnitudes = [t for k, t in codec.encode(made.adapted_layers).items() if k.endswith("dora_scale")]
    assert len(magnitudes) == len(made.adapted_layers) and all(t.dim() in (2, 4) for t in magnitudes)
    other, other_unet = network(algo=algo, use_dora="True", wd_on_output=side, conv_dim="2", **steady)
    other.load_weights(file)
    torch.testing.assert_close(draw(other_unet), wanted)
    fresh = sd_unet()
    loaded, weights = networks.lora.create_network_from_weights(1.0, file, None, None, fresh)
    loaded.apply_to(None, fresh)
    torch.testing.assert_close(draw(fresh), wanted)
    loaded.detach()
    loaded.merge_to(None, fresh, weights, torch.float32, "cpu")
    torch.testing.assert_close(draw(fresh), wanted, atol=1e-4, rtol=1e-4)


def test_mismatches_between_file_and_network(tmp_path: Path) -> None:
    made, _ = network(use_dora="True")
    randomise_network(made)
    made.save_weights(str(tmp_path / "dora.safetensors"), None, {})
    plain, unet = network()
    randomise_network(plain)
    plain.save_weights(str(tmp_path / "plain.safetensors"), None, {})
    plain.load_weights(str(tmp_path / "dora.safetensors"))  # with a warning, see test_adapter_file
    assert not any(layer.side for layer in plain.adapted_layers)
    with pytest.raises(ValueError, match="give wd_on_output=True"):
        network(use_dora="True", wd_on_output="False")[0].load_weights(str(tmp_path / "dora.safetensors"))
    again, unet = network(use_dora="True")
    before = draw(unet)
    with pytest.raises(ValueError, match="this network expects DoRA but .* has no magnitudes; leave out use_dora=True"):
        again.load_weights(str(tmp_path / "plain.safetensors"))
    assert torch.equal(draw(unet), before), "a file that is refused changes nothing"


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_where_dora_cannot_be(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = networks.lora.plan(4, 1, None, sd_unet(), use_dora="True", **{kind: "0.1"})
    assert any(f"use_dora (it is left on no layer, off on 48 {kind}" in line for line in plan.warnings)
    assert {row.dora for row in plan.trained} == {""}
    with pytest.raises(ValueError, match="wd_on_output has no effect without use_dora"):
        networks.lora.plan(4, 1, None, sd_unet(), wd_on_output="False")
    assert "DoRA on 48 layers" in networks.lora.plan(4, 1, None, sd_unet(), use_dora="True").notes


def test_magnitudes_train_at_the_plain_rate() -> None:
    made, _ = network(use_dora="True", loraplus_lr_ratio="16")
    groups, texts = made.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    magnitudes = {id(layer.magnitude_change) for layer in made.adapted_layers}
    plain = next(g for g, text in zip(groups, texts, strict=True) if "plus" not in text)
    assert magnitudes <= {id(p) for p in plain["params"]} and plain["lr"] == 1e-3


def test_magnitudes_at_a_rate_of_their_own() -> None:
    """A step of SGD moves them by ratio * rate * gradient, also where a layer has its rate from an expression; LoRA+
    and the ratio do not multiply."""
    kwargs = {"use_dora": "True", "network_reg_lrs": ".*attn1.*=0.5", "loraplus_lr_ratio": "4"}
    made, unet = network(**kwargs, dora_lr_ratio="0.1")
    groups, texts = made.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-3)
    rates = {text: group["lr"] for group, text in zip(groups, texts, strict=True)}
    assert rates == {
        "unet": 1e-2, "unet plus": 4e-2, "unet magnitudes": pytest.approx(1e-3),
        "unet lr=0.5": 0.5, "unet plus lr=2": 2.0, "unet magnitudes lr=0.05": pytest.approx(0.05),
    }  # fmt: skip
    draw(unet).square().mean().backward()
    torch.optim.SGD(groups, lr=1.0).step()
    wide = [layer for row, layer in made.layers if "attn1" in row.dotted_name]
    assert wide and all(bool(layer.magnitude_change.grad.any()) for layer in made.adapted_layers)
    for layer in made.adapted_layers:
        rate, change = 0.5 if layer in wide else 1e-2, layer.magnitude_change
        torch.testing.assert_close(change.detach(), -0.1 * rate * change.grad, rtol=1e-5, atol=0)


def test_a_ratio_of_0_leaves_the_magnitudes_alone() -> None:
    made, _ = network(use_dora="True", dora_lr_ratio="0")
    groups, texts = made.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    trained = {id(p) for group in groups for p in group["params"]}
    still = [layer.magnitude_change for layer in made.adapted_layers]
    assert texts == ["unet"] and not any(id(p) in trained or p.requires_grad for p in still)
    plan = networks.lora.plan(4, 1, None, sd_unet(), use_dora="True", dora_lr_ratio="0")
    assert plan.to_json()["totals"]["learning"] == sum(p.numel() for group in groups for p in group["params"])
    assert {row["dora_ratio"] for row in plan.to_json()["rows"] if row["trained"]} == {0.0}
    assert "x1/dora x0" in plan.to_text() and "ratio of the magnitudes 0" in str(plan.why("to_q")[0])


def test_a_ratio_wants_magnitudes() -> None:
    plan = networks.lora.plan(4, 1, None, sd_unet(), dora_lr_ratio="1")
    assert {row.dora_ratio for row in plan.trained} == {1.0}
    with pytest.raises(ValueError, match="dora_lr_ratio has no effect without use_dora"):
        networks.lora.plan(4, 1, None, sd_unet(), dora_lr_ratio="0.5")
    with pytest.raises(ValueError, match="dora_lr_ratio=0.5 has no effect with algo=boft"):
        networks.lora.plan(4, 1, None, sd_unet(), algo="boft", dora_lr_ratio="0.5")
    with pytest.raises(ValueError, match="no argument is called dora_lr: write dora_lr_ratio=0.5"):
        networks.lora.plan(4, 1, None, sd_unet(), use_dora="True", dora_lr="0.5")
