"""The model that an adapter file is for, by the names and shapes in it, and what its metadata say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import nn

from ..archs import ARCHS
from ..archs.detect import detect
from ..archs.places import Layer
from ..archs.spec import ArchSpec
from ..files import dotted, weight_names
from ..files.adapter_file import AdapterFile, FileTensors, Naming
from ..files.base_weights import BaseWeights
from ..files.readers import Given
from ..plan.walk import Candidate, candidates
from .releases import plain
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


def arch_of(file: FileTensors, keys: Collection[str]) -> ArchSpec | None:
    """The architecture that a file is for, whose weights a checkpoint has: by the names in the file; of several, the
    one of which all layers are there, then the one whose own names these are rather than another program's.

    Args:
        keys: of the checkpoint.
    """
    there, likely = weight_names.all_names(keys), _likeliest(file)
    stems = {weight_names.stem_of(key).replace(".", "_") for key in keys}

    def shared(arch: ArchSpec) -> tuple[bool, int, int]:
        prefix, own = layers_of(arch.releases[0].name)
        names = {name.removeprefix(f"{prefix}_") for name in own}
        return own.keys() <= there, len(stems & names), len(there & own.keys())

    best = max(likely, key=shared, default=None)
    return best if best is not None and any(shared(best)) else None


def nearest_model(file: FileTensors) -> Skeleton | None:
    """The one released model into which most layers of a file fit, though not all; None = there is none for more than
    half, or several."""
    shares: dict[str, float] = {}
    for arch in _likeliest(file):
        opened = file.opened(Naming(arch))
        for release in arch.releases:
            there = {c.saved_name: c for c in _layers(arch, skeleton(release.name))}
            fitting = sum(_fit(opened, name, there.get(name)) for name in opened.families)
            shares[release.name] = fitting / len(opened.families)
    best = sorted(shares, key=lambda name: -shares[name])[:2]
    clear = best and shares[best[0]] > max([0.5, *(shares[name] for name in best[1:])])
    return skeleton(best[0]) if clear else None


def _fit(file: AdapterFile, name: str, there: Candidate | None) -> bool:
    """Whether a layer of a file fits one of a model."""
    if there is None or name in file.unread:
        return False
    try:
        shape = there.geometry.weight_shape
        saved = file.layers[name] if name in file.layers else file.layer_of(name, shape)[0]
        return bool(saved.describe(there.geometry))
    except ValueError:
        return False


def fits(file: FileTensors, model: Skeleton) -> bool:
    """Whether layers of a file fit this model, and none does not."""
    arch = detect(model.unet)
    return bool(_fits(file.opened(Naming(arch)), arch, model))


def given_of(file: FileTensors, model: Skeleton, checkpoint: Path | None = None) -> Given:
    """A file as other programs meet it, beside its model.

    Args:
        model: that it is for.
        checkpoint: of that model, for errors that depend on the base weights; None = these are not known.
    """
    arch = detect(model.unet)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for c in _layers(arch, model):
        shapes.setdefault(c.part.name, {})[c.trainer_name] = c.geometry.weight_shape
    own = file.opened(Naming()).layers
    names = {f"{part.prefix}_{name}".replace(".", "_") for part in arch.parts for name in shapes.get(part.name, ())}
    base = BaseWeights([checkpoint], names) if checkpoint is not None and own.keys() <= names else None
    meant = {name.replace("/", "."): saved for name, saved in own.items()}
    return Given(file, file.metadata, arch, shapes, meant, base, file.settings)


def layers_of_model(arch: ArchSpec, model: Skeleton) -> dict[str, Layer]:
    """Saved name -> every layer of a model that has a weight."""
    parts = {part.name: part for part in arch.parts}
    return {
        c.saved_name: Layer(parts[c.part.name], c.trainer_name, c.saved_name, c.geometry.weight_shape)
        for c in _layers(arch, model)
    }


def _likeliest(file: FileTensors) -> list[ArchSpec]:
    """The architectures that have most of its layers; of them those of which its metadata speak, if there are any."""
    released = [arch for arch in ARCHS if arch.releases]
    counts = [_names_there(file, arch) for arch in released]
    most = max(counts)
    best = [arch for arch, count in zip(released, counts, strict=True) if count == most and count[0]]
    return [arch for arch in best if _is_said(arch, file.metadata)] or best


def _names_there(file: FileTensors, arch: ArchSpec) -> tuple[int, int]:
    """How many layers of a file an architecture has, and how many of them under the trainer's names."""
    prefixes = tuple(f"{part.prefix}_" for part in arch.text_encoders)
    own = layers_of(arch.releases[0].name)[1].keys()
    spoken = Naming(arch).shares(dotted.layers(file))
    there = [
        (path, found)
        for path, found in spoken.items()
        if all(share.name in own or (prefixes and share.name.startswith(prefixes)) for share in found)
    ]
    return len(there), sum(found[0].name == path for path, found in there)


def _is_said(arch: ArchSpec, metadata: Mapping[str, str]) -> bool:
    said = " ".join(plain(metadata.get(key, "")) for key in SAID)
    return any(plain(word) in said for word in (arch.name, arch.title, *(one.name for one in arch.releases)))


def _fitting(file: FileTensors, arch: ArchSpec) -> Skeleton | None:
    """The first release of an architecture whose layers have the shapes which a file needs."""
    opened = file.opened(Naming(arch))
    found = {}
    for release in arch.releases:
        model = skeleton(release.name)
        found[release.name] = _fits(opened, arch, model)
        if found[release.name] == len(opened.families):
            return model
    best = max(found, key=lambda name: found[name])
    return skeleton(best) if found[best] else None


def _fits(file: AdapterFile, arch: ArchSpec, model: Skeleton) -> int:
    """How many layers of a file fit a model; 0 if one does not."""
    there = {c.saved_name: c for c in _layers(arch, model)}
    try:
        layers = file.on(lambda name: there[name].geometry.weight_shape if name in there else None).layers
        fitting = [saved.describe(there[name].geometry) for name, saved in layers.items() if name in there]
    except ValueError:
        return 0
    return len(fitting)


def _layers(arch: ArchSpec, model: Skeleton) -> Iterator[Candidate]:
    """All layers that have a weight."""
    encoders: list[nn.Module | None] = [*model.text_encoders, *[None] * len(arch.text_encoders)]
    pairs = [*zip(arch.text_encoders, encoders, strict=False), (arch.denoiser, model.unet)]
    return (c for part, one in pairs if one is not None for c in candidates(part, one, norms=True))
