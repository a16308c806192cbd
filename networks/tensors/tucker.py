"""Tucker-2 form of a convolution kernel: a small core and a matrix on each channel axis."""

from __future__ import annotations

from torch import Tensor


def core_times_right(core_SRK: Tensor, right_RI: Tensor) -> Tensor:
    """sum_r core[s, r, k] right[r, i] as [S, I, *kernel]: the input side of a Tucker product."""
    core_SKR = core_SRK.movedim(1, -1)
    return (core_SKR @ right_RI).movedim(-1, 1)
