"""PEFT reads folders, on diffusers' classes: which layers, how strong, or refused in which words, equals its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from common import KINDS, Made, Trained, assert_model, given_of, trained
from diffusers_program import PIPELINES, found, models, remove
from peft import PeftModel
from registry_archs import SPECS
from safetensors.torch import save_file
from torch import nn

from networks.files.readers import READERS

READER = next(reader for reader in READERS if reader.name == "peft")
CONFIG: dict[str, dict[str, Any]] = {  # alpha = 2 r everywhere
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "dora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True},
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 2},
    "lokr": {"peft_type": "LOKR", "r": 4, "alpha": 2, "decompose_factor": 2},
}


def parts_of(arch: str) -> dict[str, nn.Module]:
    part = SPECS[arch].denoiser.name
    return {part: models(arch, False)[part]}


def folder(source: Trained, parts: Mapping[str, nn.Module], path: Path, **settings: Any) -> Trained:
    """As PEFT writes it: its names, the strength in the settings."""
    path.mkdir()
    (model,) = parts.values()
    paths = {module: name for name, module in model.named_modules()}
    names = {layer: paths[target.module] for layer, (target,) in source.targets.items()}
    tensors = {}
    for key, tensor in source.given.tensors.items():
        layer = max((one for one in names if key.startswith(f"{one}.")), key=len)
        suffix = key[len(layer) + 1 :]
        if suffix != "alpha":
            half = tensor / 2 if suffix == "lora_B.weight" else tensor
            written = suffix.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            tensors[f"base_model.model.{names[layer]}.{written}"] = half.contiguous()
    file = path / "adapter_model.safetensors"
    save_file(tensors, file)
    config = {"target_modules": [*names.values()], "base_model_name_or_path": None, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    given = given_of(source.given.arch, parts, file, source.given.base)
    return Trained(file, given, {f"base_model.model.{names[one]}": targets for one, targets in source.targets.items()})


def load(parts: Mapping[str, nn.Module], trained: Trained) -> Made:
    """What `PeftModel.from_pretrained` makes of a folder."""
    (model,) = parts.values()
    try:
        PeftModel.from_pretrained(model, str(trained.file.parent), adapter_name="read")
        return found([model], trained)
    except Exception as error:
        return Made(f"{type(error).__name__}: {error}")
    finally:
        remove(model)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("arch", PIPELINES)
def test_folders_of_every_architecture(arch: str, kind: str, tmp_path: Path) -> None:
    parts = parts_of(arch)
    source = trained(arch, parts, tmp_path / "a.safetensors", save_format="diffusers", **KINDS[kind])
    assert_model(READER, made := folder(source, parts, tmp_path / "f", **CONFIG[kind]), load(parts, made))
    reading = READER.read(made.given)
    assert reading is not None and reading.loaded == len(made.targets) and reading.errors[0] == 0


@pytest.mark.parametrize("arch", ["zimage", "qwen_image"])  # where nothing is fused
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_factors(arch: str, kind: str, tmp_path: Path) -> None:
    parts = parts_of(arch)
    source = trained(arch, parts, tmp_path / "a.safetensors", **KINDS[kind])
    assert_model(READER, made := folder(source, parts, tmp_path / "f", **CONFIG[kind]), load(parts, made))
    reading = READER.read(made.given)
    assert reading is not None and reading.exact


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    parts = parts_of("zimage")
    source = trained("zimage", parts, tmp_path / "a.safetensors", **KINDS["lokr"])
    made = folder(source, parts, tmp_path / "f", **CONFIG["lokr"] | {"decompose_factor": 4})
    assert_model(READER, made, load(parts, made))
    reading = READER.read(made.given)
    assert reading is not None and reading.refused
    lora = trained("zimage", parts, tmp_path / "b.safetensors", save_format="diffusers")
    made = folder(lora, parts, tmp_path / "g", **CONFIG["lora"] | {"target_modules": ["to_q"]})
    assert_model(READER, made, load(parts, made))
    reading = READER.read(made.given)
    assert reading is not None and 0 < reading.loaded < len(made.targets)


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    parts = parts_of("zimage")
    made = trained("zimage", parts, tmp_path / "a.safetensors")
    assert_model(READER, made, real := load(parts, made))
    assert real.refused
