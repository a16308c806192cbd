"""scripts/benchmark.py: what its counters count, by hand."""

from __future__ import annotations

import torch
from bench.counting import count
from torch import Tensor, nn


def test_counts_of_a_small_pass_by_hand() -> None:
    """A frozen Linear 3 -> 5 on 4 tokens in fp32, then a product: views and allocations count nothing."""
    base, x = nn.Linear(3, 5).requires_grad_(False), torch.randn(2, 2, 3).requires_grad_()
    hidden: list[Tensor] = []

    def forward() -> Tensor:
        hidden[:] = [torch.empty(100), torch.zeros(7)]  # held beside the graph; the first runs no kernel
        y = base(x)
        return y * y.detach()

    counts = count(forward, x, torch.ones(2, 2, 5), base.parameters())
    assert counts.flops == 2 * 2 * 4 * 3 * 5
    assert [each.name for each in counts.launches] == [
        "zeros.default", "addmm.default", "mul.Tensor", "mul.Tensor", "mm.default"
    ]  # fmt: skip
    X, W, Y = 4 * 4 * 3, 4 * 5 * 3, 4 * 4 * 5  # bytes
    assert counts.traffic == 4 * 7 + (X + W + 4 * 5 + Y) + 3 * Y + 3 * Y + (Y + W + X)
    assert counts.kept == Y + 4 * 107 and not counts.keeps_input
    assert counts.peak == 4 * 107 + Y + Y + Y  # product, output, the product's gradient; x's comes when y is freed


def test_what_is_kept_with_the_input() -> None:
    """Of a trained Linear the input is kept, counted by itself; an expanded tensor is read once."""
    layer, x = nn.Linear(3, 5, bias=False), torch.randn(4, 3).requires_grad_()
    counts = count(lambda: layer(x), x, torch.ones(1, 1).expand(4, 5), layer.parameters())
    assert counts.keeps_input and counts.kept == 0 and len(counts.launches) == 3
    X, W, Y = 4 * 4 * 3, 4 * 5 * 3, 4 * 4 * 5
    assert counts.traffic == (X + W + Y) + (4 + W + X) + (4 + X + W)
