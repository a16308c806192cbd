"""scripts/show.py: what a file says of itself, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_parts import randomise, sd_unet

import networks.lora
from networks.cli import show as script
from networks.files import kinds


def saved(path: Path, **arguments: str) -> Path:
    torch.manual_seed(0)
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet, **arguments)
    network.apply_to(None, unet, False, True)
    randomise(network)
    network.save_weights(str(path), torch.float16, {"ss_network_module": "networks.lora", "ss_steps": "12"})
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert script.main(argv) == 0
    return capsys.readouterr().out


def test_a_plain_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.safetensors")
    text = shown(capsys, str(path))
    assert "float16, form portable" in text and "network module: networks.lora" in text and "steps: 12" in text
    assert "lora_unet: " in text and "x LoRA, dim 4, scale 0.5" in text
    assert all(f"{reader}: exactly" in text for reader in kinds.READERS.values())
    found = json.loads(shown(capsys, str(path), "--json"))
    assert found["layers"]
    rows = [line for line in shown(capsys, str(path), "--layers").splitlines() if "lora_down.weight" in line]
    assert len(rows) == len(found["layers"])
    assert "ss_steps: 12" in shown(capsys, str(path), "--metadata")


@pytest.mark.parametrize(
    ("arguments", "reader", "words"),
    [
        ({"use_dora": "True"}, "ComfyUI 2026-08", "about a tenth off"),
        ({"use_dora": "True"}, "PEFT 0.21", "exactly"),
        ({"use_dora": "True"}, "A1111 1.10", "wrong strength, without a word (DoRA on the output side)"),
        ({"use_dora": "True", "wd_on_output": "False"}, "ComfyUI 2026-08", "exactly"),
        ({"algo": "lokr"}, "diffusers 0.42", "exactly on FLUX.2 and Z-Image"),
        ({"algo": "lokr", "conv_dim": "2", "use_tucker": "True"}, "Forge 2025-06", "refuses the file (LoKr in Tucker"),
        ({"algo": "diag-oft"}, "ComfyUI 2026-08", "exactly at strength 1"),
        ({"algo": "diag-oft", "constraint": "0.1"}, "ComfyUI 2026-08", "wrong strength"),
        ({"train_norm": "True"}, "A1111 1.10", "exactly"),
        ({"train_norm": "True"}, "diffusers 0.42", "refuses the file (norm)"),
    ],
)
def test_readers(
    arguments: dict[str, str], reader: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, str(saved(tmp_path / "a.safetensors", **arguments)))
    line = next(line for line in text.splitlines() if reader in line)
    assert words in line


def test_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dotted = shown(capsys, str(saved(tmp_path / "d.safetensors", save_format="diffusers")))
    assert "form diffusers" in dotted and "load_lora_weights and PEFT: exactly" in dotted and "  unet: " in dotted
    arguments = {"save_format": "blissful", "rs_lora": "True"}
    raw = shown(capsys, str(saved(tmp_path / "b.safetensors", **arguments)))
    assert "form blissful" in raw and "scale 1" in raw and "blissful-tuner: exactly" in raw


def test_what_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"model.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert script.main([str(tmp_path / "m.safetensors")]) == 2
    assert "no adapter that we know" in capsys.readouterr().err
