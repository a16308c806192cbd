"""LyCORIS' own loader reads our files: which layers, how strong, or refused in which words, equals its model."""

from __future__ import annotations

from pathlib import Path

import lycoris.kohya
import pytest
import torch
from common import KINDS, WIDE, Trained, assert_model, trained
from lycoris_program import load, models
from registry_archs import SPECS
from torch import nn

from networks.files.readers import READERS
from networks.files.readers.contract import Reading
from networks.files.readers.lycoris import TWICE

READER = next(reader for reader in READERS if reader.name == "lycoris")
OTHERS = [kind for kind in KINDS if kind not in (*WIDE, "norms")]
EXACT = {"loha": 1e-3}  # small products, measured on an output


def read(arch: str, file: Path, parts: dict[str, nn.Module] | None = None, **arguments: str) -> tuple[Trained, Reading]:
    """A file that the program and its model read alike."""
    parts = parts or models(arch)
    made = trained(arch, parts, file, **arguments)
    assert_model(READER, made, load(arch, parts, made), EXACT.get(arguments.get("algo", ""), 1e-4))
    reading = READER.read(made.given)
    assert reading is not None
    return made, reading


@pytest.mark.sweep
@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("arch", SPECS)
def test_files_of_every_architecture(arch: str, kind: str, tmp_path: Path) -> None:
    made, reading = read(arch, tmp_path / "a.safetensors", **KINDS[kind])
    assert bool(reading.refused) is (arch == "sd")
    if arch not in ("sd", "flux", "chroma"):
        assert reading.loaded == len(made.targets) and reading.errors[0] == 0


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    read("zimage", tmp_path / "a.safetensors", **KINDS[kind])


@pytest.mark.parametrize(
    "arguments",
    [
        {"conv_dim": "4", "conv_alpha": "1", "use_tucker": "True"},
        {"conv_dim": "4", "use_dora": "True"},
        {"conv_dim": "4", "algo": "lokr", "factor": "2", "use_tucker": "True"},
        {"conv_dim": "4", "algo": "glora"},
    ],
)
def test_convolutions(arguments: dict[str, str], tmp_path: Path) -> None:
    part = SPECS["sdxl"].denoiser.name
    read("sdxl", tmp_path / "a.safetensors", {part: models("sdxl")[part]}, **arguments)


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("zimage", {"algo": "lokr", "factor": "2", "unbalanced_factorization": "True"}),
        ("qwen_image", {"use_dora": "True", "save_format": "comfyui"}),
        ("zimage", {"algo": "boft", "dim": "64", "rescaled": "True"}),
        ("zimage", {"algo": "boft", "dim": "64", "constraint": "0.01"}),
        ("flux", {"split_qkv": "True"}),
        ("flux", {"split_qkv": "True", "algo": "diag-oft"}),
        ("flux", {"train_t5xxl": "True"}),
        ("sd3", {"train_t5xxl": "True"}),
    ],
)
def test_other_forms(arch: str, arguments: dict[str, str], tmp_path: Path) -> None:
    read(arch, tmp_path / "a.safetensors", **arguments)


def test_merging_takes_the_scale_twice(tmp_path: Path) -> None:
    parts = models("zimage")
    made, reading = read("zimage", tmp_path / "a.safetensors", **KINDS["lokr"])
    assert reading.notes == (TWICE,)
    network, tensors = lycoris.kohya.create_network_from_weights(
        1.0, str(made.file), None, [], parts[SPECS["zimage"].denoiser.name]
    )
    network.merge_to(None, parts[SPECS["zimage"].denoiser.name], tensors, torch.float32, "cpu")
    try:
        for (target,) in made.targets.values():
            half = target.base + (target.wanted - target.base) / 2  # alpha / rank = 2 / 4
            torch.testing.assert_close(target.module.weight.detach(), half, rtol=1e-4, atol=1e-6)
    finally:
        for (target,) in made.targets.values():
            target.module.weight.data.copy_(target.base)
