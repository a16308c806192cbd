"""A change of a weight as a matrix [O, J], J = input features x positions of the kernel: whole, or as two factors.

What is asked of it (its length, singular values, the nearest one of a lower rank) is computed from the factors where it
has fewer ranks than the matrix could have: QR of both and SVD of the small middle. The matrix is built where somebody
wants it. The leading part of a large matrix comes from products with some directions, see `leading`, all of it from the
eigenvectors of its smaller square; neither takes more memory than the matrix does once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .leading import EXTRA, leading, length, random_directions
from .low_rank import EXACT_BELOW

Triples = tuple[Tensor, Tensor, Tensor]  # u [O, R], s [R], vh [R, J], the largest value first
Enough = Callable[[Tensor], bool]  # whether the first singular values, in descending order, are as many as are wanted

_FIRST = 32  # triples of a large matrix to begin with, where it shows only then whether they are enough
_SHARE = 8  # with more than this part of all triples, all of them together are no dearer
_BLOCK = 1024  # rows that are widened at once
_CHUNK = 1 << 24  # values that are cast to float64 at a time


@dataclass(frozen=True, eq=False)
class Update:
    """One change of a weight.

    Attributes:
        left: [O, R]; without `right` the matrix itself, [O, J]. Factors of fewer bits become fp32.
        right: [R, J]; None = there are no factors.
    """

    left: Tensor
    right: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (("left", self.left), ("right", self.right)):
            if factor is not None and factor.itemsize < 4:
                object.__setattr__(self, name, factor.float())

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

    def rows(self, ranges: Sequence[tuple[int, int]]) -> Update:
        """Some of them, (start, stop) each, in this order."""
        return Update(torch.cat([self.left[start:stop] for start, stop in ranges]), self.right)

    def minus(self, other: Update) -> Update:
        mine, theirs = self.right, other.right
        if mine is not None and theirs is not None and mine.shape == theirs.shape and torch.equal(mine, theirs):
            return Update(self.left - other.left, mine)
        return total([self, other], [1.0, -1.0])

    def norm(self) -> float:
        """Frobenius norm, as right as the values are: nothing is taken from anything larger."""
        return length(self._middle)

    def inner(self, other: Update) -> float:
        """Sum of the products of all elements."""
        if self.right is None or other.right is None:
            factors, whole = (other, self.matrix()) if self.right is None else (self, other.matrix())
            if factors.right is None:
                return float((whole * factors.left).sum())
            return float(((factors.left.T @ whole) * factors.right).sum())
        return float(((self.left.T @ other.left) * (self.right @ other.right.T)).sum())

    def singular_values(self) -> Tensor:
        """All of them, in descending order; those of large matrices below 1e-8 of the first are not told from 0."""
        middle = self._middle
        if min(middle.shape) <= EXACT_BELOW:
            return torch.linalg.svdvals(middle)
        return torch.linalg.eigvalsh(_square(middle)).flip(0).clamp_min(0).sqrt().to(middle)

    def decomposed(self, rank: int | None = None, enough: Enough | None = None) -> Triples:
        """Singular triples u [O, R], s [R], vh [R, J], the largest value first: those that are more than rounding, and
        at least one.

        Args:
            rank: at most so many; None = all.
            enough: of the values so far; no more are then looked for, but there may be more than it takes.
        """
        u, s, vh = _triples(self._middle, rank, enough)
        terms = max(*self.shape, 0 if self.right is None else len(self.right))  # of the longest sum on the way
        limit = float(s[:1].sum()) * torch.finfo(s.dtype).eps * math.sqrt(terms)
        count = max(1, int((s > limit).sum()))
        u, s, vh = u[:, :count], s[:count], vh[:count]
        return (self._split[0] @ u, s, vh @ self._split[2]) if self._is_slim else (u, s, vh)

    @property
    def _is_slim(self) -> bool:
        """Whether its factors are smaller than the matrix."""
        return self.right is not None and 0 < len(self.right) < min(self.shape)

    @functools.cached_property
    def _split(self) -> Triples:
        """Orthonormal factors, and the small matrix between them."""
        assert self.right is not None
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        return q_left, r_left @ r_right.T, q_right.T

    @property
    def _middle(self) -> Tensor:
        """Of the same singular values: itself, or the small matrix between orthonormal ones."""
        return self._split[1] if self._is_slim else self.matrix()


def stacked(updates: Sequence[Update]) -> Update:
    """The update whose rows are those of these, one below the other: factors along a diagonal where that has fewer
    values than the matrix.

    Args:
        updates: one at least, of one number of columns, dtype and device.
    """
    if len(updates) == 1:
        return updates[0]
    O, J = sum(one.shape[0] for one in updates), updates[0].shape[1]
    rights = [one.right for one in updates if one.right is not None]
    if len(rights) == len(updates) and sum(map(len, rights)) * (O + J) < O * J:
        return Update(torch.block_diag(*[one.left for one in updates]), torch.cat(rights))
    return Update(torch.cat([one.matrix() for one in updates]))


def total(updates: Sequence[Update], weights: Sequence[float] | None = None) -> Update:
    """The sum of updates of one weight: factors side by side where that has fewer values than the matrix, which takes
    no more memory than itself and one of them.

    Args:
        updates: one at least, of one shape and device; of several dtypes the widest one holds.
        weights: what each is multiplied with; None = 1.
    """
    factors = weights or [1.0] * len(updates)
    O, J = updates[0].shape
    rights = [one.right for one in updates if one.right is not None]
    if len(rights) == len(updates) and sum(map(len, rights)) * (O + J) < O * J:
        lefts = [one.left * factor for one, factor in zip(updates, factors, strict=True)]
        return Update(torch.cat(lefts, 1), torch.cat(rights))
    wide = max((one.left.dtype for one in updates), key=lambda dtype: dtype.itemsize)
    matrix = updates[0].left.new_zeros(O, J, dtype=wide)
    for one, factor in zip(updates, factors, strict=True):
        if one.right is None:
            matrix.add_(one.left, alpha=factor)
        else:
            matrix.addmm_(one.left.to(wide), one.right.to(wide), alpha=factor)
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


def _triples(matrix: Tensor, rank: int | None, enough: Enough | None) -> Triples:
    """The first ones of a matrix: `rank` at most, as few as are enough at least."""
    full = min(matrix.shape)
    most = full if rank is None else min(rank, full)
    if full <= EXACT_BELOW:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :most], s[:most], vh[:most]
    energy, known = length(matrix) ** 2, 0
    size = most if rank is not None and enough is None else min(_FIRST, most)
    start = matrix.new_empty(matrix.shape[1], 0)
    while (size + EXTRA) * _SHARE <= full:
        fresh = random_directions(matrix.shape[1], size + EXTRA, matrix)[:, known:]
        u, s, vh = leading(matrix.__matmul__, matrix.T.__matmul__, torch.cat([start, fresh], 1), size, energy)
        found = u[:, :size], s[:size], vh[:size]
        if size == most or (_is_all(matrix, found) if enough is None else enough(found[1])):
            return found
        start, known, size = vh.T, len(vh), min(4 * size, most)
    u, s, vh = _all_triples(matrix)
    return u[:, :most], s[:most], vh[:most]


def _is_all(matrix: Tensor, found: Triples) -> bool:
    """Whether nothing but rounding is left."""
    u, s, vh = found
    eps = torch.finfo(s.dtype).eps
    if float(s[-1]) > math.sqrt(eps) * float(s[0]):
        return False
    return length(torch.addmm(matrix, u * s, vh, alpha=-1)) <= float(s[0]) * eps * math.sqrt(max(matrix.shape))


def _all_triples(matrix: Tensor) -> Triples:
    """From the eigenvectors of the smaller square: several times cheaper than a singular value decomposition. The
    vectors of small values are not quite those of it, but orthonormal on the smaller side, so that nothing is lost."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _all_triples(matrix.T)
        return vh.T, s, u.T
    u = torch.linalg.eigh(_square(matrix))[1].to(matrix.dtype)
    rows = u.T @ matrix
    s = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).to(rows.dtype)
    order = s.argsort(descending=True)
    u, s, rows = u[:, order], s[order], rows[order]
    return u, s, rows.div_(s.clamp_min(torch.finfo(s.dtype).tiny)[:, None])


def _square(matrix: Tensor) -> Tensor:
    """matrix matrix^T, or the other way where that is smaller, in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    square = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=matrix.device)
    for part in wide.split(max(1, _CHUNK // len(wide)), 1):
        part = part.double()
        square.addmm_(part, part.T)
    return square
