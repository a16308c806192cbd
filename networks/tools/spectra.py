"""What the ranks of a file hold: the length of each layer's update, its singular values, and what a dim would keep."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import dotted
from ..files.places import part_of
from .opened import Opened
from .report import Walk, silently

SHARES = (0.9, 0.99)  # of energy, of which it is told which dim keeps them
DIMS = (1, 2, 4, 8, 16, 32, 64, 128)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Spectrum:
    """One layer.

    Attributes:
        name: as people know it.
        part: prefix of its saved name.
        kind: its name without block numbers: layers that differ in those alone are of one kind.
        block: the first number in its name; None = it has none.
        norm: of the update, Frobenius.
        relative: that beside the norm of the weight; None = no checkpoint is given.
        values: singular values, the largest first, without those that are rounding alone.
    """

    name: str
    part: str
    kind: str
    block: int | None
    norm: float
    relative: float | None
    values: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the shares of energy: as many equal directions would be as spread (Roy, Vetterli
        2007)."""
        whole = math.fsum(s * s for s in self.values)
        shares = [s * s / whole for s in self.values] if whole else []
        return math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0)) if shares else 0.0

    def rank_for(self, energy: float) -> int:
        """The fewest ranks that keep this share of the energy."""
        wanted, found = energy * math.fsum(s * s for s in self.values), 0.0
        for count, s in enumerate(self.values, start=1):
            found += s * s
            if found >= wanted * (1 - 1e-12):
                return count
        return len(self.values)


@dataclass(frozen=True)
class Spectra:
    """Those of a file.

    Attributes:
        file: its path.
        layers: by part, block and name.
    """

    file: Path
    layers: tuple[Spectrum, ...]

    def kept(self, dim: int) -> float:
        """The share of the energy of all layers that a dim keeps at most."""
        whole = math.fsum(s * s for layer in self.layers for s in layer.values)
        held = math.fsum(s * s for layer in self.layers for s in layer.values[:dim])
        return held / whole if whole else 1.0

    def dim_for(self, energy: float) -> int:
        """The lowest dim that keeps this share of the energy of all layers."""
        return next((dim for dim in range(1, self.most) if self.kept(dim) >= energy * (1 - 1e-12)), self.most)

    @property
    def most(self) -> int:
        """Ranks of the layer that has most."""
        return max((len(layer.values) for layer in self.layers), default=0)

    @property
    def dims(self) -> list[int]:
        """Those worth telling: up to the first that keeps all."""
        below = [dim for dim in DIMS if dim < self.most]
        return [*below, self.most]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = [
            {
                **vars(one),
                "effective_rank": one.effective_rank,
                **{f"rank_{share:g}": one.rank_for(share) for share in SHARES},
            }
            for one in self.layers
        ]
        return {"file": str(self.file), "kept": {dim: self.kept(dim) for dim in self.dims},
                "dims": {f"{share:g}": self.dim_for(share) for share in SHARES}, "layers": layers}  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        kept = ", ".join(f"{dim}: {self.kept(dim):.1%}" for dim in self.dims)
        ranks = sorted(layer.effective_rank for layer in self.layers)
        middle = ranks[len(ranks) // 2] if ranks else 0.0
        largest = max(self.layers, key=lambda one: one.norm, default=None)
        return [
            f"energy that a dim keeps: {kept}",
            ", ".join(f"{share:.0%} of it from dim {self.dim_for(share)}" for share in SHARES),
            f"effective rank {middle:.1f} in the middle of the layers, {ranks[0]:.1f} to {ranks[-1]:.1f}"
            if ranks
            else "",
            f"largest update {largest.norm:.4g}, {largest.name}" if largest else "",
        ]


def spectra(file: Path | str, *, model: str = "", base: Sequence[Path | str] = (), walk: Walk = silently) -> Spectra:
    """Of every matrix of a file.

    Args:
        file: of any form that is read here.
        model, base: as for `convert`; with a checkpoint norms are told beside those of the weights.
        walk: goes over the layers, and may show how far it is.

    Raises:
        ValueError: it is no adapter file, or what a layer adds depends on a weight which is not given.
    """
    opened = Opened(file, model, base)
    found = []
    for name in walk([name for name, saved in opened.own.layers.items() if saved.algorithm.spec.family == "matrix"]):
        update = opened.update(name)
        values = update.singular_values()
        limit = float(values[0]) * 1e-7 if len(values) else 0.0
        weight = opened.weight(name)
        norm, shown = update.norm(), dotted.shown(name)
        numbers = _NUMBER.findall(shown.removeprefix(part_of(name)))
        size = None if weight is None else float(weight.double().norm())
        found.append(
            Spectrum(
                shown, part_of(name), _NUMBER.sub("#", shown), int(numbers[0]) if numbers else None, norm,
                norm / size if size else None, tuple(float(s) for s in values if s > limit),
            )
        )  # fmt: skip
    return Spectra(Path(file), tuple(sorted(found, key=_place)))


def _place(layer: Spectrum) -> list[tuple[bool, int, str]]:
    """Its name, with numbers as such."""
    words = re.split(r"(\d+)", layer.name)
    return [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in words]
