"""Tucker-2 form of a convolution kernel: a small core and a matrix on each channel axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def core_times_right(core_SRK: Tensor, right_RI: Tensor) -> Tensor:
    """sum_r core[s, r, k] right[r, i] as [S, I, *kernel]: the input side of a Tucker product."""
    core_SKR = core_SRK.movedim(1, -1)
    return (core_SKR @ right_RI).movedim(-1, 1)


def nearest_tucker(
    left_OS: Tensor, core_SRK: Tensor, right_RI: Tensor, count: Callable[[Tensor], int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same form with fewer ranks, as many on both sides: each side keeps its first singular directions (HOSVD),
    within the root of 2 of the least possible error.

    Args:
        left_OS, core_SRK, right_RI: of sum_sr left[o, s] core[s, r, k] right[r, i].
        count: how many of the singular values of a side, the largest first, are kept.

    Returns:
        left [O, n], core [n, n, *kernel], right [n, I].
    """
    q_left, r_left = torch.linalg.qr(left_OS)
    q_right, r_right = torch.linalg.qr(right_RI.T)
    core = torch.einsum("as,srk,br->abk", r_left, core_SRK.flatten(2), r_right)
    u, s, _ = torch.linalg.svd(core.flatten(1), full_matrices=False)
    v, t, _ = torch.linalg.svd(core.transpose(0, 1).flatten(1), full_matrices=False)
    kept = min(max(count(s), count(t)), len(s), len(t))
    u, v = u[:, :kept], v[:, :kept]
    small = torch.einsum("as,abk,bt->stk", u, core, v).reshape(kept, kept, *core_SRK.shape[2:])
    even = small.norm() ** (1 / 3) / kept**0.5 if bool(small.any()) else 1.0  # all three of about equal size
    return q_left @ u * even, small / even**2, (q_right @ v).T * even
