"""The demo from end to end at a few steps, on the embedded model."""

from __future__ import annotations

import csv
import re

import demo
from PIL import Image


def test_demo_makes_its_files(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "SHOWN", demo.SHOWN[:3])
    arguments = ["--steps=2", "--draw_steps=2", f"--output={tmp_path}"]
    assert demo.main([*arguments, "--no_check"]) == 0
    for name in ("emoji-outline.safetensors", "loss.png", "before_after.png", "plan.txt", "updates.png"):
        assert (tmp_path / name).stat().st_size > 100
    grid = Image.open(tmp_path / "before_after.png")
    assert grid.height > 4 * 48 and grid.width > 3 * 48
    with (tmp_path / "emoji-outline-loss.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    before, after = demo.held_out_losses(tmp_path / "emoji-outline-loss.csv")
    assert after < before
    base, rows = ([*(tmp_path / "images" / name).glob("*.png")] for name in ("base", "adapter"))
    assert (len(base), len(rows)) == (3, 9)
    first = Image.open(tmp_path / "images" / "base" / "im_000000.png").tobytes()
    assert first == Image.open(tmp_path / "images" / "adapter" / "im_000000.png").tobytes()  # strength 0
    assert first != Image.open(tmp_path / "images" / "adapter" / "im_000006.png").tobytes()  # strength 1
    out = capfd.readouterr().out
    assert "loss on held-out images" in out
    assert "diffusers reads the file: its pictures are ours within 0.0" in out
    assert re.search(r"ComfyUI [\d.]+: 128/128 layers, exactly", out)


def test_demo_without_its_model(tmp_path, capsys):
    assert demo.main([f"--model={tmp_path}", f"--output={tmp_path / 'out'}"]) == 2
    assert "is missing" in capsys.readouterr().err


def test_colour_and_recognition():
    grey, red = Image.new("RGB", (4, 4), "#808080"), Image.new("RGB", (4, 4), "#ff0000")
    assert demo.colour([grey, red]) == 0.5
    assert demo.recognised([grey, red], [grey, red]) == 1
    assert demo.recognised([red, grey], [grey, red]) == 0
