"""The nearest Kronecker product kron(w1 [A, C], w2 [B, D, *kernel]) of a change of a weight [A B, C D, *kernel].

Rearranged as [A C, B D K], a Kronecker product is a matrix of rank 1 (Van Loan, Pitsianis 1993), so that the nearest
one is the first singular pair. With a low rank for w2 [B, D K] both factors are found in turns, each the best beside
the other, from that pair on: the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .leading import leading, length, random_directions
from .updates import Triples, Update

_DIRECTIONS = 8  # the first pair is looked for in
_TURNS = 50
_ENOUGH = 1e-6  # of what is not covered, gained in one turn

Split = tuple[int, int]


def nearest_kronecker(update: Update, rows: Split, columns: Split) -> tuple[Tensor, Tensor]:
    """w1 [A, C] of length 1 and w2 [B, D K].

    Args:
        update: [A B, C D K], its last axis running over D, then over K.
        rows: (A, B).
        columns: (C, D).
    """
    pieces = _Pieces(update, rows, columns)
    start = random_directions(pieces.size[1], min(_DIRECTIONS, *pieces.size), update.left)
    u, s, vh = leading(pieces.forth, pieces.back, start, 1, update.norm() ** 2)
    return u[:, 0].reshape(rows[0], columns[0]), (s[0] * vh[0]).reshape(rows[1], -1)


def with_low_rank(update: Update, rows: Split, columns: Split, triples: Triples) -> tuple[Tensor, Triples]:
    """The same with a w2 of low rank, as its singular triples.

    Args:
        update, rows, columns: as above.
        triples: the first ones of the w2 of `nearest_kronecker`, as many as stay.
    """
    pieces, energy = _Pieces(update, rows, columns), update.norm() ** 2
    (u, s, vh), covered = triples, 0.0
    for _ in range(_TURNS):
        w1 = pieces.forth((u * (s / (length(s) or 1.0)) @ vh).reshape(-1, 1))
        w1 /= length(w1) or 1.0
        u, s, vh = Update(pieces.back(w1).reshape(rows[1], -1)).decomposed(len(triples[1]))
        before, covered = covered, length(s) ** 2
        if covered - before <= _ENOUGH * (energy - covered):
            break
    return w1.reshape(rows[0], columns[0]), (u, s, vh)


class _Pieces:
    """The change as a matrix [A C, B D K], a row for each element of w1: as factors where they make products with it
    cheaper, or else as one copy."""

    def __init__(self, update: Update, rows: Split, columns: Split) -> None:
        (A, B), C = rows, columns[0]
        DK = update.shape[1] // C
        self.size, self.right, self.left = (A * C, B * DK), update.right, update.left
        if update.right is None or len(update.right) * (A + DK) >= A * DK:
            self.right, self.left = None, update.matrix().reshape(A, B, C, DK).transpose(1, 2).reshape(self.size)
        else:
            self.left = update.left.reshape(A, B, -1)  # a b r
            self.right = update.right.reshape(-1, C, DK)  # r c e, e = positions in D K

    def forth(self, w2: Tensor) -> Tensor:
        """[B D K, n] -> [A C, n]."""
        if self.right is None:
            return self.left @ w2
        found = torch.einsum("rce,ben->rcbn", self.right, w2.reshape(self.left.shape[1], -1, w2.shape[1]))
        return torch.einsum("abr,rcbn->acn", self.left, found).flatten(0, 1)

    def back(self, w1: Tensor) -> Tensor:
        """[A C, n] -> [B D K, n]."""
        if self.right is None:
            return self.left.T @ w1
        found = torch.einsum("abr,acn->rcbn", self.left, w1.reshape(len(self.left), -1, w1.shape[1]))
        return torch.einsum("rce,rcbn->ben", self.right, found).flatten(0, 1)
