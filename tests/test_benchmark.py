"""scripts/benchmark.py: what its counters count, by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.counting import Watch, count, flops_of
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


def test_traffic_reads_no_tensor_that_is_written_over() -> None:
    """A copy, a fill and a result given with out= are written; what is added to in place is read, too."""
    a, b = torch.zeros(10), torch.zeros(10)
    with Watch() as watch:
        a.copy_(b)
        a.fill_(1.0)
        torch.mul(b, 2.0, out=a)
        a.add_(b)
    assert [launch.traffic // 40 for launch in watch.launches] == [2, 1, 2, 3]


def test_every_product_is_counted_however_it_is_written() -> None:
    """In place, into a given tensor, with vectors: two FLOPs for each multiplication."""
    m, n, a, b = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(4, 2, 3), torch.zeros(4, 3, 5)
    y, ys, v, w = torch.zeros(2, 5), torch.zeros(4, 2, 5), torch.zeros(3), torch.zeros(2)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "mm": (lambda: m @ n, 2 * 3 * 5),
        "mm.out": (lambda: torch.mm(m, n, out=y), 2 * 3 * 5),
        "addmm": (lambda: torch.addmm(y, m, n), 2 * 3 * 5),
        "addmm.out": (lambda: torch.addmm(y, m, n, out=torch.zeros(2, 5)), 2 * 3 * 5),
        "addmm_": (lambda: y.addmm_(m, n), 2 * 3 * 5),
        "bmm": (lambda: a @ b, 4 * 2 * 3 * 5),
        "bmm.out": (lambda: torch.bmm(a, b, out=ys), 4 * 2 * 3 * 5),
        "baddbmm": (lambda: torch.baddbmm(ys, a, b), 4 * 2 * 3 * 5),
        "baddbmm_": (lambda: ys.baddbmm_(a, b), 4 * 2 * 3 * 5),
        "addbmm": (lambda: torch.addbmm(y, a, b), 4 * 2 * 3 * 5),
        "addbmm_": (lambda: y.addbmm_(a, b), 4 * 2 * 3 * 5),
        "einsum": (lambda: torch.einsum("ij,jk->ik", m, n), 2 * 3 * 5),
        "mv": (lambda: m @ v, 2 * 3),
        "mv.out": (lambda: torch.mv(m, v, out=torch.zeros(2)), 2 * 3),
        "addmv": (lambda: torch.addmv(w, m, v), 2 * 3),
        "addmv_": (lambda: w.addmv_(m, v), 2 * 3),
        "dot": (lambda: v @ v, 3),
        "vdot": (lambda: torch.vdot(v, v), 3),
        "outer": (lambda: torch.addr(m, w, v), 2 * 3),
        "outer_": (lambda: m.addr_(w, v), 2 * 3),
    }
    found = {name: flops_of(run) for name, (run, _) in cases.items()}
    assert found == {name: 2 * products for name, (_, products) in cases.items()}
