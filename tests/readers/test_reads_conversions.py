"""Files that were converted, read by the programs they are for: the weights are those that were trained, or as far from
them as the report says. diffusers and PEFT on their own classes, ComfyUI where COMFYUI_PATH gives it.

PEFT's DoRA is no line between its strengths, so that full strength alone is compared there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers_program as diffusers
import pytest
from common import KINDS, Made, Trained, _errors, trained
from registry_archs import SPECS, data_of
from safetensors.torch import load_file, save_file
from test_reads_comfyui import program, program_on
from test_reads_peft import load as load_folder
from torch import nn
from toy_models import toy

from networks import api

ARCHS = ("sd", "sdxl", "flux", "wan", "qwen_image", "zimage")
EXACT = 1e-4
EXACT_KINDS = ("lora", "dora", "lokr", "glora")  # for a program of LoRAs
NEAREST = ("loha", "oft limited", "ia3", "dora input")  # which would be larger than these small weights


def base_of(models: dict[str, nn.Module], file: Path) -> Path:
    """A checkpoint of the denoiser."""
    denoiser = models[next(iter(models))]
    save_file({key: t.contiguous().clone() for key, t in denoiser.state_dict().items()}, file)
    return file


def converted(run: Trained, models: dict[str, nn.Module], folder: Path, *to: str, dim: int = 0) -> api.Report:
    base = base_of(models, folder / "base.safetensors")
    out = folder / ("out" if "peft" in to else "out.safetensors")
    return api.convert(run.file, out, to=to, base=[base], rule=api.RankRule(dim) if dim else None)


def assert_read(real: Made, run: Trained, report: api.Report, exact: bool, strengths: int) -> None:
    """Every layer, at so many of the strengths."""
    assert not real.refused and real.loaded == run.targets.keys()
    limit = {name: EXACT for name in run.targets}
    if not exact:
        told = {name: [row.error or 0.0 for row in report.rows if row.name == name] for name in run.targets}
        limit = {name: max(errors) * 1.0001 + EXACT for name, errors in told.items()}
        assert EXACT < report.error < 1
    for name, errors in real.errors.items():
        assert errors is not None and max(errors[:strengths]) < limit[name], (name, errors, limit[name])


def parts_of(arch: str) -> dict[str, nn.Module]:
    part = SPECS[arch].denoiser.name
    return {part: diffusers.models(arch, False)[part]}


@pytest.mark.long
@pytest.mark.parametrize("kind", (*EXACT_KINDS, *NEAREST))
@pytest.mark.parametrize("arch", ARCHS)
def test_diffusers(arch: str, kind: str, tmp_path: Path) -> None:
    models, exact = parts_of(arch), kind in EXACT_KINDS
    run = trained(arch, models, tmp_path / "a.safetensors", **KINDS[kind])
    report = converted(run, models, tmp_path, *(() if exact else ("lora",)), "diffusers", dim=0 if exact else 3)
    assert_read(
        diffusers.load(arch, models, replace(run, file=tmp_path / "out.safetensors")),
        run,
        report,
        exact,
        1 if kind == "dora" else 2,
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", (*EXACT_KINDS, "loha"))
@pytest.mark.parametrize("arch", ("qwen_image", "wan", "flux"))
def test_peft(arch: str, kind: str, tmp_path: Path) -> None:
    models = parts_of(arch)
    exact = kind != "loha" or arch != "flux"  # whose fused layers have no LoHa of PEFT's
    run = trained(arch, models, tmp_path / "a.safetensors", **KINDS[kind])
    report = converted(run, models, tmp_path, *(() if exact else ("lora",)), "peft", dim=0 if exact else 3)
    real = load_folder(models, replace(run, file=tmp_path / "out" / "adapter_model.safetensors"))
    assert_read(real, run, report, exact, 1 if kind == "dora" else 2)


if program.ROOT:  # tests of what is not installed are not collected

    @pytest.mark.sweep
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "norms"])
    @pytest.mark.parametrize("arch", ARCHS)
    def test_comfyui(arch: str, kind: str, tmp_path: Path) -> None:
        part = SPECS[arch].denoiser.name
        models = {part: toy(arch, shrink=data_of(arch).shrink)[part].eval().requires_grad_(False)}
        run = trained(arch, models, tmp_path / "a.safetensors", **KINDS[kind])
        report = converted(run, models, tmp_path, "comfyui")
        weight_at = program_on(arch, models[part], load_file(tmp_path / "out.safetensors"))
        real = Made("", {name: _errors(targets, weight_at) for name, targets in run.targets.items()})
        assert_read(real, run, report, True, 2)
