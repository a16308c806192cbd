"""Shared by the numerical tests: layers of every kind, networks on them, and what `registry` says of them."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from registry import data_of
from torch import Tensor, nn

from networks.algos import ALGOS, Adapter, Multiplicative
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.network.network import Network
from networks.plan.plan import Plan, PlanRow
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

FOR_LINEARS = [name for name, cls in ALGOS.items() if cls.spec.family == Geometry.family]  # and convolutions
ADDITIVE = {
    name: cls for name, cls in ALGOS.items() if not issubclass(cls, Multiplicative)
}  # have an update of their own
FACTORED = {name: cls for name, cls in ADDITIVE.items() if "bypass_mode" in cls.spec.features}  # of small factors
TOLERANCE = 1e-9  # of everything in float64, relative to the largest value
OUT, IN = 110, 108  # 10 * 11 and 9 * 12, so that a rank of 4 is below half of every factor
DIM, ALPHA, MULTIPLIER = 4, 3.0, 0.7


# -- layers


@dataclass(frozen=True)
class Kind:
    """A layer kind: how to make the layer, and the shape of an input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(IN, OUT), (2, 5, IN)),
    "linear_no_bias": Kind(lambda: nn.Linear(IN, OUT, bias=False), (6, IN)),
    "conv1d": Kind(lambda: nn.Conv1d(IN, OUT, 3, stride=2, padding=1), (2, IN, 9)),
    "conv_1x1": Kind(lambda: nn.Conv2d(IN, OUT, 1), (2, IN, 3, 4)),
    "conv_3x3": Kind(lambda: nn.Conv2d(IN, OUT, 3, padding=1), (2, IN, 4, 5)),
    "conv_3x3_no_bias": Kind(lambda: nn.Conv2d(IN, OUT, 3, bias=False), (2, IN, 4, 5)),
    "conv_strided_dilated": Kind(lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=(2, 1), dilation=2), (2, IN, 7, 8)),
    "conv_grouped": Kind(lambda: nn.Conv2d(2 * IN, OUT, 3, padding=1, groups=2), (2, 2 * IN, 3, 4)),
    "conv_same": Kind(lambda: nn.Conv2d(IN, OUT, (4, 3), padding="same", dilation=(1, 2)), (2, IN, 6, 5)),
    "conv_reflect": Kind(lambda: nn.Conv2d(IN, OUT, 3, padding=(2, 1), padding_mode="reflect"), (2, IN, 4, 5)),
    "conv_same_circular": Kind(
        lambda: nn.Conv2d(IN, OUT, (2, 3), padding="same", padding_mode="circular"), (2, IN, 4, 5)
    ),
    "conv3d": Kind(lambda: nn.Conv3d(IN, OUT, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)), (2, IN, 3, 3, 2)),
}


NORM_KINDS: dict[str, Kind] = {
    "layer_norm": Kind(lambda: nn.LayerNorm(IN), (2, 5, IN)),
    "layer_norm_no_bias": Kind(lambda: nn.LayerNorm(IN, bias=False), (6, IN)),
    "group_norm": Kind(lambda: nn.GroupNorm(9, IN), (2, IN, 3, 4)),
    "rms_norm": Kind(lambda: nn.RMSNorm(IN, eps=1e-3), (2, 5, IN)),
}
ALL_KINDS = KINDS | NORM_KINDS


def make_layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A frozen layer of this kind with random weights."""
    return ALL_KINDS[kind].make().to(dtype).requires_grad_(False)


def make_input(kind: str, dtype: torch.dtype = torch.float64, samples: int = 2) -> Tensor:
    """A random input; its first axis holds the samples."""
    shape = ALL_KINDS[kind].shape
    return torch.randn(samples if len(shape) > 2 else shape[0], *shape[1:], dtype=dtype)


def with_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A copy of an unattached layer with another weight, and bias: the base operation, by torch's own class."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.copy_(weight)
        if bias is not None:
            twin.bias.copy_(bias)
    return twin


def _geometry(kind: str) -> Geometry:
    with torch.device("meta"):
        found = layer_geometry(ALL_KINDS[kind].make())
    assert found is not None
    return found


_GEOMETRIES = {kind: _geometry(kind) for kind in ALL_KINDS}


class Zoo(nn.Module):
    """One layer of every kind; called with one input per layer, so that it can be a network's root."""

    def __init__(self, kinds: tuple[str, ...] = tuple(KINDS), dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for kind in kinds:
            self.add_module(kind, make_layer(kind, dtype))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: layer(inputs[kind]) for kind, layer in self.named_children()}


# -- cases


@dataclass(frozen=True)
class Case:
    """An algorithm with options, dim and the way alpha is scaled."""

    algo: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dim: int = DIM
    rs_lora: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer kinds for which its algorithm is, and for which it has a form with this dim."""
        return tuple(kind for kind, geometry in _GEOMETRIES.items() if self.fits(geometry))

    def fits(self, geometry: Geometry) -> bool:
        try:
            ALGOS[self.algo].layout(geometry, self.dim, **self.options)
        except ValueError:
            return False
        return ALGOS[self.algo].spec.family == geometry.family

    def __str__(self) -> str:
        words = [self.algo]
        words += [name if value is True else f"{name}={value}" for name, value in self.options.items()]
        words += [f"dim={self.dim}"] if self.dim != DIM else []
        return "-".join([*words, "rs_lora"] if self.rs_lora else words)

    def scale(self, layout: Any) -> float:
        """alpha / rank or alpha / sqrt(rank); 1 without a rank."""
        if layout.rank is None:
            return 1.0
        return ALPHA / (math.sqrt(layout.rank) if self.rs_lora else layout.rank)


def options_for(algo: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the algorithm has, and what keeps it steady."""
    return {name: value for name, value in options.items() if name in ALGOS[algo].spec.options} | dict(
        data_of(algo).steady
    )


def values_of(algorithm: type[Adapter], option: str) -> tuple[Any, ...]:
    """The values under which an option is tested: True for a switch, else those of the registry.

    Raises:
        LookupError: there are none, with what to write.
    """
    name, parameters = algorithm.spec.name, inspect.signature(algorithm.layout).parameters
    if option not in parameters:
        raise LookupError(f"the record of {name} has an option {option}, but its `layout` has no such keyword")
    if parameters[option].default is False:
        return (True,)
    if option not in data_of(name).values:
        raise LookupError(f"tests/registry.py: write values={{{option!r}: (...,)}} of {name}: what the tests try")
    return data_of(name).values[option]


def cases() -> list[Case]:
    """For every algorithm: plain, every option, every pair of options; with a rank also RS-LoRA and a large dim."""
    found = []
    for algo, algorithm in ALGOS.items():
        singles = [{o: v} for o in sorted(algorithm.spec.options) for v in values_of(algorithm, o)]
        pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
        dim = max(DIM, data_of(algo).least_dim)
        plain = [Case(algo, options, dim) for options in ({}, *singles, *pairs)]
        found += [case for case in plain if case.kinds]
        if algorithm.layout(_GEOMETRIES[plain[0].kinds[0]], dim).rank is not None:
            # sqrt(4) is exact, so that RS-LoRA's folded alpha, which a file holds in fp32, is exact too.
            found += [Case(algo, {}, rs_lora=True), Case(algo, {}, dim=16)]
    return found


def make_network(
    case: Case, zoo: nn.Module, multiplier: float = MULTIPLIER, dropouts: Mapping[str, float] | None = None
) -> Network:
    """A real network with one adapted layer per child of `zoo`, in the dtype of its weights if that can be trained."""
    rows, modules = [], {}
    for name, module in zoo.named_children():
        geometry = layer_geometry(module)
        assert geometry is not None, name
        layout = ALGOS[case.algo].layout(geometry, case.dim, **case.options)
        saved = f"lora_unet_{name}"
        rows.append(
            PlanRow(
                "unet", name, saved, saved, geometry.kind, geometry.weight_shape, geometry, case.algo, case.dim, ALPHA,
                case.options, case.scale(layout), rank_axis=layout.rank_axis, parameters=layout.parameters,
                shown_name=name,
            )
        )  # fmt: skip
        modules[saved] = module
    rows = [replace(row, dropouts=Dropouts(**(dropouts or {}))) for row in rows]
    network = Network(Plan("Zoo", tuple(rows)), modules, {"unet": zoo}, multiplier)
    network.train(not ALGOS[case.algo].spec.stepwise)  # or its random choices would be part of every comparison
    dtype = next(zoo.parameters()).dtype
    return network.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else network


def layers_of(network: Network) -> dict[str, AdaptedLayer]:
    """Kind -> adapted layer."""
    return {row.dotted_name: layer for row, layer in network.layers}


def randomise(module: nn.Module) -> None:
    """Every parameter random and of a size that keeps the update near the base output's; no start is waited for."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (1.0 if p.dim() == 0 else 0.0))
    for adapter in module.modules():
        if isinstance(adapter, Adapter):
            adapter.mark_initialised_()


def scale_for(adapter: Adapter, scale: float = 0.75) -> float:
    """A layer's scale as a plan gives it: 1 where the form has no rank, since no file could hold another."""
    return scale if adapter.laid_out.rank is not None else 1.0


def learn_lengths(layer: AdaptedLayer) -> None:
    """Every magnitude half to one and a half times what it was, by what is learnt of it."""
    with torch.no_grad():
        layer.magnitude_change.add_(layer.magnitude * (torch.rand_like(layer.magnitude) - 0.5))


# -- forms of the forward pass

FORMS = ("factored", "materialised")


@contextmanager
def forced(form: str, *owners: AdaptedLayer | Network) -> Iterator[None]:
    """Layers, or those of networks, take one form of their forward pass where they have it, as with bypass_mode."""
    before = [owner.runtime.factored for owner in owners]
    for owner in owners:
        owner.runtime.factored = form == "factored"
    try:
        yield
    finally:
        for owner, factored in zip(owners, before, strict=True):
            owner.runtime.factored = factored


# -- the definitions


def named_tensors(adapter: Adapter, base: Tensor) -> dict[str, Tensor]:
    """What a formula wants: parameters by their suffixes in a file, buffers by their own names, the base weight."""
    named = {adapter.spec.keys[name]: p for name, p in adapter.named_parameters() if name != "scalar"}
    return named | dict(adapter.named_buffers()) | {"base": base.to(next(adapter.parameters()).dtype)}


def delta_of(adapter: Adapter) -> Callable[[Mapping[str, Tensor], tuple[int, ...]], Tensor]:
    """The formula of dW in the registry."""
    delta = data_of(adapter.spec.name).delta
    assert delta is not None, f"tests/registry.py: write delta of {adapter.spec.name}, or weight"
    return delta


def definition(adapter: Adapter, W: Tensor) -> Tensor:
    """W' of a live adapter at scale 1, by the formula of the registry, in its dtype; without its scalar."""
    W, data = W.to(next(adapter.parameters()).dtype), data_of(adapter.spec.name)
    tensors = named_tensors(adapter, W)
    if data.weight is not None:
        return data.weight(tensors, adapter, W)
    return W + delta_of(adapter)(tensors, adapter.geometry.weight_shape)


def dense_update(layer: AdaptedLayer, multiplier: float) -> Tensor:
    """multiplier * (W' - W) of a live layer by the definition, differentiable: of scale * scalar * dW."""
    adapter, W = layer.adapter, layer.whole_weight()
    if data_of(adapter.spec.name).weight is not None:
        return (definition(adapter, W) - W) * multiplier
    delta = delta_of(adapter)(named_tensors(adapter, W), adapter.geometry.weight_shape)
    scalar = 1.0 if adapter.scalar is None else adapter.scalar
    return delta * scalar * layer.scale * multiplier


def dense_bias(layer: AdaptedLayer, multiplier: float) -> Tensor | None:
    """The base layer's bias with multiplier * its change by the definition, differentiable; None without a bias."""
    bias = getattr(layer.base, "bias", None)
    change = dict(layer.adapter.named_parameters()).get(layer.adapter.spec.bias_key)
    return bias if bias is None or change is None else bias + multiplier * change


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` relative to the largest expected value, which must not be 0."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    size = float(expected.detach().abs().max())
    error = float((actual - expected).detach().abs().max())
    assert size > 0, f"{what}: nothing to compare, all values are 0"
    assert error <= tolerance * size, f"{what}: off by {error / size:.2e}, allowed {tolerance:.0e}"


def assert_start(found: Tensor, base: Tensor, algo: str, what: str) -> None:
    """As near the base layer as the record says (`start_error`); with 0 bit for bit."""
    if torch.equal(found, base):
        return
    off = float((found - base).detach().abs().max() / base.abs().max()) / torch.finfo(base.dtype).eps
    assert off <= ALGOS[algo].spec.start_error, (
        f"{what}: off by {off:.1f} eps at the start; where the mathematics of {algo} allows no less, its record says "
        "how much as start_error"
    )
