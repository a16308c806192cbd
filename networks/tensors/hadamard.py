"""A near Hadamard product of two low-rank matrices for any matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 3  # of the fit: the first gains most


def nearest_hadamard(matrix_OJ: Tensor, u_OR: Tensor, s_R: Tensor, vh_RJ: Tensor) -> tuple[Tensor, ...]:
    """w1_a [O, R], w1_b [R, J], w2_a and w2_b, for which (w1_a w1_b) * (w2_a w2_b) is near a matrix: never further away
    than the nearest matrix of rank R.

    That one is the start, with 1 everywhere in the second product. From that on, where ranks are left out, each row of
    w1_a and w2_a and each column of w1_b and w2_b is the best beside the others, in turns, so that the error never
    rises. There is no closed form.

    Args:
        matrix_OJ: the matrix.
        u_OR, s_R, vh_RJ: its first singular triples.
    """
    root, rank = s_R.sqrt(), len(s_R)
    factors = [u_OR * root, root[:, None] * vh_RJ, torch.zeros_like(u_OR), torch.ones_like(vh_RJ)]
    factors[2][:, 0] = 1
    if 1 < rank < min(matrix_OJ.shape):
        generator = torch.Generator().manual_seed(0)
        factors[3][1:] = torch.randn(rank - 1, vh_RJ.shape[1], generator=generator, dtype=vh_RJ.dtype).to(vh_RJ)
        for _ in range(_ROUNDS):
            for mine in (2, 0):
                other = factors[2 - mine] @ factors[3 - mine]
                factors[mine] = _best_rows(matrix_OJ, factors[mine + 1], other, factors[mine])
                factors[mine + 1] = _best_rows(matrix_OJ.T, factors[mine].T, other.T, factors[mine + 1].T).T
    return tuple(factors)


def _best_rows(matrix: Tensor, right: Tensor, other: Tensor, former: Tensor) -> Tensor:
    """[O, R] with the least ||matrix - other * (it @ right)||, row by row.

    Args:
        matrix, other: [O, J].
        right: [R, J].
        former: [O, R], which stays where nothing decides.
    """
    weights = other.square()
    gram = torch.einsum("oj,rj,sj->ors", weights, right, right)
    wanted = (other * matrix) @ right.T - torch.einsum("ors,os->or", gram, former)
    size = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(len(right), dtype=gram.dtype, device=gram.device)
    step = torch.linalg.solve(gram + 1e-10 * size[:, None, None] * eye, wanted[..., None])[..., 0]
    return former + step
