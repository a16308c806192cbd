"""The leading singular triples of a large matrix, by products with some of its directions alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

EXTRA = 16  # directions beside those that are asked for
_ROUNDS = 60
_ENOUGH = 1e-6  # of what is not covered, gained in one round


def length(values: Tensor) -> float:
    """Square root of the sum of all squares, which fp32 would lose of very small or large values."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def random_directions(rows: int, count: int, like: Tensor) -> Tensor:
    """[rows, count], drawn on the CPU from a fixed seed: the same whatever the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, count, generator=generator, dtype=like.dtype).to(like.device)


def leading(forth: Product, back: Product, start_JN: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples u [O, N], s [N], vh [N, J] within N directions, the largest value first, until the first `rank`
    cover no more by another round: the error of a matrix of that rank is then the least one to some parts in a million.

    Args:
        forth: X [J, N] -> A X.
        back: Y [O, N] -> A^T Y.
        start_JN: directions to start from, `rank` at least and at most min(O, J).
        rank: how many triples are to be right.
        energy: ||A||^2.
    """
    right, covered = start_JN, 0.0
    least = torch.finfo(start_JN.dtype).eps * energy
    for _ in range(_ROUNDS):
        left = torch.linalg.qr(forth(right))[0]
        right, triangle = torch.linalg.qr(back(left))
        u, s, vh = torch.linalg.svd(triangle.T)  # A is nearly left triangle^T right^T
        now = float(s[:rank].double().square().sum())
        if now - covered <= max(_ENOUGH * (energy - now), least):
            break
        covered = now
    return left @ u, s, vh @ right.T
