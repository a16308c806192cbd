"""Opening a model in diffusers' layout: which family it is, and its parts, frozen."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from networks.foreign.texts import read_json
from networks.models.libraries import quiet_libraries

from . import small_weights
from .families import FAMILIES, Family


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
        content = read_json(index)
    except ValueError as error:
        raise ValueError(f"{option}: {error}. Download the model again.") from error
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
    small: str | None = None,
    keep_denoiser: bool = False,
) -> Family:
    """Load a model folder, frozen and in eval mode. The autoencoder stays fp32: SDXL's overflows in fp16.

    Part after part, each in its own precision from the start and in its place before the next is read, so that memory
    never holds the whole model in fp32, nor the GPU the denoiser in `dtype` that is to be `small`.

    Args:
        folder: the model's, in diffusers' layout.
        device: where it computes.
        dtype: what the denoiser and the text encoders are loaded and compute in.
        option: of the command line, which named the folder; for messages.
        sdpa: torch's fused attention also on the CPU, where a family's plain one is faster.
        small: stores the denoiser's weights in 4 or 8 bits, see small_weights.shrink.
        keep_denoiser: leaves the denoiser in memory, to be divided over processes.

    Raises:
        ValueError: the folder is not a model of these families, or cannot be read.
    """
    kind = check_model_folder(folder, option)
    quiet_libraries()
    from diffusers import DiffusionPipeline

    where = f"{option} {folder}"
    denoiser = _load_part(folder, kind.denoiser_name, dtype, where)
    if small:
        small_weights.shrink(denoiser, small, dtype, device)
    denoiser.to("cpu" if keep_denoiser else device)
    vae = _load_part(folder, "vae", torch.float32, where)
    parts = {kind.denoiser_name: denoiser, "vae": vae, **kind.absent_parts}
    with _told(where):
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **parts)
    if hasattr(vae, "fit_pipeline"):  # pipelines know the scale of diffusers' own autoencoders alone
        vae.fit_pipeline(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    family = kind(pipeline, dtype)
    for model in family.helpers:
        model.requires_grad_(False).eval()
        model.to(device, torch.float32 if model is family.vae else dtype)
    if device.type == "cpu" and not sdpa:
        family.use_plain_attention()
    return family


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, or of the machine: torch has no class of its own for the latter."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of a library that reads a damaged model become ours."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{what} cannot be loaded: {first}. Is a part missing or truncated?") from error


def _load_part(folder: Path, name: str, dtype: torch.dtype, where: str) -> Any:
    """One of the pipeline's models, frozen, in memory.

    Args:
        name: of the part, in model_index.json; there, too, are its module (diffusers, or any other that can be
            imported) and class.
        where: the option and folder, for messages.

    Raises:
        ValueError: there is no such class, or its files cannot be read.
    """
    written = read_json(folder / "model_index.json").get(name) or ["", ""]
    if not isinstance(written, list) or len(written) != 2 or not all(isinstance(one, str | None) for one in written):
        raise ValueError(f"{where}: model_index.json has no module and class of its {name}. Download the model again.")
    module, class_name = (one or "" for one in written)  # two times nothing stand for a part that is not there
    try:
        part_class = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: its name begins with a dot
        raise ValueError(
            f"{where}: its {name} is {class_name or 'no class'} of the module {module!r}, which cannot be imported "
            f"({error}). Install or upgrade the package that has it, or put the module's folder on PYTHONPATH."
        ) from error
    with _told(where):
        model = part_class.from_pretrained(folder / name, torch_dtype=dtype)
    return model.requires_grad_(False).eval().to(dtype)  # some parts come in fp32 whatever is asked for
