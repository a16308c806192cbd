"""Every family with a frozen model in 4 or 8 bits: loaded part after part, trained, and its file read again."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import diffusers
import pytest
import tiny_flow_models
import tiny_models
import torch
from safetensors.torch import load_file
from test_training_runs import train

from kohya_trainer import model_folder as host

FLOWS = [name for name in tiny_flow_models.MAKERS if hasattr(diffusers, name)]
# bitsandbytes is among the test requirements on Linux only
KINDS = ["fp8", "nf4", "int8"] if sys.platform == "linux" else ["fp8"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folders images and sounds, and a function that makes a model's folder once."""
    root = tmp_path_factory.mktemp("small")
    tiny_models.make_images(root / "images", 3)
    tiny_flow_models.make_sounds(root / "sounds")
    makers = {**tiny_flow_models.MAKERS, "SD": tiny_models.make_sd, "SDXL": tiny_models.make_sdxl}

    @functools.cache
    def model(name: str) -> Path:
        torch.manual_seed(0)
        return makers[name](root / name)

    model.root = root
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["SD", "SDXL", *FLOWS])
def test_trains_and_reloads(folder, tmp_path, name, kind):
    data = folder.root / ("sounds" if name == "AceStepPipeline" else "images")
    options = [f"--pretrained_model_name_or_path={folder(name)}", f"--train_data_dir={data}", "--resolution=32"]
    options += ["--mixed_precision=bf16", "--network_train_unet_only", "--cache_latents"]
    options += ["--fp8_base"] if kind == "fp8" else [f"--quantize={kind}"]
    assert train(folder.root, tmp_path / "a", *options, steps=2) == 0
    file = tmp_path / "a" / "last.safetensors"
    trained = load_file(file)
    assert any(bool(value.any()) for key, value in trained.items() if key.endswith("lora_up.weight"))
    again = [f"--network_weights={file}", "--dim_from_weights", "--learning_rate=1e-20", "--optimizer_type=SGD"]
    assert train(folder.root, tmp_path / "b", *options, *again, steps=1) == 0
    reread = load_file(tmp_path / "b" / "last.safetensors")
    assert reread.keys() == trained.keys()
    assert all(torch.allclose(reread[key], value, rtol=0, atol=1e-12) for key, value in trained.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_small_and_in_its_place_before_the_next_is_read(folder, monkeypatch, kind):
    """From the start in the precision that is asked for, never the whole model in fp32."""
    seen: list[str] = []
    load, shrink = host._load_part, host.small_weights.shrink

    def spy_load(path: Path, name: str, dtype: torch.dtype, where: str):
        seen.append(f"{name} {dtype}")
        return load(path, name, dtype, where)

    def spy_shrink(model, *args) -> None:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        before = sum(p.untyped_storage().nbytes() for p in model.parameters())
        shrink(model, *args)
        assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 0.8 * before
        seen.append("shrunk")

    monkeypatch.setattr(host, "_load_part", spy_load)
    monkeypatch.setattr(host.small_weights, "shrink", spy_shrink)
    family = host.load_model(folder("FluxPipeline"), torch.device("cpu"), torch.bfloat16, "--x", small=kind)
    assert seen == ["transformer torch.bfloat16", "shrunk", "vae torch.float32"]
    assert {p.dtype for model in family.text_encoders for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
