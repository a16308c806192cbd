"""Two adapter files beside each other, against numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from networks import api
from networks.cli import show

Matrix = np.ndarray[Any, np.dtype[np.float64]]
NAMES = ("lora_unet_blocks_0_q", "lora_unet_blocks_1_k", "lora_unet_blocks_2_conv")  # of no model that is known


def lora(name: str, shape: tuple[int, ...], rank: int, alpha: float) -> tuple[dict[str, Tensor], Matrix]:
    up, down = torch.randn(shape[0], rank, *[1] * (len(shape) - 2)), torch.randn(rank, *shape[1:])
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(alpha)}
    return tensors, (up.double().flatten(1) @ down.double().flatten(1) * (alpha / rank)).numpy()


def cosine(one: Matrix, other: Matrix) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, dict[str, Matrix], dict[str, Matrix]]:
    """A LoRA of three layers; a file with a whole difference, a LoKr and a LoRA, of which one layer is another."""
    torch.manual_seed(0)
    a, one = dict[str, Tensor](), dict[str, Matrix]()
    for name, shape in zip(NAMES, ((24, 16), (12, 8), (6, 4, 3, 3)), strict=True):
        tensors, one[name] = lora(name, shape, 3, 1.5)
        a |= tensors
    diff, w1, w2 = torch.randn(24, 16), torch.randn(3, 2), torch.randn(4, 4)
    b = {f"{NAMES[0]}.diff": diff, f"{NAMES[1]}.lokr_w1": w1, f"{NAMES[1]}.lokr_w2": w2}
    tensors, last = lora("lora_unet_out", (5, 7), 2, 2.0)
    other = {NAMES[0]: diff.double().numpy(), NAMES[1]: np.kron(w1.double(), w2.double()), "lora_unet_out": last}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b | tensors, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors", one, other


def test_layer_by_layer_and_in_all(files: tuple[Path, Path, dict[str, Matrix], dict[str, Matrix]]) -> None:
    first, second, one, other = files
    found = api.compare(first, second)
    assert [pair.name for pair in found.pairs] == [*NAMES[:2]]
    for pair in found.pairs:
        a, b = one[pair.name], other[pair.name]
        assert pair.norms == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)), rel=1e-6)
        assert pair.cosine == pytest.approx(cosine(a, b), abs=1e-6)
        assert pair.outputs == pytest.approx(cosine(a @ a.T, b @ b.T), abs=1e-6)
        assert pair.inputs == pytest.approx(cosine(a.T @ a, b.T @ b), abs=1e-6)
    assert [[*names] for names in found.alone] == [[NAMES[2]], ["lora_unet_out"]]
    assert found.alone[0][NAMES[2]] == pytest.approx(np.linalg.norm(one[NAMES[2]]), rel=1e-6)
    whole = [np.concatenate([m.ravel() for m in matrices.values()]) for matrices in (one, other)]
    inner = sum(float((one[name] * other[name]).sum()) for name in NAMES[:2])
    assert found.norms == pytest.approx([np.linalg.norm(vector) for vector in whole], rel=1e-6)
    assert found.cosine == pytest.approx(inner / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1]), abs=1e-6)


def test_a_file_and_what_is_made_of_it(files: tuple[Path, Path, dict[str, Matrix], dict[str, Matrix]]) -> None:
    """The same update in another algorithm and strength; another one at right angles to it."""
    first, *_ = files
    made = first.with_name("c.safetensors")
    api.combine({first: -2.0}, made, to="diff")
    found = api.compare(first, made)
    assert found.cosine == pytest.approx(-1, abs=1e-6) and found.directions == pytest.approx((1, 1), abs=1e-6)
    down = torch.randn(1, 16)
    for i, name in enumerate(("d", "e")):
        up = torch.zeros(24, 1).index_fill(0, torch.tensor([i]), 1.0)
        save_file(
            {f"{NAMES[0]}.lora_up.weight": up, f"{NAMES[0]}.lora_down.weight": down},
            first.with_name(f"{name}.safetensors"),
        )
    found = api.compare(first.with_name("d.safetensors"), first.with_name("e.safetensors"))
    assert (found.cosine, found.pairs[0].outputs) == (0, 0) and found.pairs[0].inputs == pytest.approx(1)


def test_show_of_two(
    files: tuple[Path, Path, dict[str, Matrix], dict[str, Matrix]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, one, other = files
    assert show.main([str(first), str(second), "--layers"]) == 0
    text = capsys.readouterr().out
    shown = f"{NAMES[0]} {cosine(one[NAMES[0]], other[NAMES[0]]):.4f}"
    assert shown in text and f"only in {second}: 1 layers" in text and "lora_unet_out" in text
    assert show.main([str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["layers"]} == {*NAMES[:2]} and [*found["alone"][1]] == ["lora_unet_out"]
    assert show.main([str(first), str(first.with_name("missing.safetensors"))]) == 2
    assert show.main([str(first), str(second), "--plot", str(first.with_name("x.png"))]) == 2
    assert "--plot is of one file" in capsys.readouterr().err and not first.with_name("x.png").exists()
