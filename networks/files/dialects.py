"""How programs write adapters, as data: names of the DoRA magnitude, encoding of alpha, flags of the whole file.

`codec` turns keys into layers and back by these records. A key without a dot belongs to the whole network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..archs import places as other_names
from ..archs.places import Target
from ..archs.spec import ArchSpec
from ..records import ALGORITHMS, AlgoSpec
from ..records.lora import LORA
from ..records.oft import BLOCKS, DIAG_OFT
from . import dotted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialect:
    """A way of writing.

    Attributes:
        name: of `save_format`.
        magnitude: suffix of the DoRA magnitude.
        flat: the magnitude is a vector, [O].
        rs_flag: key that says whether RS-LoRA layers have their own alpha, to be divided by sqrt(rank); "" = alpha is
            folded, so that alpha / rank is the scale.
        dora_flag: key that says whether there are magnitudes; "" = none.
        rank: (suffix, axis) where an RS-LoRA layer shows its rank.
        algos: algorithms that it can hold; none = all. With a program others are converted.
        dora_kinds: kinds of layer that can have a magnitude; none = all.
        dora_sides: where magnitudes can be.
        tucker: (algorithm, axes of the kernel) of which its program computes the Tucker form.
        prefixes: (beginning of a saved name, what stands for it in files).
        suffixes: (end of a key, what stands for it in files), where a layer has one such tensor.
        archs: architectures on which other programs read it; none = all.
        lacks: options that its files have no place for.
        whole: (key, suffix, suffix); in a file with that key, a layer with both suffixes has the scale
            alpha / longest side of the second, where all other programs know none.
        fold_flag: key that says that magnitudes of output rows are multiplied by ||W|| / ||W + s dW||, for readers that
            divide by the norm of the base weight alone; "" = they are as they act.
        program: whose layers it has, under the names which that program reads; "" = the trainers'.
        peft: keys have PEFT's suffixes, see `dotted`.
        settings: of PEFT, beside those which follow from the layers.
        folder: it is a folder beside the trainer's file, which stays in the portable form.
    """

    name: str
    magnitude: str
    flat: bool = False
    rs_flag: str = ""
    dora_flag: str = ""
    rank: tuple[str, int] = ("", 0)
    algos: tuple[str, ...] = ()
    dora_kinds: tuple[str, ...] = ()
    dora_sides: tuple[str, ...] = ("output", "input")
    tucker: tuple[tuple[str, int], ...] = ()
    fold_flag: str = ""
    program: str = ""
    peft: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    folder: bool = False
    prefixes: tuple[tuple[str, str], ...] = ()
    suffixes: tuple[tuple[str, str], ...] = ()
    archs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    whole: tuple[str, str, str] = ("", "", "")

    def written_name(self, name: str) -> str:
        """A saved name as its files have it."""
        own, written = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
        return written + name.removeprefix(own)

    def own_name(self, name: str) -> str:
        """The saved name that stands behind one in its files."""
        return _own_name(name, self.prefixes)

    def computes(self, spec: AlgoSpec, suffixes: Collection[str], axes: int) -> bool:
        """Whether its program computes layers in their own form.

        Args:
            spec: of their algorithm.
            suffixes: of their tensors.
            axes: of their kernel.
        """
        is_tucker = spec.keys.get(spec.core) in suffixes
        return spec.file_algo in self.algos and (not is_tucker or (spec.file_algo, axes) in self.tucker)

    def written_suffix(self, suffix: str) -> str:
        return dict(self.suffixes).get(suffix, suffix)

    def scaled(self, layer: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """The tensors of a layer in a file with the key of `whole`, with that scale multiplied in."""
        _, first, second = self.whole
        if first not in layer or second not in layer:
            return layer
        return {**layer, first: layer[first] * (alpha / max(layer[second].shape))}

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(key for key in (self.rs_flag, self.dora_flag, self.fold_flag) if key)


PORTABLE = Dialect("portable", "dora_scale")
BLISSFUL = Dialect(
    "blissful",
    "dora_layer.weight",
    flat=True,
    rs_flag="use_rslora_flag",
    dora_flag="use_dora_flag",
    rank=LORA.rank_shows[0],
    algos=(LORA.name,),
    dora_kinds=("Linear",),
    dora_sides=("output",),
    whole=("lokr_factor", "lokr_w1", "lokr_w2"),
)
COMFYUI = Dialect(
    "comfyui",
    "dora_scale",
    algos=("lora", "loha", "lokr", "glora", "full", "norm"),
    tucker=(("lora", 2), ("loha", 2)),
    fold_flag="use_folded_dora_flag",
    program=other_names.COMFYUI,
)
DIFFUSERS = Dialect(
    "diffusers", "dora_scale", algos=(LORA.name,), dora_sides=("output",), program=other_names.DIFFUSERS, peft=True
)
PEFT = replace(DIFFUSERS, name="peft", folder=True)
# What the modules networks.oft and networks.oft_flux of sd-scripts read and write.
OFT = Dialect(
    "oft",
    PORTABLE.magnitude,
    algos=(DIAG_OFT.name,),
    prefixes=(("lora_unet_", "oft_unet_"),),
    archs=("sd", "sdxl"),
    lacks=("rescaled", "train_on_input", "split_qkv"),
)
OFT_FLUX = replace(
    OFT,
    name="oft_flux",
    suffixes=((BLOCKS, f"{BLOCKS}.0"),),
    archs=("flux", "chroma"),
    lacks=("rescaled", "train_on_input"),
)
DIALECTS = {dialect.name: dialect for dialect in (PORTABLE, BLISSFUL, COMFYUI, DIFFUSERS, PEFT, OFT, OFT_FLUX)}
# Suffixes, in any dialect, of values of which what was learnt is a small part: bf16 rounds by up to 0.4 %, and 1 % of
# change may be all that there is.
MAGNITUDES = frozenset(
    {dialect.magnitude for dialect in DIALECTS.values()}
    | {written for written, own in dotted.SUFFIXES.items() if own == dotted.MAGNITUDE}
    | {spec.keys[name] for spec in ALGORITHMS.values() for name in spec.near_one}
)


def is_magnitude(key: str) -> bool:
    """Whether this is the key of a magnitude, or of factors near 1: a file has them in fp32 at least."""
    return any(key.endswith(f".{suffix}") for suffix in MAGNITUDES)


def own_name(name: str) -> str:
    """The saved name that stands behind one in a file of any dialect."""
    return _own_name(name, [pair for dialect in DIALECTS.values() for pair in dialect.prefixes])


def _own_name(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    own, written = next((pair for pair in prefixes if name.startswith(pair[1])), ("", ""))
    return own + name.removeprefix(written)


def own_suffixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer, likewise; a list of one tensor is that tensor."""
    own = {written: suffix for dialect in DIALECTS.values() for suffix, written in dialect.suffixes}
    alone = {suffix for suffix in own if suffix.removesuffix("0") + "1" not in tensors}
    return {own[suffix] if suffix in alone else suffix: tensor for suffix, tensor in tensors.items()}


def detect(keys: Iterable[str]) -> Dialect:
    """The dialect of a file's keys under the trainers' names, by its flags or by the name of its magnitudes."""
    found = set(keys)
    for dialect in (BLISSFUL, COMFYUI):
        named = any(key.partition(".")[2] == dialect.magnitude for key in found)
        if not found.isdisjoint(dialect.flags) or (named and dialect.magnitude != PORTABLE.magnitude):
            return dialect
    return PORTABLE


@dataclass(frozen=True)
class Flags:
    """What the keys of a file say about the whole of it.

    Attributes:
        rs_lora: whether alphas are to be divided by sqrt(rank); None = it says nothing.
        whole: it has the key of `Dialect.whole`.
        suspicious: how many of its alphas are the square root of their rank, and how many there are.
    """

    dialect: Dialect
    rs_lora: bool | None
    whole: bool
    suspicious: tuple[int, int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Flags:
        dialect = detect(tensors)
        rs_lora = bool(tensors[dialect.rs_flag]) if dialect.rs_flag in tensors else None
        return cls(dialect, rs_lora, dialect.whole[0] in tensors, _alphas_of_roots(tensors))


@dataclass(frozen=True)
class FileFormat:
    """What the files of one network are like.

    Attributes:
        rs_lora: whether alpha stays as the user wrote it, under the flag; only in a dialect with that flag.
        dims: of further files beside each, with the first ranks alone.
        arch: of its model, whose names files may have in several spellings.
        targets: layers of the dialect's program.
        also: forms of further files beside each.
    """

    dialect: Dialect = PORTABLE
    rs_lora: bool = False
    dims: tuple[int, ...] = ()
    arch: ArchSpec | None = None
    targets: tuple[Target, ...] = ()
    also: tuple[FileFormat, ...] = ()

    def alpha(self, alpha: float, rank: int | None) -> float:
        """The alpha to be written, for one that would be right for alpha / rank."""
        return alpha / math.sqrt(rank) if self.dialect.rs_flag and self.rs_lora and rank else alpha

    def network_keys(self, magnitudes: bool) -> dict[str, Tensor]:
        """The flags, 0-d floats: they follow the layers' keys in a file, whose first key some programs look at."""
        values = {self.dialect.rs_flag: self.rs_lora, self.dialect.dora_flag: magnitudes}
        if magnitudes:
            values[self.dialect.fold_flag] = True
        return {key: torch.tensor(float(value)) for key, value in values.items() if key}

    def check(self, flags: Flags, metadata: Mapping[str, str], source: str) -> None:
        """Compare what a file says of RS-LoRA with what this network is.

        A file which says nothing is held to the network's own dialect; one of ours without flags needs none.

        Raises:
            ValueError: they differ.
        """
        plain = metadata.get("networks_dialect") in (PORTABLE.name, COMFYUI.name, DIFFUSERS.name, PEFT.name)
        hint = _hint(flags) if flags.suspicious[0] * 2 > flags.suspicious[1] else ""
        if not flags.dialect.rs_flag and (plain or not self.dialect.rs_flag):
            if hint and self.rs_lora and "networks_dialect" not in metadata:
                log.warning("%s: %s; it is read as alpha / rank", source, hint)
        elif bool(flags.rs_lora) != self.rs_lora:
            raise ValueError(rs_lora_differs(flags, self.rs_lora, source, hint))


def rs_lora_differs(flags: Flags, wanted: bool, source: str, hint: str = "") -> str:
    """Message.

    Args:
        flags: of the file.
        wanted: use_rslora of the network.
        source: name of the file.
        hint: what else speaks for RS-LoRA there; "" = nothing.
    """
    says = "nothing of RS-LoRA" if flags.rs_lora is None else f"{flags.dialect.rs_flag} = {flags.rs_lora}"
    more = f". Hint: {hint}" if hint and flags.rs_lora is None else ""
    return (
        f"RS-LoRA flag mismatch: {source} says {says}, this network has use_rslora={wanted}; give "
        f"use_rslora={bool(flags.rs_lora)}, as it was trained{more}"
    )


def _alphas_of_roots(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(alphas that are sqrt(rank), all alphas). Files in bf16 round them, by up to 0.4 %."""
    found = total = 0
    for key, alpha in tensors.items():
        down = tensors.get(f"{key.removesuffix('.alpha')}.{dotted.DOWN}")
        if key.endswith(".alpha") and down is not None and down.dim():
            total += 1
            found += math.isclose(float(alpha), math.sqrt(down.shape[0]), rel_tol=4e-3, abs_tol=0.01)
    return found, total


def _hint(flags: Flags) -> str:
    found, total = flags.suspicious
    return f"{found} of {total} alphas are the square root of their rank, as RS-LoRA with alpha=0 saves them"
