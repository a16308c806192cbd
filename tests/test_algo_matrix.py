"""Every algorithm x layer kind x option set: all readings of one formula agree, in float64, to one tolerance.

Cases come from the records and `registry` (helpers_numeric.cases): an algorithm is tested without an edit here.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_numeric import (
    ADDITIVE,
    ALL_KINDS,
    ALPHA,
    FACTORED,
    FORMS,
    KINDS,
    MULTIPLIER,
    Case,
    Zoo,
    assert_close,
    assert_start,
    cases,
    dense_bias,
    dense_update,
    forced,
    layers_of,
    make_input,
    make_layer,
    make_network,
    randomise,
    scale_for,
    with_weight,
)
from registry import data_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.algos import ALGOS, recognise
from networks.files import codec, reader
from networks.files.merge import merged_bias, merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.max_norm import update_norm
from networks.layers.runtime import Runtime
from networks.network.network import Network
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_algo = pytest.mark.parametrize("algo", list(FACTORED))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@functools.lru_cache(maxsize=1)
def _template() -> Zoo:
    return Zoo(tuple(ALL_KINDS))


def zoo(case: Case) -> Zoo:
    """A zoo of its own for the test, with the same weights each time: the layers for which the algorithm is."""
    found = copy.deepcopy(_template())
    for kind in ALL_KINDS.keys() - {*case.kinds}:
        delattr(found, kind)
    return found


def single(
    kind: str, algo: str, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[nn.Module, AdaptedLayer]:
    """A layer and its attached, randomised adapter in fp32 (float64 on a float64 layer)."""
    base = make_layer(kind, dtype)
    adapter = ALGOS[algo](Geometry.of(base), 4, options)
    adapter.to(torch.float64 if dtype == torch.float64 else torch.float32)
    randomise(adapter)
    layer = AdaptedLayer(f"lora_unet_{kind}", base, adapter, scale_for(adapter), Dropouts(), Runtime(MULTIPLIER))
    layer.train(not adapter.spec.stepwise)
    layer.attach()
    return base, layer


def trained(layer: AdaptedLayer) -> list[tuple[str, nn.Parameter]]:
    """Parameters that learn."""
    return [(name, p) for name, p in layer.adapter.named_parameters() if name not in layer.adapter.spec.frozen]


# -- what the matrix itself must cover


@pytest.mark.parametrize("algo", ALGOS)
def test_every_option_changes_the_layout_somewhere(algo: str) -> None:
    """An option set without effect on all these layers would test nothing."""
    geometries = [layer_geometry(module) for module in _template().children()]
    layout = ALGOS[algo].layout
    for case in (c for c in CASES if c.algo == algo):
        for option in case.options:
            if "full_matrix" in case.options and option in ("decompose_both", "use_tucker"):
                continue  # whole factors have nothing to decompose
            if option in data_of(algo).same_shapes:
                continue
            without = {name: value for name, value in case.options.items() if name != option}
            assert any(
                not replace(case, options=without).fits(g)  # others of them go with it alone
                or layout(g, case.dim, **case.options).shapes != layout(g, case.dim, **without).shapes
                for g in geometries
                if case.fits(g)
            ), f"{case}: {option} changes no shapes; if that is right, name it in same_shapes of tests/registry.py"


# -- one formula, many readings


@pytest.mark.sweep(2)
@every_case
def test_forward_and_weights_and_file_agree(case: Case, tmp_path: Path) -> None:
    """Both forms of forward == base op with new_weight == merged layer == merge from the file == the definition."""
    model = zoo(case)
    plain = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    network.save(tmp_path / "adapter.safetensors")
    saved, unknown = codec.decode(reader.read_tensors(tmp_path / "adapter.safetensors")[0])
    assert not unknown
    network.attach()
    inputs = {kind: make_input(kind) for kind in case.kinds}
    outputs: dict[str, dict[str, Tensor]] = {}
    for form in FORMS:
        with forced(form, network), torch.no_grad():
            outputs[form] = model(inputs)
    with torch.no_grad():
        outputs["chosen"] = model(inputs)
    merged = copy.deepcopy(plain)
    layers = layers_of(network)
    with torch.no_grad():
        for kind, layer in layers.items():
            base = plain.get_submodule(kind)
            W = base.weight
            new = layer.new_weight(W)
            assert_close(new - W, dense_update(layer, MULTIPLIER), f"{kind}: new_weight and the definition")
            from_file = merged_weight(saved[layer.lora_name], W, MULTIPLIER, bias_too=True)
            assert_close(from_file - W, new - W, f"{kind}: merge from the file")
            bias = dense_bias(layer, MULTIPLIER)
            if bias is not None:
                assert_close(merged_bias(saved[layer.lora_name], base.bias, MULTIPLIER), bias, f"{kind}: bias, file")
            expected = with_weight(base, new, bias)(inputs[kind]) - base(inputs[kind])
            for form, output in outputs.items():
                assert_close(output[kind] - base(inputs[kind]), expected, f"{kind}: forward ({form})")
    network.detach()
    network.merge()
    with torch.no_grad():
        for kind, output in model(inputs).items():
            base = merged.get_submodule(kind)
            difference = output - base(inputs[kind])
            assert_close(difference, outputs["chosen"][kind] - base(inputs[kind]), f"{kind}: merged into the model")


@pytest.mark.sweep(2)
@every_case
def test_start_is_the_base(case: Case) -> None:
    """Bit for bit, but for the rounding which a record documents (`start_error`)."""
    model = zoo(case)
    inputs = {kind: make_input(kind) for kind in case.kinds}
    before = model(inputs)
    network = make_network(case, model)
    for kind, layer in layers_of(network).items():
        W = model.get_submodule(kind).weight
        assert_start(layer.new_weight(W), W, case.algo, kind)
    network.attach()
    for form in FORMS:
        with forced(form, network):
            after = model(inputs)
        for kind in case.kinds:
            assert_start(after[kind], before[kind], case.algo, f"{kind} ({form})")
    weighed = (y * torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y) for y in after.values())
    sum(y.sum() for y in weighed).backward()  # of lengths alone a rotation learns nothing
    for kind, layer in layers_of(network).items():
        grads = [p.grad for p in layer.adapter.parameters() if p.grad is not None]
        assert any(bool(g.any()) for g in grads), f"{kind}: nothing could ever be learnt"


def gradients(model: Zoo, network: Network, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a random linear function of all outputs, by name, parameters and inputs."""
    leaves = {kind: x.clone().requires_grad_() for kind, x in inputs.items()}
    sum((y * weights[kind]).sum() for kind, y in model(leaves).items()).backward()
    found = {f"input of {kind}": leaf.grad for kind, leaf in leaves.items()}
    found |= {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    network.zero_grad(set_to_none=True)
    assert all(g is not None for g in found.values()), [name for name, g in found.items() if g is None]
    return {name: g for name, g in found.items() if g is not None}


@pytest.mark.sweep(2)
@every_case
def test_gradients_of_both_forms_are_the_definitions(case: Case) -> None:
    """Every parameter and the input get the same, nonzero gradient in both forms, that of the dense formula."""
    model = zoo(case)
    plain = copy.deepcopy(model)
    network = make_network(case, model)
    randomise(network)
    inputs = {kind: make_input(kind) for kind in case.kinds}
    weights = {kind: torch.randn_like(y) for kind, y in plain(inputs).items()}
    network.attach()
    found = {}
    for form in FORMS:
        with forced(form, network):
            found[form] = gradients(model, network, inputs, weights)
    for name, gradient in found["factored"].items():
        assert_close(gradient, found["materialised"][name], f"{name}: factored against materialised")
    leaves = {kind: x.clone().requires_grad_() for kind, x in inputs.items()}
    total = torch.zeros((), dtype=torch.float64)
    for kind, layer in layers_of(network).items():
        base = plain.get_submodule(kind)
        new, bias = {"weight": base.weight + dense_update(layer, MULTIPLIER)}, dense_bias(layer, MULTIPLIER)
        new |= {} if bias is None else {"bias": bias}
        total = total + (torch.func.functional_call(base, new, leaves[kind]) * weights[kind]).sum()
    total.backward()
    expected = {f"input of {kind}": leaf.grad for kind, leaf in leaves.items()}
    expected |= {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert_close(found["factored"][name], gradient, f"{name}: gradient and the definition")


@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
@pytest.mark.parametrize("algo", [name for name, cls in FACTORED.items() if cls.spec.frozen])
def test_frozen_parameters_have_no_gradient_whatever_a_host_switches_on(algo: str, kind: str) -> None:
    base, layer = single(kind, algo)
    layer.requires_grad_(True)
    for form in FORMS:
        with forced(form, layer):
            base(make_input(kind)).square().sum().backward()
        for name in layer.adapter.spec.frozen:
            grad = layer.adapter.get_parameter(name).grad
            assert grad is None, f"{algo}: {name} is frozen, so `delta` and `apply_delta` ask `values` for it ({form})"


@every_case
def test_multiplier_zero_is_the_base_bit_exactly(case: Case) -> None:
    model = zoo(case)
    inputs = {kind: make_input(kind) for kind in case.kinds}
    before, weights = model(inputs), {name: p.clone() for name, p in model.named_parameters()}
    network = make_network(case, model, multiplier=0.0)
    randomise(network)
    network.attach()
    for form in FORMS:
        with forced(form, network):
            for kind, y in model(inputs).items():
                assert torch.equal(y, before[kind]), f"{kind} ({form})"
    network.merge()
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.mark.sweep(2)
@every_case
def test_one_multiplier_per_sample_is_a_loop_over_samples(case: Case) -> None:
    """Two values for a batch of four (guidance stacks the batch twice), in both forms."""
    model = zoo(case)
    network = make_network(case, model)
    randomise(network)
    network.attach()
    inputs = {kind: make_input(kind, samples=4) for kind in case.kinds}  # [6, I] where samples have no token axis
    values = [0.3, -1.5]
    for form in FORMS:
        with forced(form, network), torch.no_grad():
            network.runtime.multiplier = torch.tensor(values, dtype=torch.float64)  # set_multiplier rounds to fp32
            together = model(inputs)
            apart: dict[str, list[Tensor]] = {kind: [] for kind in case.kinds}
            for i in range(6):
                network.set_multiplier(values[i % 2])
                one = {kind: x[i : i + 1] if i < len(x) else x[:1] for kind, x in inputs.items()}
                for kind, y in model(one).items():
                    apart[kind].append(y)
        for kind, y in together.items():
            assert_close(y, torch.cat(apart[kind][: len(y)]), f"{kind} ({form})")


@pytest.mark.sweep(2)
@every_case
def test_state_and_file_round_trips(case: Case, tmp_path: Path) -> None:
    """The live state is lossless, scalar and scale included; a file gives an equal network our output."""
    model = zoo(case)
    network = make_network(case, model)
    randomise(network)
    for layer in network.adapted_layers:
        layer.scale *= scale_for(layer.adapter, 1 / 3)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.save(tmp_path / "adapter.safetensors")
    inputs = {kind: make_input(kind) for kind in case.kinds}
    network.attach()
    expected = model(inputs)
    network.detach()

    other = make_network(case, model)
    randomise(other)
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert [layer.scale for layer in other.adapted_layers] == [layer.scale for layer in network.adapted_layers]
    other.attach()
    for kind, y in model(inputs).items():
        assert torch.equal(y, expected[kind]), f"{kind}: live state"
    other.detach()
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name

    for layer in network.adapted_layers:  # from here on with a scale that a file's fp32 alpha holds exactly
        layer.scale = scale_for(layer.adapter)
    network.save(tmp_path / "exact.safetensors")
    network.attach()
    expected = model(inputs)
    network.detach()
    report = other.load(tmp_path / "exact.safetensors")
    assert len(report.matched) == len(case.kinds) and not report.missing and not report.unexpected
    other.attach()
    for kind, y in model(inputs).items():
        assert_close(y, expected[kind], f"{kind}: file")
    other.detach()
    # Hosts load files through load_state_dict too.
    third = make_network(case, model)
    result = third.load_state_dict(reader.read_tensors(tmp_path / "exact.safetensors")[0])
    assert not result.missing_keys and not result.unexpected_keys
    third.attach()
    for kind, y in model(inputs).items():
        assert_close(y, expected[kind], f"{kind}: file keys as a state dict")


@every_case
def test_layout_and_keys_describe_the_adapter(case: Case) -> None:
    """Layout == parameters; the saved keys are recognised, and describe the layout that they came from."""
    model = zoo(case)
    network = make_network(case, model)
    for kind, layer in layers_of(network).items():
        adapter, geometry = layer.adapter, layer.adapter.geometry
        shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        assert shapes == adapter.laid_out.shapes, kind
        assert adapter.laid_out.parameters == sum(p.numel() for p in adapter.parameters()), kind
        assert adapter.spec.plus & shapes.keys() or not adapter.spec.plus, f"{kind}: LoRA+ has no parameter to act on"
        packed = adapter.pack()
        shown = adapter.spec.shown_rank(packed)
        assert shown == adapter.laid_out.saved_rank, f"{kind}: rank_shows of the record says {shown} where readers look"
        found = recognise(packed)
        assert found is not None and found.spec.file_algo == adapter.spec.file_algo, kind
        dim, options = type(adapter).describe(geometry, packed)
        options |= {"bias": adapter.spec.bias_key in packed} if adapter.spec.bias_key else {}
        described = type(adapter).whole_layout(geometry, dim or case.dim, options)
        scalar = {"scalar": ()} if adapter.scalar is not None else {}
        assert described.shapes | scalar == shapes, kind
        assert described.rank == adapter.laid_out.rank, kind
        # The meta device must be enough to plan and to build.
        with torch.device("meta"):
            type(adapter)(geometry, case.dim, case.options)


@pytest.mark.parametrize("case", [case for case in CASES if case.algo in ADDITIVE], ids=str)
def test_norm_rescale_and_limit(case: Case) -> None:
    """norm() is the Frobenius norm of delta(); max norm shrinks the true update: scale, scalar and all."""
    network = make_network(case, zoo(case))
    randomise(network)
    with torch.no_grad():
        for kind, layer in layers_of(network).items():
            adapter = layer.acting
            delta = adapter.delta().clone()
            assert_close(adapter.norm(), torch.linalg.vector_norm(delta), f"{kind}: norm")
            assert_close(update_norm(layer), true_norm(layer), f"{kind}: norm of the true update")
            adapter.rescale_(0.3)
            assert_close(layer.acting.delta(), 0.3 * delta, f"{kind}: rescale_")
        before = {kind: float(true_norm(layer)) for kind, layer in layers_of(network).items()}
        limit = sorted(before.values())[len(before) // 2] * 0.99
        kept = {kind: layer.acting.delta() for kind, layer in layers_of(network).items() if before[kind] < limit}
        count, mean, largest = network.limit_norms(limit)
        assert count == len(before) - len(kept)
        after = {kind: float(true_norm(layer)) for kind, layer in layers_of(network).items()}
        for kind, norm in after.items():
            assert norm == pytest.approx(min(before[kind], limit), rel=1e-6), kind  # norms are read in fp32
        assert largest == pytest.approx(limit, rel=1e-6)
        assert mean == pytest.approx(sum(after.values()) / len(after), rel=1e-6)
        for kind, delta in kept.items():
            assert torch.equal(layers_of(network)[kind].acting.delta(), delta), f"{kind}: below the limit"


def true_norm(layer: AdaptedLayer) -> Tensor:
    """Of W' - W at multiplier 1."""
    W = layer.base.weight
    return torch.linalg.vector_norm(layer.new_weight(W, 1.0) - W)


@pytest.mark.parametrize("dim", (3, 5))
@every_algo
def test_rs_lora_with_an_inexact_alpha_loses_fp32_rounding_only(algo: str, dim: int, tmp_path: Path) -> None:
    """alpha * sqrt(dim) is saved in fp32: the strength in a file is right to half a unit of its last place."""
    base = make_layer("linear")
    adapter = ALGOS[algo](Geometry.of(base), dim).double()
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, scale_for(adapter, ALPHA / dim**0.5))
    saved = codec.decode(codec.encode([layer]))[0]["lora_unet_x"]
    update = layer.new_weight(base.weight) - base.weight
    off = merged_weight(saved, base.weight) - base.weight - update
    assert float(off.abs().max() / update.abs().max()) <= 2**-24 + 1e-12


# -- inputs of other shapes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("conv")])
@every_algo
def test_an_unbatched_convolution_input_works(algo: str, kind: str) -> None:
    """torch's convolutions take [C, *space] too; a rank mask must not fall on a spatial axis then."""
    base, layer = single(kind, algo)
    x = make_input(kind)[:1]
    for form in FORMS:
        with forced(form, layer), torch.no_grad():
            assert_close(base(x[0]), base(x)[0], form)
            layer.dropouts = Dropouts(rank_dropout=0.5)
            torch.manual_seed(3)
            dropped = base(x)[0]
            torch.manual_seed(3)
            assert_close(base(x[0]), dropped, f"{form} with rank_dropout")
            layer.dropouts = Dropouts()


@every_algo
def test_a_linear_takes_any_number_of_axes(algo: str) -> None:
    base, layer = single("linear", algo)
    x = torch.randn(2, 3, 2, base.in_features, dtype=torch.float64)
    expected = torch.func.functional_call(base_of(base, layer), {"weight": layer.new_weight(base.weight)}, x)
    for form in FORMS:
        with forced(form, layer):
            assert_close(base(x), expected, form)
            assert_close(base(x[0, 0, 0]), expected[0, 0, 0], f"{form}, one vector")
            assert base(x[:0]).shape == expected[:0].shape, f"{form}, no sample at all"


def base_of(base: nn.Module, layer: AdaptedLayer) -> nn.Module:
    """The layer as it is without its adapter."""
    layer.detach()
    twin = copy.deepcopy(base)
    layer.attach()
    return twin


def test_set_multiplier_takes_numbers_lists_and_tensors() -> None:
    model = Zoo(("linear",))
    network = make_network(Case("lora"), model)
    randomise(network)
    network.attach()
    x = {"linear": make_input("linear")}
    for given in (0.5, [0.5], torch.tensor(0.5), torch.tensor([0.5, 0.5]), (0.5, 0.5)):
        network.set_multiplier(0.5)
        expected = model(x)["linear"]
        network.set_multiplier(given)
        assert_close(model(x)["linear"], expected, str(given))


@every_algo
def test_a_wrong_number_of_multipliers_is_an_error(algo: str) -> None:
    base, layer = single("linear", algo)
    layer.runtime.multiplier = torch.tensor([1.0, 0.5, 0.25])
    with pytest.raises(ValueError, match="3 multipliers for a batch of 2"):
        base(make_input("linear"))
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()


# -- attachment


@every_algo
def test_attach_and_detach_leave_no_trace(algo: str) -> None:
    base, layer = single("linear", algo)
    names = [name for name, _ in itertools.chain(base.named_parameters(), base.named_buffers(), base.named_modules())]
    assert names == ["weight", "bias", ""], "nothing may be added below the base model"
    assert not any("base" in name for name, _ in layer.named_parameters())
    x = make_input("linear")
    adapted = base(x)
    layer.attach()
    assert torch.equal(base(x), adapted), "attached twice counts once"
    layer.detach()
    assert "forward" not in vars(base) and base.forward.__func__ is type(base).forward
    assert not torch.equal(base(x), adapted)
    layer.detach()
    layer.attach()
    assert torch.equal(base(x), adapted)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_networks_detach_in_any_order(order: tuple[int, ...]) -> None:
    base, first = single("linear", "lora")
    stack = [first]
    for _ in range(2):
        adapter = ALGOS["lokr"](first.adapter.geometry, 4).double()
        randomise(adapter)
        stack.append(AdaptedLayer("lora_unet_x", base, adapter, 0.75, Dropouts(), Runtime(MULTIPLIER)))
        stack[-1].attach()
    x = make_input("linear")
    plain = torch.nn.functional.linear(x, base.weight, base.bias)
    left = list(stack)
    for i in order:
        assert_close(base(x), plain + sum(layer.update(x) for layer in left), f"{len(left)} attached")
        stack[i].detach()
        left.remove(stack[i])
    assert "forward" not in vars(base)
    assert torch.equal(base(x), plain)


def test_detach_keeps_the_forward_that_a_host_had_put_in_place() -> None:
    base = make_layer("linear")
    original = base.forward
    wrapped = lambda x: original(x) * 2  # noqa: E731
    base.forward = wrapped
    layer = AdaptedLayer("lora_unet_x", base, ALGOS["lora"](Geometry.of(base), 4).double(), 1.0)
    layer.attach()
    x = make_input("linear")
    assert torch.equal(base(x), original(x) * 2)
    layer.detach()
    assert base.forward is wrapped


# -- precision


@every_algo
@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
def test_fp32_adapter_on_a_bf16_base(algo: str, kind: str) -> None:
    """Works without autocast, returns the base's dtype, and trains the fp32 parameters."""
    base, layer = single(kind, algo, torch.bfloat16)
    x = make_input(kind, torch.bfloat16)
    layer.scale = 1 / 16
    exact = layer.adapter.geometry.op(x.double(), layer.acting.delta().detach().double()) * MULTIPLIER / 16
    for form in FORMS:
        with forced(form, layer):
            y = base(x)
            update = layer.update(x)
        assert y.dtype == torch.bfloat16
        assert float((update.double() - exact).norm() / exact.norm()) < 0.02, form
        y.float().sum().backward()
        for name, p in trained(layer):
            assert p.dtype == torch.float32 and p.grad is not None and bool(p.grad.any()), f"{name} ({form})"
        layer.zero_grad(set_to_none=True)


@every_algo
@pytest.mark.parametrize("base_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
def test_autocast(algo: str, base_dtype: torch.dtype, kind: str) -> None:
    """Output and its dtype are the base's under autocast; parameter gradients stay fp32."""
    base, layer = single(kind, algo, base_dtype)
    layer.scale = 1 / 16
    for x_dtype, form in itertools.product((torch.float32, torch.bfloat16), FORMS):
        x = make_input(kind, x_dtype)
        exact = layer.adapter.geometry.op(x.double(), layer.acting.delta().detach().double()) * MULTIPLIER / 16
        with forced(form, layer), torch.autocast("cpu", torch.bfloat16):
            y, update = base(x), layer.update(x)
        assert y.dtype == torch.bfloat16
        assert float((update.double() - exact).norm() / exact.norm()) < 0.02, (x_dtype, form)
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in trained(layer))
        layer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("adapter_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("base_dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("algo", "use_scalar"),
    [
        (name, on)
        for name, cls in FACTORED.items()
        for on in (False, True)
        if not on or "use_scalar" in cls.spec.options
    ],
)
def test_merge_rounds_once(algo: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, use_scalar: bool) -> None:
    """W' is computed in fp32 or wider, also when the host has cast the network (gen_img does), and rounded once."""
    base, layer = single("conv_3x3", algo, base_dtype, **({"use_scalar": True} if use_scalar else {}))
    layer.to(adapter_dtype)
    W = base.weight.clone()
    wide = copy.deepcopy(layer.adapter).double()
    scalar = 1.0 if wide.scalar is None else float(wide.scalar)
    exact = W.double() + wide.weight_change(W.double(), 1.0).detach() * layer.scale * MULTIPLIER * scalar
    layer.merge()
    assert base.weight.dtype == base_dtype
    # Rounding the exact value gives the same, but for values within fp32 noise of a tie.
    same = (base.weight == exact.to(base_dtype)).double().mean()
    assert float(same) > 0.999
    if use_scalar and adapter_dtype == torch.bfloat16:
        return  # saving rounds factor * scalar to the parameters' dtype
    # The file alone gives the same bits as the live merge, or rounds a tie to the other side.
    saved = codec.decode(codec.encode([layer]))[0][layer.lora_name]
    same = (merged_weight(saved, W.float(), MULTIPLIER).to(base_dtype) == base.weight).double().mean()
    assert float(same) == 1.0 if not use_scalar else float(same) > 0.999


def test_merge_into_a_weight_that_cannot_be_written_is_refused() -> None:
    base, layer = single("linear", "lora", torch.float32)
    base.weight = nn.Parameter(base.weight.to(torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="int32"):
        layer.merge()


# -- merge for the time being


def two_networks(dtype: torch.dtype) -> tuple[Zoo, list[Network]]:
    model = Zoo(("linear", "conv_3x3"), dtype)
    networks = [make_network(Case(algo), model) for algo in ("lora", "lokr")]
    for network in networks:
        randomise(network)
        network.attach()
    return model, networks


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
@pytest.mark.parametrize("backup_first", (True, False))
def test_backup_pre_calculation_and_restore(dtype: torch.dtype, order: tuple[int, int], backup_first: bool) -> None:
    """Bit-exact with two networks on one model, in any order of restoring, repeatedly."""
    model, networks = two_networks(dtype)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    inputs = {kind: make_input(kind, dtype) for kind, _ in model.named_children()}
    adapted = model(inputs)
    if backup_first:
        for network in networks:
            network.backup_weights()
    for _ in range(2):
        for network in networks:
            network.pre_calculation()
        assert not torch.equal(model.linear.weight, weights["linear.weight"])
        if dtype == torch.float64:
            for kind, y in model(inputs).items():
                assert_close(y, adapted[kind], f"{kind}: merged for the time being")
        for i in order:
            networks[i].restore_weights()
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name]), name
        for kind, y in model(inputs).items():
            assert torch.equal(y, adapted[kind]), kind


def test_a_new_base_weight_after_restore_is_not_overwritten_by_an_old_backup() -> None:
    model, (network, _) = two_networks(torch.float64)
    network.pre_calculation()
    network.restore_weights()
    with torch.no_grad():
        model.linear.weight.fill_(2.0)  # a host swaps experts or merges another adapter
    network.pre_calculation()
    network.restore_weights()
    assert bool((model.linear.weight == 2.0).all())
    network.restore_weights()
    assert bool((model.linear.weight == 2.0).all())


# -- recomputation and compilation


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
@every_algo
def test_checkpointing_repeats_the_dropouts(algo: str, kind: str, form: str, reentrant: bool) -> None:
    """Gradients with recomputation are those without, at the same seed, dropouts on."""
    base, layer = single(kind, algo)
    layer.dropouts = Dropouts(dropout=0.3 if form == "factored" else 0.0, rank_dropout=0.4, module_dropout=0.2)
    x = make_input(kind)
    found = []
    for run in (base, lambda t: checkpoint(base, t, use_reentrant=reentrant)):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        with forced(form, layer):
            y = run(leaf)
            torch.rand(5)  # the generator has moved on when the backward recomputes
            y.square().sum().backward()
        found.append([leaf.grad, *(p.grad for _, p in trained(layer))])
        layer.zero_grad(set_to_none=True)
    for plain, recomputed in zip(*found, strict=True):
        assert plain is not None and recomputed is not None
        assert torch.equal(plain, recomputed)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
@every_algo
def test_compile_in_one_graph(algo: str, kind: str) -> None:
    """torch.compile without a graph break, forward and backward, for both forms and with dropouts on."""
    base, layer = single(kind, algo)
    x = make_input(kind)

    def gradients_of(run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        layer.zero_grad(set_to_none=True)
        run(x).square().sum().backward()
        return [p.grad for _, p in trained(layer)]

    compiled = torch.compile(base, fullgraph=True, backend="eager")
    assert_close(compiled(x), base(x), kind)
    for plain, graph in zip(gradients_of(base), gradients_of(compiled), strict=True):
        assert plain is not None and graph is not None
        assert_close(graph, plain, kind)
    layer.dropouts = Dropouts(0.3, 0.3, 0.3)
    again = torch.compile(base, fullgraph=True, backend="eager")
    assert bool(again(x).isfinite().all())
