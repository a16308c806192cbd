"""How alike two adapter files are: the cosine of what each adds to a weight, layer by layer and in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import dotted
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
    """

    name: str
    norms: tuple[float, float]
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """Two files beside each other.

    Attributes:
        files: their paths.
        pairs: layers that both have.
        alone: names of those that one has alone, for each.
    """

    files: tuple[Path, Path]
    pairs: tuple[Pair, ...]
    alone: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def cosine(self) -> float:
        """Of all layers together, those of one file alone left out."""
        first, second = (math.fsum(one.norms[i] ** 2 for one in self.pairs) for i in (0, 1))
        inner = math.fsum(one.cosine * one.norms[0] * one.norms[1] for one in self.pairs)
        return inner / math.sqrt(first * second) if first and second else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "files": [str(path) for path in self.files],
            "cosine": self.cosine,
            "layers": [vars(pair) for pair in self.pairs],
            "alone": [list(names) for names in self.alone],
        }

    def lines(self, every: bool = False) -> list[str]:
        """For people.

        Args:
            every: a line for each layer, too.
        """
        lengths = [math.sqrt(math.fsum(pair.norms[i] ** 2 for pair in self.pairs)) for i in (0, 1)]
        found = [
            f"cosine {self.cosine:.4f} over {len(self.pairs)} layers; lengths {lengths[0]:.4g} and {lengths[1]:.4g}, "
            f"ratio {lengths[1] / lengths[0] if lengths[0] else math.inf:.4g}"
        ]
        ordered = sorted(self.pairs, key=lambda pair: pair.cosine)
        if len(ordered) > 1:
            found.append(f"least alike: {_shown(ordered[0])}; most: {_shown(ordered[-1])}")
        for path, names in zip(self.files, self.alone, strict=True):
            if names:
                found.append(f"only in {path}: {len(names)} layers, such as {names[0]}")
        if every:
            found += [f"  {_shown(pair)}, norms {pair.norms[0]:.4g} and {pair.norms[1]:.4g}" for pair in self.pairs]
        return found


def _shown(pair: Pair) -> str:
    return f"{pair.name} {pair.cosine:.4f}"


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
    shared = [name for name in layers[0] if name in layers[1]]
    pairs = []
    for name in walk(shared):
        one, other = (together.update(file, name) for file in together.files)
        norms = one.norm(), other.norm()
        if one.shape != other.shape:
            raise ValueError(
                f"{dotted.shown(name)} is {one.shape} in {first} and {other.shape} in {second}: they are of two models"
            )
        whole = norms[0] * norms[1]
        pairs.append(Pair(dotted.shown(name), norms, one.inner(other) / whole if whole else 0.0))
    alone = [tuple(dotted.shown(name) for name in mine if name not in shared) for mine in layers]
    return Comparison((Path(first), Path(second)), tuple(pairs), (alone[0], alone[1]))
