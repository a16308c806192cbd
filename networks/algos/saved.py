"""What an adapter is as data: its layout before any tensor exists, and the tensors of a layer in a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Count = Callable[[Tensor], int]  # how many of the singular values of a change, the largest first, are kept


@dataclass(frozen=True)
class Layout:
    """What an adapter would consist of, before any tensor exists.

    Attributes:
        shapes: parameter name -> shape, `scalar` (0-d) included.
        rank: the rank that alpha is divided by; None if the form has none (its scale is then 1).
        rank_axis: whether there is a rank activation, on which dropouts can act.
        stacked: how many adapters of that rank a file holds as one.
    """

    shapes: dict[str, tuple[int, ...]]
    rank: int | None
    rank_axis: bool
    stacked: int = 1

    @property
    def saved_rank(self) -> int | None:
        """The rank that readers of the file see, and divide its alpha by."""
        return None if self.rank is None else self.rank * self.stacked

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def count(self, names: Collection[str]) -> int:
        """How many of the values belong to parameters of these names, in all parts."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name.rpartition(".")[2] in names)


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Saved tensors against those that are wanted. 1x1 convolutions and Linears may stand for each other.

    Args:
        own: suffix -> tensor of the wanted shape.
        tensors: suffix -> tensor of a file.

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


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """[sum of O, sum of R, ...] with the blocks [O, R, ...] along the diagonal of its first two axes, in the widest of
    their dtypes."""
    dtype = functools.reduce(torch.promote_types, (block.dtype for block in blocks))
    sizes = [sum(block.shape[axis] for block in blocks) for axis in (0, 1)]
    found, row, column = blocks[0].new_zeros(*sizes, *blocks[0].shape[2:], dtype=dtype), 0, 0
    for block in blocks:
        found[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return found


def there(packs: Sequence[Mapping[str, Tensor] | None]) -> list[Mapping[str, Tensor]]:
    """Those of the parts of a layer that something changes."""
    return [pack for pack in packs if pack is not None]


def each(packs: Sequence[Mapping[str, Tensor] | None], suffix: str) -> list[Tensor | None]:
    """One tensor of each part; None where it has none."""
    return [None if pack is None else pack.get(suffix) for pack in packs]


def alike(packs: Sequence[Mapping[str, Tensor]], suffixes: Iterable[str]) -> bool:
    """Whether the tensors under these suffixes are the same in all of them, bit for bit, or missing in all."""
    first, *rest = packs
    return all(
        (key in first) == (key in one) and (key not in first or torch.equal(first[key], one[key]))
        for key in suffixes
        for one in rest
    )


def kept_ranks(left: Tensor, start: int, stop: int) -> Tensor | None:
    """Numbers of the ranks that some output rows have, where others are other rows' alone; None = all ranks stay.

    Args:
        left: the factor with the rows, [O, R].
        start, stop: the rows.
    """
    own = left[start:stop].any(0)
    idle = left.any(0) & ~own
    return None if not bool(idle.any()) or not bool(own.any()) else torch.nonzero(~idle).flatten()


def with_ranks(own: Tensor, start: Tensor, parts: int = 1, still: bool = False) -> Tensor:
    """A saved tensor of a higher rank, in which this one is.

    Args:
        own: [A, B, ...].
        start: [A', B', ...], each as A and B or longer: what the new ranks are.
        parts: of which it is a stack; the new ranks are behind those of each.
        still: the new ranks are 0.
    """
    sizes = [*zip(own.shape[:2], start.shape[:2], strict=False)]
    if all(old == new for old, new in sizes) or any(old > new for old, new in sizes):
        return own
    found = start.reshape(*start.shape[:2], *own.shape[2:]).to(own.device, wide_dtype(own)) * (not still)
    rows, columns = (_places(old, new, parts).to(own.device) for old, new in sizes)
    if all(old < new for old, new in sizes):  # a core, in which old and new ones do not mix yet
        found[rows], found[:, columns] = 0, 0
    found[rows[:, None], columns] = own.to(found)
    return found.to(own.dtype)


def _places(old: int, new: int, parts: int) -> Tensor:
    """Where the entries of an axis are in a longer one."""
    return torch.arange(new).reshape(parts, -1)[:, : old // parts].flatten() if old < new else torch.arange(old)


def blocks_of(up_OR: Tensor) -> int:
    """Of how many parts a factor is the block-diagonal stack: the most for which every block has values of its own."""
    O, R = up_OR.shape
    for n in range(min(O, R), 1, -1):
        if R % n:
            continue
        rows = [used.nonzero().flatten().tolist() for used in up_OR.reshape(O, n, -1).ne(0).any(-1).T]
        if all(rows) and all(above[-1] < below[0] for above, below in zip(rows, rows[1:], strict=False)):
            return n
    return 1


def concatenated(parts: Sequence[Tensor | None], sizes: Sequence[int], axis: int = 0, rest: float = 0.0) -> Tensor:
    """Tensors with one value for each output row along an axis, one after the other.

    Args:
        parts: not all None.
        sizes: rows of each.
        axis: the rows'.
        rest: all values of a part that is None.
    """
    like = next(part for part in parts if part is not None)
    shapes = [[*like.shape[:axis], size, *like.shape[axis + 1 :]] for size in sizes]
    filled = [like.new_full(shape, rest) if t is None else t for t, shape in zip(parts, shapes, strict=True)]
    return torch.cat(filled, axis)


def unstack_diagonal(name: str, stacked: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The blocks [size, R, ...] of a block-diagonal [sum of sizes, n R, ...].

    Args:
        name: of the tensor, for messages.
        stacked: the block-diagonal one.
        sizes: rows of the n blocks.

    Raises:
        ValueError: it has another shape, or something outside its blocks.
    """
    n = len(sizes)
    if stacked.shape[0] != sum(sizes) or stacked.shape[1] % n:
        raise ValueError(f"{name} {tuple(stacked.shape)} is no stack of {n} parts with {tuple(sizes)} rows")
    columns = stacked.shape[1] // n
    blocks = [rows[:, i * columns : (i + 1) * columns] for i, rows in enumerate(stacked.split(list(sizes)))]
    if stacked.is_meta or sum(int(block.count_nonzero()) for block in blocks) != int(stacked.count_nonzero()):
        raise ValueError(f"{name} mixes the parts of its layer: it was trained without split_qkv")
    return blocks


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 after the second."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Its own, of fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
