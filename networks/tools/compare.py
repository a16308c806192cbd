"""How alike two adapter files are: the cosine of what each adds to a weight, layer by layer and in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import dotted
from ..tensors.updates import Update
from .opened import Opened
from .report import Walk, silently
from .together import Together


@dataclass(frozen=True)
class Pair:
    """One layer of both files.

    Attributes:
        name: as people know it.
        norms: Frobenius norms of both updates.
        cosine: of the two as vectors; 0 where one of them is 0.
        outputs, inputs: how far they write to and read from the same directions, whatever they do there: the cosine of
            A A^T and B B^T, and of A^T A and B^T B; 0 = directions of one are at right angles to all of the other.
    """

    name: str
    norms: tuple[float, float]
    cosine: float
    outputs: float
    inputs: float


@dataclass(frozen=True)
class Comparison:
    """Two files beside each other.

    Attributes:
        files: their paths.
        pairs: layers that both have.
        alone: name and norm of those that one has alone, for each file.
    """

    files: tuple[Path, Path]
    pairs: tuple[Pair, ...]
    alone: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def cosine(self) -> float:
        """Of all layers together; what a file has not is 0 there."""
        inner = math.fsum(pair.cosine * pair.norms[0] * pair.norms[1] for pair in self.pairs)
        whole = self.norms[0] * self.norms[1]
        return inner / whole if whole else 0.0

    @property
    def norms(self) -> tuple[float, float]:
        """Of all layers of each file together."""
        first, second = (
            math.sqrt(
                math.fsum([*(pair.norms[i] ** 2 for pair in self.pairs), *(n**2 for n in self.alone[i].values())])
            )
            for i in (0, 1)
        )
        return first, second

    @property
    def directions(self) -> tuple[float, float]:
        """`outputs` and `inputs` on average, weighted by the product of the norms."""
        weights = [pair.norms[0] * pair.norms[1] for pair in self.pairs]
        whole = math.fsum(weights) or 1.0
        outputs = math.fsum(pair.outputs * weight for pair, weight in zip(self.pairs, weights, strict=True))
        inputs = math.fsum(pair.inputs * weight for pair, weight in zip(self.pairs, weights, strict=True))
        return outputs / whole, inputs / whole

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "files": [str(path) for path in self.files],
            "cosine": self.cosine,
            "norms": self.norms,
            "outputs": self.directions[0],
            "inputs": self.directions[1],
            "layers": [vars(pair) for pair in self.pairs],
            "alone": [dict(layers) for layers in self.alone],
        }

    def lines(self, every: bool = False) -> list[str]:
        """For people.

        Args:
            every: a line for each layer, too.
        """
        first, second = self.norms
        found = [
            f"cosine {self.cosine:.4f}, {len(self.pairs)} layers in both; norms {first:.4g} and {second:.4g}, ratio "
            f"{second / first if first else math.inf:.4g}"
        ]
        ordered = sorted(self.pairs, key=lambda pair: pair.cosine)
        if ordered:
            found.append(f"directions alike: outputs {self.directions[0]:.4f}, inputs {self.directions[1]:.4f}")
        if len(ordered) > 1:
            found.append(f"least alike: {_shown(ordered[0])}; most: {_shown(ordered[-1])}")
        for path, layers, norm in zip(self.files, self.alone, self.norms, strict=True):
            if layers:
                share = math.fsum(one**2 for one in layers.values()) / norm**2 if norm else 0.0
                names = f"{len(layers)} layers with {share:.1%} of its squared norm, such as {next(iter(layers))}"
                found.append(f"only in {path}: {names}")
        return found + ([_row(pair) for pair in self.pairs] if every else [])


def _shown(pair: Pair) -> str:
    return f"{pair.name} {pair.cosine:.4f}"


def _row(pair: Pair) -> str:
    norms = f"norms {pair.norms[0]:.4g} and {pair.norms[1]:.4g}"
    return f"  {_shown(pair)}, outputs {pair.outputs:.4f}, inputs {pair.inputs:.4f}, {norms}"


def compare(
    first: Path | str, second: Path | str, *, model: str = "", base: Sequence[Path | str] = (), walk: Walk = silently
) -> Comparison:
    """Compare two files, of any algorithms and layouts.

    Args:
        first, second: the files.
        model, base: as for `convert`.
        walk: goes over the layers, and may show how far it is.

    Raises:
        ValueError: they are not of one model, or what a layer adds depends on a weight which is not given.
    """
    together = Together.of([Opened(first, model, base), Opened(second, model, base)])
    layers = [together.layers(file) for file in together.files]
    pairs, alone = list[Pair](), (dict[str, float](), dict[str, float]())
    for name in walk(together.names):
        updates = [together.update(file, name) for file, own in zip(together.files, layers, strict=True) if name in own]
        shown = dotted.shown(name)
        if len(updates) == 2:
            pairs.append(_pair(shown, updates[0], updates[1], f"in {first} and {second}"))
        else:
            alone[name not in layers[0]][shown] = updates[0].norm()
    return Comparison((Path(first), Path(second)), tuple(pairs), alone)


def _pair(name: str, one: Update, other: Update, where: str) -> Pair:
    """
    Raises:
        ValueError: they are of different shapes.
    """
    if one.shape != other.shape:
        sizes = " and ".join(" x ".join(map(str, update.shape)) for update in (one, other))
        raise ValueError(f"{name} is {sizes} {where}: give files of one model")
    norms = one.norm(), other.norm()
    if not norms[0] * norms[1]:
        return Pair(name, norms, 0.0, 0.0, 0.0)
    one, other = one.times(1 / norms[0]), other.times(1 / norms[1])
    return Pair(name, norms, one.inner(other), _alike(one, other), _alike(_turned(one), _turned(other)))


def _alike(one: Update, other: Update) -> float:
    """The cosine of A A^T and B B^T."""
    return _products(one, other) / math.sqrt(_products(one, one) * _products(other, other))


def _products(one: Update, other: Update) -> float:
    """||A^T B||^2, the sum of the products of the elements of A A^T and B B^T."""
    middle = one.left.T @ other.left
    found = middle if one.right is None else (one.right @ one.right.T) @ middle
    found = found if other.right is None else found @ (other.right @ other.right.T)
    return float((found * middle).sum())


def _turned(update: Update) -> Update:
    """Its transpose."""
    return Update(update.left.T) if update.right is None else Update(update.right.T, update.left.T)
