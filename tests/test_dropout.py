"""The three dropouts mean one thing for all algorithms (design decision 11); masks are checked value by value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers_numeric import (
    ALPHA,
    FACTORED,
    FORMS,
    KINDS,
    TOLERANCE,
    Case,
    Zoo,
    assert_close,
    delta_of,
    forced,
    layers_of,
    make_input,
    make_layer,
    make_network,
    named_tensors,
    options_for,
    randomise,
)
from registry import data_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import lokr as lokr_entry
from networks import lora as lora_entry
from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry

every_algo = pytest.mark.parametrize("algo", list(FACTORED))
every_dropout = pytest.mark.parametrize("dropout", ("dropout", "rank_dropout", "module_dropout"))
P = 0.3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def adapted(algo: str, kind: str, dropouts: Mapping[str, float], **options: Any) -> tuple[nn.Module, AdaptedLayer]:
    """A float64 layer with an attached, randomised adapter of scale 0.75 in train mode."""
    base = make_layer(kind)
    adapter = ALGOS[algo](Geometry.of(base), 4, options_for(algo, options)).double()
    randomise(adapter)
    layer = AdaptedLayer(f"lora_unet_{kind}", base, adapter, 0.75, Dropouts(**dropouts), Runtime(1.0))
    layer.attach()
    return base, layer.train()


def masks_of(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """The rank masks [samples, R] of one call: the coefficients of every rank index's own update, solved exactly."""
    with torch.no_grad():
        R, geometry = layer.adapter.mask_size, layer.adapter.geometry
        parts = [geometry.op(x, layer.acting.delta(row)) * layer.scale for row in torch.eye(R, dtype=torch.float64)]
        columns = torch.stack(parts, -1).flatten(1, -2)  # [samples, everything else, R]
        update = layer.update(x).flatten(1)[..., None]
        masks = torch.linalg.lstsq(columns, update).solution
        error = float((columns @ masks - update).abs().max())
        assert error <= TOLERANCE * float(columns.abs().max()), "the update is a weighted sum over its rank indices"
    return masks[..., 0]


# -- rank_dropout


@pytest.mark.parametrize("options", ({}, {"use_tucker": True}), ids=("flat", "tucker"))
@every_algo
def test_a_rank_mask_weighs_the_rank_indices(algo: str, options: dict[str, bool]) -> None:
    """delta(mask) is the definition with one tensor's rank axis weighed: the ground of the tests below."""
    _, layer = adapted(algo, "conv_3x3", {}, **options)
    adapter = layer.acting
    tensors = {key: t.detach() for key, t in named_tensors(adapter, layer.base.weight).items()}
    mask = torch.tensor([0.0, 1.5, 0.0, 2.0, 0.5, 0.0, 1.0, 0.0], dtype=torch.float64)[: adapter.mask_size]
    data, parts = data_of(algo), mask.chunk(adapter.mask_size // adapter.dim)
    axes = data.rank_axes | (data.tucker_axes if adapter.chosen.get("use_tucker") else {})
    for (key, axis), part in zip(axes.items(), itertools.cycle(parts), strict=False):
        shape = [1] * tensors[key].dim()
        shape[axis] = 4
        tensors[key] = tensors[key] * part.reshape(shape)
    assert_close(adapter.delta(mask), delta_of(adapter)(tensors, adapter.geometry.weight_shape), algo)


@pytest.mark.parametrize(
    "kind, options",
    [(kind, {}) for kind in ("linear", "conv1d", "conv_3x3", "conv_grouped")]
    + [(kind, {"use_tucker": True}) for kind in ("conv1d", "conv_3x3", "conv_grouped")],
    ids=lambda value: value if isinstance(value, str) else "tucker" if value else "flat",
)
@every_algo
def test_rank_dropout_factored_masks_per_sample_and_rank_index(algo: str, kind: str, options: dict[str, bool]) -> None:
    """Every mask value is 0 or 1 / (1 - p), drawn per sample and index, equal over tokens and positions."""
    base, layer = adapted(algo, kind, {"rank_dropout": P}, **options)
    if not layer.adapter.laid_out.rank_axis:
        assert algo == "lokr" and kind == "conv_grouped", "only this combination has no rank activation"
        return
    x = make_input(kind, samples=64)
    with forced("factored", layer):
        masks = masks_of(layer, x)
    dropped = masks.abs() < 1e-6
    assert_close(masks[~dropped], torch.full_like(masks[~dropped], 1 / (1 - P)), "kept values", 1e-6)
    # 256 draws: the share of zeros has a standard deviation of 0.029.
    assert abs(float(dropped.double().mean()) - P) < 0.12
    assert len({tuple(row) for row in dropped.int().tolist()}) > 5, "samples have masks of their own"
    assert all(0 < int(column.sum()) < 64 for column in dropped.T), "every rank index is dropped and kept somewhere"


@pytest.mark.parametrize("algo", list(FACTORED))
def test_rank_dropout_materialised_has_one_mask_per_call(algo: str) -> None:
    base, layer = adapted(algo, "linear", {"rank_dropout": P})
    x, seen = make_input("linear", samples=3), []
    with forced("materialised", layer):
        for _ in range(60):
            masks = masks_of(layer, x)
            assert float((masks - masks[:1]).abs().max()) < 1e-6, "one mask for all samples"
            seen.append(masks[0])
    dropped = torch.stack(seen).abs() < 1e-6
    kept = torch.stack(seen)[~dropped]
    assert_close(kept, torch.full_like(kept, 1 / (1 - P)), "kept values", 1e-6)
    assert abs(float(dropped.double().mean()) - P) < 0.13  # 240 draws


@pytest.mark.parametrize("form", FORMS)
@every_algo
def test_rank_dropout_keeps_values_unscaled_on_request(algo: str, form: str) -> None:
    """rank_dropout_scale=False: every mask value is 0 or 1 itself, and both are drawn."""
    _, layer = adapted(algo, "linear", {"rank_dropout": P, "rank_dropout_scale": False})
    x = make_input("linear", samples=8)
    with forced(form, layer):
        masks = torch.cat([masks_of(layer, x) for _ in range(10)])
    kept = masks.round()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert_close(masks, kept, "mask values", 1e-6)


# -- dropout


@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
@every_algo
def test_dropout_is_elementwise_on_the_rank_activation(algo: str, kind: str) -> None:
    """Equal tokens of one sample are dropped apart (a rank mask would treat them alike), also where the materialised
    form is the cheaper one."""
    base, layer = adapted(algo, kind, {"dropout": P})
    shape = KINDS[kind].shape
    axis = 1 if kind == "linear" else -1
    x = make_input(kind).select(axis, 0).unsqueeze(axis).expand(shape).contiguous()
    if kind == "conv_3x3":
        x = torch.ones(shape, dtype=torch.float64)
    for form in FORMS:
        with forced(form, layer), torch.no_grad():
            y = layer.update(x)
            layer.dropouts = Dropouts(rank_dropout=P)
            ranked = layer.update(x)
            layer.dropouts = Dropouts(dropout=P)
        tokens = y[0] if kind == "linear" else y[0, :, 1:-1, 1:-1].flatten(1).T  # away from the padding
        alike = ranked[0] if kind == "linear" else ranked[0, :, 1:-1, 1:-1].flatten(1).T
        assert_close(alike, alike[:1].expand_as(alike), "rank_dropout treats equal tokens alike")
        assert float((tokens - tokens[:1]).abs().max()) > 1e-3 * float(y.abs().max()), form


def test_dropout_values_of_the_rank_activation() -> None:
    """With up = identity the update is the rank activation itself: 0 or h / (1 - p), each element on its own."""
    base = nn.Linear(8, 8).double().requires_grad_(False)
    adapter = ALGOS["lora"](Geometry.of(base), 8).double()
    with torch.no_grad():
        adapter.down.normal_()
        adapter.up.copy_(torch.eye(8))
    layer = AdaptedLayer("x", base, adapter, 0.5, Dropouts(dropout=P), Runtime(1.0))
    layer.attach()
    x = torch.randn(20, 30, 8, dtype=torch.float64)
    with torch.no_grad():
        h = x @ adapter.down.T * 0.5
        ratio = layer.update(x) / h
    dropped = ratio == 0
    assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / (1 - P)), "kept values")
    assert abs(float(dropped.double().mean()) - P) < 0.03  # 4800 draws, standard deviation 0.0066
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        assert bool((dropped.double().mean(others) - P).abs().max() < 0.2), "no axis shares its mask"


@pytest.mark.parametrize("kind", ("linear", "conv1d"))
@pytest.mark.parametrize("dropouts", ({"dropout": P}, {"rank_dropout": P}, {"dropout": P, "rank_dropout": P}), ids=str)
@every_algo
def test_the_mean_over_many_draws_is_the_update(algo: str, kind: str, dropouts: dict[str, float]) -> None:
    """A missing or doubled 1 / (1 - p) would move the mean by 30 %; the draw's own error is about 1 %."""
    base, layer = adapted(algo, kind, dropouts)
    draws = 1500
    x = make_input(kind)[:1]
    with forced("factored", layer), torch.no_grad():
        mean = layer.update(x.expand(draws, *x.shape[1:])).mean(0)
        layer.eval()
        update = layer.update(x)[0]
    share = float((mean * update).sum() / update.square().sum())
    assert share == pytest.approx(1.0, abs=0.06)
    assert float((mean - update).norm() / update.norm()) < 0.15


# -- module_dropout


@pytest.mark.parametrize("form", FORMS)
@every_algo
def test_module_dropout_takes_the_whole_update_of_a_call(algo: str, form: str) -> None:
    base, layer = adapted(algo, "linear", {"module_dropout": P})
    x = make_input("linear")
    plain = torch.nn.functional.linear(x, base.weight, base.bias)
    layer.eval()
    with forced(form, layer), torch.no_grad():
        whole = base(x)
        layer.train()
        outputs = [base(x) for _ in range(400)]
    dropped = [torch.equal(y, plain) for y in outputs]
    for y, gone in zip(outputs, dropped, strict=True):
        assert gone or torch.allclose(y, whole, rtol=1e-12, atol=1e-12), "kept unscaled"
    assert abs(sum(dropped) / 400 - P) < 0.1  # standard deviation 0.023


@pytest.mark.parametrize("kind", ("linear", "conv_3x3", "conv_grouped"))
@pytest.mark.parametrize("form", FORMS)
@every_algo
def test_module_dropout_leaves_every_parameter_a_gradient(algo: str, form: str, kind: str) -> None:
    """A dropped call gives zeros, not None: DDP and fused optimizers see every parameter in every step."""
    base, layer = adapted(algo, kind, {"module_dropout": 1 - 1e-12}, use_scalar=True)
    with forced(form, layer):
        base(make_input(kind)).square().sum().backward()
    for name, p in layer.adapter.named_parameters():
        assert not p.requires_grad or p.grad is not None and not bool(p.grad.any()), name


# -- where dropouts do not act


@every_dropout
@every_algo
def test_dropouts_are_off_in_eval_and_for_inference(algo: str, dropout: str) -> None:
    base, layer = adapted(algo, "linear", {dropout: 0.5})
    x = make_input("linear", samples=8)
    expected = layer.eval() and base(x)
    layer.train()
    assert any(not torch.equal(base(x), expected) for _ in range(20)), "it acts in train mode"
    layer.runtime.for_inference = True
    assert all(torch.equal(base(x), expected) for _ in range(20))
    layer.runtime.for_inference, layer.runtime.sampling = False, True
    assert all(torch.equal(base(x), expected) for _ in range(20))


@pytest.mark.parametrize("options", ({"full_matrix": True}, {}), ids=("full_matrix", "grouped"))
def test_a_layer_without_rank_axis_goes_without(options: dict[str, bool]) -> None:
    """As the plan says, in whichever form; and a dim that only means "whole" costs no mask of that length."""
    kinds = ("linear", "conv_3x3", "conv_grouped") if options else ("conv_grouped",)
    for kind in kinds:
        base = make_layer(kind)
        adapter = ALGOS["lokr"](Geometry.of(base), 10**12 if options else 4, options).double()
        randomise(adapter)
        assert not adapter.laid_out.rank_axis
        layer = AdaptedLayer("x", base, adapter, 1.0, Dropouts(dropout=0.5, rank_dropout=0.5), Runtime(1.0))
        layer.attach()
        x = make_input(kind)
        for form in FORMS:
            with forced(form, layer):
                first = base(x)
                assert all(torch.equal(base(x), first) for _ in range(3)), (kind, form)


# -- through a network on a model


class Recomputed(Zoo):
    """A model that checkpoints its layer, as trainers do with blocks; it can fail on demand."""

    mode: bool | None = None
    fail = False

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.fail:
            raise RuntimeError("out of memory")
        if self.mode is None:
            return super().forward(inputs)
        return {k: checkpoint(m, inputs[k], use_reentrant=self.mode) for k, m in self.named_children()}


def recomputed_network(**dropouts: float) -> tuple[Recomputed, Any, dict[str, Tensor]]:
    model = Recomputed(("linear", "conv_3x3"))
    network = make_network(Case("lora"), model, dropouts=dropouts)
    randomise(network)
    network.attach()
    inputs = {kind: make_input(kind).requires_grad_() for kind, _ in model.named_children()}
    return model, network.train(), inputs


@pytest.mark.parametrize("sample_between", (False, True))
@pytest.mark.parametrize("reentrant", (False, True))
def test_recomputation_sees_the_dropouts_of_its_own_pass(reentrant: bool, sample_between: bool) -> None:
    """Reentrant checkpointing runs layers without gradients in training, which must not pass for sampling; nor may a
    sampling pass between forward and backward turn the recomputation's dropouts off."""
    model, network, inputs = recomputed_network(dropout=0.3, rank_dropout=0.3, module_dropout=0.3)
    found = []
    for model.mode in (None, reentrant):
        torch.manual_seed(5)
        total = sum(y.square().sum() for y in model(inputs).values())
        if sample_between:
            with torch.no_grad():
                model(inputs)
        total.backward()
        found.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    for plain, again in zip(*found, strict=True):
        assert torch.equal(again, plain) or (bool(plain.any()) and not assert_close(again, plain, "gradient", 1e-12))
    assert any(bool(g.any()) for g in found[0])


def test_a_failed_sampling_pass_does_not_turn_training_dropouts_off() -> None:
    model, network, inputs = recomputed_network(dropout=0.5)
    model.fail = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(inputs)
    model.fail = False
    assert not network.runtime.sampling
    first = model(inputs)["linear"]
    assert any(not torch.equal(model(inputs)["linear"], first) for _ in range(3))
    network.detach()
    with torch.no_grad():
        model(inputs)
    assert not network.runtime.sampling, "detached networks leave the model alone"


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    return model.double().requires_grad_(False).train()


def call(unet: nn.Module) -> Tensor:
    """One denoising step on fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    return unet(x, torch.tensor([10, 700]), context).sample


@every_dropout
@pytest.mark.parametrize("entry", (lora_entry, lokr_entry), ids=("lora", "lokr"))
def test_sampling_in_train_mode_has_no_dropout(unet: nn.Module, entry: Any, dropout: str) -> None:
    """Hosts draw sample images without eval(): no_grad at the model's entrance is the sign."""
    network = entry.create_network(1.0, 2, 2.0, None, None, unet, conv_dim=2, conv_alpha=2, **{dropout: 0.5})
    network.apply_to(None, unet, False, True)
    network.double().train()
    randomise(network)
    try:
        network.eval()
        with torch.no_grad():
            expected = call(unet)
        network.train()
        with torch.no_grad():
            assert torch.equal(call(unet), expected), "a sampling pass"
        assert not torch.equal(call(unet), expected), "a training pass"
        with torch.inference_mode():
            assert torch.equal(call(unet), expected), "a sampling pass in inference mode"
        assert not torch.equal(call(unet), expected), "a training pass after it"
        call(unet).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())
    finally:
        network.detach()


def test_recomputation_in_a_real_model(unet: nn.Module) -> None:
    """diffusers' own gradient checkpointing, a sampling pass before the backward."""
    network = lora_entry.create_network(
        1.0, 2, 2.0, None, None, unet, conv_dim=2, dropout=0.2, rank_dropout=0.2, module_dropout=0.2
    )
    network.apply_to(None, unet, False, True)
    network.double().train()
    randomise(network)
    found = []
    try:
        for recompute in (False, True):
            if recompute:
                unet.enable_gradient_checkpointing()
            torch.manual_seed(3)
            loss = call(unet).square().mean()
            with torch.no_grad():
                call(unet)
            loss.backward()
            found.append([p.grad.clone() for p in network.parameters()])
            network.zero_grad()
    finally:
        unet.disable_gradient_checkpointing()
        network.detach()
    size = max(float(g.abs().max()) for g in found[0])
    assert size > 0 and math.isfinite(size)
    for plain, again in zip(*found, strict=True):
        assert float((plain - again).abs().max()) <= 1e-12 * size


def test_helpers_agree_with_the_plan() -> None:
    """The networks above say of each layer what its adapter says."""
    network = make_network(Case("lokr"), Zoo(("linear", "conv_grouped")))
    assert {kind: layer.scale for kind, layer in layers_of(network).items()} == dict.fromkeys(
        ("linear", "conv_grouped"), ALPHA / 4
    )
    assert {row.dotted_name: row.rank_axis for row, _ in network.layers} == {"linear": True, "conv_grouped": False}


# -- by regular expression


def test_dropouts_by_expression_act_on_their_layers(unet: nn.Module) -> None:
    """The first match wins, 0 is one, others have the general value; a mask is 0 or 1 / (1 - p) of the layer's own p.
    In the plan, too."""
    kwargs = {
        "rank_dropout": "0.5",
        "network_reg_rank_dropouts": "{'.*attn1.to_q': 0, '.*attn1.*': 0.25}",
        "network_reg_dropouts": ".*to_out.0=0.2",
        "network_reg_module_dropouts": ".*ff.*=0.1",
    }
    network = lora_entry.create_network(1.0, 4, 2, None, None, unet, **kwargs)
    wanted = {
        row.dotted_name: Dropouts(
            0.2 if row.dotted_name.endswith("to_out.0") else 0.0,
            0.0 if row.dotted_name.endswith("attn1.to_q") else 0.25 if ".attn1." in row.dotted_name else 0.5,
            0.1 if ".ff." in row.dotted_name else 0.0,
        )
        for row, _ in network.layers
    }
    assert {row.dotted_name: layer.dropouts for row, layer in network.layers} == wanted
    assert len({*wanted.values()}) == 6
    network.apply_to(None, unet, False, True)
    network.train().double()
    for row, layer in network.layers:
        p = wanted[row.dotted_name]
        if p.dropout or p.module_dropout or row.kind != "Linear":
            continue
        randomise(layer.adapter)
        x = torch.randn(6, row.shape[1], dtype=torch.float64)
        found = {round(float(value), 6) for value in masks_of(layer, x).flatten()}
        assert found <= {0.0, round(1 / (1 - p.rank_dropout), 6)} and (0.0 in found) == bool(p.rank_dropout), row
    network.detach()
    text = network.plan.to_text()
    assert "dropouts" in text.splitlines()[1] and "dropout 0.2 rank_dropout 0.25" in text
    rows = {row["dotted_name"]: row for row in network.plan.to_json()["rows"]}
    assert all(rows[name].get("rank_dropout", 0) == p.rank_dropout for name, p in wanted.items())
    plan = lora_entry.plan(4, 2, None, unet, **kwargs)
    why = str(plan.why("mid_block.attentions.0.transformer_blocks.0.attn1.to_k")[0])
    assert "rank_dropout: 0.25 by network_reg_rank_dropouts '.*attn1.*' > 0.5 by rank_dropout" in why


def test_dora_stays_plain_where_an_expression_drops_ranks(unet: nn.Module) -> None:
    plan = lora_entry.plan(4, 2, None, unet, use_dora="True", network_reg_rank_dropouts=".*attn1.*=0.25")
    assert {row.dora for row in plan.trained if ".attn1." in row.dotted_name} == {""}
    assert {row.dora for row in plan.trained if ".attn1." not in row.dotted_name} == {"output"}
    assert any("DoRA on" in note and "rank_dropout" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"network_reg_dropouts": "nothing=0.1"}, "network_reg_dropouts: 'nothing' matches no layer"),
        ({"network_reg_rank_dropouts": ".*attn1.*=0.1,.*attn1.to_q=0.2"}, "'.*attn1.to_q' decides no layer"),
        ({"network_reg_dropouts": ".*attn1.*=0.1", "algo": "boft"}, "'.*attn1.*' decides no layer"),
        ({"network_reg_module_dropouts": ".*=1"}, "is too large; it must stay below 1"),
        ({"network_reg_dropouts": ".*=0.1", "rank_dropout_scale": "False"}, "no effect without rank_dropout"),
        ({"audio_dropout": "0.1"}, "network_reg_dropouts="),
    ],
    ids=str,
)
def test_an_expression_that_drops_nothing_is_told(unet: nn.Module, kwargs: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora_entry.plan(4, 2, None, unet, **kwargs)
