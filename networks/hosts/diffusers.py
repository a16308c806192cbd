"""Opening a model in diffusers' layout: which family it is, and its parts, frozen."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from . import small_weights
from .families import FAMILIES, Family


def quiet_libraries() -> None:
    """Silence the libraries' remarks at import time, which a user can do nothing about."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they lack on this machine
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def check_model_folder(folder: Path, option: str) -> type[Family]:
    """The family of the model in `folder`. Raises ValueError when it is none of ours."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{option} {folder} {what}. Give a model folder in diffusers' layout (with model_index.json).")
    index = folder / "model_index.json"
    if not index.is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
        hint = f" Its subfolder {inner[0]} has one: give that." if inner else " Give a folder in diffusers' layout."
        raise ValueError(f"{option} {folder} has no model_index.json.{hint}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{option}: {index} is not JSON ({error}). Download the model again.") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    for family in FAMILIES:
        if family.pipeline_class == name:
            return family
    known = ", ".join(f"{family.title} ({family.pipeline_class})" for family in FAMILIES)
    raise ValueError(f"{option} {folder} is of an unknown family ({name}). Known: {known}.")


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    option: str,
    sdpa: bool = False,
    quantize: str | None = None,
    keep_denoiser: bool = False,
) -> Family:
    """Load a model folder, frozen and in eval mode. The autoencoder stays fp32: SDXL's overflows in fp16.

    On the CPU the plain attention is used unless `sdpa`, where a family has it and it is faster there.
    `quantize` stores the denoiser's Linear layers in 4 or 8 bits, see small_weights. `keep_denoiser` leaves the
    denoiser in memory, to be divided over processes.
    Raises ValueError when the folder is not a model of these families or cannot be read.
    """
    kind = check_model_folder(folder, option)
    quiet_libraries()
    from .pixel_autoencoder import load_pipeline

    extra: dict[str, Any] = {}
    if kind is FAMILIES[0]:
        extra.update(safety_checker=None, requires_safety_checker=False)
    try:
        pipeline = load_pipeline(folder, **extra)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{option} {folder} cannot be loaded: {first}. Is a part missing or truncated?") from error
    pipeline.set_progress_bar_config(disable=True)
    family = kind(pipeline, dtype)
    for model in (family.denoiser, *family.helpers):
        model.requires_grad_(False).eval()
        if quantize and model is family.denoiser:
            small_weights.quantize(model, quantize, dtype, device)
        where = torch.device("cpu") if keep_denoiser and model is family.denoiser else device
        model.to(where, torch.float32 if model is family.vae else dtype)
    if device.type == "cpu" and not sdpa:
        family.use_plain_attention()
    return family
