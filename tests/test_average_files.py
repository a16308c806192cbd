"""The average of a run's files, against recursions in numpy and the published widths of power functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_combine import header, lora, of_lora, saved, wide
from torch import Tensor

from networks import api
from networks.cli import average as command
from networks.tools.average import _power

Q, CONV = "lora_unet_blocks_0_q", "lora_unet_blocks_1_conv"  # of no model that is known
STEPS = (20, 50, 60, 100)
Files = list[Path]


@pytest.fixture
def run(tmp_path: Path) -> Files:
    """The files of a run whose values move by a part of themselves."""
    torch.manual_seed(0)
    first = {**lora(Q, (6, 10), 2, 1.0), **lora(CONV, (4, 3, 3, 3), 2, 3.0)}
    way = {key: torch.randn_like(t) * 0.3 for key, t in first.items()}
    files = []
    for step in STEPS:
        at = {
            key: t if "alpha" in key else t + way[key] * step / 100 + 0.05 * torch.randn_like(t)
            for key, t in first.items()
        }
        files.append(saved(tmp_path / f"run-step{step:08d}.safetensors", at, ss_steps=str(step), ss_network_dim="2"))
    return files


def check(out: Path, files: Files, weights: list[float]) -> None:
    found, inputs = load_file(out), [load_file(file) for file in files]
    assert found.keys() == inputs[0].keys()
    for key, tensor in found.items():
        wanted = sum(w * t[key].double().numpy() for w, t in zip(weights, inputs, strict=True))
        np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=1e-6, atol=1e-7, err_msg=key)


def test_an_ema_is_that_of_training_at_the_files_alone(run: Files, tmp_path: Path) -> None:
    """Each value holds from the file before it to its own, in the recursion of `ema_decay` step by step."""
    for decay in (0.9, 0.99):
        weights = np.eye(4)[0]
        for n in range(1, STEPS[-1]):
            d = min(decay, (1 + n) / (10 + n))
            value = np.eye(4)[next(i for i, step in enumerate(STEPS) if n + 1 <= step)]
            weights = d * weights + (1 - d) * value
        out = tmp_path / f"{decay}.safetensors"
        report = api.average([run[2], run[0], run[3], run[1]], out, decay=decay)
        check(out, run, list(weights))
        assert [one["step"] for one in report.details["files"]] == list(STEPS)
        assert json.loads(header(out)["networks_ema"]) == {"decay": decay, "files": 4, "steps": 100}


def test_a_power_function(run: Files, tmp_path: Path) -> None:
    """Karras et al. 2024, section 3.1: widths of 0.05 and 0.1 are powers of 16.97 and 6.94; the widest is the mean of
    all steps."""
    assert (round(_power(0.05), 2), round(_power(0.1), 2)) == (16.97, 6.94)
    for sigma_rel, g in ((0.1, 6.94), (12**-0.5, 0.0)):
        api.average(run, tmp_path / "a.safetensors", sigma_rel=sigma_rel, overwrite=True)
        t = np.linspace(0, 100, 100_001)[1:]
        mass = t**g / (t**g).sum()
        weights = [float(mass[(t > low) & (t <= high)].sum()) for low, high in zip((0, *STEPS), STEPS, strict=False)]
        found, inputs = load_file(tmp_path / "a.safetensors"), [load_file(file) for file in run]
        key = f"{Q}.lora_up.weight"
        wanted = sum(w * one[key].double() for w, one in zip(weights, inputs, strict=True))
        torch.testing.assert_close(found[key].double(), wanted, rtol=1e-3, atol=1e-4)


def test_alike_and_how_far_it_is_from_the_average_of_updates(run: Files, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "mean.safetensors"
    assert command.main([*map(str, run), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check(out, run, [0.25] * 4)
    for name, row in zip((Q, CONV), report["layers"], strict=True):
        wanted = sum(0.25 * of_lora(load_file(file), name) for file in run)
        off = np.linalg.norm(of_lora(load_file(out), name) - wanted) / np.linalg.norm(wanted)
        assert row["error"] == pytest.approx(off, rel=1e-3) and row["rank"] == 2 and 0 < off < 0.3
    assert command.main([*map(str, run), "--out", str(out), "--overwrite", "--max_error", "1e-6"]) == 2
    assert "more than --max_error" in capsys.readouterr().err


def test_other_files(run: Files, tmp_path: Path) -> None:
    """Half precision stays, magnitudes and other forms are averaged as they stand; nothing is known of their updates
    without a base."""
    out, half = tmp_path / "o.safetensors", []
    for file in run:
        tensors: dict[str, Tensor] = {key: t if "alpha" in key else t.half() for key, t in load_file(file).items()}
        tensors[f"{Q}.dora_scale"] = torch.rand(6, 1)
        half.append(saved(tmp_path / f"half-{file.name}", tensors))
    report = api.average(half, out)
    found = load_file(out)
    assert found[f"{Q}.lora_up.weight"].dtype == torch.float16 and found[f"{Q}.dora_scale"].dtype == torch.float32
    assert [row.error is None for row in report.rows] == [True, False]
    mean = sum(0.25 * wide(load_file(file), Q, "dora_scale") for file in half)
    np.testing.assert_allclose(wide(found, Q, "dora_scale"), mean, rtol=1e-6)
    api.average(run, out, dtype=torch.bfloat16, overwrite=True)
    assert load_file(out)[f"{Q}.lora_up.weight"].dtype == torch.bfloat16


def test_averages_of_averages_are_told(run: Files, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    api.average(run[:2], first, steps=[20, 50])
    report = api.average([first, run[3]], tmp_path / "second.safetensors")
    assert any(note.startswith("averages already") and note.endswith("first.safetensors") for note in report.notes)


def test_mistakes(run: Files, tmp_path: Path) -> None:
    """Each is one sentence, and nothing is written."""
    out = tmp_path / "out.safetensors"
    torch.manual_seed(9)
    strange = saved(tmp_path / "strange.safetensors", {**lora(Q, (6, 10), 2, 1.0), **lora(CONV, (4, 3, 3, 3), 2, 3.0)})
    other = load_file(run[0])
    more = saved(tmp_path / "more.safetensors", {**other, f"{Q}.alpha": torch.tensor(2.0)})
    fewer = saved(tmp_path / "fewer.safetensors", {key: t for key, t in other.items() if Q not in key})
    cases: tuple[tuple[Files, dict[str, Any], str], ...] = (
        (run[:1], {}, "takes two files or more"),
        (run, {"decay": 1.0}, "--decay 1 is no decay"),
        (run, {"sigma_rel": 0.3}, "--sigma_rel 0.3 is no width"),
        (run, {"decay": 0.9, "sigma_rel": 0.1}, "give one of them"),
        (run, {"steps": [1, 2]}, "--steps has 2 numbers for 4 files"),
        (run, {"steps": [1, 2, 3, 3]}, "were both saved after 3 steps"),
        (run, {"steps": [0, 1, 2, 3]}, "not of 0"),
        ([run[0], strange], {"decay": 0.9}, "does not say after how many steps"),
        ([run[0], strange], {}, "files of different runs"),
        ([run[0], more], {}, r"differ in more than values, first in lora_unet_blocks_0_q.alpha \(1 and 2\)"),
        ([run[0], fewer], {}, "it is missing"),
    )
    for files, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            api.average(files, out, **options)
        assert len(str(error.value).splitlines()) == 1 and not out.exists()
