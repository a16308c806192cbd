"""Layers of files joined and divided by rows, in float64 against dense formulas that share no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from networks.files import codec
from networks.files.codec import SavedLayer
from networks.files.joining import as_diff, as_lora, joined, rows_of
from networks.files.merged import merged_weight

SIZES, I = (8, 16, 4), 6
KERNELS: dict[str, tuple[int, ...]] = {"Linear": (), "1x1": (1, 1), "3x3": (3, 3)}
Kernel = tuple[int, ...]
Tensors = dict[str, Tensor]


# -- layers, by the keys of files


class Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def lora(r: Draw, O: int, k: Kernel, rank: int = 2) -> Tensors:
    ones = [1] * len(k)
    return {"lora_down.weight": r(rank, I, *k), "lora_up.weight": r(O, rank, *ones), "alpha": torch.tensor(1.0)}


def lora_tucker(r: Draw, O: int, k: Kernel) -> Tensors:
    ones = [1] * len(k)
    return {
        "lora_down.weight": r(2, I, *ones),
        "lora_mid.weight": r(2, 2, *k),
        "lora_up.weight": r(O, 2, *ones),
        "alpha": torch.tensor(3.0),
    }


def loha(r: Draw, O: int, k: Kernel) -> Tensors:
    J = I * math.prod(k)
    return {f"hada_w{n}_{x}": r(*s) for n in (1, 2) for x, s in (("a", (O, 2)), ("b", (2, J)))} | {
        "alpha": torch.tensor(1.0)
    }


def loha_tucker(r: Draw, O: int, k: Kernel) -> Tensors:
    return {f"hada_w{n}_{x}": r(*s) for n in (1, 2) for x, s in (("a", (2, O)), ("b", (2, I)))} | {
        "hada_t1": r(2, 2, *k),
        "hada_t2": r(2, 2, *k),
        "alpha": torch.tensor(1.0),
    }


def lokr(r: Draw, O: int, k: Kernel) -> Tensors:
    """w2 of rank 1."""
    K = math.prod(k)
    return {
        "lokr_w1": r(2, 2), "lokr_w2_a": r(O // 2, 1), "lokr_w2_b": r(1, I // 2 * K), "alpha": torch.tensor(0.5)
    }  # fmt: skip


def lokr_both(r: Draw, O: int, k: Kernel) -> Tensors:
    K = math.prod(k)
    return {
        "lokr_w1_a": r(2, 1), "lokr_w1_b": r(1, 3), "lokr_w2_a": r(O // 2, 1), "lokr_w2_b": r(1, I // 3 * K),
        "alpha": torch.tensor(0.5),
    }  # fmt: skip


def lokr_whole(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"lokr_w1": r(O // 4, 3), "lokr_w2": r(4, 2, *k), "alpha": torch.tensor(0.5)}


def lokr_tucker(r: Draw, O: int, k: Kernel) -> Tensors:
    return {
        "lokr_w1": r(2, 2), "lokr_w2_a": r(1, O // 2), "lokr_w2_b": r(1, I // 2), "lokr_t2": r(1, 1, *k),
        "alpha": torch.tensor(0.5),
    }  # fmt: skip


def glora(r: Draw, O: int, k: Kernel) -> Tensors:
    ones = [1] * len(k)
    return {
        "a1.weight": r(I, 1, *ones), "a2.weight": r(1, I, *ones), "b1.weight": r(O, 1, *ones),
        "b2.weight": r(1, I, *k), "alpha": torch.tensor(0.5),
    }  # fmt: skip


def full(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"diff": r(O, I, *k), "diff_b": r(O), "alpha": torch.tensor(4.0)}


def ia3(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"weight": r(1, O, *[1] * len(k)) if k else r(O), "on_input": torch.tensor(0)}


def ia3_input(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"weight": r(1, I, *[1] * len(k)) if k else r(I), "on_input": torch.tensor(1)}


def oft(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"oft_blocks": r(O // 4, 4, 4) / 4, "alpha": torch.tensor(0.0)}


def oft_limited(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"oft_blocks": r(O // 4, 4, 4), "alpha": torch.tensor(0.05)}


def oft_rescaled(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"oft_blocks": r(O // 2, 2, 2) / 4, "rescale": 1 + r(O, 1, *[1] * len(k)) / 8, "alpha": torch.tensor(0.0)}


def boft(r: Draw, O: int, k: Kernel) -> Tensors:
    count = O // 2
    return {"oft_blocks": r(count.bit_length(), count, 2, 2) / 4, "alpha": torch.tensor(0.0)}


def oft_input(r: Draw, O: int, k: Kernel) -> Tensors:
    return {"oft_R.weight": r(I * math.prod(k) // 3, 3) / 8}


def tlora(r: Draw, O: int, k: Kernel) -> Tensors:
    """As a LoRA of twice the rank, which is how its files are."""
    return lora(r, O, k, 4)


def dora(r: Draw, O: int, k: Kernel) -> Tensors:
    return {**lora(r, O, k), "dora_scale": 2 + r(O, 1, *[1] * len(k)).abs()}


def dora_input(r: Draw, O: int, k: Kernel) -> Tensors:
    return {**lora(r, O, k), "dora_scale": 2 + r(1, I, *[1] * len(k)).abs()}


def lokr_dora(r: Draw, O: int, k: Kernel) -> Tensors:
    return {**lokr(r, O, k), "dora_scale": 2 + r(O, 1, *[1] * len(k)).abs()}


Make = Callable[[Draw, int, Kernel], Tensors]
TUCKER: tuple[Make, ...] = (lora_tucker, loha_tucker, lokr_tucker)
MAKERS: tuple[Make, ...] = (
    lora, loha, lokr, lokr_both, lokr_whole, glora, full, ia3, ia3_input, oft, oft_limited, oft_rescaled, boft,
    oft_input, tlora, dora, dora_input, lokr_dora, *TUCKER,
)  # fmt: skip
CELLS = [
    pytest.param(make, kernel, id=f"{make.__name__}-{title}")
    for make in MAKERS
    for title, kernel in KERNELS.items()
    if title == "3x3" or make not in TUCKER
]


def saved_of(tensors: Mapping[str, Tensor], name: str = "lora_unet_x") -> SavedLayer:
    layers, unknown = codec.decode({f"{name}.{suffix}": t for suffix, t in tensors.items()})
    assert not unknown
    return layers[name]


# -- the same in dense matrices


def dense(saved: SavedLayer, W: Tensor) -> Tensor:
    """W' by the definitions in README and papers."""
    t, k = {key: x.double() for key, x in saved.tensors.items()}, W.shape[2:]
    O, flat = len(W), W.flatten(1)
    new = next(form(t, W, flat, saved.alpha) for key, form in FORMS.items() if key in t).reshape(W.shape)
    if saved.magnitude is None:
        return new
    rows = saved.magnitude.shape[0] == O and saved.magnitude.numel() == O
    axes = [*range(1, W.dim())] if rows else [0, *range(2, W.dim())]
    return (
        new
        / new.square().sum(axes, keepdim=True).sqrt()
        * saved.magnitude.reshape((-1, 1, *[1] * len(k)) if rows else (1, -1, *[1] * len(k)))
    )


def _lora(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    down, up = t["lora_down.weight"], t["lora_up.weight"].flatten(1)
    scale = alpha / len(down) if alpha else 1.0
    if "lora_mid.weight" in t:
        return W + scale * torch.einsum("oa,abxy,bi->oixy", up, t["lora_mid.weight"], down.flatten(1))
    return flat + scale * up @ down.flatten(1)


def _loha(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    scale = alpha / len(t["hada_w1_b"]) if alpha else 1.0
    if "hada_t1" in t:
        halves = [
            torch.einsum("abxy,ao,bi->oixy", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in (1, 2)
        ]
        return W + scale * halves[0] * halves[1]
    return flat + scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def _lokr(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    rank = next((len(t[key]) for key in ("lokr_w1_b", "lokr_w2_b") if key in t), 0)
    scale = alpha / rank if alpha and rank else 1.0
    if "lokr_t2" in t:
        w2 = torch.einsum("abxy,ao,bi->oixy", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return flat + scale * torch.kron(w1, w2.flatten(1))


def _glora(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    scale = alpha / len(a2) if alpha else 1.0
    return W + scale * (torch.einsum("oi...,ij->oj...", W, a1 @ a2) + (b1 @ b2).reshape(W.shape))


def _ia3(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    shape = (1, -1) if bool(t["on_input"]) else (-1, 1)
    return W * (1 + t["weight"].reshape(*shape, *[1] * (W.dim() - 2)))


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    Q = blocks - blocks.transpose(-1, -2)
    if limit and float(Q.norm()) > limit:
        Q = Q * limit / Q.norm()
    one = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (one + Q) @ torch.linalg.inv(one - Q)


def _oft(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    parts = [t[key] for key in sorted(t) if key.startswith("oft_blocks")]
    if parts[0].dim() == 4:
        return _boft(parts[0]) @ flat
    turns = [torch.block_diag(*_cayley(part, (alpha or 0.0) * part.shape[0] * part.shape[1])).T for part in parts]
    new = torch.block_diag(*turns) @ flat
    return new * t["rescale"].reshape(-1, 1) if "rescale" in t else new


def _boft(blocks: Tensor) -> Tensor:
    stages, count, size, _ = blocks.shape
    O, T = count * size, torch.eye(count * size, dtype=torch.float64)
    for i in range(stages):
        apart = 2**i * size // 2
        order = [start + j + half * apart for start in range(0, O, 2 * apart) for j in range(apart) for half in (0, 1)]
        P = torch.eye(O, dtype=torch.float64)[order]
        T = P.T @ torch.block_diag(*_cayley(blocks[i], 0.0)) @ P @ T
    return T


def _oft_input(t: Tensors, W: Tensor, flat: Tensor, alpha: float | None) -> Tensor:
    G = torch.zeros(len(t["oft_R.weight"]), 3, 3, dtype=torch.float64)
    G[:, (0, 0, 1), (1, 2, 2)] = t["oft_R.weight"]
    Q = (G - G.transpose(1, 2)) * (-1 if W.dim() == 2 else 1)
    R = torch.eye(3) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    return flat @ torch.block_diag(*R)


FORMS: dict[str, Callable[[Tensors, Tensor, Tensor, float | None], Tensor]] = {
    "lora_up.weight": _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "a1.weight": _glora,
    "on_input": _ia3,
    "oft_blocks": _oft,
    "oft_blocks.0": _oft,
    "oft_R.weight": _oft_input,
    "diff": lambda t, W, flat, alpha: W + t["diff"],
}


def check(found: SavedLayer, W: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    """By the dense formula, and by the package's own, which also sees that the tensors fit the layer."""
    size = float((wanted - W).norm())
    assert float((dense(found, W) - wanted).norm()) < tolerance * size
    assert float((merged_weight(found, W, bias_too=True) - wanted).norm()) < tolerance * size


def pieces_of(make: Make, kernel: Kernel, absent: Sequence[int] = ()) -> tuple[list[SavedLayer | None], Tensor, Tensor]:
    """The pieces, the base weight, and the weight that all of them together make."""
    r = Draw(1)
    pieces = [saved_of(make(r, size, kernel)) if i not in absent else None for i, size in enumerate(SIZES)]
    W = r(sum(SIZES), I, *kernel)
    rows = zip(pieces, W.split(SIZES), strict=True)
    return pieces, W, torch.cat([w if piece is None else dense(piece, w) for piece, w in rows])


ALONE = {lora, loha, full, ia3, oft, oft_limited, oft_rescaled, tlora, *TUCKER[:2]}  # stay what they are
IN_PLACE = {lokr, lokr_both, lokr_whole, lokr_tucker, dora, lokr_dora}  # can be joined without the base weight
ABSENT_TOO = IN_PLACE - {dora, lokr_dora}


@pytest.mark.parametrize(("make", "kernel"), CELLS)
def test_joined(make: Make, kernel: Kernel) -> None:
    pieces, W, wanted = pieces_of(make, kernel)
    found, words = joined("lora_unet_whole", pieces, SIZES, (I, *kernel), W)
    check(found, W, wanted)
    assert found.name == "lora_unet_whole"
    assert (words == "") == (make in ALONE | {dora}), words
    if make in ALONE | IN_PLACE:
        without, _ = joined("lora_unet_whole", pieces, SIZES, (I, *kernel), None)
        check(without, W, wanted)
    else:
        with pytest.raises(ValueError, match=r"lora_unet_whole: its .* would have to be converted.*base weight"):
            joined("lora_unet_whole", pieces, SIZES, (I, *kernel), None)


@pytest.mark.parametrize(("make", "kernel"), CELLS)
@pytest.mark.parametrize("absent", [(1,), (0, 2)])
def test_joined_with_parts_that_nothing_changes(make: Make, kernel: Kernel, absent: tuple[int, ...]) -> None:
    pieces, W, wanted = pieces_of(make, kernel, absent)
    found, words = joined("lora_unet_whole", pieces, SIZES, (I, *kernel), W)
    check(found, W, wanted)
    assert found.algorithm is next(p for p in pieces if p).algorithm or words
    if make in ALONE | ABSENT_TOO:
        without, _ = joined("lora_unet_whole", pieces, SIZES, (I, *kernel), None)
        check(without, W, wanted)
    else:
        with pytest.raises(ValueError, match="base weight"):
            joined("lora_unet_whole", pieces, SIZES, (I, *kernel), None)


TAKEN = {lora, loha, glora, full, ia3, ia3_input, oft, oft_limited, oft_rescaled, oft_input, tlora, dora, *TUCKER[:2]}


@pytest.mark.parametrize(("make", "kernel"), CELLS)
@pytest.mark.parametrize("rows", [(8, 16), (4, 24), (3, 9)])
def test_rows(make: Make, kernel: Kernel, rows: tuple[int, int]) -> None:
    r, (start, stop) = Draw(2), rows
    saved, W = saved_of(make(r, 32, kernel)), r(32, I, *kernel)
    found, words = rows_of(saved, "lora_unet_part", start, stop, W)
    check(found, W[start:stop], dense(saved, W)[start:stop])
    assert found.name == "lora_unet_part"
    if make in TAKEN and (start % 4 == 0 or "oft" not in make.__name__ or make is oft_input):
        assert words == "" and found.algorithm is saved.algorithm
        without, _ = rows_of(saved, "lora_unet_part", start, stop, None)
        check(without, W[start:stop], dense(saved, W)[start:stop])
    elif make in IN_PLACE:
        without, _ = rows_of(saved, "lora_unet_part", start, stop, None, tuple(W.shape))
        check(without, W[start:stop], dense(saved, W)[start:stop])
    else:
        with pytest.raises(ValueError, match=r"lora_unet_x: its .* would have to be converted.*base weight"):
            rows_of(saved, "lora_unet_part", start, stop, None)


def test_whole_blocks_of_a_kronecker_product_stay_one_and_come_together_again() -> None:
    r = Draw(3)
    saved = saved_of(lokr_whole(r, 32, ()))
    parts = [rows_of(saved, f"lora_unet_{i}", 8 * i, 8 * i + 8, None) for i in range(4)]
    assert all(words == "" and part.algorithm is saved.algorithm for part, words in parts)
    again, words = joined(saved.name, [part for part, _ in parts], [8] * 4, (I,), None)
    assert words == "" and again.alpha == saved.alpha
    assert all(torch.equal(again.tensors[key], t) for key, t in saved.tensors.items())


# -- what stays as it is, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_scales_leave_every_bit(dtype: torch.dtype) -> None:
    r = Draw(4)
    ranks = (3, 3, 6)
    given = [
        {**{key: t.to(dtype) for key, t in lora(r, size, (), rank).items()}, "alpha": torch.tensor(rank / 3)}
        for size, rank in zip(SIZES, ranks, strict=True)
    ]
    found, words = joined("x", [saved_of(one) for one in given], SIZES, (I,), None)
    up, down = found.tensors["lora_up.weight"], found.tensors["lora_down.weight"]
    assert words == "" and (up.dtype, down.dtype) == (dtype, dtype)
    assert found.alpha == 4.0 and found.scale == 1 / 3
    row = column = 0
    for size, rank, one in zip(SIZES, ranks, given, strict=True):
        assert torch.equal(up[row : row + size, column : column + rank], one["lora_up.weight"])
        assert torch.equal(down[column : column + rank], one["lora_down.weight"])
        row, column = row + size, column + rank


def test_one_down_factor_where_all_have_the_same() -> None:
    r = Draw(5)
    shared = r(2, I)
    given = [{**lora(r, size, ()), "lora_down.weight": shared.clone()} for size in SIZES]
    found, _ = joined("x", [saved_of(given[0]), None, saved_of(given[2])], SIZES, (I,), None)
    assert torch.equal(found.tensors["lora_down.weight"], shared) and found.alpha == 1.0
    up = found.tensors["lora_up.weight"]
    assert torch.equal(up[:8], given[0]["lora_up.weight"]) and not up[8:24].any()


@pytest.mark.parametrize("make", [lora, loha, glora, lokr])
def test_other_scales_go_into_the_factors(make: Make) -> None:
    r = Draw(6)
    alphas = (0.25, 3.0, None)
    layers = [saved_of(make(r, size, ())) for size in SIZES]
    layers = [codec.SavedLayer(p.name, p.algorithm, p.tensors, a) for p, a in zip(layers, alphas, strict=True)]
    if make is glora:  # which only joins parts that change the input alike
        layers = [
            codec.SavedLayer(p.name, p.algorithm, {**p.tensors, "a2.weight": p.tensors["a2.weight"] * 0}, p.alpha)
            for p in layers
        ]
        layers = [
            codec.SavedLayer(p.name, p.algorithm, {**p.tensors, "a1.weight": layers[0].tensors["a1.weight"]}, p.alpha)
            for p in layers
        ]
    W = r(sum(SIZES), I)
    wanted = torch.cat([dense(p, w) for p, w in zip(layers, W.split(SIZES), strict=True)])
    found, _ = joined("x", layers, SIZES, (I,), None)
    check(found, W, wanted)
    assert found.algorithm.spec.shown_rank(found.tensors) == found.alpha or make is lokr


def test_float8_without_a_loss() -> None:
    r = Draw(7)
    given = [{k: t.to(torch.float8_e4m3fn) if t.dim() else t for k, t in lora(r, n, ()).items()} for n in SIZES]
    given[1]["alpha"] = torch.tensor(2.0)
    W = r(sum(SIZES), I)
    pieces = [saved_of(one) for one in given]
    wanted = torch.cat([dense(p, w) for p, w in zip(pieces, W.split(SIZES), strict=True)])
    check(joined("x", pieces, SIZES, (I,), None)[0], W, wanted, 1e-6)


# -- kinds side by side


@pytest.mark.parametrize(
    ("makes", "algorithm"),
    [
        ((lora, loha, lokr), "lora"), ((lora, full, None), "full"), ((dora, lora, None), "lora"),
        ((ia3, lora, oft), "full"), ((dora_input, dora, lora), "full"), ((lora, lora_tucker, None), "lora"),
        ((glora, None, loha), "lora"),
    ],
)  # fmt: skip
def test_kinds_mixed(makes: tuple[Make | None, ...], algorithm: str) -> None:
    kernel = (3, 3)
    r = Draw(8)
    sizes = (16, 32, 48)
    pieces = [None if make is None else saved_of(make(r, n, kernel)) for make, n in zip(makes, sizes, strict=True)]
    W = r(sum(sizes), I, *kernel)
    rows = zip(pieces, W.split(sizes), strict=True)
    wanted = torch.cat([w if piece is None else dense(piece, w) for piece, w in rows])
    found, _ = joined("x", pieces, sizes, (I, *kernel), W)
    assert found.algorithm.spec.name == algorithm
    check(found, W, wanted)


def test_changes_of_the_bias_go_along() -> None:
    r = Draw(9)
    pieces = [saved_of(full(r, SIZES[0], ())), None, saved_of(full(r, SIZES[2], ()))]
    found, _ = joined("x", pieces, SIZES, (I,), None)
    bias = found.tensors["diff_b"]
    own = [piece.tensors["diff_b"] for piece in pieces if piece is not None]
    assert torch.equal(bias[:8], own[0]) and torch.equal(bias[24:], own[1]) and not bias[8:24].any()
    assert torch.equal(rows_of(found, "y", 24, 28, None)[0].tensors["diff_b"], own[1])


def test_norms() -> None:
    r = Draw(10)
    given = [saved_of({"w_norm": r(n), "b_norm": r(n)}) for n in SIZES]
    found, words = joined("x", [given[0], None, given[2]], SIZES, (), None)
    assert words == "" and not found.tensors["w_norm"][8:24].any()
    assert torch.equal(found.tensors["b_norm"][24:], given[2].tensors["b_norm"])
    assert torch.equal(rows_of(found, "y", 0, 8, None)[0].tensors["w_norm"], given[0].tensors["w_norm"])


def test_magnitudes_of_absent_parts_are_the_lengths_of_their_rows() -> None:
    pieces, W, _ = pieces_of(dora, (), (1,))
    found, _ = joined("x", pieces, SIZES, (I,), W)
    assert found.magnitude is not None and pieces[0] is not None and pieces[0].magnitude is not None
    assert torch.equal(found.magnitude[:8], pieces[0].magnitude)
    assert torch.allclose(found.magnitude[8:24, 0], W[8:24].norm(dim=1))


def test_a_piece_of_another_shape_is_told() -> None:
    r = Draw(11)
    with pytest.raises(ValueError, match=r"lora_unet_x: .*do not fit a weight of \(8, 5\)"):
        joined("x", [saved_of(lora(r, 8, ())), None], (8, 8), (5,), None)


# -- conversions


@pytest.mark.parametrize(("make", "kernel"), CELLS)
def test_as_diff(make: Make, kernel: Kernel) -> None:
    r = Draw(12)
    saved, W = saved_of(make(r, 16, kernel)), r(16, I, *kernel)
    found = as_diff(saved, tuple(W.shape), W)
    assert set(found.tensors) - {"diff_b"} == {"diff"} and found.magnitude is None
    check(found, W, dense(saved, W))


@pytest.mark.parametrize(("make", "kernel"), CELLS)
def test_as_lora(make: Make, kernel: Kernel) -> None:
    r, I_ = Draw(13), I
    saved, W = saved_of(make(r, 64, kernel)), r(64, I_, *kernel)
    found = as_lora(saved, tuple(W.shape), W)
    if make in (full, ia3, ia3_input, oft, oft_limited, oft_rescaled, boft, oft_input):
        assert found is None
        return
    if make is lokr_whole and kernel != (3, 3):  # of 3 * 2 ranks where the layer has 6 columns
        assert found is None
        return
    ranks: dict[Make, int] = {
        loha: 4,
        loha_tucker: 4,
        lokr_both: 1,
        lokr_whole: 12,
        glora: 1 + math.prod(kernel),
        tlora: 4,
    }
    rank = ranks.get(make, 2)
    assert found is not None and found.tensors["lora_down.weight"].shape == (rank, I_, *kernel)
    check(found, W, dense(saved, W))
    if make is lora:
        assert found.tensors == saved.tensors and found.alpha == saved.alpha


def test_factors_without_their_start_take_it_from_the_base() -> None:
    """T-LoRA of another program: its file has no start, which is the principal part of the base weight."""
    W = torch.randn(40, I, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    p, q, lam = u[:, :2] * 1.1, vh[:2] * 1.2, s[None, :2] * 0.9
    saved = saved_of({"q_layer.weight": q, "p_layer.weight": p, "lambda_layer": lam, "alpha": torch.tensor(1.0)})
    change = 0.5 * (p * lam @ q - u[:, :2] * s[:2] @ vh[:2])
    with pytest.raises(ValueError, match="tlora would have to be converted"):
        as_lora(saved, (40, I))
    lora = as_lora(saved, (40, I), W)
    assert lora is not None and lora.alpha == 2.0
    check(lora, W, W + change)
    check(as_diff(saved, (40, I), W), W, W + change)
    whole = torch.cat([W, W])
    found, words = joined("x", [saved, None], (40, 40), (I,), whole)
    check(found, whole, torch.cat([W + change, W]))
    assert words
