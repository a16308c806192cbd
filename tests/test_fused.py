"""One function over base and adapter: equal to the plain path, whatever is done to the layer around it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from helpers_numeric import (
    FOR_LINEARS,
    KINDS,
    Case,
    assert_close,
    cases,
    learn_lengths,
    make_input,
    make_layer,
    randomise,
    scale_for,
)
from registry import data_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.over_base import Beside
from networks.layers.runtime import Runtime
from networks.tensors.fused import unfused
from networks.tensors.geometry import Geometry

OPEN = ("linear", "linear_no_bias", "conv1d", "conv_1x1", "conv_3x3", "conv_strided_dilated", "conv3d")
CLOSED = ("conv_grouped", "conv_same", "conv_reflect", "conv_same_circular")
# Ways of an algorithm that have no function over the base: (algorithm, one of its options).
PLAIN = {(algo, "use_scalar") for algo in ALGOS}
PLAIN |= {(algo, "use_tucker") for algo in ("lora", "lora_fa")}  # three convolutions in a row, beside the base
every_algorithm = pytest.mark.parametrize("algo", FOR_LINEARS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def adapted(
    kind: str | nn.Module,
    algo: str = "lora",
    dtype: torch.dtype = torch.float64,
    dim: int = 4,
    dora: str = "",
    multiplier: float = 1.0,
    **options: object,
) -> tuple[nn.Module, AdaptedLayer]:
    """A layer and its attached, randomised adapter: in fp32, or in float64 on such a layer."""
    base = make_layer(kind, dtype) if isinstance(kind, str) else kind
    geometry = Geometry.of(base)
    assert geometry is not None
    adapter = ALGOS[algo](geometry, max(dim, data_of(algo).least_dim), {**data_of(algo).steady, **options})
    randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, scale_for(adapter), runtime=Runtime(multiplier), dora=dora)
    layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    layer.train(not adapter.spec.stepwise)
    layer.attach()
    if dora:
        learn_lengths(layer)
    return base, layer


def last_form(layer: AdaptedLayer) -> object:
    """Of its last kind of call; None = by plain autograd."""
    return [None, *layer.sites[0].forms.values()][-1]


def is_fused(layer: AdaptedLayer) -> bool:
    """Whether that was one function over base and adapter."""
    return last_form(layer) is not None and not isinstance(last_form(layer), Beside)


def has_function(layer: AdaptedLayer) -> bool:
    """Whether it is to have one: columns are in the weight alone, of which a pass makes another, whatever is open."""
    return bool(getattr(layer.adapter, "side", "") != "columns")


def passed(base: nn.Module, layer: AdaptedLayer, x: Tensor, call: object = None) -> list[Tensor]:
    """Output, and gradients of the input and of all that learns, which must be there."""
    run = base if call is None else call
    x = x.detach().requires_grad_()
    y = run(x)  # type: ignore[operator]
    seen = [x, *(p for _, p in layer.learnt())]
    weights = torch.arange(y.numel(), dtype=torch.float64).sin().to(y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, seen, weights)]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str, tolerance: float = 1e-9) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if bool(other.any()) or bool(one.any()):
            assert_close(one, other, f"{what}: {['output', 'input'][number] if number < 2 else number - 2}", tolerance)


CASES = [case for case in cases() if case.algo in FOR_LINEARS and not case.rs_lora]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_paths_are_equal(case: Case) -> None:
    """In float64, at a multiplier other than 1; and which of them is taken."""
    for kind in (kind for kind in case.kinds if kind in KINDS):
        base, layer = adapted(kind, case.algo, dim=case.dim, multiplier=0.7, **case.options)
        x = make_input(kind)
        found = passed(base, layer, x)
        fused = is_fused(layer)
        with unfused():
            wanted = passed(base, layer, x)
        assert_same(found, wanted, kind)
        if kind in CLOSED:
            assert not fused, kind
        elif not any((case.algo, option) in PLAIN for option in case.options):
            assert fused == has_function(layer), f"{kind}: no function; if that is right, name the option in PLAIN"


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("algo", [name for name in FOR_LINEARS if "use_dora" in ALGOS[name].spec.features])
def test_both_paths_are_equal_with_magnitudes(algo: str, side: str) -> None:
    for kind in OPEN:
        base, layer = adapted(kind, algo, dora=side)
        x = make_input(kind)
        found = passed(base, layer, x)
        assert is_fused(layer) == has_function(layer), kind
        with unfused():
            assert_same(found, passed(base, layer, x), kind)


@every_algorithm
def test_gradients_by_differences(algo: str) -> None:
    makes = {
        "linear": (nn.Linear(12, 8), (3, 12)),
        "conv": (nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 3, 4)),
    }
    sides = ("", "output", "input") if "use_dora" in ALGOS[algo].spec.features else ("",)
    for (kind, (made, shape)), dora in itertools.product(makes.items(), sides):
        base, layer = adapted(copy.deepcopy(made).double().requires_grad_(False), algo, dim=2, dora=dora)
        learnt = dict(layer.learnt())
        names = [name for name in learnt if not dora or "magnitude" in name]  # a norm has no gradient, by definition

        def call(x: Tensor, *values: Tensor, base=base, layer=layer, names=names) -> Tensor:
            for name, value in zip(names, values, strict=True):
                owner, _, last = name.rpartition(".")
                layer.get_submodule(owner)._parameters[last] = value
            return base(x)

        given = [learnt[name].detach().clone().requires_grad_() for name in names]
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(call, (x, *given), fast_mode=True), f"{kind} {dora}"
        assert is_fused(layer) == has_function(layer), kind


HALVES = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.bfloat16, False)]


@every_algorithm
@pytest.mark.parametrize("dtype, autocast", HALVES, ids=str)
def test_it_is_at_least_as_near_to_the_exact_result(algo: str, dtype: torch.dtype, autocast: bool) -> None:
    """As the plain path, in the precisions in which people train: relative errors of outputs and gradients, on the mean
    of some layers, as those of few small tensors vary by a half."""
    errors, even = torch.zeros(2), algo == "boft"  # whose stages round as often in both: told apart by many layers only
    for kind in ("linear", "linear_no_bias", "conv_3x3", "conv_1x1") * (16 if even else 2):
        base, layer = adapted(kind, algo, dtype)
        x = make_input(kind, dtype)
        exact_base = copy.deepcopy(base)
        del exact_base.forward
        exact = AdaptedLayer(
            "x", exact_base.double(), copy.deepcopy(layer.adapter).double(), layer.scale, runtime=Runtime(1.0)
        )
        exact.train(layer.training)
        exact.attach()
        with unfused():
            wanted = passed(exact_base, exact, x.double())
        half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        with torch.autocast("cpu", dtype=half, enabled=autocast):
            found = passed(base, layer, x)
            assert is_fused(layer) == has_function(layer)
            with unfused():
                plain = passed(base, layer, x)
        for one, other, best in zip(found, plain, wanted, strict=True):
            assert one.dtype == other.dtype
            size = best.square().mean().sqrt()
            errors += torch.stack([(t.double() - best).square().mean().sqrt() / size for t in (one, other)])
    assert errors[0] <= errors[1] * (1.002 if even else 1) + 1e-6, errors  # on 64 layers BOFT's ratio is .9999


@pytest.mark.parametrize("autocast", [True, False])
def test_a_change_below_the_digits_of_the_weight_acts(autocast: bool) -> None:
    """Added to a weight in half precision it would be rounded away; where its parts agree, the output has it."""
    linear = nn.Linear(256, 256, dtype=torch.bfloat16).requires_grad_(False)
    _, layer = adapted(linear, "full", torch.bfloat16)
    x = torch.rand(16, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.adapter.get_parameter("diff").copy_(2**-11 * linear.weight.abs().mean())
        layer.adapter.get_parameter("diff_b").zero_()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = linear(x).double()
        assert is_fused(layer)
        layer.runtime.multiplier = 0.0
        found -= linear(x).double()
    wanted = x.double() @ layer.adapter.get_parameter("diff").double().T
    assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(layer.scale, rel=0.1)


# -- what hosts do around a layer


@every_algorithm
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing(algo: str, reentrant: bool) -> None:
    base, layer = adapted("linear", algo)
    x = make_input("linear")
    wanted = passed(base, layer, x)

    def call(x: Tensor) -> Tensor:
        return checkpoint(base, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    x = x.detach().requires_grad_()
    y = call(x)
    layer.zero_grad()
    y.backward(torch.arange(y.numel(), dtype=torch.float64).sin().view_as(y))
    assert_same([y, x.grad, *(p.grad for _, p in layer.learnt())], wanted, algo)  # type: ignore[list-item]


@every_algorithm
def test_weights_that_are_moved_between_the_passes(algo: str) -> None:
    """Block swap binds other memory to the parameter, and uses the old one for another block."""
    for kind in ("linear", "conv_3x3"):
        base, layer = adapted(kind, algo)
        x = make_input(kind).requires_grad_()
        wanted = passed(base, layer, x)
        if not has_function(layer):  # PyTorch's own Linear remembers the memory of its weight
            continue
        y = base(x)
        old, home = base.weight.data, base.weight.data.clone()
        base.weight.data = torch.full_like(old, torch.nan)
        old.zero_()
        base.weight.data = home
        seen = [x, *(p for _, p in layer.learnt())]
        found = torch.autograd.grad(y, seen, torch.arange(y.numel(), dtype=torch.float64).sin().view_as(y))
        assert_same([y, *found], wanted, kind)


@every_algorithm
def test_outputs_can_be_changed_in_place(algo: str) -> None:
    """As hosts do: residuals are added, activations have inplace=True."""
    for kind in ("linear", "linear_no_bias", "conv_3x3"):
        base, layer = adapted(kind, algo)
        x = make_input(kind)
        wanted = passed(base, layer, x, lambda x, base=base: base(x) * 2 + 1)
        assert_same(passed(base, layer, x, lambda x, base=base: base(x).mul_(2).add_(1)), wanted, kind)


@every_algorithm
def test_inputs_and_gradients_of_any_layout(algo: str) -> None:
    """Of one sample, an image whose axes were swapped is tokens without a copy, and so is its gradient."""

    def swapped(t: Tensor) -> Tensor:
        return t.transpose(1, -1).contiguous().transpose(1, -1)

    def call(x: Tensor) -> Tensor:
        y: Tensor = base(x)
        y.register_hook(swapped)
        return y

    for case in (case for case in CASES if case.algo == algo and len(case.options) <= 1):
        for kind in {"linear", "conv_3x3"} & {*case.kinds}:
            base, layer = adapted(kind, algo, dim=case.dim, **case.options)
            x = make_input(kind, samples=1)
            wanted = passed(base, layer, x)
            assert_same(passed(base, layer, swapped(x), call), wanted, f"{case} on {kind}")


@every_algorithm
def test_a_base_that_learns_too_keeps_its_gradient(algo: str) -> None:
    base, layer = adapted("linear", algo)
    for learning in (base.bias, base.weight):
        base(make_input("linear"))
        learning.requires_grad_()
        y = base(make_input("linear"))
        assert not is_fused(layer)
        y.sum().backward()
        assert learning.grad is not None and bool(learning.grad.any())
        learning.requires_grad_(False)


@every_algorithm
def test_an_input_without_gradient(algo: str) -> None:
    """The first layers of a model; and a pass without gradients."""
    for kind in ("linear", "conv_3x3"):
        base, layer = adapted(kind, algo)
        x = make_input(kind)
        wanted = passed(base, layer, x)
        y = base(x)
        seen = [p for _, p in layer.learnt()]
        weights = torch.arange(y.numel(), dtype=torch.float64).sin().view_as(y)
        assert_same([y, wanted[1], *torch.autograd.grad(y, seen, weights)], wanted, kind)
        with torch.no_grad():
            assert torch.equal(base(x), y)
        for p in seen:
            p.requires_grad_(False)
        alone = torch.autograd.grad(base(x.requires_grad_()), x, weights)
        assert_same([y, *alone], wanted[:2], kind)


@every_algorithm
def test_a_copy_is_a_layer_of_its_own(algo: str) -> None:
    base, layer = adapted("linear", algo)
    x = make_input("linear")
    before = base(x)
    holder = nn.ModuleList([base, layer])
    twin_base, twin = copy.deepcopy(holder)
    randomise(twin)
    assert torch.equal(base(x), before) and not torch.equal(twin_base(x), before)
    assert twin.sites[0].module is twin_base


def switches(base: nn.Module, layer: AdaptedLayer) -> Iterator[tuple[str, object]]:
    """Things that change between two calls of one shape."""
    yield "strength", lambda: setattr(layer.runtime, "multiplier", 0.3)
    yield "one for each sample", lambda: setattr(layer.runtime, "multiplier", torch.tensor([0.3, 2.0]))
    yield "scale", lambda: setattr(layer, "scale", 2.0)
    yield "LoRA+", lambda: layer.adapter.fold_plus_(4.0)
    yield "weight", lambda: setattr(base, "weight", nn.Parameter(base.weight * 2, requires_grad=False))
    yield "no bias", lambda: setattr(base, "bias", None)
    yield "forward", lambda: setattr(base, "bias", nn.Parameter(torch.ones(base.out_features).double(), False))
    yield "off", lambda: setattr(layer.runtime, "enabled", False)


def test_what_changes_between_calls_is_seen() -> None:
    base, layer = adapted("linear")
    x = make_input("linear")
    for what, change in switches(base, layer):
        base(x)
        change()  # type: ignore[operator]
        found = base(x)
        with unfused():
            assert_close(found, base(x), what)


def test_networks_on_one_layer_and_forwards_of_others() -> None:
    """Whatever lies between the base's own forward and the adapter, or on top of it, acts; and goes."""
    base, layer = adapted("linear")
    x = make_input("linear")
    alone = base(x)
    upper = AdaptedLayer("x", base, copy.deepcopy(layer.adapter), layer.scale, runtime=Runtime(1.0))
    upper.attach()
    both = passed(base, upper, x)
    assert isinstance(last_form(upper), Beside) and is_fused(layer)
    with unfused():
        assert_same(both, passed(base, upper, x), "two")
    layer.detach()
    assert_close(base(x), alone, "the upper one alone")
    assert is_fused(upper)
    upper.detach()
    own = base.forward
    base.forward = lambda x: own(x) * 3
    layer.attach()
    assert_close(base(x) - alone, 2 * own(x), "a host's forward below")
    found = passed(base, layer, x)
    assert isinstance(last_form(layer), Beside)
    with unfused():
        assert_same(found, passed(base, layer, x), "a host's forward below")


@pytest.mark.parametrize("autocast", [True, False])
def test_beside_a_base_of_few_bits(autocast: bool) -> None:
    """float8 under autocast as with --fp8_base, and an output in another precision than the input's."""
    base, layer = adapted("linear", dtype=torch.float32)
    x = make_input("linear", torch.bfloat16)
    if autocast:
        base.to(torch.float8_e4m3fn)
    else:
        own = copy.deepcopy(base)
        del own.forward
        layer.detach()
        base.forward = lambda x: own(x.float())
        layer.attach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = passed(base, layer, x)
        assert isinstance(last_form(layer), Beside)
        with unfused():
            plain = passed(base, layer, x)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype
        assert_close(one.float(), other.float(), "beside", 2e-2)


def test_second_derivatives_are_refused_or_right() -> None:
    base, layer = adapted("linear")
    x = make_input("linear").requires_grad_()
    for context in (nullcontext(), unfused()):
        with context:
            y = base(x).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True) if context.__class__ is not nullcontext else (None,)
        if first is not None:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="unfused"):
                torch.autograd.grad(y, x, create_graph=True)


def test_other_ways_to_differentiate() -> None:
    """torch.func and forward mode know no such functions."""
    base, layer = adapted("linear")
    x = make_input("linear")
    wanted = passed(base, layer, x, lambda x: base(x).square())[1]
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(lambda x: base(x).square(), (x,), (tangent,))
    weights = torch.arange(moved.numel(), dtype=torch.float64).sin().view_as(moved)
    gradient = torch.func.grad(lambda x: (base(x).square() * weights).sum())(x)
    assert_close(gradient, wanted, "torch.func.grad")
    with torch.autograd.forward_ad.dual_level():
        dual = base(torch.autograd.forward_ad.make_dual(x, tangent)).square()
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved, "forward mode")


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    base, layer = adapted("linear")
    x = make_input("linear")
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    assert_same(passed(base, layer, x, compiled), passed(base, layer, x), "compiled")
