"""Modulation layers: which call trains them, and files that have them although the default leaves them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_arch_names import trainer_plan
from toy_models import signal, toy

import networks.lora
import networks.lora_qwen_image
from networks.archs import ARCHS

WITH_SWITCH = [arch.name for arch in ARCHS if any(switch.argument == "exclude_mod" for switch in arch.switches)]
MODULATION = ("_mod", "modulation", "adaln", "adaLN", "norm")


def trained(arch: str, host: str = "sd_scripts", **kwargs: str) -> set[str]:
    spec = next(spec for spec in ARCHS if spec.name == arch)
    plan = networks.lora.plan(4, 1, None, toy(arch)[spec.denoiser.name], host=host, **kwargs)
    return {row.dotted_name for row in plan.trained}


@pytest.mark.parametrize("arch", WITH_SWITCH)
def test_exclude_mod_decides_the_modulation_layers_and_no_others(arch: str) -> None:
    plain, without, whole = trained(arch), trained(arch, exclude_mod="True"), trained(arch, exclude_mod="False")
    assert without < whole and plain in (without, whole)
    assert all(any(word in name for word in MODULATION) for name in whole - without)
    assert not any(any(word in name for word in MODULATION) for name in without)


def test_the_default_is_that_of_the_host() -> None:
    assert trained("flux", "sd_scripts") == trained("flux", exclude_mod="False")
    assert trained("flux", "musubi") == trained("flux", exclude_mod="True")
    assert trained("qwen_image", "sd_scripts") == trained("qwen_image", "musubi")


@pytest.mark.parametrize(("host", "count"), [("sd_scripts", 304), ("musubi", 228)])
def test_flux_at_full_size(host: str, count: int) -> None:
    plan = trainer_plan("flux", host=host)
    assert sum(row.part == "dit" for row in plan.trained) == count and not plan.warnings


def test_the_reason_names_the_argument() -> None:
    plan = networks.lora.plan(4, 1, None, toy("qwen_image")["dit"])
    reasons = {row.reason for row in plan.rows if "img_mod" in row.dotted_name}
    assert reasons == {"give exclude_mod=False to train it"}


def test_include_patterns_rescue_some_of_them() -> None:
    found = trained("qwen_image", include_patterns=r".*\.img_mod\..*")
    assert any("img_mod" in name for name in found) and not any("txt_mod" in name for name in found)


def trainer_file(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """As the trainer makes it, whose own default pattern matches nothing: every layer of the blocks, no metadata."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks."):
            saved = "lora_unet_" + name.replace(".", "_")
            tensors[f"{saved}.lora_down.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"{saved}.lora_up.weight"] = 0.05 * torch.randn(module.out_features, 2, generator=generator)
            tensors[f"{saved}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return tensors


def test_a_file_with_modulation_layers_loads_whole(tmp_path: Path) -> None:
    model = toy("qwen_image")["dit"]
    tensors = trainer_file(model, tmp_path / "theirs.safetensors")
    network = networks.lora_qwen_image.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
    assert len(network.unet_loras) == len(tensors) // 3
    network.apply_to(None, model, False, True)
    applied = model(signal()).detach()
    network.detach()
    for name, module in model.named_modules():
        saved = "lora_unet_" + name.replace(".", "_")
        if f"{saved}.alpha" in tensors:
            up, down = tensors[f"{saved}.lora_up.weight"], tensors[f"{saved}.lora_down.weight"]
            module.weight.data += up @ down * (tensors[f"{saved}.alpha"] / 2)
    torch.testing.assert_close(applied, model(signal()), atol=1e-5, rtol=1e-4)


def test_exclude_mod_leaves_them_out_of_a_file_too(tmp_path: Path) -> None:
    model = toy("qwen_image")["dit"]
    tensors = trainer_file(model, tmp_path / "theirs.safetensors")
    network = networks.lora_qwen_image.create_arch_network_from_weights(1.0, tensors, unet=model, exclude_mod="True")
    names = [row.dotted_name for row, _ in network.layers]
    assert names and not any("_mod" in name for name in names)
