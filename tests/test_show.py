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
    found = json.loads(shown(capsys, str(path), "--json"))
    assert found["layers"]
    rows = [line for line in shown(capsys, str(path), "--layers").splitlines() if "lora_down.weight" in line]
    assert len(rows) == len(found["layers"])
    assert "ss_steps: 12" in shown(capsys, str(path), "--metadata")


@pytest.mark.parametrize(
    ("written", "said"),
    [("1795907274.79", "2026-11-28 23:07 UTC"), ("nan", "nan"), ("1e300", "1e300"), ("last Friday", "last Friday")],
)
def test_times_are_dates(written: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {f"lora_unet_x.lora_{name}.weight": torch.ones(4, 4) for name in ("up", "down")}
    save_file(factors, tmp_path / "a.safetensors", {"ss_training_finished_at": written})
    assert f"finished at: {said}\n" in shown(capsys, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"use_dora": "True"}, "x LoRA, dim 4, scale 0.5, DoRA (output)"),
        ({"use_dora": "True", "wd_on_output": "False"}, "DoRA (input)"),
        ({"algo": "lokr", "conv_dim": "2", "use_tucker": "True"}, "LoKr in Tucker form"),
        ({"algo": "diag-oft"}, "x rotation, scale 1"),
        ({"algo": "diag-oft", "constraint": "0.1"}, "x constrained rotation"),
        ({"algo": "tlora"}, "x LoRA, dim 8, scale 0.5"),  # of the difference from its start
        ({"train_norm": "True"}, "x norm, "),
    ],
)
def test_kinds_of_layers(
    arguments: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in shown(capsys, str(saved(tmp_path / "a.safetensors", **arguments)))


def test_the_strength_of_another_programs_tlora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its alpha is divided by the rank that its factors have."""
    factors = {"q_layer.weight": (4, 8), "p_layer.weight": (16, 4), "lambda_layer": (1, 4)}
    tensors = {f"lora_unet_x.{suffix}": torch.ones(shape) for suffix, shape in factors.items()}
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor(1.0)}, tmp_path / "t.safetensors")
    assert "x tlora, dim 4, scale 0.25" in shown(capsys, str(tmp_path / "t.safetensors"))


def test_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dotted = shown(capsys, str(saved(tmp_path / "d.safetensors", save_format="diffusers")))
    assert "form diffusers" in dotted and "  unet: " in dotted
    arguments = {"save_format": "blissful", "rs_lora": "True"}
    raw = shown(capsys, str(saved(tmp_path / "b.safetensors", **arguments)))
    assert "form blissful" in raw and "scale 1" in raw


def test_what_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"model.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert script.main([str(tmp_path / "m.safetensors")]) == 2
    assert "no adapter that we know" in capsys.readouterr().err
