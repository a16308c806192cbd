"""Diagonal OFT: rotations of blocks of features (2306.07280), of the output, or of the input as in OFT v2 (2506.19847).

    Q_n = B_n - B_n^T        R_n = (1 + Q_n)(1 - Q_n)^-1
    W'_n = r_n R_n^T W_n                for each block n of rows, or
    W'_n = W_n R_n, y = base(R x)       for each block n of columns, with train_on_input

On the input side R_n is cut off to 1 + 2 Q_n + 2 Q_n^2 + 2 Q_n^3 + Q_n^4, as in the programs that read its files.

The block size is the smaller of the two factors of O (or I) next to dim (tensors.factor); with `dim_is_count` there
are as many blocks as the largest divisor of O (or I) up to dim.
`constraint` limits the norm of all Q together to constraint * O, or I (0 = none); a file holds it as alpha. With
`rescaled` every row has a factor r, too.

Parameters (saved as oft_blocks, rescale = r; those of the input side as `oft_input` has it)
    blocks          [N, B, B]         start: 0
    rescale_change  [O, 1, 1..], r - 1, with rescaled only         start: 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..records.oft import BLOCKS, CHANGE, DIAG_OFT, RESCALE
from ..tensors.factor import factorization
from ..tensors.fused import Call, OverBase
from ..tensors.fused_rotation import cayley_less_identity, turned_over_base
from ..tensors.geometry import Geometry, RowRanges
from ..tensors.rotation import apply_blocks, generator, rotation_less_identity
from . import oft_input
from .multiplicative import Multiplicative, alike_inputs
from .saved import Layout, concatenated, each, there

TERMS = "terms"  # in a live state of the input side: of the series, 0 = the whole transform


class Rotation(Multiplicative):
    """What both kinds of orthogonal fine-tuning share: blocks, a constraint, factors by row."""

    blocks: nn.Parameter
    rescale_change: nn.Parameter  # from 1: half precision holds no small change of the 1 itself

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    @property
    def features_of_side(self) -> int:
        """O, or I where the input is rotated."""
        return _features(self.geometry, self.side)

    @property
    def limit(self) -> float:
        return float(self.chosen.get("constraint") or 0.0) * self.features_of_side

    def with_rows(self, less_NBB: Tensor, rows: Tensor | None = None) -> Tensor:
        """r T - 1 for the blocks of T - 1, with r - 1 of these rows, or of all in order."""
        if CHANGE not in self.laid_out.shapes:
            return less_NBB
        c = (self.rescale_change.flatten() if rows is None else rows).reshape(*less_NBB.shape[:2], 1)
        return less_NBB + c * less_NBB + torch.diag_embed(c[..., 0])

    @staticmethod
    def _with_rescale(shapes: dict[str, tuple[int, ...]], geometry: Geometry, rescaled: bool) -> Layout:
        if rescaled:
            shapes[CHANGE] = (geometry.out_features, 1, *geometry.ones)
        return Layout(shapes, rank=None, rank_axis=False)

    # -- files and states

    def pack(self) -> dict[str, Tensor]:
        tensors = super().pack()
        if RESCALE in tensors:
            tensors[RESCALE] = 1 + _wide(tensors[RESCALE])
        return tensors

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        change = {RESCALE: _wide(tensors[RESCALE]) - 1} if RESCALE in tensors else {}
        super().unpack_({**tensors, **change})

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        """Earlier versions learnt r itself."""
        if prefix + RESCALE in state:
            state[prefix + CHANGE] = state.pop(prefix + RESCALE) - 1


class DiagOFT(Rotation):
    spec = DIAG_OFT

    @classmethod
    def layout(
        cls, geometry: Geometry, dim: int, constraint: float = 0.0, rescaled: bool = False, dim_is_count: bool = False,
        train_on_input: bool = False, dim_is_size: bool = False, block_share: bool = False, size: int = 0,
        terms: int = oft_input.SERIES, columns: bool = False,
    ) -> Layout:  # fmt: skip
        """Shapes of its blocks and factors.

        Args:
            geometry: of the layer.
            dim: the size of a block, about, or their number.
            constraint, rescaled: see the file's head.
            dim_is_count: dim is the number of blocks.
            train_on_input: blocks of columns, not of rows.
            dim_is_size: dim is the size of a block of columns, with `train_on_input`.
            block_share: one block stands for all, likewise.
            size: of a block, what a file holds; 0 = by dim.
            terms, columns: what a file of the input side says, see `oft_input.Blocks`.

        Raises:
            ValueError: blocks would mix the groups of a convolution, or an option is asked of the other side.
        """
        _check_side(train_on_input, {"dim_is_size": dim_is_size, "block_share": block_share}, rescaled)
        features = _features(geometry, "columns" if columns or dim_is_size else "input" if train_on_input else "output")
        size = size or _block_size(features, dim, dim_is_count, dim_is_size)
        if not train_on_input and features // geometry.groups % size:
            raise ValueError(f"diag-oft: blocks of {size} rows would mix the {geometry.groups} groups of a convolution")
        return cls._with_rescale({"blocks": (1 if block_share else features // size, size, size)}, geometry, rescaled)

    @classmethod
    def remark(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> str:
        if layout.shapes.keys() == {"blocks"} and layout.shapes["blocks"][1] == 1:
            return (
                "blocks of one feature, which cannot turn and learn nothing: give a larger dim (of kernels: conv_dim)"
            )
        blocks = [shape[0] for shape in layout.shapes.values() if len(shape) == 3]
        if not options.get("dim_is_count") or min(blocks) >= dim:
            return super().remark(layout, dim, options)
        return (
            "fewer blocks than network_dim, which does not divide their width; sd-scripts' own modules refuse such a "
            "model, and such a file"
        )

    @property
    def on_input(self) -> bool:
        return bool(self.chosen.get("train_on_input"))

    @property
    def terms(self) -> int:
        """Of the series on the input side, 0 = the whole transform."""
        return int(self.chosen.get(TERMS, oft_input.SERIES)) if self.on_input else 0

    @property
    def side(self) -> str:  # type: ignore[override]
        by_columns = self.chosen.get("columns") or (self.chosen.get("dim_is_size") and self.geometry.has_kernel)
        return "columns" if by_columns else "input" if self.on_input else "output"

    def _less(self) -> Tensor:
        """T - 1 as blocks [N, B, B] that act on features."""
        less = rotation_less_identity(self.blocks, self.limit, self.terms)
        return less if self.on_input else self.with_rows(less.transpose(1, 2))

    def change(self, t: Tensor, axis: int) -> Tensor:
        return _apply(self._less(), t, axis)

    def change_rows(self, t: Tensor, axis: int, row_ranges: RowRanges) -> Tensor | None:
        size = self.blocks.shape[1]
        if any(n % size for piece in row_ranges for n in piece):
            return None
        less = self._less().to(t.dtype)
        return apply_blocks(torch.cat([less[start // size : stop // size] for start, stop in row_ranges]), t, axis)

    def over_base(self, call: Call) -> OverBase | None:
        return None if self.side == "columns" else _OverBase(self.on_input)

    def weight_change(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.change_of_slices()(weight, strength)

    def change_of_slices(self) -> Callable[[Tensor, float | Tensor], Tensor]:
        less, axis = self._less(), 0 if self.side == "output" else 1
        if not self.on_input:
            return lambda weight, strength: _apply(less, weight, axis)
        less = less.transpose(1, 2)

        def of_columns(weight: Tensor, strength: float | Tensor) -> Tensor:
            columns = weight.flatten(1) if self.side == "columns" else weight
            return _apply(less, columns, 1).reshape(weight.shape)

        return of_columns

    # -- files

    @classmethod
    def splits(cls, options: Mapping[str, Any]) -> bool:
        return super().splits(options) and not options.get("train_on_input")

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        return BLOCKS not in tensors or tensors[BLOCKS].dim() == 3

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        return oft_input.portable(tensors, alpha) if oft_input.is_input(tensors) else (tensors, alpha)

    @classmethod
    def of_peft(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return oft_input.of_peft(tensors, config)

    @classmethod
    def assumed(cls, tensors: Mapping[str, Tensor]) -> str:
        return oft_input.assumed(tensors)

    @property
    def saves_alpha(self) -> bool:
        """Of the input side no other program has one, and an alpha marks files of earlier versions."""
        return not self.on_input or bool(self.limit)

    @classmethod
    def rows_of_parts(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(blocks.shape[0] * blocks.shape[1] for blocks in _numbered(tensors))

    def pack(self) -> dict[str, Tensor]:
        if not self.on_input:
            return super().pack()
        Q = generator(self.blocks.detach(), self.limit)
        triangles = oft_input.above_diagonal(Q).to(self.blocks.dtype)
        shared = bool(self.chosen.get("block_share"))
        blocks = oft_input.Blocks(triangles, self.terms, shared, self.side == "columns")
        return oft_input.write(self.geometry, blocks, limited=bool(self.limit))

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """oft_blocks.0, oft_blocks.1, ..., as sd-scripts' oft_flux has them."""
        tensors = {f"{BLOCKS}.{i}": pack[BLOCKS] for i, pack in enumerate(packs)}
        if RESCALE in packs[0]:
            tensors[RESCALE] = torch.cat([pack[RESCALE] for pack in packs])
        return tensors

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        blocks = _numbered(tensors)
        if cls.rows_of_parts(tensors) != tuple(sizes):
            raise ValueError(
                f"oft_blocks of {cls.rows_of_parts(tensors)} rows do not fit projections of {tuple(sizes)}"
            )
        packs = [{BLOCKS: one} for one in blocks]
        if RESCALE in tensors:
            for pack, rows in zip(packs, tensors[RESCALE].split(list(sizes)), strict=True):
                pack[RESCALE] = rows
        return packs

    @classmethod
    def settled(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor] | None:
        """With blocks that are within the limit."""
        if not alpha:
            return dict(tensors)
        if oft_input.is_input(tensors):
            return None
        return {**tensors, **{key: _within(tensors[key], alpha) for key in tensors if key.startswith(BLOCKS)}}

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None
    ) -> dict[str, Tensor] | None:
        """As one rotation if all blocks are of one size and nothing limits those of a part."""
        present = there(packs)
        if any(oft_input.is_input(pack) for pack in present):
            return alike_inputs(packs)
        like = _listed(present[0])[0]
        parts = [_listed(p) if p else [_resting(like, size)] for p, size in zip(packs, sizes, strict=True)]
        found = _as_listed([blocks for part in parts for blocks in part], together=not alpha)
        if any(RESCALE in pack for pack in present):
            found[RESCALE] = concatenated(each(packs, RESCALE), sizes, rest=1.0)
        return found

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None] | None:
        """Whole blocks of rows; the input is turned alike for all."""
        settled = cls.settled(tensors, alpha)
        if settled is None or oft_input.is_input(tensors):
            return dict(tensors), alpha
        kept, at = list[Tensor](), 0
        for blocks in _listed(settled):
            count, size = blocks.shape[:2]
            cut = [min(max(edge - at, 0), count * size) for edge in (start, stop)]
            if any(edge % size for edge in cut):
                return None
            kept += [blocks[cut[0] // size : cut[1] // size]] if cut[0] < cut[1] else []
            at += count * size
        rows = {RESCALE: tensors[RESCALE][start:stop]} if RESCALE in tensors else {}
        return {**_as_listed(kept, together=False), **rows}, None if alpha is None else 0.0

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        rescaled = {"rescaled": RESCALE in tensors}
        if oft_input.is_input(tensors):
            if BLOCKS in tensors or _numbered(tensors):
                raise ValueError(
                    "it turns the input of the layer and its output, which no program writes: save it again"
                )
            found = oft_input.read(geometry, tensors)
            found = found.by_channels(geometry.kernel_size) or found
            form = {"terms": found.terms, "block_share": found.shared, "columns": found.columns}
            return found.size, {"size": found.size, "train_on_input": True, **form, **rescaled}
        blocks = _numbered(tensors) or [tensors[BLOCKS]]
        if any(b.dim() != 3 for b in blocks) or sum(b.shape[0] * b.shape[1] for b in blocks) != geometry.out_features:
            shapes = [tuple(b.shape) for b in blocks]
            raise ValueError(f"oft_blocks {shapes} do not fit a weight of {geometry.weight_shape}")
        sizes = tuple(b.shape[1] for b in blocks)
        return sizes[0], {"size": sizes if BLOCKS not in tensors else sizes[0], **rescaled}

    @classmethod
    def asked_as(cls, geometry: Geometry, dim: int, options: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """The dim is the size of a block, or their number."""
        sizes = options["size"] if isinstance(options["size"], tuple) else (options["size"],)
        features = geometry.in_features if options.get("train_on_input") else geometry.out_features
        count = features // len(sizes) // sizes[0]
        found = {**super().asked_as(geometry, dim, options), "dim": (dim, count), "dim_is_count": (False, True)}
        return {**found, "dim_is_size": (False, True)} if options.get("train_on_input") else found

    def _blocks_of(self, tensors: Mapping[str, Tensor]) -> oft_input.Blocks:
        """The rotation of a file as this one has it on the input side.

        Raises:
            ValueError: it has other blocks, or the other side.
        """
        self._same_side(tensors)
        found = oft_input.read(self.geometry, tensors)
        if found.columns and self.side == "input":
            found = found.by_channels(self.geometry.kernel_size) or found
        size, own = self.blocks.shape[1], "columns" if self.side == "columns" else "channels"
        theirs = "columns" if found.columns else "channels"
        if own != theirs:
            raise ValueError(f"the file turns the {theirs} of a convolution with a kernel, this network its {own}")
        if len(self.blocks) == 1 and bool((found.triangles == found.triangles[:1]).all()):
            found = replace(found, triangles=found.triangles[:1])  # one for all, written as many alike
        if found.size != size:
            raise ValueError(f"the file has blocks of {found.size} features, this network has blocks of {size}")
        if len(found.triangles) != len(self.blocks):
            raise ValueError(f"the file has {len(found.triangles)} blocks, this network has {len(self.blocks)}")
        return found

    def _same_side(self, tensors: Mapping[str, Tensor]) -> None:
        if self.on_input != oft_input.is_input(tensors):
            raise ValueError(f"the file has train_on_input={not self.on_input}, this network has the other")

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        self._same_side(tensors)
        if self.on_input:
            self._blocks_of(tensors)
        else:
            super().check_fits(tensors)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.on_input:
            super().unpack_(tensors)
            return
        found = self._blocks_of(tensors)
        rows, columns = torch.triu_indices(found.size, found.size, 1)
        self.chosen[TERMS] = found.terms
        with torch.no_grad():
            self.blocks.zero_()
            self.blocks[:, rows, columns] = found.triangles.to(self.blocks)

    # -- live state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.on_input:
            destination[prefix + TERMS] = torch.tensor(self.terms)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + TERMS, None)  # `renew_state` has taken it
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        """Earlier versions turned the input by the whole transform."""
        super().renew_state(state, prefix)
        if self.on_input and f"{prefix}blocks" in state:
            self.chosen[TERMS] = int(state.setdefault(prefix + TERMS, torch.tensor(0)))


@dataclass(frozen=True)
class _OverBase:
    on_input: bool

    def __call__(self, adapter: DiagOFT, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
        p: Any = adapter._parameters
        if self.on_input or CHANGE in p or adapter.chosen.get("constraint"):
            less = adapter._less()
        else:
            less = cayley_less_identity(p["blocks"]).transpose(1, 2)
        times = adapter.features_of_side // (less.shape[0] * less.shape[1])
        less = less.repeat(times, 1, 1) if times > 1 else less  # one may stand for all
        return turned_over_base(adapter.geometry, x, weight, bias, less, strength, self.on_input)


def _apply(less_NBB: Tensor, t: Tensor, axis: int) -> Tensor:
    """(T - 1) t along an axis; the blocks are repeated until its end: one may stand for all, and those of the input of
    a convolution stand for each of its groups."""
    less, times = less_NBB.to(t.dtype), t.shape[axis] // (less_NBB.shape[0] * less_NBB.shape[1])
    return apply_blocks(less.repeat(times, 1, 1) if times > 1 else less, t, axis)


def _numbered(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """oft_blocks.0, oft_blocks.1, ... of a layer whose projections have rotations of their own."""
    found: list[Tensor] = []
    while (key := f"{BLOCKS}.{len(found)}") in tensors:
        found.append(tensors[key])
    return found


def _listed(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The blocks of each part, or of the whole."""
    return _numbered(tensors) or [tensors[BLOCKS]]


def _resting(like: Tensor, rows: int) -> Tensor:
    """Blocks that turn nothing, if possible of the same size."""
    size = like.shape[-1] if rows % like.shape[-1] == 0 else 1
    return like.new_zeros(rows // size, size, size)


def _as_listed(blocks: Sequence[Tensor], together: bool) -> dict[str, Tensor]:
    """The inverse; together: as one rotation, where all blocks have one size."""
    if together and len({each.shape[-1] for each in blocks}) == 1:
        blocks = [torch.cat([*blocks])]
    return {BLOCKS: blocks[0]} if len(blocks) == 1 else {f"{BLOCKS}.{i}": each for i, each in enumerate(blocks)}


def _within(blocks: Tensor, constraint: float) -> Tensor:
    """Blocks which a limit leaves as they are; those themselves if it does."""
    limit, norm = constraint * blocks.shape[0] * blocks.shape[1], float(generator(blocks).norm())
    return blocks if norm <= limit else _wide(blocks) * (limit / norm)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _block_size(features: int, dim: int, is_count: bool, is_size: bool) -> int:
    """By what network_dim means, see `DiagOFT.layout`."""
    if is_size:  # of two that are as near, the smaller one
        near = (n for distance in range(features + dim) for n in (dim - distance, dim + distance))
        return next(n for n in near if 0 < n <= features and features % n == 0)
    if is_count:
        return features // max(n for n in range(1, dim + 1) if features % n == 0)
    return factorization(features, dim)[0]


def _features(geometry: Geometry, side: str) -> int:
    """That are rotated: O, I, or I times the positions of the kernel."""
    return {"output": geometry.out_features, "input": geometry.in_features, "columns": geometry.columns}[side]


def _check_side(on_input: bool, of_input: Mapping[str, bool], rescaled: bool) -> None:
    """Raises ValueError for an option that is asked of the other side."""
    for name in (name for name, on in of_input.items() if on and not on_input):
        raise ValueError(f"{name} goes with train_on_input=True alone")
    if on_input and rescaled:
        raise ValueError("rescaled gives factors to output rows: leave it out, or train_on_input")
