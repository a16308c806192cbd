"""How the parameters of an algorithm are saved: names, shapes, and what can be told from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tensors.geometry import Geometry


@dataclass(frozen=True)
class Layout:
    """What an adapter would consist of, before any tensor exists.

    Attributes:
        shapes: parameter name -> shape, `scalar` (0-d) included.
        rank: the rank that alpha is divided by; None if the form has none (its scale is then 1).
        rank_axis: whether there is a rank activation, on which dropouts can act.
        stacked: how many adapters of that rank a file holds as one.
        frozen: how many of the values are never trained.
    """

    shapes: dict[str, tuple[int, ...]]
    rank: int | None
    rank_axis: bool
    stacked: int = 1
    frozen: int = 0

    @property
    def saved_rank(self) -> int | None:
        """The rank that readers of the file see, and divide its alpha by."""
        return None if self.rank is None else self.rank * self.stacked

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Resized:
    """Saved tensors with fewer ranks.

    Attributes:
        ranks: before and after; with the nearest update both keep their scale, with the first ranks their alpha.
        lost, whole: squared norms of what is left out of the nearest update, and of the whole.
    """

    tensors: dict[str, Tensor]
    ranks: tuple[int, int]
    lost: float = 0.0
    whole: float = 0.0


class SavedForm(nn.Module):
    """The side of an algorithm that files see."""

    algo: ClassVar[str]
    plus: ClassVar[frozenset[str]]  # parameters which LoRA+ (2402.12354) trains faster
    keys: ClassVar[dict[str, str]]  # parameter -> suffix in a file
    more_keys: ClassVar[frozenset[str]] = frozenset()  # suffixes of what else its files can have
    required: ClassVar[tuple[frozenset[str], ...]]  # one of these sets of suffixes marks the algorithm
    fold: ClassVar[tuple[str, ...]]  # the first of these that exists takes up the learnt scalar at save
    saved_as: ClassVar[str] = ""  # the algorithm whose files these are, if it is not this one
    bias_key: ClassVar[str] = ""  # suffix of the change of the layer's bias, where a file can have one
    saves_alpha: ClassVar[bool] = True  # whether readers expect one
    rank_shows: ClassVar[tuple[tuple[str, int], ...]] = ()  # (suffix, axis): the first that a file has is the rank
    near_one: ClassVar[frozenset[str]] = frozenset()  # parameters that a file holds as factors near 1
    peft_type: ClassVar[str] = ""  # in PEFT's adapter_config.json, where its files cannot be read alike without
    peft_keys: ClassVar[Mapping[str, str]] = {}  # suffix in a file of PEFT -> what stands for it in that of any program

    plus_unit: float = 1.0  # what a plus parameter of this adapter counts for; dW is linear in each of them
    scalar: nn.Parameter | None

    def fold_plus_(self, unit: float) -> None:
        """LoRA+ in the parametrisation: from now on a plus parameter holds its value / unit, so that a step of an
        optimizer moves it by `unit` times as much. The layer's strength makes up for it."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.plus:
                    p.mul_(self.plus_unit / unit)
        self.plus_unit = unit

    @classmethod
    def form(cls) -> str:
        """The algorithm whose saved keys it has."""
        return cls.saved_as or cls.algo

    @classmethod
    def recognises(cls, suffixes: set[str]) -> bool:
        return any(marks <= suffixes for marks in cls.required)

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors under its suffixes are its own, where several algorithms share the names."""
        return True

    @classmethod
    def knows(cls, suffix: str) -> bool:
        """Whether its files have such tensors."""
        return suffix in cls.keys.values() or suffix in cls.more_keys

    @classmethod
    def readers(cls, options: Mapping[str, Any]) -> str:
        """What a user should know of the programs that read its files; "" where all of them do, and alike."""
        return ""

    @classmethod
    def rows_of_parts(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """Output rows of the parts that have adapters of their own in a file, () for none; None where tensors of
        `stack` do not show them."""
        return None

    @classmethod
    def shown_rank(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """The rank that readers of these saved tensors divide alpha by; None if there is none."""
        return next((tensors[suffix].shape[axis] for suffix, axis in cls.rank_shows if suffix in tensors), None)

    @classmethod
    def with_scale(cls, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Saved tensors with the alpha for this scale; without a rank it goes into a factor, if there is one."""
        rank = cls.shown_rank(tensors)
        if rank is not None:
            return {**tensors, "alpha": torch.tensor(scale * rank)}
        factors = [cls.keys[name] for name in cls.fold if cls.keys[name] in tensors][:1]
        return {**tensors, **{key: tensors[key].to(_wide(tensors[key])) * scale for key in factors}}

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        """A layer of any program's file as our own files would have it: scale = alpha / rank."""
        return tensors, alpha

    @classmethod
    def of_peft(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A layer of a file of PEFT, under `peft_keys`, with what its adapter_config.json says.

        Raises:
            ValueError: that makes no sense.
        """
        return tensors

    @classmethod
    def assumed(cls, tensors: Mapping[str, Tensor]) -> str:
        """What is taken for granted of a layer that programs write in several ways, for the log; "" if nothing is."""
        return ""

    def pack(self) -> dict[str, Tensor]:
        """Saved suffix -> tensor. The scalar goes into one factor: no reader knows it."""
        tensors = {name: p.detach() for name, p in self.named_parameters() if name != "scalar"}
        if self.plus_unit != 1:
            tensors = {name: t * self.plus_unit if name in self.plus else t for name, t in tensors.items()}
        if self.scalar is not None:
            name = next(name for name in self.fold if name in tensors)
            tensors[name] = tensors[name] * self.scalar.detach()
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Saved tensors of the layer whose parts, from the first output row down, have these, with split_qkv."""
        raise NotImplementedError

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The inverse of `stack` for parts of these output sizes.

        Raises:
            ValueError: the tensors are no such stack.
        """
        raise NotImplementedError

    @classmethod
    def first_ranks(cls, tensors: Mapping[str, Tensor], dim: int) -> Resized:
        """The first `dim` ranks (of each part, in a stack): what DyLoRA trains to stand alone.

        Raises:
            ValueError: no ranks of this form stand alone.
        """
        raise ValueError(f"{cls.algo} has no ranks that could stand alone")

    @classmethod
    def nearest(cls, tensors: Mapping[str, Tensor], dim: int) -> Resized:
        """The nearest update of rank `dim`.

        Raises:
            ValueError: it has not this algorithm's form.
        """
        raise ValueError(f"the nearest update of a lower rank is no {cls.algo}")

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        """(dim, options) under which `layout` gives the shapes of these saved tensors.

        Raises:
            ValueError: they do not fit the layer.
        """
        raise NotImplementedError

    def fits(self, tensors: Mapping[str, Tensor]) -> None:
        """Check saved tensors against this adapter. 1x1 convolutions and Linears may stand for each other.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        check_tensors(self._by_suffix(), tensors)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved tensors.

        Raises:
            ValueError: they do not fit; nothing was changed.
        """
        self.fits(tensors)
        with torch.no_grad():
            for suffix, p in self._by_suffix().items():
                p.copy_(tensors[suffix].reshape(p.shape))
            unit, self.plus_unit = self.plus_unit, 1.0
            self.fold_plus_(unit)
            if self.scalar is not None:
                self.scalar.fill_(1.0)

    def _by_suffix(self) -> dict[str, nn.Parameter]:
        return {self.keys[name]: p for name, p in self.named_parameters() if name != "scalar"}


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Saved tensors against those that are wanted. 1x1 convolutions and Linears may stand for each other.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    if own.keys() != tensors.keys():
        raise ValueError(f"the file has {', '.join(sorted(tensors))}; this network wants {', '.join(sorted(own))}")
    for suffix, p in own.items():
        if not tensors[suffix].is_floating_point():
            raise ValueError(f"{suffix} is of type {tensors[suffix].dtype}, not floating point")
        if _squeezed(tensors[suffix].shape) != _squeezed(p.shape):
            raise ValueError(f"{suffix} is {tuple(tensors[suffix].shape)}, this network wants {tuple(p.shape)}")


def unstack_diagonal(name: str, stacked: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The blocks [size, R, ...] of a block-diagonal [sum of sizes, n R, ...].

    Raises:
        ValueError: it has another shape, or something outside its blocks.
    """
    n = len(sizes)
    if stacked.shape[0] != sum(sizes) or stacked.shape[1] % n:
        raise ValueError(f"{name} {tuple(stacked.shape)} is no stack of {n} parts with {tuple(sizes)} rows")
    columns = stacked.shape[1] // n
    blocks = [rows[:, i * columns : (i + 1) * columns] for i, rows in enumerate(stacked.split(list(sizes)))]
    if sum(int(block.count_nonzero()) for block in blocks) != int(stacked.count_nonzero()):
        raise ValueError(f"{name} mixes the parts of its layer: it was trained without split_qkv")
    return blocks


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 after the second."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
