"""The nearest Kronecker product kron(w1 [A, C], w2 [B, D K]) of a matrix [A B, C D K], the second factor of any rank or
of a low one.

Rearranged as [A C, B D K], a Kronecker product is a matrix of rank 1 (Van Loan, Pitsianis 1993): the nearest one is the
first singular pair. With a limit on the rank of w2 the two factors are found in turns, each the best beside the other,
so that the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .low_rank import singular

_TURNS = 50
_ENOUGH = 1e-9  # of what is covered, gained in one turn


def nearest_kronecker(
    matrix: Tensor, rows: tuple[int, int], columns: tuple[int, int], limit: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """w1 [A, C] of length 1 and w2 [B, D K].

    Args:
        matrix: [A B, C D K], fp32 or wider; with a kernel of K positions, the last axis runs over D, then over K.
        rows: (A, B).
        columns: (C, D).
        limit: what w2 may be, its nearest such matrix; None = any.
    """
    (A, B), (C, _) = rows, columns
    pieces = matrix.reshape(A, B, C, -1).transpose(1, 2).reshape(A * C, -1)  # [AC, BDK]
    first = singular(pieces, 1)[0][:, 0]
    covered = 0.0
    for _ in range(_TURNS):
        second = first @ pieces
        if limit is not None:
            second = limit(second.reshape(B, -1)).flatten()
        size = float(second.norm())
        if not size:
            break
        other = pieces @ (second / size)
        first, now = other / other.norm().clamp_min(torch.finfo(other.dtype).tiny), float(other.norm())
        if now - covered <= _ENOUGH * now:
            break
        covered = now
    second = first @ pieces
    return first.reshape(A, C), second.reshape(B, -1) if limit is None else limit(second.reshape(B, -1))
