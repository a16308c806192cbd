"""The nearest Hadamard product (a1 b1) * (a2 b2) of two matrices of rank R, by alternating least squares.

A product a b of rank R is one whose second pair gives 1 everywhere. From there on the rows of a1 and a2 and the columns
of b1 and b2 are each made the best ones beside all others, in turns: the error never rises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .leading import length, random_directions

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]

_SWEEPS = 10
_ENOUGH = 5e-3  # of the squared error, gained in one sweep
_DAMPED = 1e-10  # towards the former rows, of the largest number on the diagonal: rows that nothing decides stay
_CHUNK = 1 << 22  # values at a time


def nearest_hadamard(matrix_OJ: Tensor, u_OR: Tensor, s_R: Tensor, vh_RJ: Tensor) -> Pairs:
    """a1 [O, R], b1 [R, J], a2 [O, R], b2 [R, J]: never further from a matrix than the nearest one of rank R.

    Args:
        matrix_OJ: the matrix.
        u_OR, s_R, vh_RJ: its first singular triples.
    """
    size = float(s_R[:1].sum()) or 1.0  # the largest value is 1 in the search, whose squares fp32 then holds
    best = a1, b1, a2, b2 = _start(u_OR, s_R / size, vh_RJ)
    scale, eps = 1 / size, torch.finfo(s_R.dtype).eps
    error = _squared_error(matrix_OJ, scale, best)
    if len(s_R) > 1 and error > (10 * eps) ** 2:  # a product of rank 1 is one of two: there is nothing to gain
        for _ in range(_SWEEPS):
            a2 = _best_rows(matrix_OJ, scale, b2, a1, b1, a2)
            b2 = _best_rows(matrix_OJ.T, scale, a2.T, b1.T, a1.T, b2.T).T
            a1 = _best_rows(matrix_OJ, scale, b1, a2, b2, a1)
            b1 = _best_rows(matrix_OJ.T, scale, a1.T, b2.T, a2.T, b1.T).T
            before, error = error, _squared_error(matrix_OJ, scale, (a1, b1, a2, b2))
            if error < before:
                best = a1, b1, a2, b2
            if before - error <= _ENOUGH * before:
                break
    a1, b1, a2, b2 = best
    return a1 * math.sqrt(size), b1 * math.sqrt(size), a2, b2


def _start(u: Tensor, s: Tensor, vh: Tensor) -> Pairs:
    """The matrix of these triples. In the second pair one rank gives 1; the others give nothing, and could: their rows
    of b2 are random."""
    root, ones = s.sqrt(), torch.zeros_like(u)
    ones[:, :1] = 1
    other = random_directions(vh.shape[1], len(s), vh).T.contiguous()
    other[:1] = 1
    return u * root, root[:, None] * vh, ones, other


def _best_rows(
    matrix: Tensor, scale: float, right: Tensor, other_left: Tensor, other_right: Tensor, former: Tensor
) -> Tensor:
    """[O, R], the rows with the least ||scale * matrix - (rows right) * (other_left other_right)||.

    Args:
        matrix: [O, J].
        scale: of it.
        right: [R, J].
        other_left, other_right: [O, R] and [R, J].
        former: [O, R].
    """
    i, j = torch.triu_indices(len(right), len(right), device=right.device)
    pairs_JP, eye = (right[i] * right[j]).T, torch.eye(len(right), dtype=torch.float64, device=right.device)
    found = []
    for start in range(0, len(matrix), _step(matrix)):
        rows = slice(start, start + _step(matrix))
        other = other_left[rows] @ other_right
        rest = torch.addcmul(matrix[rows] * scale, former[rows] @ right, other, value=-1)
        wanted = ((rest * other) @ right.T).double()
        gram = eye.new_empty(len(rest), *eye.shape)
        gram[:, i, j] = gram[:, j, i] = (other.square() @ pairs_JP).double()
        damping = gram.diagonal(dim1=1, dim2=2).amax(1).mul_(_DAMPED).clamp_min(torch.finfo(torch.float64).tiny)
        change = torch.linalg.solve(gram + damping[:, None, None] * eye, wanted[..., None])[..., 0]
        found.append(former[rows] + change.to(former.dtype))
    return torch.cat(found)


def _squared_error(matrix: Tensor, scale: float, pairs: Pairs) -> float:
    a1, b1, a2, b2 = pairs
    starts = range(0, len(matrix), _step(matrix))
    chunks = [slice(start, start + _step(matrix)) for start in starts]
    rest = (torch.addcmul(matrix[rows] * scale, a1[rows] @ b1, a2[rows] @ b2, value=-1) for rows in chunks)
    return sum(length(one) ** 2 for one in rest)


def _step(matrix: Tensor) -> int:
    """Rows at a time."""
    return max(1, _CHUNK // matrix.shape[1])
