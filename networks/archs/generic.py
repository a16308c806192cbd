"""The record of a model that no file here knows, from its module tree: its repeated blocks, names as its modules'."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .spec import ArchSpec, BlockAxis, Part, Timestep

LISTS = {"ModuleList", "Sequential"}
SHARE = 0.1  # of the largest kind of block; smaller ones prepare inputs or outputs


@dataclass(frozen=True)
class Row:
    """The blocks of one class in a list of modules.

    Attributes:
        path: of the list.
        cls: of the blocks.
        matrices: how many parameters of theirs are those of matrices and of convolutions without a kernel.
        parameters: how many there are in all.
    """

    path: str
    cls: str
    matrices: int
    parameters: int


def record_of(model: Any) -> ArchSpec:
    """Trained is what the largest blocks hold, and other ones with a tenth of their parameters at least: where double
    blocks are the largest, single ones are as well. A model without blocks is one.

    Args:
        model: any nn.Module, without wrappers.
    """
    title, rows = type(model).__name__, [*_rows(model, "")]
    by_matrices = _largest([(row.cls, row.matrices) for row in rows])
    by_all = _largest([(row.cls, row.parameters) for row in rows])
    containers = by_matrices or by_all or (title,)
    blocks = [row for row in rows if row.cls in containers]
    convolutional = tuple(cls for cls in by_all if cls not in containers)
    tops = tuple(f"{name}." for name in _children(model))
    part = Part("model", "lora_unet", containers, convolutional, tops=tops)
    return ArchSpec(
        name="generic",
        title=title,
        entry="lora",
        signatures=(),
        denoiser=part,
        timestep=Timestep(()),
        axes=tuple(BlockAxis(f"{path}.", None) for path in dict.fromkeys(row.path for row in blocks)),
        note=_told(title, part, bool(blocks)),
    )


def _told(title: str, part: Part, has_blocks: bool) -> str:
    where = f"in its repeated blocks ({', '.join(part.containers)})" if has_blocks else "of it, as it has no blocks,"
    return (
        f"no record knows {title}: every Linear {where} is trained, named as its module; for other layers give a "
        "preset with unet_target_module=[CLASSES] or unet_target_name=[PATTERNS], for fewer exclude_patterns"
    )


def _largest(sizes: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """The classes with most of something, the most first."""
    totals: dict[str, int] = {}
    for cls, size in sizes:
        totals[cls] = totals.get(cls, 0) + size
    least = SHARE * max(totals.values(), default=0)
    return tuple(sorted((cls for cls, size in totals.items() if size and size >= least), key=lambda cls: -totals[cls]))


def _rows(module: Any, path: str) -> Iterator[Row]:
    """The outermost lists of blocks of one class. In a list of several classes, as UNets have their levels in, those
    inside its blocks count, and a block without any counts itself."""
    children = _children(module)
    listed = _is_list(module)
    blocks = [child for child in children.values() if _children(child)] if listed else []
    classes = {type(block).__name__ for block in blocks}
    if len(classes) == 1 and not _is_list(blocks[0]):
        yield _row(path, blocks)
        return
    for name, child in children.items():
        inside = [*_rows(child, f"{path}.{name}" if path else name)]
        yield from inside or ([_row(path, [child])] if child in blocks and not _is_list(child) else [])


def _row(path: str, blocks: Sequence[Any]) -> Row:
    shapes = [tuple(p.shape) for block in blocks for p in block.parameters()]
    flat = [shape for shape in shapes if len(shape) > 1 and math.prod(shape[2:]) == 1]
    return Row(path, type(blocks[0]).__name__, sum(map(math.prod, flat)), sum(map(math.prod, shapes)))


def _is_list(module: Any) -> bool:
    return not LISTS.isdisjoint(cls.__name__ for cls in type(module).__mro__)


def _children(module: Any) -> Mapping[str, Any]:
    """By name, without the wrappers of compiled blocks."""
    return {name: getattr(child, "_orig_mod", child) for name, child in module.named_children()}
