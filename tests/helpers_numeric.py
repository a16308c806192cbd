"""Shared by the numerical tests: layers of every kind, networks on them, and dense formulas of our own.

The dense formulas are written from the definitions (LyCORIS sheet, A1.1) over the keys of a file. They share no code
with the package, so that a mistake in it cannot hide in both.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from networks.algos import ALGOS, Adapter, Multiplicative
from networks.layers.adapted import AdaptedLayer
from networks.network.network import Network
from networks.plan.plan import Plan, PlanRow
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

FOR_LINEARS = [name for name, cls in ALGOS.items() if cls.family == Geometry.family]  # and convolutions
ADDITIVE = {
    name: cls for name, cls in ALGOS.items() if not issubclass(cls, Multiplicative)
}  # have an update of their own
FACTORED = {name: cls for name, cls in ADDITIVE.items() if "bypass_mode" in cls.features}  # of small factors
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
        return ALGOS[self.algo].family == geometry.family

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


# Values for options that are not switches. A new option without a value here fails `values_of`.
# Those without values change nothing in weights: test_tlora.py.
VALUES: dict[str, tuple[Any, ...]] = {
    "factor": (9,),
    "constraint": (2**-5,),  # is exact in fp32, and limits random blocks
    "block_size": (3,),
    "sig_type": ("middle",),
    "use_data_init": (False,),
    "min_rank": (),
    "alpha_rank_scale": (),
    "mask_group_id": (),
}


# Options under which a pass has no random choice, and is the same at all timesteps.
STEADY: dict[str, dict[str, Any]] = {"dylora": {"block_size": 1 << 30}, "tlora": {"alpha_rank_scale": 0.0}}


def options_for(algo: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the algorithm has, and what keeps it steady."""
    return {name: value for name, value in options.items() if name in ALGOS[algo].options} | STEADY.get(algo, {})


def values_of(algorithm: type[Adapter], option: str) -> tuple[Any, ...]:
    """The values under which an option is tested: True for a switch, else those of VALUES."""
    default = inspect.signature(algorithm.layout).parameters[option].default
    if default is False:
        return (True,)
    if option not in VALUES:
        raise LookupError(f"{algorithm.algo}: option {option} has no test values; add a line to helpers_numeric.VALUES")
    return VALUES[option]


def cases() -> list[Case]:
    """For every algorithm: plain, every option, every pair of options; with a rank also RS-LoRA and a large dim."""
    found = []
    for algo, algorithm in ALGOS.items():
        singles = [{o: v} for o in sorted(algorithm.options) for v in values_of(algorithm, o)]
        pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
        dim = DIM if Case(algo).kinds else OUT  # some divide the features into blocks that fill them
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
            )
        )  # fmt: skip
        modules[saved] = module
    network = Network(Plan("Zoo", tuple(rows)), modules, {"unet": zoo}, dropouts, multiplier)
    network.train(not ALGOS[case.algo].stepwise)  # or its random choices would be part of every comparison
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
            adapter.settle_()


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


def dense_lora(t: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """up . down; Tucker sum_ab up[o, a] mid[a, b, k] down[b, i]."""
    up = t["lora_up.weight"].flatten(1)
    if "lora_mid.weight" in t:
        mid, down = t["lora_mid.weight"], t["lora_down.weight"].flatten(1)
        return torch.einsum("oa,ab...,bi->oi...", up, mid, down)
    return torch.einsum("or,r...->o...", up, t["lora_down.weight"]).reshape(shape)


def dense_loha(t: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """(w1_a w1_b) .* (w2_a w2_b); Tucker: each half sum_ab w_a[a, o] t[a, b, k] w_b[b, i]."""
    halves = []
    for n in (1, 2):
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if f"hada_t{n}" in t:
            halves.append(torch.einsum("ao,ab...,bi->oi...", a, t[f"hada_t{n}"], b))
        else:
            halves.append(torch.einsum("or,rc->oc", a, b).reshape(shape))
    return halves[0] * halves[1]


def dense_lokr(t: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """kron(w1, w2), by torch.kron."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    kernel = shape[2:]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("ab,ac...,cd->bd...", t["lokr_w2_a"], t["lokr_t2"], t["lokr_w2_b"])
    else:
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(t["lokr_w2_a"].shape[0], -1, *kernel)
    return torch.kron(w1.reshape(*w1.shape, *[1] * len(kernel)), w2.contiguous())


def dense_glora(t: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """W a1 a2 + b1 b2, with the base weight W under `base`; the first product on the channels."""
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    on_channels = torch.einsum("oi...,ij->oj...", t["base"], a1.flatten(1) @ a2.flatten(1))
    return on_channels + torch.einsum("or,r...->o...", b1.flatten(1), b2).reshape(shape)


def dense_tlora(t: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """P diag(lam) Q - P0 diag(lam0) Q0, of changes and start."""
    p0, q0, lam0 = t["p0"].flatten(1), t["q0"].flatten(1), t["lam0"]
    p, q, lam = p0 + t["p_layer.weight"].flatten(1), q0 + t["q_layer.weight"].flatten(1), lam0 + t["lambda_layer"]
    return ((p @ torch.diag(lam[0])) @ q - (p0 @ torch.diag(lam0[0])) @ q0).reshape(shape)


def dense_oft(t: Mapping[str, Tensor], layer: AdaptedLayer, W: Tensor) -> Tensor:
    """T W, T made of dense matrices: Cayley's rotations of blocks, in stages for BOFT; or W T on the input side, where
    their series is cut off."""
    on_input = layer.adapter.side == "input"
    blocks = layer.adapter.blocks
    Q = blocks - blocks.transpose(-1, -2)
    constraint = layer.adapter.chosen.get("constraint", 0) * W.shape[1 if on_input else 0]
    if constraint and Q.norm() > constraint:
        blocks = blocks * constraint / Q.norm()
    if on_input:
        return torch.einsum("oj...,ji->oi...", W, torch.block_diag(*(_series(B) for B in blocks)))
    T = torch.eye(len(W), dtype=W.dtype)
    for i, stage in enumerate(blocks[None] if blocks.dim() == 3 else blocks):
        R = torch.block_diag(*(_cayley(B) for B in stage))
        if blocks.dim() == 3:
            T = R.T @ T
            continue
        half = 2**i * stage.shape[-1] // 2  # features that lie `half` apart come side by side
        P = torch.eye(len(W), dtype=W.dtype)[torch.arange(len(W)).reshape(-1, 2, half).transpose(1, 2).flatten()]
        T = P.T @ R @ P @ T
    if "rescale" in t:
        T = (1 + layer.adapter.rescale_change.reshape(-1, 1)) * T
    return (T @ W.flatten(1)).reshape(W.shape)


def _cayley(B: Tensor) -> Tensor:
    Q = B - B.T
    one = torch.eye(len(Q), dtype=Q.dtype)
    return (one + Q) @ torch.linalg.inv(one - Q)


def _series(B: Tensor) -> Tensor:
    Q = B - B.T
    return torch.eye(len(Q), dtype=Q.dtype) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


def dense_ia3(t: Mapping[str, Tensor], layer: AdaptedLayer, W: Tensor) -> Tensor:
    """W (1 + w), by column or by row."""
    shape = (1, -1) if layer.adapter.side == "input" else (-1, 1)
    return W * (1 + t["weight"]).reshape(*shape, *[1] * (W.dim() - 2))


# W' of the multiplicative algorithms
DENSE_WEIGHT: dict[str, Callable[[Mapping[str, Tensor], AdaptedLayer, Tensor], Tensor]] = {
    "diag-oft": dense_oft,
    "boft": dense_oft,
    "ia3": dense_ia3,
}
DENSE: dict[str, Callable[[Mapping[str, Tensor], tuple[int, ...]], Tensor]] = {
    "lora": dense_lora,
    "loha": dense_loha,
    "lokr": dense_lokr,
    "dylora": dense_lora,
    "lora_fa": dense_lora,
    "glora": dense_glora,
    "full": lambda t, shape: t["diff"],
    "norm": lambda t, shape: t["w_norm"],
    "tlora": dense_tlora,
}


def named_tensors(adapter: Adapter, base: Tensor) -> dict[str, Tensor]:
    """What DENSE wants: parameters by their suffixes in a file, buffers by their own names, the base weight."""
    named = {adapter.keys[name]: p for name, p in adapter.named_parameters() if name != "scalar"}
    return named | dict(adapter.named_buffers()) | {"base": base.to(next(adapter.parameters()).dtype)}


def dense_update(layer: AdaptedLayer, multiplier: float) -> Tensor:
    """multiplier * (W' - W) of a live layer by the definition, differentiable: of scale * scalar * dW."""
    adapter, W = layer.adapter, layer.whole_weight()
    if adapter.algo in DENSE_WEIGHT:
        W = W.to(next(adapter.parameters()).dtype)
        return (DENSE_WEIGHT[adapter.algo](named_tensors(adapter, W), layer, W) - W) * multiplier
    delta = DENSE[adapter.algo](named_tensors(adapter, W), adapter.geometry.weight_shape)
    scalar = 1.0 if adapter.scalar is None else adapter.scalar
    return delta * scalar * layer.scale * multiplier


def dense_bias(layer: AdaptedLayer, multiplier: float) -> Tensor | None:
    """The base layer's bias with multiplier * its change by the definition, differentiable; None without a bias."""
    bias = getattr(layer.base, "bias", None)
    change = dict(layer.adapter.named_parameters()).get(layer.adapter.bias_key)
    return bias if bias is None or change is None else bias + multiplier * change


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` relative to the largest expected value, which must not be 0."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    size = float(expected.detach().abs().max())
    error = float((actual - expected).detach().abs().max())
    assert size > 0, f"{what}: nothing to compare, all values are 0"
    assert error <= tolerance * size, f"{what}: off by {error / size:.2e}, allowed {tolerance:.0e}"
