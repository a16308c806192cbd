"""BOFT on the input side, as PEFT and sd-scripts' networks.boft have it (2311.06243).

    W' = (1 + c) W T^T        T = P_p^-1 R_p P_p ... P_0^-1 R_0 P_0 on the columns, I times kernel positions

with R_i block-diagonal, of (1 - Q)(1 + Q)^-1 with Q = (B - B^T) / 2 for each block B. P_i brings half blocks together
that lie 2^i of them apart; P_0 changes nothing. The size of the blocks is the divisor of the columns next to dim that
goes with the number of stages.

Parameters (saved as boft_R, boft_s = 1 + c)
    blocks          [p + 1, N, B, B]         start: 0
    rescale_change  [O, 1], c, with rescaled only         start: 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..records.boft_input import BOFT_INPUT, SCALES, TURNS
from ..records.oft import CHANGE
from ..tensors.fused import Call, OverBase
from ..tensors.fused_butterfly import Stages, butterfly_over_base
from ..tensors.fused_rotation import cayley_less_identity, turned_over_base
from ..tensors.geometry import Geometry
from ..tensors.rotation import apply_blocks, butterfly_chain, rotation_less_identity
from .multiplicative import Multiplicative
from .saved import Layout, alike, concatenated, each, there, wide_dtype


class BOFTInput(Multiplicative):
    spec = BOFT_INPUT

    blocks: nn.Parameter
    rescale_change: nn.Parameter  # from 1: half precision holds no small change of the 1 itself

    @classmethod
    def layout(
        cls, geometry: Geometry, dim: int, butterflies: int = 1, rescaled: bool = False, size: int = 0
    ) -> Layout:
        """Shapes of its blocks and factors.

        Args:
            geometry: of the layer.
            dim: the size of a block, about.
            butterflies: stages, p + 1.
            rescaled: a factor for every row, too.
            size: of a block, what a file holds; 0 = by dim.

        Raises:
            ValueError: blocks would mix the groups of a convolution, or there are none for so many stages.
        """
        if geometry.groups > 1:
            raise ValueError(f"boft-input would mix the {geometry.groups} groups of a convolution: leave the layer out")
        size = size or _block_size(geometry.columns, dim, butterflies)
        shapes: dict[str, tuple[int, ...]] = {"blocks": (butterflies, geometry.columns // size, size, size)}
        if rescaled:
            shapes[CHANGE] = (geometry.out_features, 1)
        return Layout(shapes, rank=None, rank_axis=False)

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    @property
    def side(self) -> str:  # type: ignore[override]
        return "columns" if self.geometry.has_kernel or CHANGE in self.laid_out.shapes else "input"

    def change(self, t: Tensor, axis: int) -> Tensor:
        return self._turned(t, axis, back=False)

    def _turned(self, t: Tensor, axis: int, back: bool) -> Tensor:
        """(T^T - 1) t, as features are turned, or `back`, (T - 1) t, as the columns of a weight."""
        stages, _, size, _ = self.blocks.shape
        less = rotation_less_identity(self.blocks.flatten(0, 1) / -2).unflatten(0, (stages, -1)).to(t.dtype)
        less = less if back else less.transpose(2, 3).flip(0)
        if stages == 1:
            return apply_blocks(less[0], t, axis)
        distances = tuple(2**i for i in range(stages))
        return butterfly_chain(t, less, axis, distances if back else distances[::-1], size // 2)

    def over_base(self, call: Call) -> OverBase | None:
        return _over_base if self.side == "input" else None

    @property
    def free_axis(self) -> int | None:
        return None if CHANGE in self.laid_out.shapes else 0  # its numbers belong to the rows of the whole weight

    def weight_change(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        flat = weight.flatten(1)
        turned = self._turned(flat, 1, back=True)
        if CHANGE in self.laid_out.shapes:
            turned = turned + self.rescale_change.to(flat.dtype) * (flat + turned)
        return turned.reshape(weight.shape)

    # -- files

    def pack(self) -> dict[str, Tensor]:
        tensors = super().pack()
        if SCALES in tensors:
            tensors[SCALES] = 1 + tensors[SCALES].to(wide_dtype(tensors[SCALES]))
        return tensors

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        change = {SCALES: tensors[SCALES].to(wide_dtype(tensors[SCALES])) - 1} if SCALES in tensors else {}
        super().unpack_({**tensors, **change})

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[dict[str, Tensor], float | None]:
        """PEFT has the factors of a convolution as [1, O]."""
        column = {SCALES: tensors[SCALES].reshape(-1, 1)} if SCALES in tensors else {}
        return {**tensors, **column}, None

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None
    ) -> dict[str, Tensor] | None:
        """Only parts whose columns are turned alike."""
        present = there(packs)
        if len(present) < len(packs) or not alike(present, (TURNS,)):
            return None
        if not any(SCALES in pack for pack in present):
            return dict(present[0])
        return {**present[0], SCALES: concatenated(each(packs, SCALES), sizes, rest=1.0)}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None]:
        rows = {SCALES: tensors[SCALES][start:stop]} if SCALES in tensors else {}
        return {**tensors, **rows}, alpha

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        blocks = tensors[TURNS]
        fits = blocks.dim() == 4 and blocks.shape[1] * blocks.shape[2] == geometry.columns
        if not fits or not _goes_with(blocks.shape[1], blocks.shape[2], blocks.shape[0]):
            raise ValueError(f"boft_R {tuple(blocks.shape)} does not fit a weight of {geometry.weight_shape}")
        size = blocks.shape[2]
        return size, {"size": size, "butterflies": blocks.shape[0], "rescaled": SCALES in tensors}


def _goes_with(count: int, size: int, stages: int) -> bool:
    """Whether so many blocks of a size can be mixed in so many stages."""
    return stages == 1 or (size % 2 == 0 and count % 2 ** (stages - 1) == 0)


def _block_size(columns: int, dim: int, stages: int) -> int:
    """Raises ValueError where there is none."""
    divisors = [n for n in range(1, columns + 1) if columns % n == 0 and _goes_with(columns // n, n, stages)]
    if not divisors:
        raise ValueError(f"boft-input has no blocks of {columns} columns for butterflies={stages}: use fewer")
    return min(divisors, key=lambda n: (abs(n - dim), n))


def _over_base(adapter: BOFTInput, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p: Any = adapter._parameters
    count, _, size, _ = shape = p["blocks"].shape
    less = cayley_less_identity(p["blocks"].flatten(0, 1) / -2).view(shape).transpose(2, 3).flip(0)
    if count == 1:  # of any size, odd ones too
        return turned_over_base(adapter.geometry, x, weight, bias, less[0], strength, on_input=True)
    stages = Stages(adapter.geometry.in_features, size, tuple(2**i for i in reversed(range(count))), size // 2)
    return butterfly_over_base(adapter.geometry, x, weight, bias, less, stages, strength, on_input=True)
