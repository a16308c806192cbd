"""Factors of a product, refactored: against the dense product and its SVD, in float64."""

from __future__ import annotations

import pytest
import torch

from networks.tensors.low_rank import refactor


@pytest.mark.parametrize("shape", [(9, 4, 12), (3, 4, 12), (9, 4, 2)])
def test_refactor_keeps_the_product_or_its_nearest_of_lower_rank(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    O, R, J = shape
    left, right = torch.randn(O, R, dtype=torch.float64), torch.randn(R, J, dtype=torch.float64)
    whole = left @ right
    a, b, s = refactor(left, right)
    torch.testing.assert_close(a @ b, whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(s, torch.linalg.svdvals(whole)[: len(s)], atol=1e-9, rtol=0)
    torch.testing.assert_close(a.T @ a, b @ b.T, atol=1e-9, rtol=0)  # equal lengths, orthogonal directions
    for rank in range(1, len(s)):
        a, b, s = refactor(left, right, rank)
        assert a.shape == (O, rank) and b.shape == (rank, J)
        lost = torch.linalg.matrix_norm(whole - a @ b)
        torch.testing.assert_close(lost, s[rank:].square().sum().sqrt(), atol=1e-9, rtol=0)


def test_a_difference_of_products_in_float32() -> None:
    """[B, B0] . [A; -A0] where both products are large and nearly the same: the small difference survives."""
    torch.manual_seed(0)
    up, down = torch.randn(64, 8), torch.randn(8, 96)
    moved = up + 1e-3 * torch.randn(64, 8), down + 1e-3 * torch.randn(8, 96)
    exact = moved[0].double() @ moved[1].double() - up.double() @ down.double()
    a, b, _ = refactor(torch.cat([moved[0], up], 1), torch.cat([moved[1], -down]))
    error = torch.linalg.matrix_norm(a.double() @ b.double() - exact) / torch.linalg.matrix_norm(exact)
    assert float(error) < 1e-3
    half = torch.linalg.matrix_norm(a.half().double() @ b.half().double() - exact) / torch.linalg.matrix_norm(exact)
    stacked = torch.cat([moved[0], up], 1).half().double() @ torch.cat([moved[1], -down]).half().double()
    assert float(half) < 2e-3
    assert float(torch.linalg.matrix_norm(stacked - exact) / torch.linalg.matrix_norm(exact)) > 0.1
