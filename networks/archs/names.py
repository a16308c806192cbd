"""What the name of a layer in an adapter file says: which of the trainer's layers it is, or which rows of one.

One table for all programs, made of the records: the trainer's own names, those of diffusers, of the original release,
of ComfyUI and of further layouts, dotted or with underscores for the dots, behind any of the beginnings that programs
write before them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .spec import ArchSpec, Part
from .spellings import Rename, Spelling, Swap

PEFT = "base_model.model."  # before the names of layers in its files, and behind the name of a component
# What stands before the names of a denoiser's layers, beside its prefix in saved names and what does in checkpoints.
DENOISER = (
    "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lycoris_", "lora_transformer_",
    "lora_unet.", "lycoris.", "lora_transformer.",  # OneTrainer, before its conversion
    "pipe.dit.", "dit.",  # DiffSynth, UniAnimate
    "default.",
)  # fmt: skip
_SAVED = re.compile(r"lora_[a-z]+\d*_.+")  # a saved name of a part which an architecture may not have


@dataclass(frozen=True)
class Share:
    """One of the trainer's layers, or rows of one.

    Attributes:
        name: its saved name.
        position, count, span: of the `count` projections that are that layer: the first which this one is, from the
            first row down, and how many; count 1 = all rows.
        piece, shares, pieces: where this is a layer for several of the trainer's: the first of its `pieces` equal
            shares of rows that are this one, and how many are; pieces 1 = all rows.
        swapped: whether its halves of rows are in the other order.
    """

    name: str
    position: int = 0
    count: int = 1
    span: int = 1
    piece: int = 0
    shares: int = 1
    pieces: int = 1
    swapped: Swap = Swap.NEVER

    @property
    def places(self) -> range:
        """The projections that it is."""
        return range(self.position, self.position + self.span)

    @property
    def whole(self) -> bool:
        """Whether it is a layer of the trainer's as it stands."""
        return self.count == self.pieces == 1 and self.swapped is Swap.NEVER


@dataclass(frozen=True)
class _Found:
    """A name without its beginning, with underscores for its dots; None = of a part that this architecture has not."""

    part: Part | None
    rest: str


def shares(paths: Collection[str], arch: ArchSpec) -> dict[str, tuple[Share, ...]]:
    """The trainer's layers behind the names of a file: several where it has one for them, in the order of the rows.

    A name that several programs have, for different layers, is read as the rest of the file shows that it is spelt. All
    are compared with underscores for their dots: some converters make dots of all underscores.

    Args:
        paths: names of layers, without suffixes; all of a file.
        arch: of the model.
    """
    found = {path: _locate(path, arch) for path in paths}
    names: dict[Part | None, list[str]] = {}
    for one in found.values():
        names.setdefault(one.part, []).append(one.rest)
    used = {part: _used(part, rests) for part, rests in names.items()}
    return {path: _read(one, used[one.part]) for path, one in found.items()}


def row_sizes(arch: ArchSpec, name: str, rows: int, columns: int, count: int) -> tuple[int, ...]:
    """Output rows of the projections that are one of the trainer's layers.

    Args:
        arch: of the model.
        name: the layer's saved name.
        rows, columns: its output and input features.
        count: how many there are.

    Raises:
        ValueError: it has no such projections.
    """
    for one in arch.fused_rows if count > 1 else ():
        flat = one.pattern.replace(r"\.", "_")
        if re.fullmatch(f"{arch.denoiser.prefix}_(?:{flat})", name):
            sizes = one.sizes(rows, columns)
            if len(sizes) == count:
                return sizes
    if rows % count:
        raise ValueError(f"{name}: its {rows} rows cannot be divided into {count} projections")
    return (rows // count,) * count


def nearest_layout(paths: Collection[str], archs: Iterable[ArchSpec]) -> str:
    """In words, whose names of which architecture most of these are: `diffusers' names of FLUX.1`; "" if nobody's."""
    counts = Counter[str]()
    for arch in archs:
        found = [_locate(path, arch) for path in paths]
        for title, spelling in arch.denoiser.layouts_by_title:
            rests = [one.rest for one in found if one.part is arch.denoiser]
            counts[f"names of {arch.title} as {title} has them"] = sum(map(bool, map(spelling.flat.of, rests)))
    best = counts.most_common(1)
    return best[0][0] if best and 2 * best[0][1] > len(paths) else ""


def _locate(path: str, arch: ArchSpec) -> _Found:
    """The part that a name speaks of; the denoiser where nothing says."""
    path = path.removeprefix(PEFT)
    if arch.denoiser.tops and path.startswith(arch.denoiser.tops):
        return _Found(arch.denoiser, path.replace(".", "_"))
    for root, part in _roots(arch):
        if path.startswith(root) and len(path) > len(root):
            rest = path[len(root) :].removeprefix(PEFT)
            return _Found(part, rest.strip("_").replace(".", "_"))
    return _Found(None if _SAVED.fullmatch(path) else arch.denoiser, path.replace(".", "_"))


@functools.lru_cache
def _roots(arch: ArchSpec) -> tuple[tuple[str, Part], ...]:
    """What stands before names of layers, and the part which it tells; the longest first."""
    found: dict[str, Part] = {}
    for part in arch.parts:  # what a record says goes before what is usual
        found |= {root: part for root in part.file_roots if root not in found}
    for part in arch.text_encoders:
        named = (f"{part.diffusers}.",) if part.diffusers else ()
        for root in (f"{part.prefix}_", *named, *filter(None, part.roots)):
            found.setdefault(root, part)
    denoiser = arch.denoiser
    for root in (f"{denoiser.prefix}_", *DENOISER, *filter(None, denoiser.roots)):
        found.setdefault(root, denoiser)
    return tuple(sorted(found.items(), key=lambda pair: -len(pair[0])))


def _used(part: Part | None, names: Collection[str]) -> tuple[Spelling, ...]:
    """The spellings of a part which some name shows to be those of the file."""
    spellings = () if part is None else part.spellings
    return tuple(one.flat for one in spellings if any(map(one.flat.marks, names)))


def _read(found: _Found, used: Collection[Spelling]) -> tuple[Share, ...]:
    if found.part is None:
        return (Share(found.rest),)
    known = (one.of(found.rest) for one in used)
    renames = next(filter(None, known), (Rename(found.rest, found.rest),))
    return tuple(_share(found.part, one) for one in renames)


def _share(part: Part, one: Rename) -> Share:
    return Share(
        f"{part.prefix}_{one.trainer}",
        one.position,
        one.count,
        one.span,
        one.piece,
        one.shares,
        one.pieces,
        one.swapped,
    )
