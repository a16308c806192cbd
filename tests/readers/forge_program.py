"""Forge itself, where FORGE_PATH names a checkout: its classes, key maps and patches."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from comfyui_program import CONFIGS, ENCODERS_OF, StandIns, Target, plain
from torch import Tensor

ROOT = os.environ.get("FORGE_PATH", "")
_FLUX = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth")
_FLUX += ("depth_single_blocks", "axes_dim", "theta", "qkv_bias")
_CHROMA = {"guidance_out_dim": 3072, "guidance_hidden_dim": 5120, "guidance_n_layers": 5}
_UNET = ("use_checkpoint", "image_size", "legacy", "use_temporal_attention")
# Architecture -> its class, how Forge calls the model, and the settings of that class.
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd": ("unet:IntegratedUNet2DConditionModel", "stable-diffusion-v1-5", CONFIGS["sd"]),
    "sdxl": ("unet:IntegratedUNet2DConditionModel", "stable-diffusion-xl-base-1.0", CONFIGS["sdxl"]),
    "flux": (
        "flux:IntegratedFluxTransformer2DModel",
        "black-forest-labs/FLUX.1-dev",
        {name: CONFIGS["flux"][name] for name in (*_FLUX, "guidance_embed")},
    ),
    "chroma": (
        "chroma:IntegratedChromaTransformer2DModel",
        "Chroma",
        {name: CONFIGS["chroma"][name] for name in _FLUX} | {"in_channels": 16} | _CHROMA,
    ),
    "sd3": ("mmditx:MMDiTX", "stabilityai/stable-diffusion-3.5-medium", CONFIGS["sd3"]),
}


@cache
def program(name: str) -> Any:
    """A module of it, by its path there."""
    if ROOT not in sys.path:
        sys.path += [ROOT, f"{ROOT}/packages_3rdparty"]
        sys.meta_path.append(StandIns())
        before, sys.argv = sys.argv, [sys.argv[0], "--always-cpu"]
        importlib.import_module("backend.args")
        sys.argv = before
    return importlib.import_module(name)


@cache
def weights(arch: str) -> dict[str, Tensor]:
    """The state dict of its denoiser, on the meta device."""
    module, _, cls = CLASSES[arch][0].partition(":")
    settings = {name: value for name, value in CLASSES[arch][2].items() if name not in _UNET}
    with torch.device("meta"):
        made = getattr(program(f"backend.nn.{module}"), cls)(**settings)
    return {f"diffusion_model.{key}": tensor for key, tensor in made.state_dict().items()}


def raw_map(arch: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Names in files -> what it makes of them, for a model of these weights."""
    lora = program("backend.patcher.lora")
    denoiser = {key: tensor for key, tensor in tensors.items() if key.startswith("diffusion_model.")}
    model = SimpleNamespace(
        state_dict=lambda: denoiser,
        diffusion_model=SimpleNamespace(config=config),
        config=SimpleNamespace(huggingface_repo=CLASSES[arch][1]),
    )
    others = {key: tensor for key, tensor in tensors.items() if key not in denoiser}
    keys: dict[str, Any] = lora.model_lora_keys_unet(model, {})
    return lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: others), keys)


def key_map(arch: str, encoders: Mapping[str, Tensor]) -> dict[str, Target]:
    """Names in files -> the rows of which weight they mean, without `diffusion_model.` and `.weight`.

    Args:
        encoders: weights of text encoders, under its own names.
    """
    tensors, found = weights(arch) | dict(encoders), {}
    for name, value in raw_map(arch, tensors, CONFIGS[arch]).items():
        key, offset, function = (value, None, None) if isinstance(value, str) else (*value, None, None)[:3]
        if key in tensors and key.endswith(".weight"):
            start, rows = (0, tensors[key].shape[0]) if offset is None else offset[1:]
            found[name] = plain(key), start, rows, function is not None
    return found


def encoder_names(arch: str) -> tuple[str, ...]:
    """Its names of text encoders, in the order of the architecture's; "" = it has none there."""
    return ENCODERS_OF.get(arch, ())


def patched(
    arch: str, file: Mapping[str, Tensor], base: Mapping[str, Tensor], config: dict[str, Any], strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    """What it makes of a model with a file: weights that it changes, and keys that it does not know.

    Args:
        file: tensors under the keys of the file.
        base: weights under its own names, in fp32.
        config: of the denoiser's class.
    """
    lora = program("backend.patcher.lora")
    patches, unknown = lora.load_lora(dict(file), raw_map(arch, base, config))
    changed: dict[str, Tensor] = {}
    for target, patch in patches.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
        if key in base:
            one = [(strength, patch, 1.0, offset, function)]
            changed[key] = lora.merge_lora_to_weight(one, changed.get(key, base[key]).clone(), key)
    return changed, list(unknown)
