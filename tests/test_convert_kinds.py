"""Every kind of layer as every other: what a file adds to a weight is built by hand before, and read by hand after, by
dense formulas in float64; a Linear and a convolution each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from registry import dense_glora, dense_loha, dense_lokr, dense_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.tools.convert import convert
from networks.tools.ranks import RankRule

Tensors = dict[str, Tensor]
WEIGHTS = {"x": (24, 16), "c": (12, 8, 3, 3)}  # a Linear and a convolution
R, ALPHA = 2, 3.0


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    ones = [1] * (len(shape) - 2)
    own = {"lora_down.weight": rand(R, *shape[1:]), "lora_up.weight": rand(shape[0], R, *ones)}
    return own, dense_lora(own, shape) * ALPHA / R


def tucker(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    if len(shape) == 2:
        return lora(shape, W)
    own = {
        "lora_down.weight": rand(R, shape[1], 1, 1),
        "lora_mid.weight": rand(R, R, *shape[2:]),
        "lora_up.weight": rand(shape[0], R, 1, 1),
    }
    return own, dense_lora(own, shape) * ALPHA / R


def loha(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    columns = math.prod(shape[1:])
    own = {f"hada_w{n}_{s}": rand(*size) for n in (1, 2) for s, size in (("a", (shape[0], R)), ("b", (R, columns)))}
    return own, dense_loha(own, shape) * ALPHA / R


def lokr(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    columns = math.prod(shape[1:]) // 2
    own = {"lokr_w1": rand(2, 2), "lokr_w2_a": rand(shape[0] // 2, R), "lokr_w2_b": rand(R, columns)}
    return own, dense_lokr(own, shape) * ALPHA / R


def whole_lokr(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    own = {"lokr_w1": rand(2, 2), "lokr_w2": rand(shape[0] // 2, shape[1] // 2, *shape[2:])}
    return own, dense_lokr(own, shape)  # without a rank the scale is 1, whatever alpha says


def glora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    O, I, *kernel = shape
    own = {"a1.weight": rand(I, R), "a2.weight": rand(R, I), "b1.weight": rand(O, R), "b2.weight": rand(R, I, *kernel)}
    if kernel:
        own |= {key: own[key][..., None, None] for key in ("a1.weight", "a2.weight", "b1.weight")}
    return own, dense_glora({**own, "base": W}, shape) * ALPHA / R


def ia3(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    w = rand(shape[0], *[1] * (len(shape) - 1)) * 0.1
    return {"weight": w, "on_input": torch.tensor(False)}, W * w


def oft(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    blocks = rand(shape[0] // 4, 4, 4)
    Q, eye = blocks - blocks.transpose(1, 2), torch.eye(4, dtype=torch.float64)
    turns = torch.block_diag(*(torch.linalg.inv((eye + q) @ torch.linalg.inv(eye - q)) for q in Q))
    return {"oft_blocks": blocks}, (turns @ W.flatten(1)).reshape(shape) - W


def full(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    diff = rand(*shape)
    return {"diff": diff}, diff


def dora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    own, delta = lora(shape, W)
    magnitude = rand(shape[0], *[1] * (len(shape) - 1)).abs() + 1
    new = W + delta
    lengths = new.flatten(1).norm(dim=1).reshape(magnitude.shape)
    return {**own, "dora_scale": magnitude}, magnitude * new / lengths - W


MAKERS: dict[str, Callable[[tuple[int, ...], Tensor], tuple[Tensors, Tensor]]] = {
    one.__name__: one for one in (lora, tucker, loha, lokr, whole_lokr, glora, ia3, oft, full, dora)
}
ON_BASE = {"glora", "ia3", "oft", "dora"}
HIDDEN = {"loha", "lokr"}  # whose factors do not tell a kernel from columns
WITHOUT_ALPHA = {"ia3", "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a file of each kind for it."""
    found = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    weights = {name: rand(*shape) for name, shape in WEIGHTS.items()}
    save_file({f"{name}.weight": W for name, W in weights.items()}, found / "base.safetensors")
    for kind, make in MAKERS.items():
        tensors = dict[str, Tensor]()
        for name, shape in WEIGHTS.items():
            own, update = make(shape, weights[name])
            if kind not in WITHOUT_ALPHA:
                own["alpha"] = torch.tensor(0.0 if kind == "oft" else ALPHA)
            tensors |= {f"lora_unet_{name}.{key}": t.contiguous() for key, t in own.items()}
            WANTED[kind, name] = update
        save_file(tensors, found / f"{kind}.safetensors", {"ss_steps": "5", "ss_network_module": f"networks.{kind}"})
    return found


WANTED: dict[tuple[str, str], Tensor] = {}


def by_hand(path: Path) -> dict[str, Tensor]:
    """What a file of plain LoRA, LoHa, LoKr or differences adds to each weight."""
    tensors, found = {key: t.double() for key, t in load_file(path).items()}, dict[str, Tensor]()
    for name, shape in WEIGHTS.items():
        stem = f"lora_unet_{name}."
        own = {key.removeprefix(stem): t for key, t in tensors.items() if key.startswith(stem)}
        alpha = float(own.pop("alpha", torch.tensor(1.0)))
        if "diff" in own:
            found[name] = own["diff"]
        elif "lora_up.weight" in own:
            found[name] = dense_lora(own, shape) * alpha / own["lora_down.weight"].shape[0]
        elif "hada_w1_a" in own:
            found[name] = dense_loha(own, shape) * alpha / own["hada_w1_b"].shape[0]
        else:
            rank = own["lokr_w2_b"].shape[0] if "lokr_w2_b" in own else alpha
            found[name] = dense_lokr(own, shape) * alpha / rank
    return found


def off(found: Mapping[str, Tensor], kind: str) -> float:
    """How far the file is from what it was to be, as a share of that."""
    pairs = [(found[name], WANTED[kind, name]) for name in WEIGHTS]
    return math.sqrt(
        sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    )


@pytest.mark.parametrize("target", ("lora", "loha", "lokr", "diff"))
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_becomes_every_other(folder: Path, tmp_path: Path, kind: str, target: str) -> None:
    dense = kind in ("ia3", "oft", "full", "dora", "whole_lokr") or (kind, target) == ("glora", "loha")
    rule = RankRule(4) if target != "diff" and (dense or target == "lokr") else None
    base = [folder / "base.safetensors"] if kind in ON_BASE | HIDDEN else []
    report = convert(
        folder / f"{kind}.safetensors", tmp_path / "a.safetensors", to=target, rule=rule, base=base, dtype=torch.float64
    )
    error = off(by_hand(tmp_path / "a.safetensors"), kind)
    assert math.isclose(report.error, error, rel_tol=1e-6, abs_tol=1e-12), (report.error, error)
    if rule is None:
        assert error < 1e-12
    else:
        assert error < 0.99 and all(row.rank is None or row.rank <= 4 for row in report.rows)
    if rule is not None and target == "lora":  # the nearest there is, says numpy
        for row in report.rows:
            s = torch.linalg.svdvals(WANTED[kind, row.name.removeprefix("lora_unet_")].flatten(1))
            best = float((s[4:].square().sum() / s.square().sum()).sqrt())
            assert row.error is not None and math.isclose(row.error, best, rel_tol=1e-6, abs_tol=1e-9)


def test_ranks_are_those_of_the_algebra(folder: Path, tmp_path: Path) -> None:
    """R^2 of a LoHa, rank(w1) R of a LoKr, 2 R of a GLoRA, which with a kernel has one of its own for each position."""
    for kind, rank in (("loha", R * R), ("lokr", 2 * R), ("glora", 2 * R), ("tucker", R)):
        report = convert(
            folder / f"{kind}.safetensors",
            tmp_path / f"{kind}.safetensors",
            to="lora",
            base=[folder / "base.safetensors"],
        )
        assert {row.rank for row in report.rows if kind != "glora" or row.name == "lora_unet_x"} == {rank}, kind
