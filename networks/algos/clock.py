"""The time of a denoising pass, for algorithms that act by it. A network's hook sets it, its adapters read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-4  # of fp32 times: what is a whole number on paper must not fall below it


@dataclass
class Clock:
    """Shared by the networks of one group.

    Attributes:
        time: [N], of each sample: 0 = nothing but noise, 1 = no noise; None = nobody has told.
        mask: [R] or [N, R], set by hand; goes before the time.
    """

    time: Tensor | None = None
    mask: Tensor | None = None

    def rank_mask(self, dim: int, least: int, exponent: float) -> Tensor | None:
        """[N, R] of 0 and 1: the first floor(time^exponent (R - least)) + least ranks of each sample; None = all.

        Raises:
            ValueError: the mask that was set is for another number of ranks.
        """
        if self.mask is not None:
            if self.mask.shape[-1] != dim:
                raise ValueError(
                    f"the timestep mask is {tuple(self.mask.shape)}, this layer has {dim} ranks: give [{dim}] or "
                    f"[samples, {dim}], or one dim to all layers"
                )
            return self.mask.reshape(-1, dim)
        if self.time is None:
            return None
        active = torch.floor(self.time**exponent * (dim - least) + _ROUNDING) + least
        return (torch.arange(dim, device=active.device) < active[:, None]).to(active.dtype)


_GROUPS: dict[int, Clock] = {}


def clock_of(group: int) -> Clock:
    """The clock of all networks with this `mask_group_id`."""
    return _GROUPS.setdefault(group, Clock())
