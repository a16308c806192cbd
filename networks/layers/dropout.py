"""Strength and dropouts of one call. All random choices are tensor operations: compile and recomputation agree.

dropout         on the rank activation, elementwise, kept values divided by 1 - p
rank_dropout    a mask per sample and rank index, kept values divided by 1 - p, unless rank_dropout_scale is False
module_dropout  the whole update of a call, kept unscaled; it multiplies by 0, so every parameter keeps a gradient
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dropouts:
    """Probabilities in [0, 1)."""

    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_dropout_scale: bool = True

    def __bool__(self) -> bool:
        return self.acts

    @functools.cached_property
    def acts(self) -> bool:
        """Whether there are any: asked for in every pass."""
        return bool(self.given)

    @property
    def given(self) -> dict[str, float]:
        """Those that are not 0, by their names."""
        found = {"dropout": self.dropout, "rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}
        return {name: p for name, p in found.items() if p}


@dataclass
class CallGate:
    """What a forward pass does to the rank activation (see tensors.low_rank.PassGate).

    Attributes:
        scale: multiplier * alpha scale * scalar; a number, a 0-d tensor, or [N] with one value per sample, repeated
            when the batch is a multiple of N (classifier-free guidance stacks copies of the batch).
        dropout, rank_dropout, rank_dropout_scale: as in `Dropouts`, as they act in this pass.
    """

    scale: float | Tensor
    dropout: float = 0.0
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = True

    @property
    def uniform(self) -> bool:
        return not isinstance(self.scale, Tensor) or self.scale.dim() == 0

    @property
    def elementwise(self) -> bool:
        return self.dropout > 0

    def mask(self, size: int, like: Tensor) -> Tensor | None:
        return rank_mask((size,), self.rank_dropout, like, self.rank_dropout_scale) if self.rank_dropout else None

    def output(self, update: Tensor) -> Tensor:
        scale = self.scale
        if not isinstance(scale, Tensor):
            return update if scale == 1.0 else update * scale
        if scale.dim() == 0:  # 0-d tensors do not promote: the strength stays exact, the update keeps its dtype
            return update * scale
        samples, values = update.shape[0], scale.shape[0]
        if samples % values:
            raise ValueError(f"{values} multipliers for a batch of {samples}: give one value, or one per sample")
        each = scale.repeat(samples // values).reshape(-1, *[1] * (update.dim() - 1))
        return (update * each).to(update.dtype)

    def rank(self, h: Tensor, dim: int) -> Tensor:
        h = self.output(h)
        if self.rank_dropout:
            shape = [1] * h.dim()
            shape[dim] = h.shape[dim]
            if h.dim() > 1:
                shape[0] = h.shape[0]
            h = h * rank_mask(shape, self.rank_dropout, h, self.rank_dropout_scale)
        if self.dropout:
            h = F.dropout(h, self.dropout)
        return h


def rank_mask(shape: list[int] | tuple[int, ...], p: float, like: Tensor, scaled: bool = True) -> Tensor:
    """0 with probability p, otherwise 1 / (1 - p), so that the mean is 1.

    Args:
        shape: of the mask.
        p: in [0, 1).
        like: has its device and dtype.
        scaled: False = 1 instead of 1 / (1 - p).
    """
    kept = torch.rand(shape, device=like.device) >= p
    return kept.to(like.dtype) / (1 - p if scaled else 1)


def module_mask(p: float, like: Tensor) -> Tensor:
    """0-d: 0 with probability p, otherwise 1."""
    return (torch.rand((), device=like.device) >= p).to(torch.promote_types(like.dtype, torch.float32))
