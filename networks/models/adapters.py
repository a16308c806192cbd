"""The model that an adapter file is for, by the names and shapes in it, and what its metadata say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ..archs import ARCHS
from ..archs.spec import ArchSpec
from ..files.adapter_file import FileTensors, Naming
from ..files.codec import SavedLayer
from ..plan.walk import candidates
from .skeleton import Skeleton, layers_of, skeleton

SAID = ("ss_base_model_version", "modelspec.architecture")  # keys of metadata that name the model


def model_of(file: FileTensors) -> Skeleton:
    """The released model that has the layers of a file.

    Raises:
        ValueError: there is none that we know, or several have them.
    """
    fitting = [model for arch in _likeliest(file) if (model := _fitting(file, arch)) is not None]
    if not fitting:
        raise ValueError(
            f"{file.source}: no released model that we know has its layers in these shapes; say which one it is for, "
            "--model with a name, a diffusers folder or a checkpoint"
        )
    if len(fitting) > 1:
        titles = " or ".join(model.title for model in fitting)
        raise ValueError(f"{file.source} may be for {titles}: say which, --model with its name")
    return fitting[0]


def _likeliest(file: FileTensors) -> list[ArchSpec]:
    """The architectures that have most of its layers; of them those of which its metadata speak, if there are any."""
    released = [arch for arch in ARCHS if arch.releases]
    counts = [_names_there(file, arch) for arch in released]
    most = max(counts)
    best = [arch for arch, count in zip(released, counts, strict=True) if count == most and count]
    return [arch for arch in best if _is_said(arch, file.metadata)] or best


def _names_there(file: FileTensors, arch: ArchSpec) -> int:
    """How many layers of a file an architecture has."""
    prefixes = tuple(f"{part.prefix}_" for part in arch.text_encoders)
    try:
        names = {key.partition(".")[0] for key in Naming(arch).apply(file, file.source)}
    except ValueError:
        return 0
    encoders = sum(name.startswith(prefixes) for name in names) if prefixes else 0
    return encoders + len(names & layers_of(arch.releases[0].name)[1].keys())


def _is_said(arch: ArchSpec, metadata: Mapping[str, str]) -> bool:
    said = " ".join(_plain(metadata.get(key, "")) for key in SAID)
    return any(_plain(word) in said for word in (arch.name, arch.title, *(one.name for one in arch.releases)))


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


def _fitting(file: FileTensors, arch: ArchSpec) -> Skeleton | None:
    """The first release of an architecture whose layers have the shapes which a file needs."""
    try:
        layers = file.opened(Naming(arch)).layers
    except ValueError:
        return None
    found = {}
    for release in arch.releases:
        model = skeleton(release.name)
        found[release.name] = _fits(layers, arch, model)
        if found[release.name] == len(layers):
            return model
    best = max(found, key=lambda name: found[name])
    return skeleton(best) if found[best] else None


def _fits(layers: Mapping[str, SavedLayer], arch: ArchSpec, model: Skeleton) -> int:
    """How many layers of a file fit a model; 0 if one does not."""
    models: list[nn.Module | None] = [*model.text_encoders, *[None] * len(arch.text_encoders)]
    pairs = [*zip(arch.text_encoders, models, strict=False), (arch.denoiser, model.unet)]
    count = 0
    for c in (c for part, one in pairs if one is not None for c in candidates(part, one, norms=True)):
        saved = layers.get(c.saved_name)
        try:
            if saved is not None:
                saved.describe(c.geometry)
                count += 1
        except ValueError:
            return 0
    return count
