"""Diagonal OFT: rotations of blocks of features (2306.07280), of the output, or of the input as in OFT v2 (2506.19847).

    Q_n = B_n - B_n^T        R_n = (1 + Q_n)(1 - Q_n)^-1
    W'_n = r_n R_n^T W_n                for each block n of rows, or
    W'_n = W_n R_n, y = base(R x)       for each block n of columns, with train_on_input

The block size is the smaller of the two factors of O (or I) next to dim (tensors.factor); with `dim_is_count` there
are as many blocks as the largest divisor of O (or I) up to dim.
`constraint` limits the norm of all Q together to constraint * O, or I (0 = none); a file holds it as alpha. With
`rescaled` every row has a factor r, too.

Parameters (saved as oft_blocks, rescale; of the input side as oft_R.weight [N, B (B - 1) / 2], the upper triangles of
Q, which no reader takes for a rotation of rows: it is PEFT's form)
    blocks   [N, B, B]         start: 0
    rescale  [O, 1, 1..], with rescaled only         start: 1
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tensors.factor import factorization
from ..tensors.geometry import Geometry, Pieces
from ..tensors.rotation import apply_blocks, generator, rotation_less_identity
from .reweight import Reweight
from .saved import Layout

INPUT = "oft_R.weight"  # of a rotation on the input side


class Rotation(Reweight):
    """What both kinds of orthogonal fine-tuning share: blocks, a constraint, factors by row."""

    keys = {"blocks": "oft_blocks", "rescale": "rescale"}
    required: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_blocks"}),)
    alpha_option = "constraint"
    near_one = frozenset({"rescale"})
    blocks: nn.Parameter
    rescale: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.blocks)
        if "rescale" in self.record.shapes:
            nn.init.ones_(self.rescale)

    @property
    def features_of_side(self) -> int:
        """O, or I where the input is rotated."""
        return self.geometry.in_features if self.side == "input" else self.geometry.out_features

    @property
    def limit(self) -> float:
        return float(self.chosen.get("constraint") or 0.0) * self.features_of_side

    def with_rows(self, less_NBB: Tensor, rows: Tensor | None = None) -> Tensor:
        """r T - 1 for the blocks of T - 1, with the factors r of these rows, or of all in order."""
        if "rescale" not in self.record.shapes:
            return less_NBB
        r = (self.rescale.flatten() if rows is None else rows).reshape(*less_NBB.shape[:2], 1)
        return r * less_NBB + torch.diag_embed(r[..., 0] - 1)

    @classmethod
    def readers(cls, options: Mapping[str, Any]) -> str:
        own = [name for name in ("constraint", "rescaled") if options.get(name)]
        comfy = f"ComfyUI ignores its {' and '.join(own)}" if own else "ComfyUI does at strength 1"
        return f"{cls.algo} files: LyCORIS and A1111 read them exactly; {comfy}; Forge and diffusers read none"

    def shrink_(self, ratio: float) -> None:
        with torch.no_grad():
            self.blocks.mul_(ratio)
            if "rescale" in self.record.shapes:
                self.rescale.sub_(1).mul_(ratio).add_(1)

    @staticmethod
    def _with_rescale(shapes: dict[str, tuple[int, ...]], geometry: Geometry, rescaled: bool) -> Layout:
        if rescaled:
            shapes["rescale"] = (geometry.out_features, 1, *geometry.ones)
        return Layout(shapes, rank=None, rank_axis=False)


class DiagOFT(Rotation):
    algo = "diag-oft"
    options = frozenset({"constraint", "rescaled", "dim_is_count", "train_on_input"})
    features = frozenset({"split_qkv"})
    required = (frozenset({"oft_blocks"}), frozenset({"oft_blocks.0"}), frozenset({INPUT}))

    @classmethod
    def layout(
        cls, geometry: Geometry, dim: int, constraint: float = 0.0, rescaled: bool = False, dim_is_count: bool = False,
        train_on_input: bool = False, size: int = 0,
    ) -> Layout:  # fmt: skip
        """`size` states the blocks' size outright; else dim and dim_is_count decide."""
        features = geometry.in_features if train_on_input else geometry.out_features
        if not size and dim_is_count:
            size = features // max(n for n in range(1, dim + 1) if features % n == 0)
        size = size or factorization(features, dim)[0]
        if not train_on_input and features // geometry.groups % size:
            raise ValueError(f"diag-oft: blocks of {size} rows would mix the {geometry.groups} groups of a convolution")
        if train_on_input and rescaled:
            raise ValueError("rescaled gives factors to output rows: leave it out, or train_on_input")
        return cls._with_rescale({"blocks": (features // size, size, size)}, geometry, rescaled)

    @property
    def side(self) -> str:  # type: ignore[override]
        return "input" if self.chosen.get("train_on_input") else "output"

    def _less(self) -> Tensor:
        """T - 1 as blocks [N, B, B] that act on features."""
        less = rotation_less_identity(self.blocks, self.limit)
        return less if self.side == "input" else self.with_rows(less.transpose(1, 2))

    def change(self, t: Tensor, axis: int) -> Tensor:
        less = self._less().to(t.dtype)
        if self.side == "input":  # of a convolution with groups: each has its own I channels
            less = less.repeat(t.shape[axis] // self.geometry.in_features, 1, 1)
        return apply_blocks(less, t, axis)

    def change_rows(self, t: Tensor, axis: int, pieces: Pieces) -> Tensor | None:
        size = self.blocks.shape[1]
        if any(n % size for piece in pieces for n in piece):
            return None
        less = self._less().to(t.dtype)
        return apply_blocks(torch.cat([less[start // size : stop // size] for start, stop in pieces]), t, axis)

    def weight_change(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        if self.side == "output":
            return super().weight_change(weight)
        return apply_blocks(self._less().to(weight.dtype).transpose(1, 2), weight, 1)

    # -- files

    @classmethod
    def readers(cls, options: Mapping[str, Any]) -> str:
        if options.get("split_qkv"):
            return "OFT of split projections: sd-scripts' oft_flux alone reads it, from files of save_format=oft_flux"
        if not options.get("train_on_input"):
            return super().readers(options)
        return (
            f"OFT on the input side: no program but this package reads its files ({INPUT}: PEFT's numbers under the "
            "trainers' names); merge it into the base model for any other"
        )

    @classmethod
    def splits(cls, options: Mapping[str, Any]) -> bool:
        return super().splits(options) and not options.get("train_on_input")

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        return "oft_blocks" not in tensors or tensors["oft_blocks"].dim() == 3

    @classmethod
    def knows(cls, suffix: str) -> bool:
        return super().knows(suffix) or suffix == INPUT or re.fullmatch(r"oft_blocks\.\d+", suffix) is not None

    @classmethod
    def rows_of_parts(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(blocks.shape[0] * blocks.shape[1] for blocks in _numbered(tensors))

    def pack(self) -> dict[str, Tensor]:
        tensors = super().pack()
        if self.side == "input":
            Q = generator(tensors.pop("oft_blocks"), self.limit)
            rows, columns = torch.triu_indices(Q.shape[1], Q.shape[1], 1, device=Q.device)
            tensors[INPUT] = Q[:, rows, columns].to(self.blocks.dtype)
        return tensors

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """oft_blocks.0, oft_blocks.1, ..., as sd-scripts' oft_flux has them."""
        tensors = {f"oft_blocks.{i}": pack["oft_blocks"] for i, pack in enumerate(packs)}
        if "rescale" in packs[0]:
            tensors["rescale"] = torch.cat([pack["rescale"] for pack in packs])
        return tensors

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        blocks = _numbered(tensors)
        if cls.rows_of_parts(tensors) != tuple(sizes):
            raise ValueError(
                f"oft_blocks of {cls.rows_of_parts(tensors)} rows do not fit projections of {tuple(sizes)}"
            )
        packs = [{"oft_blocks": one} for one in blocks]
        if "rescale" in tensors:
            for pack, rows in zip(packs, tensors["rescale"].split(list(sizes)), strict=True):
                pack["rescale"] = rows
        return packs

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        rescaled = {"rescaled": "rescale" in tensors}
        if INPUT in tensors:
            shape = tensors[INPUT].shape
            size = (1 + math.isqrt(1 + 8 * shape[1])) // 2
            if shape[0] * size != geometry.in_features or 2 * shape[1] != size * (size - 1):
                raise ValueError(f"{INPUT} {tuple(shape)} does not fit a weight of {geometry.weight_shape}")
            return size, {"size": size, "train_on_input": True, **rescaled}
        blocks = _numbered(tensors) or [tensors["oft_blocks"]]
        if any(b.dim() != 3 for b in blocks) or sum(b.shape[0] * b.shape[1] for b in blocks) != geometry.out_features:
            shapes = [tuple(b.shape) for b in blocks]
            raise ValueError(f"oft_blocks {shapes} do not fit a weight of {geometry.weight_shape}")
        sizes = tuple(b.shape[1] for b in blocks)
        return sizes[0], {"size": sizes if "oft_blocks" not in tensors else sizes[0], **rescaled}

    def fits(self, tensors: Mapping[str, Tensor]) -> None:
        if self.side == "input" and set(tensors) == {INPUT}:
            size, wanted = self.describe(self.geometry, tensors)[0], self.blocks.shape[1]
            if size != wanted:
                raise ValueError(f"the file has blocks of {size} features, this network has blocks of {wanted}")
            return
        if (self.side == "input") != (INPUT in tensors):
            raise ValueError(f"the file has train_on_input={INPUT in tensors}, this network has the other")
        super().fits(tensors)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        if self.side == "output":
            super().unpack_(tensors)
            return
        self.fits(tensors)
        size = self.blocks.shape[1]
        rows, columns = torch.triu_indices(size, size, 1)
        with torch.no_grad():
            self.blocks.zero_()
            self.blocks[:, rows, columns] = tensors[INPUT].to(self.blocks)


def _numbered(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """oft_blocks.0, oft_blocks.1, ... of a layer whose projections have rotations of their own."""
    found: list[Tensor] = []
    while (key := f"oft_blocks.{len(found)}") in tensors:
        found.append(tensors[key])
    return found
