"""A change of a weight as a matrix [O, J], J = input features x positions of the kernel: whole, or as two factors.

What is asked of it (its length, singular values, the nearest one of a lower rank) is computed from the factors where it
has some: QR of both and SVD of the small middle. The matrix is built where somebody wants it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import EXACT_BELOW, singular

_BLOCK = 1024  # rows or columns that are widened at once


@dataclass(frozen=True, eq=False)
class Update:
    """One change of a weight.

    Attributes:
        left: [O, R]; without `right` the matrix itself, [O, J].
        right: [R, J]; None = there are no factors.
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def most_ranks(self) -> int:
        """How many ranks it can have."""
        return min(self.left.shape) if self.right is None else min(*self.left.shape, *self.right.shape)

    def matrix(self) -> Tensor:
        """[O, J]."""
        return self.left if self.right is None else self.left @ self.right

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Update:
        left = self.left.to(device, dtype or self.left.dtype)
        return Update(left, None if self.right is None else self.right.to(device, dtype or self.right.dtype))

    def times(self, factor: float) -> Update:
        return Update(self.left * factor, self.right)

    def minus(self, other: Update) -> Update:
        return total([self, other.times(-1.0)])

    def norm(self) -> float:
        """Frobenius norm; no small difference of large numbers, so that a tiny one is right, too."""
        return float(self._middle.norm())

    def inner(self, other: Update) -> float:
        """Sum of the products of all elements."""
        if self.right is None or other.right is None:
            factors, whole = (other, self.matrix()) if self.right is None else (self, other.matrix())
            if factors.right is None:
                return float((whole * factors.left).sum())
            return float(((factors.left.T @ whole) * factors.right).sum())
        return float(((self.left.T @ other.left) * (self.right @ other.right.T)).sum())

    def singular_values(self) -> Tensor:
        """All of them, in descending order, [most_ranks] at most."""
        return torch.linalg.svdvals(self._middle)

    def decomposed(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Singular triples u [O, R], s [R], vh [R, J], the largest value first.

        Args:
            rank: at most so many; None = all. Few of a large matrix come from a subspace iteration.
        """
        if self.right is None:
            return _svd(self.left, rank)
        u, s, vh = torch.linalg.svd(self._middle, full_matrices=False)
        return self._lefts @ u[:, :rank], s[:rank], vh[:rank] @ self._rights

    @functools.cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.right is not None
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        return q_left, r_left @ r_right.T, q_right.T

    @property
    def _lefts(self) -> Tensor:
        return self._split[0]

    @property
    def _rights(self) -> Tensor:
        return self._split[2]

    @property
    def _middle(self) -> Tensor:
        """Of the same singular values: itself, or the small matrix between orthonormal ones."""
        return self.left if self.right is None else self._split[1]


def total(updates: Sequence[Update]) -> Update:
    """The sum of updates of one weight: factors side by side where that has fewer values than the matrix.

    Args:
        updates: one at least, of one shape, dtype and device.
    """
    if len(updates) == 1:
        return updates[0]
    O, J = updates[0].shape
    rights = [one.right for one in updates if one.right is not None]
    if len(rights) == len(updates) and sum(map(len, rights)) * (O + J) < O * J:
        return Update(torch.cat([one.left for one in updates], 1), torch.cat(rights))
    matrix = updates[0].matrix().clone()
    for one in updates[1:]:
        matrix = matrix.add_(one.left) if one.right is None else matrix.addmm_(one.left, one.right)
    return Update(matrix)


def distance(one: Update, other: Update) -> float:
    """||one - other||, in float64; of whole matrices without another one of their size."""
    if one.right is not None and other.right is not None:
        return one.minus(other).norm()
    squares = 0.0
    for start in range(0, one.shape[0], _BLOCK):
        first, second = (
            up.left[start : start + _BLOCK].double() if up.right is None
            else up.left[start : start + _BLOCK].double() @ up.right.double()
            for up in (one, other)
        )  # fmt: skip
        squares += float((first - second).square().sum())
    return math.sqrt(squares)


def _svd(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triples of a large matrix come from the eigenvectors of its smaller square: several times cheaper,
    and exact for all values above 1e-8 of the largest one in float64."""
    if rank is not None:
        return singular(matrix, rank)
    if min(matrix.shape) <= EXACT_BELOW:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _svd(matrix.T, None)
        return vh.T, s, u.T
    square = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for block in matrix.split(_BLOCK, 1):
        wide = block.double()
        square.addmm_(wide, wide.T)
    squares, vectors = torch.linalg.eigh(square)
    order = squares.argsort(descending=True)
    u, s = vectors[:, order], squares[order].clamp_min(0).sqrt()
    scaled = u / s.clamp_min(torch.finfo(s.dtype).tiny)
    vh = torch.cat([(scaled.T @ block.double()).to(matrix) for block in matrix.split(_BLOCK, 1)], 1)
    return u.to(matrix), s.to(matrix), vh
