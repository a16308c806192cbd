"""How many ranks each layer keeps: one number for all, or by its singular values.

    dim            so many
    energy         the fewest that hold this share of the squared singular values (0.99)
    sv_fro         the fewest that hold this share of the Frobenius norm (0.99; energy is its square)
    sv_cumulative  the fewest that hold this share of the sum of the singular values
    sv_ratio       those above the largest / ratio (2 keeps values down to half of it)

With one of the rules `dim` is the most. The three last are called as in sd-scripts' resize_lora.py, which keeps one
rank more than it takes (and two at least), so that a layer here has one less for the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("energy", "sv_fro", "sv_cumulative", "sv_ratio")


@dataclass(frozen=True)
class RankRule:
    """One rule for all layers.

    Attributes:
        dim: of each layer, or the most with `rule`; None = no limit.
        rule: one of RULES; "" = `dim` alone.
        value: what it says.
        conv_dim: `dim` of convolutions above 1x1; None = that of all.

    Raises:
        ValueError: the value is none that such a rule can have.
    """

    dim: int | None = None
    rule: str = ""
    value: float = 0.0
    conv_dim: int | None = None

    def __post_init__(self) -> None:
        for name, dim in (("dim", self.dim), ("conv_dim", self.conv_dim)):
            if dim is not None and dim < 1:
                raise ValueError(f"{name}={dim}: give 1 or more")
        if self.rule == "sv_ratio" and not self.value >= 1:
            raise ValueError(f"sv_ratio={self.value:g}: give 1 or more, 2 keeps values down to half of the largest")
        if self.rule not in ("", "sv_ratio") and not 0 < self.value <= 1:
            raise ValueError(f"{self.rule}={self.value:g}: it is a share, above 0 and up to 1, such as 0.95")

    @classmethod
    def given(
        cls,
        options: Mapping[str, float | None],
        dim: int | None,
        conv_dim: int | None = None,
    ) -> RankRule | None:
        """Of options by the names of RULES, of which one is given at most; None = nothing is.

        Raises:
            ValueError: several are, or a value is none.
        """
        found = {name: options[name] for name in RULES if options.get(name) is not None}
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} are two rules for one rank: leave out all but one")
        for name, value in found.items():
            return cls(dim, name, float(value or 0), conv_dim)
        return None if dim is None and conv_dim is None else cls(dim, conv_dim=conv_dim)

    def most(self, kernel: bool = False) -> int | None:
        """Of a layer, whose kernel is above 1x1 or not; None = no limit."""
        return self.conv_dim if kernel and self.conv_dim is not None else self.dim

    def count(self, values: Tensor, kernel: bool = False, energy: float | None = None) -> int:
        """How many of a layer's singular values are kept: 1 at least, if there are any.

        Args:
            values: all of them, the largest first; with `energy` the first ones will do, see `settled`.
            kernel: whether the layer has one above 1x1.
            energy: of all of them, their sum of squares.
        """
        most = min(self.most(kernel) or len(values), len(values))
        if not self.rule or not len(values) or not float(values[0]):
            return most if not self.rule else min(1, most)
        return max(1, min(most, self._wanted(values, energy)))

    def settled(self, values: Tensor, energy: float) -> bool:
        """Whether the first singular values show how many a rule keeps."""
        return not self.needs_all and (not float(values[0]) or self._wanted(values, energy) < len(values))

    @property
    def needs_all(self) -> bool:
        """Whether the first singular values never show how many are kept."""
        return self.rule == "sv_cumulative"

    def _wanted(self, values: Tensor, energy: float | None) -> int:
        squares = values.double().square()
        return _COUNTS[self.rule](values.double(), self.value, float(squares.sum()) if energy is None else energy)

    def __str__(self) -> str:
        rule = f"{self.rule} {self.value:g}" if self.rule else ""
        return ", at most ".join(filter(None, (rule, f"dim {self.dim}" if self.dim else "")))


def _reaching(parts: Tensor, amount: float) -> int:
    """How many values it takes until their sum is so much; one more than there are where it never is."""
    return int(torch.searchsorted(parts.cumsum(0), amount * (1 - 1e-12))) + 1


_COUNTS: Mapping[str, Callable[[Tensor, float, float], int]] = {  # values, what the rule says, energy
    "energy": lambda s, share, energy: _reaching(s.square(), share * energy),
    "sv_fro": lambda s, share, energy: _reaching(s.square(), share**2 * energy),
    "sv_cumulative": lambda s, share, _: _reaching(s, share * float(s.sum())),
    "sv_ratio": lambda s, ratio, _: int((s > float(s[0]) / ratio).sum()),
}
