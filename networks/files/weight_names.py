"""Which weights of a checkpoint a saved name speaks of, from keys alone: no model is built.

A checkpoint may have the trainer's names, diffusers' or the original release's, below one of several prefixes; the
architecture records know the first three, this file the prefixes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..archs import ARCHS
from ..archs.spec import Part

# Prefix of a key -> prefix of the saved names of what stands below it; "" = any. Longer ones first.
ROOTS = (
    ("model.diffusion_model.", "lora_unet"),
    ("conditioner.embedders.0.transformer.", "lora_te1"),
    ("cond_stage_model.transformer.", "lora_te"),
    ("text_encoders.clip_l.transformer.", "lora_te1"),
    ("text_encoders.clip_g.transformer.", "lora_te2"),
    ("text_encoders.t5xxl.transformer.", "lora_te3"),
    ("diffusion_model.", "lora_unet"),
    ("transformer.", "lora_unet"),
    ("unet.", "lora_unet"),
    ("net.", "lora_unet"),
    ("model.", ""),
    ("", ""),
)
_PARTS: tuple[Part, ...] = tuple(part for arch in ARCHS for part in arch.parts)
PREFIXES = tuple(dict.fromkeys(part.prefix for part in _PARTS))


# Below these are models that are no denoiser, whatever they are called there.
OTHERS = ("conditioner.", "cond_stage_model.", "text_encoders.", "text_encoder.", "text_encoder_2.", "te1.", "te2.")


def held(keys: Collection[str]) -> set[str]:
    """Prefixes of the saved names of all that a checkpoint may hold beside what is found in it: its encoders, whichever
    names they have there."""
    encoders = any(key.startswith(OTHERS) for key in keys)
    return {part.prefix for arch in ARCHS for part in arch.text_encoders} if encoders else set()


@dataclass(frozen=True)
class Target:
    """The weights that are one layer for an adapter.

    Attributes:
        keys: in the order of the layer's output rows; several where a checkpoint divides what the trainer has fused.
        swapped: the one weight has its two halves of rows in the other order, if it has twice as many as columns.
    """

    keys: tuple[str, ...]
    swapped: bool = False

    @property
    def bias_keys(self) -> tuple[str, ...]:
        return tuple(f"{stem_of(key)}.bias" for key in self.keys)


def stem_of(key: str) -> str:
    """The layer of a weight's key; "" for keys of anything else. Some RMSNorms call their weight `scale`."""
    stem, _, last = key.rpartition(".")
    return stem if last in ("weight", "scale") else ""


def find(keys: Iterable[str], names: Collection[str], prefix: str = "") -> dict[str, Target]:
    """Saved name -> weights, for those of `names` that the keys of a checkpoint have.

    Args:
        prefix: only names with this prefix, where the keys of a text encoder fit several.

    Raises:
        ValueError: a weight fits the names of several models, and no prefix says which.
    """
    wanted = {name for name in names if not prefix or name.startswith(f"{prefix}_")}
    pieces: dict[str, dict[int, str]] = {}
    records: dict[str, _Name] = {}
    for key in keys:
        found = [one for one in _names_of(stem_of(key)) if one.name in wanted] if stem_of(key) else []
        models = {model for one in found for model in PREFIXES if one.name.startswith(f"{model}_")}
        if len(models) > 1:
            raise ValueError(
                f"{key} may belong to {' or '.join(sorted(models))}: say which model this checkpoint is, "
                f"with --prefix {sorted(models)[0]}"
            )
        if found:
            pieces.setdefault(found[0].name, {})[found[0].position] = key
            records[found[0].name] = found[0]
    return {
        name: Target(tuple(parts[i] for i in range(records[name].count)), records[name].swapped)
        for name, parts in pieces.items()
        if len(parts) == records[name].count
    }


def all_names(keys: Iterable[str]) -> set[str]:
    """Every saved name that some adapter may have for these weights, to look for near ones."""
    return {one.name for key in keys if stem_of(key) for one in _names_of(stem_of(key))}


@dataclass(frozen=True)
class _Name:
    """A saved name that a weight may have, and its place there, see archs.spec.Rename."""

    name: str
    position: int = 0
    count: int = 1
    swapped: bool = False


def _names_of(path: str) -> Iterator[_Name]:
    """The likeliest first."""
    for root, model in ROOTS:
        if not path.startswith(root):
            continue
        dotted = path[len(root) :]
        for part in _PARTS:
            if model in ("", part.prefix):
                yield from _names_in(part, dotted)
        if root not in ("", "model."):
            return


def _names_in(part: Part, dotted: str) -> Iterator[_Name]:
    flat = f"{part.prefix}_{dotted}".replace(".", "_")
    yield _Name(flat)
    for old, new in part.release:
        if dotted.startswith(old):
            yield _Name(f"{part.prefix}_{new}{dotted[len(old) :]}".replace(".", "_"))
    saved, layout = part.saved_name(dotted), part.layout_of(dotted)
    if layout is not None:
        yield _Name(saved, layout.position, layout.count, layout.swapped)
    elif saved != flat:
        yield _Name(saved)
