"""Several networks on one layer: what is applied is what merging them one after the other gives, biases included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS, assert_close, learn_lengths, options_for, randomise
from torch import Tensor, nn

from networks.algos import ALGOS, Additive, Multiplicative
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

OUT, IN = 16, 8
STRENGTHS = (0.7, -0.4, 1.3)


@dataclass(frozen=True)
class Member:
    """An algorithm in a stack."""

    algo: str
    dora: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.algo, *self.options, *filter(None, [self.dora])])


MEMBERS = [
    *(Member(algo) for algo in FOR_LINEARS),
    Member("lora", "output"),
    Member("lora", "input"),
    Member("glora", "output"),
    Member("diag-oft", options={"train_on_input": True}),
    Member("diag-oft", options={"rescaled": True}),
    Member("ia3", options={"train_on_input": True}),
]
N = len(MEMBERS)
# Every ordered pair as the lower two, as the upper two and as the outer two of a stack.
TRIPLES = [(i, (i + j) % N, j) for i, j in itertools.product(range(N), range(N))]
KINDS = {
    "linear": (lambda: nn.Linear(IN, OUT), (3, 5, IN)),
    "conv": (lambda: nn.Conv2d(IN, OUT, 3, padding=1, stride=2), (2, IN, 5, 4)),
}
PIECES = (((0, 8),), ((12, 16), (8, 12)))  # the rows of two modules that are one layer together, partly swapped


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def stack(bases: Sequence[Site], members: Sequence[Member], strengths: Sequence[Any] = STRENGTHS) -> list[AdaptedLayer]:
    """One above the other, attached, with random values."""
    layers = []
    whole = nn.Linear(IN, OUT) if bases[0].row_ranges is not None else bases[0].module
    for member, strength in zip(members, strengths, strict=False):
        geometry = layer_geometry(whole)
        adapter = ALGOS[member.algo](geometry, 4, options_for(member.algo, member.options)).double()
        adapter.mark_initialised_()
        randomise(adapter)
        sites = [Site(site.module, site.row_ranges) for site in bases]
        layer = AdaptedLayer("x", sites, adapter, 0.75, runtime=Runtime(strength), dora=member.dora).double().eval()
        layer.attach()
        if member.dora:
            learn_lengths(layer)
        layers.append(layer)
    return layers


def merged(layers: Sequence[AdaptedLayer]) -> None:
    for layer in layers:
        layer.detach()
    for layer in layers:
        layer.merge()


def frozen(module: nn.Module) -> nn.Module:
    return module.double().requires_grad_(False)


def test_every_pair_is_there_in_every_place() -> None:
    pairs = set(itertools.product(range(N), range(N)))
    assert all({(triple[a], triple[b]) for triple in TRIPLES} == pairs for a, b in ((0, 1), (1, 2), (0, 2)))
    assert {member.algo for member in MEMBERS} == set(FOR_LINEARS)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lowest", range(N), ids=lambda i: str(MEMBERS[i]))
def test_applied_is_merged(lowest: int, kind: str) -> None:
    make, shape = KINDS[kind]
    for triple in (triple for triple in TRIPLES if triple[0] == lowest):
        members = [MEMBERS[i] for i in triple]
        base, x = frozen(make()), torch.randn(shape, dtype=torch.float64)
        before = base(x)
        layers = stack([Site(base)], members)
        with torch.no_grad():
            applied = base(x)
            merged(layers)
            assert_close(applied - before, base(x) - before, " < ".join(map(str, members)))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_on_modules_that_are_one_layer_together(member: Member) -> None:
    """With `full` at every place: its bias is divided over them."""
    for place in range(3):
        members = [Member("lora"), Member("ia3"), member]
        members.insert(place, Member("full"))
        modules = [frozen(nn.Linear(IN, sum(b - a for a, b in pieces))) for pieces in PIECES]
        x = torch.randn(3, IN, dtype=torch.float64)
        before = torch.cat([module(x) for module in modules], -1)
        sites = [Site(module, pieces) for module, pieces in zip(modules, PIECES, strict=True)]
        layers = stack(sites, members, (*STRENGTHS, 0.6))
        with torch.no_grad():
            applied = torch.cat([module(x) for module in modules], -1)
            merged(layers)
            after = torch.cat([module(x) for module in modules], -1)
        assert_close(applied - before, after - before, " < ".join(map(str, members)))


def test_norms_and_layers_without_bias() -> None:
    for make, algo in ((lambda: nn.LayerNorm(IN), "norm"), (lambda: nn.Linear(IN, OUT, bias=False), "full")):
        base, x = frozen(make()), torch.randn(3, IN, dtype=torch.float64)
        before = base(x)
        layers = stack([Site(base)], [Member(algo)] * (2 if algo == "full" else 3))
        if algo == "full":
            layers += stack([Site(base)], [Member("lora", "output")])
        with torch.no_grad():
            applied = base(x)
            merged(layers)
            assert_close(applied - before, base(x) - before, algo)


@pytest.mark.parametrize("top", MEMBERS, ids=str)
def test_a_network_that_is_switched_off_hides_none_below_it(top: Member) -> None:
    """`full` below, one in between that is off or at multiplier 0: as without that one."""
    for off in (
        lambda runtime: setattr(runtime, "enabled", False),
        lambda runtime: setattr(runtime, "multiplier", 0.0),
    ):
        base, x = frozen(nn.Linear(IN, OUT)), torch.randn(3, IN, dtype=torch.float64)
        before = base(x)
        lowest, between, highest = stack([Site(base)], [Member("full"), Member("full"), top])
        off(between.runtime)
        with torch.no_grad():
            applied = base(x)
            between.detach()
            merged([lowest, highest])
            assert_close(applied - before, base(x) - before, f"full < off < {top}")


@pytest.mark.parametrize("top", [m for m in MEMBERS if issubclass(ALGOS[m.algo], Multiplicative)], ids=str)
def test_one_multiplier_per_sample_below(top: Member) -> None:
    base, x = frozen(nn.Linear(IN, OUT)), torch.randn(2, 3, IN, dtype=torch.float64)
    values = torch.tensor([0.5, -1.0], dtype=torch.float64)
    lowest, _ = stack([Site(base)], [Member("full"), top], (values, 0.7))
    together = base(x)
    for i, value in enumerate(values.tolist()):
        lowest.runtime.multiplier = value
        assert_close(together[i], base(x)[i], f"sample {i}")


def test_the_bias_below_has_its_gradient_once() -> None:
    """y = T (W + diff) x + b + diff_b: whatever T is, the gradient of diff_b is that of y."""
    for top in MEMBERS:
        if not top.dora and issubclass(ALGOS[top.algo], Additive):
            continue
        base, x = frozen(nn.Linear(IN, OUT)), torch.randn(3, IN, dtype=torch.float64)
        lowest, _ = stack([Site(base)], [Member("full"), top])
        probe = torch.randn(3, OUT, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((base(x) * probe).sum(), [lowest.adapter.diff_b])
        assert_close(gradient, STRENGTHS[0] * probe.sum(0), str(top))


@pytest.mark.parametrize("side", ("output", "input"))
def test_lengths_start_from_the_weight_as_it_is_below(side: str) -> None:
    """A new DoRA network above another changes nothing."""
    base, x = frozen(nn.Linear(IN, OUT)), torch.randn(3, IN, dtype=torch.float64)
    stack([Site(base)], [Member("lora"), Member("diag-oft")])
    before: Tensor = base(x)
    layer = AdaptedLayer("x", base, ALGOS["lora"](Geometry.of(base), 4).double(), 1.0, dora=side)
    layer.attach()
    assert_close(base(x), before, "start", 1e-12)
