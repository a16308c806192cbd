"""The nearest Kronecker product against numpy: a rearrangement block by block, np.kron, np.linalg.svd and lstsq."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from networks.tensors.kronecker import nearest_kronecker, with_low_rank
from networks.tensors.updates import Update

Array = NDArray[np.float64]
SPLITS = {  # (A, B), (C, D), K
    "matrix": ((3, 4), (2, 5), 1),
    "convolution": ((3, 4), (2, 5), 6),
    "first factor larger": ((6, 2), (5, 3), 1),
    "one number": ((1, 7), (1, 9), 2),
    "rows of one": ((1, 1), (4, 5), 1),
    "columns of one": ((4, 5), (1, 1), 1),
}


def dense(w1: Tensor, w2: Tensor) -> Array:
    """[A B, C D K] of w1 [A, C] and w2 [B, D K], one block for each element of w1, side by side in D and then K."""
    return np.kron(w1.numpy(), w2.numpy())


def pieces(matrix: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """A row for each block [B, D K] of the matrix."""
    B, width = rows[1], matrix.shape[1] // columns[0]
    blocks = [
        matrix[a * B : (a + 1) * B, c * width : (c + 1) * width] for a in range(rows[0]) for c in range(columns[0])
    ]
    return np.stack([block.ravel() for block in blocks])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", SPLITS)
def test_it_is_the_first_pair_of_the_rearranged_matrix(name: str) -> None:
    torch.manual_seed(0)
    rows, columns, K = SPLITS[name]
    O, J = math.prod(rows), math.prod(columns) * K
    low = Update(drawn(O, 1), drawn(1, J))
    for what, update in {"dense": Update(drawn(O, J)), "factors": low, "0": Update(torch.zeros(O, J).double())}.items():
        matrix = update.matrix().numpy()
        w1, w2 = nearest_kronecker(update, rows, columns)
        assert w1.shape == (rows[0], columns[0]) and w2.shape == (rows[1], columns[1] * K), what
        values = np.linalg.svd(pieces(matrix, rows, columns), compute_uv=False)
        least, found = math.sqrt(float((values[1:] ** 2).sum())), float(np.linalg.norm(matrix - dense(w1, w2)))
        assert found <= least * (1 + 1e-5) + 1e-12, (what, found, least)
    exact = dense(drawn(rows[0], columns[0]), drawn(rows[1], columns[1] * K))
    np.testing.assert_allclose(dense(*nearest_kronecker(Update(torch.tensor(exact)), rows, columns)), exact, atol=1e-12)


def test_factors_act_as_their_matrix() -> None:
    """Factors of fewer ranks than there are rows in the first factor, so that the copy of the matrix is never made."""
    torch.manual_seed(1)
    rows, columns = (8, 3), (6, 10)
    low = Update(drawn(24, 3), drawn(3, 60))
    w1, w2 = nearest_kronecker(low, rows, columns)
    np.testing.assert_allclose(dense(w1, w2), dense(*nearest_kronecker(Update(low.matrix()), rows, columns)), atol=1e-4)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("name", ("matrix", "convolution"))
def test_a_low_second_factor_is_the_best_beside_the_first_and_the_other_way_round(name: str, rank: int) -> None:
    torch.manual_seed(2)
    rows, columns, K = SPLITS[name]
    matrix = drawn(math.prod(rows), math.prod(columns) * K)
    update, T = Update(matrix), pieces(matrix.numpy(), rows, columns)
    w1, w2 = nearest_kronecker(update, rows, columns)
    start = Update(w2).decomposed(rank)
    before = float(np.linalg.norm(matrix.numpy() - dense(w1, start[0] * start[1] @ start[2])))
    w1, (u, s, vh) = with_low_rank(update, rows, columns, start)
    low = u * s @ vh
    after = float(np.linalg.norm(matrix.numpy() - dense(w1, low)))
    assert len(s) == rank and after < before

    first = np.linalg.lstsq(low.numpy().ravel()[:, None], T.T, rcond=None)[0]  # the best w1 beside this w2
    best = np.linalg.lstsq(w1.numpy().ravel()[:, None], T, rcond=None)[0].reshape(low.shape)  # and w2, of any rank
    left, values, right = np.linalg.svd(best, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(best, low.numpy(), atol=1e-9)
    assert float(np.linalg.norm(T - first.T @ low.numpy().reshape(1, -1))) >= after * (1 - 1e-5)
    tries = [descended(T, low.shape, rank, seed) for seed in range(5)]
    assert after <= min(tries) * 1.05, (after, tries)  # the turns end in some minimum: near the best of several


def descended(T: Array, size: torch.Size, rank: int, seed: int) -> float:
    """The error of the same by turns in numpy, from a random start."""
    w2 = np.random.default_rng(seed).normal(size=(1, T.shape[1]))
    for _ in range(100):
        w1 = T @ w2.T / (w2**2).sum()
        u, s, vh = np.linalg.svd((w1.T @ T / (w1**2).sum()).reshape(size), full_matrices=False)
        w2 = (u[:, :rank] * s[:rank] @ vh[:rank]).reshape(1, -1)
    return float(np.linalg.norm(T - w1 @ w2))
