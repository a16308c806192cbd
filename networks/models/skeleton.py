"""Models without weights, on the meta device: from a name, a diffusers folder, or a checkpoint's header."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..archs.detect import detect
from ..args.coerce import nearest
from ..files import codec, reader, weight_names
from ..plan.select import candidates
from .libraries import quiet_libraries
from .releases import RELEASES, Encoder, Release

DENOISERS = ("unet", "transformer")  # their folders in a pipeline
_NUMBER = re.compile(r"\d+")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Missing(ValueError):
    """The installed library lacks a class."""


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, as a host would hand it over."""

    title: str
    unet: nn.Module
    text_encoders: list[nn.Module | None]


def skeleton(model: str) -> Skeleton:
    """A model without weights.

    Args:
        model: the name of a release (`sdxl`), a diffusers folder (of a pipeline, or of its denoiser alone), or a
            checkpoint of a release, of which only the header is read.

    Raises:
        ValueError: it is none of these, or of no architecture that we know.
    """
    if model in RELEASES:
        return _from_release(RELEASES[model], with_text_encoders=True)
    path = Path(model)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_header(path)
    names = ", ".join(RELEASES)
    raise ValueError(
        f"{model} is neither a built-in model ({names}), nor a diffusers folder, nor a checkpoint"
        f"{nearest(model, RELEASES)}"
    )


def _from_release(release: Release, with_text_encoders: bool, whole: bool = True) -> Skeleton:
    """`whole`: with what diffusers' class lacks."""
    with _on_meta():
        denoiser = _library("diffusers", release.denoiser)(**release.sizes)
        for name, (cls, sizes) in release.added.items() if whole else ():
            _add(denoiser, name, getattr(nn, cls)(*sizes) if sizes else type(cls, (nn.Module,), {})())
        encoders = [_encoder(one) if one else None for one in release.text_encoders if with_text_encoders]
    return Skeleton(release.title, denoiser, encoders)


def _add(model: nn.Module, dotted_name: str, module: nn.Module) -> None:
    *parents, last = dotted_name.split(".")
    for name in parents:
        if name not in dict(model.named_children()):
            model.add_module(name, nn.Module())
        model = model.get_submodule(name)
    model.add_module(last, module)


def _encoder(encoder: Encoder) -> nn.Module:
    config = _library("transformers", encoder.config)(**encoder.sizes)
    return _built(_library("transformers", encoder.cls), config)


def _built(cls: Any, config: Any) -> nn.Module:
    """A transformers model; its own constructor would need no more, but not all classes take a bare configuration."""
    built: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return built


def _on_meta() -> torch.device:
    quiet_libraries()
    return torch.device("meta")


def _library(library: str, name: str) -> Any:
    """A class of diffusers or transformers.

    Raises:
        Missing: the installed version has no such class.
    """
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError):
        raise Missing(
            f"{name} is not in the installed {library}: run this in an environment with a newer one (scripts/start.py "
            "makes one); leave the trainer's as it is"
        ) from None


def _from_folder(folder: Path) -> Skeleton:
    index = _json(folder / "model_index.json")
    if not index and (folder / "config.json").is_file():
        return Skeleton(str(folder), _denoiser(folder, _json(folder / "config.json").get("_class_name")), [])
    if not index:
        raise ValueError(f"{folder} is no diffusers folder: it has neither model_index.json nor config.json")
    name = next((name for name in DENOISERS if (folder / name / "config.json").is_file()), None)
    if name is None:
        raise ValueError(
            f"{folder} ({index.get('_class_name')}) has no {' and no '.join(DENOISERS)} with a config.json"
        )
    denoiser = _denoiser(folder / name, (index.get(name) or [None, None])[1])
    wanted = len(detect(denoiser).text_encoders)
    present = [(folder / one, (index.get(one) or [None, None])[1]) for one in ENCODERS]
    with _on_meta():
        encoders = [_encoder_of(where, cls) if cls else None for where, cls in present[:wanted]]
    return Skeleton(str(folder), denoiser, encoders)


def _denoiser(folder: Path, name: str | None) -> nn.Module:
    cls = _library("diffusers", name or "?")
    with _on_meta():
        denoiser: nn.Module = cls.from_config(cls.load_config(folder))
    detect(denoiser)
    return denoiser


def _encoder_of(folder: Path, name: str) -> nn.Module:
    cls = _library("transformers", name)
    return _built(cls, cls.config_class.from_pretrained(str(folder)))


def _json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty without the file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download the model again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no description of a model: download it again")
    return found


def _from_header(path: Path) -> Skeleton:
    """The release whose layers a checkpoint has, all of them and no more; a variant is refused."""
    shapes = reader.read_header(path).shapes
    if codec.is_adapter(shapes):
        raise ValueError(f"{path} is an adapter, not a model; give the model that it was trained for")
    cross = sorted(shape for key, shape in shapes.items() if _is_cross_attention(key))
    fits, unknown, present = dict[str, int](), list[str](), set() if cross else weight_names.all_names(shapes)
    for name, release in RELEASES.items():
        context = release.sizes.get("cross_attention_dim")
        if (context is None) != (not cross) or (cross and cross[0][1] != context):
            continue
        if cross:
            fits[name] = int(_cross_attention(_from_release(release, with_text_encoders=False).unet) == cross)
            continue
        try:
            fits[name] = _layers_in(name, shapes, present)
        except Missing:  # the trainers pin older libraries, which know their own models
            unknown.append(name)
    if any(fits.values()):
        release = RELEASES[max(fits, key=lambda name: fits[name])]
        encoders = any(key.startswith(("cond_stage_model.", "conditioner.", "text_encoders.")) for key in shapes)
        built = _from_release(release, with_text_encoders=encoders, whole=_has_added(release, present))
        return Skeleton(f"{path} ({release.title})", built.unet, built.text_encoders)
    known = ", ".join(name for name in RELEASES if name not in unknown)
    newer = f" (the installed diffusers lacks {', '.join(unknown)}: a newer one may know it)" if unknown else ""
    raise ValueError(
        f"{path} has not the layers of a release that we know ({known}){newer}: for another model or a variant, give "
        "its diffusers folder"
    )


def _has_added(release: Release, present: set[str]) -> bool:
    """Whether a checkpoint has what diffusers' class lacks, which trainers load from a file of its own, too."""
    return any(name.endswith(f"_{added.replace('.', '_')}") for added in release.added for name in present)


def _cross_attention(unet: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for key, p in unet.named_parameters() if _is_cross_attention(key))


def _is_cross_attention(key: str) -> bool:
    """In original and diffusers' names of Stable Diffusion's UNets alike."""
    return key.endswith(".attn2.to_k.weight") and not key.startswith(("first_stage_model.", "control_model."))


@functools.cache
def _layers_of(name: str) -> tuple[str, dict[str, tuple[tuple[int, ...], bool]]]:
    """Prefix of the saved names of a release's denoiser; saved name -> shape, and whether it is trained by default."""
    denoiser = _from_release(RELEASES[name], with_text_encoders=False).unet
    part = detect(denoiser).denoiser
    found = candidates(part, denoiser, False)
    return part.prefix, {c.saved_name: (c.geometry.weight_shape, c.default) for c in found}


def _layers_in(name: str, shapes: Mapping[str, tuple[int, ...]], present: set[str]) -> int:
    """How many layers of a release a checkpoint has; 0 unless all that are trained by default, and no more of a kind.

    Args:
        present: every saved name that the checkpoint's keys may have.
    """
    prefix, own = _layers_of(name)
    default = {saved: shape for saved, (shape, trained) in own.items() if trained}
    if not default.keys() <= present:
        return 0
    found = weight_names.find(shapes, own, prefix)
    for saved, shape in default.items():
        if saved not in found or found[saved].shape(shapes) != shape:
            return 0
    kinds = {_NUMBER.sub("#", saved) for saved in default}
    return 0 if any(_NUMBER.sub("#", saved) in kinds for saved in present - own.keys()) else len(found)
