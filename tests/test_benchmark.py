"""scripts/benchmark.py: what its counters count, by hand; and every table of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bench.main
import pytest
import torch
import torch.nn.functional as F
from bench import bases, cases, hosts, nets, peers, steps, sweep, timing
from bench.cases import MAIN, Layer, Sizes, Step
from bench.counting import Watch, count, flops_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.algos import ALGOS


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


# -- the program

TINY = "tiny"
TOY = Sizes(
    cases=("lora16", "dora16"), counted=(MAIN, TINY), timed=(MAIN, TINY), few=("ia3",), seconds=0.001,
    models=(TINY,), steps=(Step("lora16", 16), Step("lora16", 16, checkpointing=True)), release="",
    networks=("lora", "loha", "lokr"), merged=(16, 4), base_layer=TINY, base_cases=("lora16",),
    compiled=("lora16",), backend="eager",
)  # fmt: skip


class Thin(nn.Module):
    """A peer's adapter, as small as can be."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.up, self.base = nn.Parameter(torch.zeros(base.get_parameter("weight").shape[0], 1)), [base]

    def apply_to(self) -> None:
        base, before = self.base[0], self.base[0].forward
        base.forward = lambda x: before(x) + F.linear(x.mean(-1, keepdim=True), self.up)  # type: ignore[method-assign]


class TinyModel(nn.Module):
    """Of repeated blocks, with the switch that the trainers' models have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks, self.checkpointing = nn.ModuleList([nets.Block(width) for _ in range(2)]), False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in (layer for block in self.blocks for layer in block.children()):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and a model of a few numbers, ours and one peer, who has LoRA alone."""

    def thin(checkouts: Mapping[str, Any]) -> tuple[list[peers.Peer], list[str]]:
        peer = peers.Kohya("sds", "sds: thin", lambda case: None if case.dora or case.algo != "lora" else thin_module)
        return [peers.Ours(), peer], ["others are left out"]

    for name in (MAIN, TINY):
        monkeypatch.setitem(cases.LAYERS, name, Layer(lambda: nn.Linear(16, 16), (1, 4, 16)))
    model = steps.Model(TINY, "sds", TinyModel, lambda model, x, channels: model(x), lambda channels: (2, 3, channels))
    monkeypatch.setattr(steps, "MODELS", (model,))
    monkeypatch.setattr(bench.main, "peers_of", thin)
    monkeypatch.setattr(hosts, "sd_scripts", lambda root: None)
    monkeypatch.setattr(nets, "_LATE", {"sds": ()})
    monkeypatch.setattr(timing, "LEAST", 1e-4)
    monkeypatch.setattr(timing, "collect", lambda: None)
    monkeypatch.setattr(sweep, "ALGOS", {name: ALGOS[name] for name in ("lora", "diag-oft")})
    monkeypatch.setattr(bases, "BASES", {name: bases.BASES[name] for name in ("bf16", "float8", "scaled float8")})
    monkeypatch.setitem(bases.BASES, "none", lambda linear: 1 / 0)


def thin_module(name: str, base: nn.Module) -> nn.Module:
    return Thin(base)


def rows_of(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.mark.usefixtures("small")
def test_all_tables_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way of --device cuda where there is no GPU: every table, a page, its chart; what is not there is a line."""
    page = tmp_path / "cost.md"
    arguments = ["--device", "cuda", "--tables", ",".join(bench.main.TABLES), "--docs", str(page)]
    assert bench.main.main("", [*arguments, "--sd_scripts", str(tmp_path)], TOY) == 0
    text = page.read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    for line in ("no GPU was seen: everything ran on the CPU", "others are left out", "sds: thin", "no base none: "):
        assert f"* {line}" in text
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    for part in (
        f"{MAIN}, autocast: counts", f"{TINY}, autocast: counts", f"{MAIN}, fp32: time", "Python per layer, fp32",
        "A step over", "Networks of rank", "In-memory merge", "Every algorithm with every option",
        "torch.compile with eager", "bases of every form", "block swap",
    ):  # fmt: skip
        assert any(part in title for title in titles), part
    rows = list(rows_of(text))
    assert [row[0] for row in rows if row[0].startswith(TINY)] == [
        "tiny, 16 channels, lora16", "tiny, 16 channels, lora16, checkpointing"
    ]  # fmt: skip
    assert [row[-1] for row in rows if row[0] in ("lora", "diag-oft") and len(row) == 5] == ["none", "none"]
    assert ["scaled float8", "lora16"] in [row[:2] for row in rows]
    assert [row[1] for row in rows if row[0] == "lora16" and row[1] == "equal"]
    assert ["dora16", "-"] in [[row[0], row[-1]] for row in rows], "what the peer has not"
    assert page.with_suffix(".png").stat().st_size > 1000


def test_arguments_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--tables", "counts,cuonts"], "there is no table cuonts: choose of counts, times"),
        (["--sd_scripts", str(tmp_path / "none")], "is no folder: give the root of the trainer's checkout"),
    ):
        with pytest.raises(SystemExit):
            bench.main.main("", arguments)
        assert told in capsys.readouterr().err


# -- the peers

LIKE_LYCORIS = {
    "lora16",
    "lora64",
    "loha8",
    "loha32",
    "lokr f8 r8",
    "lokr f16 whole",
    "oft32",
    "boft16",
    "glora16",
    "ia3",
}
HAS = {
    "lyc": {*LIKE_LYCORIS, "dora16", "lokr f16 whole + DoRA", "dylora16", "tlora16", "full"},
    "lyc-byp": {*LIKE_LYCORIS, "tlora16"},
    "peft": {*LIKE_LYCORIS, "dora16"},
}


@pytest.mark.reference
def test_peers_have_adapters_that_act_and_are_trained() -> None:
    """Each has those that its columns show, and measures none that does nothing: outputs change, and what is trained
    gets gradients."""
    found, lines = peers.peers_of({})
    assert [peer.name for peer in found] == ["ours", "lyc", "lyc-byp", "peft"] and len(lines) == 2
    layer, cpu = Layer(lambda: nn.Linear(128, 128), (1, 4, 128)), torch.device("cpu")
    x = layer.input(torch.float32, cpu)
    for peer in found:
        has = {name for name in cases.CASES if _acts(peer, layer, cases.CASES[name], x)}
        assert has == HAS.get(peer.name, set(cases.CASES)), peer.name


def _acts(peer: peers.Peer, layer: Layer, case: cases.Case, x: Tensor) -> bool:
    torch.manual_seed(0)
    frozen = layer.build(torch.float32, x.device)(x)
    torch.manual_seed(0)
    made = peers.adapted(peer, layer, case, torch.float32, x.device)
    if made is None:
        return False
    y = made.call(x)
    y.sum().backward()
    assert not torch.allclose(y, frozen, atol=1e-6), (peer.name, case)
    some = any if case.algo == "dylora" else all  # of which a pass trains one block
    assert made.parameters and some(p.grad is not None for p in made.parameters), (peer.name, case)
    return True
