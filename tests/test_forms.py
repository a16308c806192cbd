"""Updates as layers of each form, against numpy's singular values, quantile and least squares and dense formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_numeric import Zoo, assert_close, cases, dense_update, make_network, randomise
from numpy.typing import NDArray
from registry import dense_loha, dense_lokr, dense_lora
from torch import Tensor

from networks.algos.loha import LoHa
from networks.algos.lora import LoRA
from networks.files import codec
from networks.files.joining import update_of
from networks.tensors.updates import Update, total
from networks.tools.forms import FORMS, Form, row_of
from networks.tools.ranks import RankRule

Array = NDArray[np.float64]
DENSE = {"lora": dense_lora, "loha": dense_loha, "lokr": dense_lokr, "diff": lambda t, shape: t["diff"]}
SHAPES = ((12, 18), (12, 18, 1, 1), (12, 18, 3, 3), (7, 13), (1, 20), (20, 1), (8, 6, 3), (4, 6, 3, 1, 2))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def distance(form: Form, update: Update, shape: tuple[int, ...]) -> tuple[float, int]:
    """(error as a part of the update, rank) of what a form makes, by the dense formula and alpha as readers have it."""
    layer = form.layer("x", update, shape)
    rank = layer.algorithm.spec.shown_rank(layer.tensors)
    scale = layer.alpha / rank if rank and layer.alpha else 1.0
    tensors = {key: t.double() for key, t in layer.tensors.items()}
    wanted = update.matrix().double().reshape(shape)
    found = DENSE[form.algo](tensors, shape) * scale
    assert found.shape == wanted.shape and all(t.dtype == form.dtype for t in layer.tensors.values())
    size, off = float(wanted.norm()), float((found - wanted).norm())
    row = row_of(layer, shape, update)
    rounding = 1e-12 if update.left.dtype == torch.float64 else 1e-6
    assert row.error is not None and abs(row.error - (off / size if size else off)) < rounding and row.rank == rank
    return row.error, rank or 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_are_the_nearest_ones(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    O, J = shape[0], math.prod(shape[1:])
    update, low = Update(drawn(O, J)), Update(drawn(O, 2), drawn(2, J))
    values = np.linalg.svd(update.matrix().numpy(), compute_uv=False)
    for rank in (1, 2, 5):
        form = {algo: Form(algo, RankRule(rank), dtype=torch.float64) for algo in ("lora", "loha", "lokr")}
        least = math.sqrt(float((values[rank:] ** 2).sum() / (values**2).sum()))
        found, kept = distance(form["lora"], update, shape)
        assert abs(found - least) < 1e-9 and kept == min(rank, O, J), rank
        assert distance(form["loha"], update, shape)[0] <= found + 1e-12, rank
        whole, _ = distance(Form("lokr", dtype=torch.float64), update, shape)
        assert whole - 1e-9 <= distance(form["lokr"], update, shape)[0] < 1 + 1e-9, rank
    for algo in ("lora", "loha"):  # with all its ranks, and where it has few of them, it is exact
        assert distance(Form(algo, dtype=torch.float64), update, shape)[0] < 1e-13, algo
        for rule in (None, RankRule(3), RankRule(5, "energy", 0.999999)):
            found, kept = distance(Form(algo, rule, dtype=torch.float64), low, shape)
            assert found < 1e-13 and kept == min(2, O, J), (algo, rule)
    for algo in FORMS:
        assert distance(Form(algo, dtype=torch.float64), Update(torch.zeros(O, J).double()), shape) == (
            0.0,
            0 if algo == "diff" or (algo == "lokr" and 1 in (O, J)) else 1,
        ), algo
    assert distance(Form("diff", dtype=torch.float64), low, shape)[0] < 1e-15


def test_a_hadamard_product_is_nearer_than_the_low_rank_one_and_its_rows_are_the_best() -> None:
    torch.manual_seed(1)
    for shape in ((30, 40), (16, 6, 3, 3)):
        O, J = shape[0], math.prod(shape[1:])
        update = Update((drawn(O, 2) @ drawn(2, J)) * (drawn(O, 2) @ drawn(2, J)))
        lora, loha = (distance(Form(algo, RankRule(3), dtype=torch.float64), update, shape)[0] for algo in DENSE if
                      algo in ("lora", "loha"))  # fmt: skip
        assert loha < 0.5 * lora, (shape, lora, loha)
        layer = Form("loha", RankRule(3), dtype=torch.float64).layer("x", update, shape)
        (_, a), (_, b), (_, c), (_, d) = sorted((key, t.numpy()) for key, t in layer.tensors.items())
        # the last step of its search made the columns of w1_b the best beside all else
        for column in (0, J // 2, J - 1):
            other = (c @ d)[:, column]
            wanted = update.matrix().numpy()[:, column]
            best = np.linalg.lstsq(a * other[:, None], wanted, rcond=None)[0]
            np.testing.assert_allclose(b[:, column], best, rtol=1e-5, atol=1e-8)


def test_leading_parts_of_a_large_layer_are_those_of_a_full_decomposition() -> None:
    """Above 512 rows: a spectrum that falls slowly, and noise below it; rules find the ranks that numpy finds."""
    torch.manual_seed(2)
    O, J = 560, 800
    matrix = (drawn(O, O) / torch.arange(1, O + 1)) @ drawn(O, J) + 1e-3 * drawn(O, J)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    energy = np.cumsum(values**2) / (values**2).sum()
    for dtype in (torch.float64, torch.float32):
        update = Update(matrix.to(dtype))
        for rank in (1, 8, 40):
            u, s, vh = update.decomposed(rank)
            left = float((matrix - (u * s @ vh).double()).norm())
            least = math.sqrt(float((values[rank:] ** 2).sum()))
            assert len(s) == rank and least * (1 - 1e-6) < left < least * (1 + 1e-5), (dtype, rank, left / least)
        torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
        torch.testing.assert_close(vh @ vh.T, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
        for rule, wanted in {
            RankRule(rule="energy", value=0.9): int((energy < 0.9).sum()) + 1,
            RankRule(rule="energy", value=0.99): int((energy < 0.99).sum()) + 1,
            RankRule(rule="sv_fro", value=0.97): int((energy < 0.97**2).sum()) + 1,
            RankRule(rule="sv_ratio", value=7): int((values > values[0] / 7).sum()),
            RankRule(20, "sv_ratio", 100.0): 20,
            RankRule(20, "sv_cumulative", 0.02): int((np.cumsum(values) < 0.02 * values.sum()).sum()) + 1,
        }.items():
            kept = Form("lora", rule).kept(update, (O, J))[1]
            assert len(kept) == wanted, (dtype, rule, len(kept), wanted)


@pytest.mark.parametrize("shape", ((600, 530), (40, 30)))
def test_ranks_that_are_only_rounding_are_left_out(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    left, right = drawn(shape[0], 5) * torch.logspace(0, -6, 5, dtype=torch.float64), drawn(5, shape[1])
    for update in (
        Update(left @ right),
        Update(torch.cat([left, left], 1), torch.cat([right, right])),
        Update(torch.cat([left] * 130, 1), torch.cat([right] * 130)),  # more ranks than the matrix could have
    ):
        assert len(update.decomposed()[1]) == len(update.decomposed(20)[1]) == 5
        u, s, vh = update.decomposed()
        np.testing.assert_allclose((u * s @ vh).numpy(), update.matrix().numpy(), atol=1e-10 * float(s[0]))
        assert abs(update.norm() / float(np.linalg.norm(update.matrix().numpy())) - 1) < 1e-12


def test_lengths_of_small_differences_of_large_updates() -> None:
    """Against 80 bits, where factors differ in their last bits: what is lost belongs to the factors."""
    torch.manual_seed(4)
    left, right = drawn(30, 4), drawn(4, 50)
    for size in (1e-3, 1e-8, 1e-12):
        other = Update(left * (1 + size * drawn(30, 4)), right)
        exact = (left.numpy().astype(np.longdouble) - other.left.numpy()) @ right.numpy().astype(np.longdouble)
        length = float(np.sqrt((exact**2).sum()))
        whole = Update(left @ right)
        for one in (Update(left, right), whole):
            assert abs(one.minus(other).norm() - length) < 1e-14 * whole.norm(), size
    zero = Update(torch.zeros(30, 4).double(), right)
    assert zero.norm() == 0 and total([zero, whole], [5.0, 0.0]).norm() == 0
    tiny = Update(left * 1e-45, right * 1e-45)  # the least numbers of fp32
    assert math.isclose(tiny.norm(), float((left @ right).norm()) * 1e-90, rel_tol=1e-12)


def test_weighted_sums() -> None:
    torch.manual_seed(5)
    parts = [Update(drawn(9, 2), drawn(2, 12)), Update(drawn(9, 12)), Update(drawn(9, 1), drawn(1, 12))]
    before = [part.matrix().clone() for part in parts]
    wanted = sum(w * m.numpy() for w, m in zip((2.0, -0.5, 3.0), before, strict=True))
    np.testing.assert_allclose(total(parts, [2.0, -0.5, 3.0]).matrix().numpy(), wanted, atol=1e-13)
    factors = total([parts[0], parts[2]], [2.0, 3.0])
    assert factors.right is not None and len(factors.right) == 3
    np.testing.assert_allclose(factors.matrix().numpy(), 2 * before[0].numpy() + 3 * before[2].numpy(), atol=1e-13)
    assert all(torch.equal(part.matrix(), m) for part, m in zip(parts, before, strict=True))  # inputs stay


def test_rules_count_as_they_say() -> None:
    """Of random spectra, by adding up; sd-scripts' resize_lora.py keeps one more, at least 2 and at most all."""
    generator = np.random.default_rng(6)
    for _ in range(50):
        s = np.sort(generator.random(generator.integers(1, 20)) ** 3 + 1e-9)[::-1].copy()
        share, ratio = float(generator.random()), float(1 + 9 * generator.random())
        whole, squares = s.sum(), (s**2).sum()
        wanted = {
            ("sv_cumulative", share): next(n for n in range(1, 21) if s[:n].sum() >= share * whole),
            ("energy", share): next(n for n in range(1, 21) if (s[:n] ** 2).sum() >= share * squares),
            ("sv_fro", share): next(n for n in range(1, 21) if (s[:n] ** 2).sum() >= share**2 * squares),
            ("sv_ratio", ratio): sum(value > s[0] / ratio for value in s),
        }
        values = torch.tensor(s)
        for (name, value), count in wanted.items():
            rule = RankRule(rule=name, value=value)
            assert rule.count(values) == count, (name, value, s)
            assert RankRule(2, name, value).count(values) == min(2, count), (name, value, s)
            for known in range(1, len(s) + 1):  # with the first values alone: not settled, or the same
                if rule.settled(values[:known], float(squares)):
                    assert rule.count(values[:known], energy=float(squares)) == count, (name, value, s, known)
    assert RankRule(rule="energy", value=0.5).count(torch.zeros(4)) == 1


def test_clamped_elements_are_those_of_numpys_quantile() -> None:
    torch.manual_seed(7)
    update, shape = Update(drawn(12, 54)), (12, 6, 3, 3)
    plain = Form("lora", RankRule(3), dtype=torch.float64).layer("x", update, shape)
    s = np.linalg.svd(update.matrix().numpy(), compute_uv=False)[:3]
    up = plain.tensors["lora_up.weight"].flatten(1).numpy() * s**0.5
    down = plain.tensors["lora_down.weight"].flatten(1).numpy() / s[:, None] ** 0.5
    for quantile in (0.9, 0.99, 1.0):
        limit = np.quantile(np.concatenate([up.ravel(), down.ravel()]), quantile)
        layer = Form("lora", RankRule(3), dtype=torch.float64, clamp=quantile).layer("x", update, shape)
        for suffix, factor in (("up", up), ("down", down)):
            found = layer.tensors[f"lora_{suffix}.weight"].flatten(1).numpy()
            np.testing.assert_allclose(found, factor.clip(-limit, limit), atol=1e-9)
        assert layer.alpha == 3
    for form in ({"algo": "loha", "clamp": 0.9}, {"algo": "lora", "clamp": 1.5}, {"algo": "lora", "factor": 4}):
        with pytest.raises(ValueError, match="alone"):
            Form(**form)  # type: ignore[arg-type]


def test_few_bits_in_and_out() -> None:
    torch.manual_seed(8)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        left, right = drawn(12, 3).to(dtype), drawn(3, 20).to(dtype)
        wanted = Update(left.double(), right.double())
        for algo in FORMS:
            layer = Form(algo, dtype=torch.bfloat16).layer("x", Update(left, right), (12, 20))
            other = Form(algo).layer("x", wanted, (12, 20))
            both = [DENSE[algo]({k: t.double() for k, t in one.tensors.items()}, (12, 20)) for one in (layer, other)]
            assert float((both[0] - both[1]).norm()) < 0.02 * float(both[1].norm()), (algo, dtype)


def test_values_whose_squares_fp32_does_not_hold() -> None:
    torch.manual_seed(12)
    matrix, low = torch.randn(12, 20), Update(torch.randn(12, 3), torch.randn(3, 20))
    for algo in ("lora", "loha", "lokr"):
        for rule in (RankRule(1), RankRule(2), RankRule(rule="energy", value=0.6)):
            for update in (Update(matrix), low):
                wanted = distance(Form(algo, rule), update, (12, 20))
                for size in (1e-25, 1e12, 1e20):
                    found = distance(Form(algo, rule), update.times(size), (12, 20))
                    assert found[1] == wanted[1] and abs(found[0] - wanted[0]) < 1e-3, (algo, rule, size)
    assert len(Update(torch.eye(520, 530) * 1e-25).decomposed()[1]) == 520


def test_what_a_dtype_does_not_hold_and_what_is_damaged_is_refused() -> None:
    huge = Update(torch.full((4, 6), 1e9))
    assert Form("lora", dtype=torch.float16).layer("x", huge, (4, 6))  # its factors are smaller
    with pytest.raises(ValueError, match="x: .* above the largest one of float16, give --dtype bfloat16"):
        Form("diff", dtype=torch.float16).layer("x", huge, (4, 6))
    for algo in FORMS:
        with pytest.raises(ValueError, match="x: its values are not finite"):
            Form(algo).layer("x", Update(torch.full((4, 6), float("nan"))), (4, 6))


def test_a_normalisation_layer_has_its_own_form() -> None:
    update = Update(drawn(9, 1))
    for algo in FORMS:
        layer = Form(algo, dtype=torch.float64).layer("x", update, (9,))
        assert layer.tensors.keys() == {"w_norm"} and torch.equal(layer.tensors["w_norm"], update.left[:, 0]), algo
        assert row_of(layer, (9,), update).error == 0


MATRIX = [case for case in cases() if case.algo != "norm"]


@pytest.mark.parametrize("kind", ("linear", "conv_1x1", "conv_3x3"))
def test_updates_of_all_algorithms_are_their_formulas(kind: str) -> None:
    """Options in pairs with them: Tucker, scalars, limits; then as each form, of so many ranks as the formula has."""
    torch.manual_seed(9)
    for number, case in enumerate(MATRIX):
        if kind not in case.kinds:
            continue
        model = Zoo((kind,))
        network = make_network(case, model)
        randomise(network)
        (layer,) = network.adapted_layers
        wanted, W = dense_update(layer, 1.0).detach(), layer.whole_weight()
        shape = tuple(W.shape)
        update = update_of(codec.saved_layer(layer), shape, W)
        assert_close(update.matrix().reshape(shape), wanted, f"{case} {kind}")
        if number % 8 == 0 and kind == "conv_3x3":
            values = np.linalg.svd(wanted.flatten(1).numpy(), compute_uv=False)
            least = math.sqrt(float((values[7:] ** 2).sum() / (values**2).sum()))
            found, _ = distance(Form("lora", RankRule(7), dtype=torch.float64), update, shape)
            assert abs(found - least) < 1e-7, case


@pytest.mark.parametrize("shape", ((20, 30), (20, 4, 3, 3)), ids=str)
def test_updates_with_magnitudes_are_their_formula(shape: tuple[int, ...]) -> None:
    """Of DoRA on rows and on columns, with more ranks than the weight could have, too."""
    torch.manual_seed(10)
    W, ones = drawn(*shape), [1] * (len(shape) - 2)
    for rank in (3, 40):
        down, up = drawn(rank, *shape[1:]), drawn(shape[0], rank, *ones)
        whole = W + torch.einsum("or,r...->o...", up.flatten(1), down) * (2.0 / rank)
        for axis in (0, 1):
            over = [n for n in range(len(shape)) if n != axis]
            magnitude = whole.pow(2).sum(over, keepdim=True).sqrt() * (0.5 + torch.rand(shape[axis])).reshape(
                [-1 if n == axis else 1 for n in range(len(shape))]
            )
            tensors = {"lora_down.weight": down, "lora_up.weight": up}
            saved = codec.SavedLayer("x", LoRA, tensors, 2.0, magnitude)
            wanted = whole * magnitude / whole.pow(2).sum(over, keepdim=True).sqrt() - W
            assert_close(update_of(saved, shape, W).matrix().reshape(shape), wanted, f"{rank} {axis}")
            plain = update_of(replace(saved, magnitude=None), shape)
            assert (plain.right is None) == (rank > 20)
            assert_close(plain.matrix().reshape(shape), whole - W, f"{rank} {axis}")


def test_parts_of_a_hadamard_product_with_unlike_ranks() -> None:
    """The rows of three parts: of rank 4, of rank 1, of none."""
    torch.manual_seed(11)
    left, other, right, second = torch.zeros(18, 6).double(), torch.zeros(18, 6).double(), drawn(6, 20), drawn(6, 20)
    left[:6, :2], other[:6, :2], left[6:12, 2], other[6:12, 2] = drawn(6, 2), drawn(6, 2), drawn(6), drawn(6)
    tensors = {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": other, "hada_w2_b": second}
    change = dense_loha(tensors, (18, 20))
    found = LoHa.nearest(tensors, lambda s: min(2, len(s)), parts=3)
    assert all(t.isfinite().all() for t in found.values())
    made = dense_loha(found, (18, 20))
    values = np.linalg.svd(change[:6].numpy(), compute_uv=False)
    assert float((made - change)[:6].norm()) <= math.sqrt(float((values[2:] ** 2).sum())) + 1e-9
    torch.testing.assert_close(made[6:], change[6:], atol=1e-9, rtol=0)
