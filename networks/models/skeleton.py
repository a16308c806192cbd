"""Models without weights, on the meta device: from a name, a diffusers folder, or a checkpoint's header."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..archs.detect import detect
from ..files import codec, reader, weight_names
from ..foreign.texts import read_json
from ..plan.walk import candidates
from . import outline
from .libraries import from_config, library_class, on_meta
from .releases import RELEASES, Release, arch_of, hint, release_called

DENOISERS = ("unet", "transformer")  # their folders in a pipeline
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
OUTLINES = Path(__file__).parent / "skeletons"  # written by scripts/names.py
_NUMBER = re.compile(r"\d+")
_ALIKE = re.compile(r"^( *\d+)\.\.\d+(?= )", re.MULTILINE)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, as a host would hand it over.

    Attributes:
        release: the released model that it is; None = it was built from a folder.
    """

    title: str
    unet: nn.Module
    text_encoders: list[nn.Module | None]
    release: Release | None = None


def skeleton(model: str, likely: Sequence[str] = ()) -> Skeleton:
    """A model without weights.

    Args:
        model: the name of a release (`sdxl`), a diffusers folder (of a pipeline, or of its denoiser alone), or a
            checkpoint of a release, of which only the header is read.
        likely: releases of the architecture that a checkpoint should have: one of them is found sooner.

    Raises:
        ValueError: it is none of these, or of no architecture that we know.
    """
    path = Path(model)
    release = RELEASES.get(model) if path.exists() else release_called(model)
    if release is not None:
        return _from_release(release)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_header(path, likely)
    names = ", ".join(RELEASES)
    raise ValueError(
        f"{model} is neither a built-in model ({names}), nor a diffusers folder, nor a checkpoint{hint(model)}"
    )


def recorded(name: str, short: bool = False) -> nn.Module:
    """The denoiser of a release or a text encoder, from its outline in `skeletons/`.

    Args:
        short: with the first alone of blocks which are all alike.

    Raises:
        ValueError: the outline is not there.
    """
    path = OUTLINES / f"{name}.txt"
    if not path.is_file():
        raise ValueError(f"{path} is missing: `python scripts/names.py --skeletons` writes it from the model's class")
    text = path.read_text(encoding="utf-8")
    return outline.build(_ALIKE.sub(r"\1", text) if short else text)


def _from_release(release: Release, with_text_encoders: bool = True, whole: bool = True) -> Skeleton:
    """`whole`: with what diffusers' class lacks."""
    denoiser = recorded(release.name)
    for name in () if whole else {name.partition(".")[0] for name in release.added}:
        delattr(denoiser, name)
    encoders = [recorded(one.name) if one else None for one in release.text_encoders if with_text_encoders]
    return Skeleton(release.title, denoiser, encoders, release)


def _from_folder(folder: Path) -> Skeleton:
    index = _json(folder / "model_index.json")
    if not index and (folder / "config.json").is_file():
        return Skeleton(str(folder), _alone(folder, _json(folder / "config.json")), [])
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
    with on_meta():
        encoders = [_encoder_of(where, cls) if cls else None for where, cls in present[:wanted]]
    return Skeleton(str(folder), denoiser, encoders)


def _alone(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """One model of diffusers, or of transformers."""
    names = config.get("architectures") or ()
    if "_class_name" in config or not names:
        return _denoiser(folder, config.get("_class_name"))
    with on_meta():
        return _encoder_of(folder, names[0])


def _denoiser(folder: Path, name: str | None) -> nn.Module:
    cls = library_class("diffusers", name or "?")
    with on_meta():
        denoiser: nn.Module = cls.from_config(cls.load_config(folder))
    return denoiser


def _encoder_of(folder: Path, name: str) -> nn.Module:
    cls = library_class("transformers", name)
    return from_config(cls, cls.config_class.from_pretrained(str(folder)))


def _json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty without the file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: download the model again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no description of a model: download it again")
    return found


def _from_header(path: Path, likely: Sequence[str]) -> Skeleton:
    """The release whose layers a checkpoint has, all of them and no more; a variant is refused."""
    shapes = reader.read_header(path).shapes
    if codec.is_adapter(shapes):
        raise ValueError(f"{path} is an adapter, not a model; give the model that it was trained for")
    present = weight_names.all_names(shapes)
    found = {name: _layers_in(name, shapes, present) for name in likely}
    if not any(map(any, found.values())):
        found = {name: _layers_in(name, shapes, present) for name in RELEASES}
    best = max(found, key=lambda name: found[name])
    if not any(found[best]):
        raise ValueError(
            f"{path} has not the layers of a release that we know ({', '.join(RELEASES)}): for another model or a "
            "variant, give its diffusers folder"
        )
    release = RELEASES[best]
    encoders = any(key.startswith(weight_names.OTHERS) for key in shapes)
    built = _from_release(release, with_text_encoders=encoders, whole=_has_added(release, present))
    return replace(built, title=f"{path} ({release.title})")


def _has_added(release: Release, present: set[str]) -> bool:
    """Whether a checkpoint has what diffusers' class lacks, which trainers load from a file of its own, too."""
    part = arch_of(release).denoiser
    return any(part.saved_name(added) in present for added in release.added)


@functools.cache
def layers_of(name: str) -> tuple[str, dict[str, tuple[tuple[int, ...], bool]]]:
    """Prefix of the saved names of a release's denoiser; saved name -> shape, and whether it is trained by default."""
    denoiser = recorded(name)
    part = detect(denoiser).denoiser
    found = candidates(part, denoiser, norms=True)
    held = (c for c in found if next(c.bases[0][0].parameters(), None) is not None)  # norms may have no weight
    return part.prefix, {c.saved_name: (c.geometry.weight_shape, c.default) for c in held}


def _layers_in(name: str, shapes: Mapping[str, tuple[int, ...]], present: set[str]) -> tuple[int, int]:
    """How many of a checkpoint's weights are layers of a release, and how many layers it lacks, negative; 0 unless all
    layers that are trained by default are there, and no more of a kind.

    Args:
        present: every saved name that the checkpoint's keys may have.
    """
    prefix, own = layers_of(name)
    default = {saved for saved, (_, trained) in own.items() if trained}
    if not default <= present:
        return 0, 0
    targets = weight_names.find(shapes, own, prefix)
    found = {saved: one.keys for saved, one in targets.items() if one.shape(shapes) == own[saved][0]}
    kinds = {_NUMBER.sub("#", saved) for saved in default}
    more = any(_NUMBER.sub("#", saved) in kinds for saved in present - own.keys())
    if more or not default <= found.keys():
        return 0, 0
    return len({key for keys in found.values() for key in keys}), len(found) - len(own)
