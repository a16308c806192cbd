"""Rotations of the input side (OFT v2, 2506.19847) in the files of this and of other programs.

A file holds G, skew-symmetric, of every block of columns, as the triangles above their diagonals [N, B (B - 1) / 2];
with N = 1 one block may stand for all. C(Q) = (1 + Q)(1 - Q)^-1, and C_k is its series cut off after k terms, see
tensors.rotation. W' = W T with

    written by                                         keys                   T of a Linear         of a convolution
    sd-scripts' networks.oft_v2, OneTrainer, here      oft_R.weight           C_5(-G)               C_5(G)
    PEFT                                               oft_R.weight           C_k(-G), or C(G)      the same
    here, what the first cannot hold                   oft_R.turn             C_k(G), or C(G)       the same
    earlier versions of this package                   oft_R.weight, alpha    C(G)                  C(G)

Others have C_5 alone; PEFT's adapter_config.json says which it is (use_cayley_neumann, num_cayley_neumann_terms). The
columns are all of a weight's, channels times positions of the kernel; in the last two rows they can be the channels,
turned alike at every position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..records.oft import BUFFERS, FIELD, FORMS, LIMIT, LIMITED, OWN, PEFT, SCALED, TERMS
from ..tensors.geometry import Geometry

SERIES = 5


@dataclass(frozen=True)
class Blocks:
    """Rotations of blocks of columns, W' = W C_k(Q), or W C(Q).

    Attributes:
        triangles: of Q, [N, B (B - 1) / 2].
        terms: k, 0 = C.
        shared: one block stands for all.
        columns: of channels times positions; False = of channels, alike at every position.
    """

    triangles: Tensor
    terms: int
    shared: bool = False
    columns: bool = False

    @property
    def size(self) -> int:
        """B."""
        return size_of(self.triangles)

    def matrices(self) -> Tensor:
        """Q [N, B, B]."""
        Q = self.triangles.new_zeros(len(self.triangles), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        Q[:, rows, columns] = self.triangles
        return Q - Q.transpose(1, 2)

    def by_columns(self, positions: int) -> Blocks:
        """The same rotation of channels as one of columns: Q x 1, with blocks of B times as many columns as there are
        positions."""
        one = torch.eye(positions, dtype=self.triangles.dtype, device=self.triangles.device)
        Q = torch.einsum("nbc,kl->nbkcl", self.matrices(), one).flatten(3).flatten(1, 2)
        return replace(self, triangles=above_diagonal(Q), columns=True)

    def by_channels(self, positions: int) -> Blocks | None:
        """The inverse of `by_columns`; None if positions are not turned alike, or each other's."""
        if not self.columns or self.size % positions:
            return None
        first = self.matrices().unflatten(2, (-1, positions)).unflatten(1, (-1, positions))[:, :, 0, :, 0]
        found = replace(self, triangles=above_diagonal(first), columns=False)
        return found if torch.equal(found.by_columns(positions).triangles, self.triangles) else None


def above_diagonal(matrices_NBB: Tensor) -> Tensor:
    """[N, B (B - 1) / 2], row by row."""
    size = matrices_NBB.shape[1]
    rows, columns = torch.triu_indices(size, size, 1, device=matrices_NBB.device)
    return matrices_NBB[:, rows, columns]


def size_of(triangles: Tensor) -> int:
    """B for [N, B (B - 1) / 2].

    Raises:
        ValueError: these are no triangles.
    """
    count = triangles.shape[-1] if triangles.dim() == 2 else -1
    size = (1 + math.isqrt(1 + 8 * max(count, 0))) // 2
    if 2 * count != size * (size - 1):
        raise ValueError(f"oft_R {tuple(triangles.shape)} holds no triangles of blocks")
    return size


def is_input(tensors: Mapping[str, Any]) -> bool:
    """Whether these saved tensors of a layer turn its input."""
    return any(suffix in tensors for suffix in FORMS)


def read(geometry: Geometry, tensors: Mapping[str, Tensor]) -> Blocks:
    """The rotation of a layer, from its tensors in the portable form.

    Raises:
        ValueError: they do not fit the layer.
    """
    suffix = next(suffix for suffix in FORMS if suffix in tensors)
    triangles, terms = tensors[suffix], int(tensors.get(TERMS, SERIES))
    size, count = size_of(triangles), len(triangles)
    if suffix == OWN and count * size == geometry.in_features:
        return Blocks(triangles, terms)
    if count * size != geometry.columns and (count > 1 or geometry.columns % size):
        raise ValueError(f"oft_R {tuple(triangles.shape)} does not fit a weight of {geometry.weight_shape}")
    forward = {FIELD: geometry.is_conv, PEFT: not terms, OWN: True}[suffix]
    shared = count * size != geometry.columns
    return Blocks(triangles if forward else -triangles, terms, shared, geometry.has_kernel)


def write(geometry: Geometry, blocks: Blocks, limited: bool) -> dict[str, Tensor]:
    """Saved tensors of a rotation, in the form that other programs read if it can hold it.

    Args:
        limited: whether an alpha stands beside them.
    """
    theirs, positions = blocks, geometry.kernel_size
    if blocks.terms == SERIES and positions > 1 and not blocks.columns:
        width = blocks.size * positions
        small = len(blocks.triangles) * width * (width - 1) // 2 <= math.prod(geometry.weight_shape)
        theirs = blocks.by_columns(positions) if small else blocks
    if blocks.terms == SERIES and (positions == 1 or theirs.columns):
        found = {FIELD: theirs.triangles if geometry.is_conv else -theirs.triangles}
        return {**found, TERMS: torch.tensor(SERIES)} if limited else found
    return {OWN: blocks.triangles.repeat(_alike(geometry, blocks), 1), TERMS: torch.tensor(blocks.terms)}


def _alike(geometry: Geometry, blocks: Blocks) -> int:
    """How often one block that stands for all is written: one of channels would be taken for one of columns, and one of
    columns for one of channels if it is as large as these."""
    told = blocks.columns and blocks.size != geometry.in_features
    if not blocks.shared or geometry.kernel_size == 1 or told:
        return 1
    return (geometry.columns if blocks.columns else geometry.in_features) // blocks.size


def portable(tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[dict[str, Tensor], float | None]:
    """A layer of any program's file in the form of FIELD, PEFT or OWN; alpha is its constraint."""
    found = {suffix: t for suffix, t in tensors.items() if suffix != SCALED and suffix not in BUFFERS}
    if FIELD not in found:
        return found, alpha if OWN in found else None
    if _says(tensors, LIMITED):
        found[FIELD] = within(found[FIELD], float(tensors[LIMIT]))
    if _says(tensors, SCALED):
        found[FIELD] = _wide(found[FIELD]) / (2 * math.sqrt(max(1, size_of(found[FIELD]) - 1)))
    if not BUFFERS.isdisjoint(tensors):
        return found, None
    if alpha is not None and TERMS not in found:
        found[OWN], found[TERMS] = found.pop(FIELD), torch.tensor(0)
    return found, alpha


def of_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A layer of PEFT's file with what its adapter_config.json says.

    Raises:
        ValueError: a number there is none.
    """
    found = dict(tensors)
    if PEFT in found and config.get("coft"):
        found[PEFT] = within(found[PEFT], float(config.get("eps", 6e-5)))
    if PEFT in found:
        whole = not config.get("use_cayley_neumann", True)
        found[TERMS] = torch.tensor(0 if whole else int(config.get("num_cayley_neumann_terms", SERIES)))
    return found


def within(triangles: Tensor, limit: float) -> Tensor:
    """COFT of PEFT and its kin: the norm of every G is at most limit / sqrt(N)."""
    wide = _wide(triangles)
    norms = math.sqrt(2) * wide.norm(dim=1, keepdim=True)
    return wide * (limit / math.sqrt(len(triangles)) / norms.clamp_min(1e-30)).clamp_max(1.0)


def assumed(tensors: Mapping[str, Tensor]) -> str:
    """Whose form a layer was taken for; "" where it says so itself."""
    if FIELD in tensors and TERMS not in tensors:
        return "rotations of the input are read as sd-scripts' networks.oft_v2 and OneTrainer write them"
    if PEFT in tensors and TERMS not in tensors:
        return (
            "rotations of the input are read as PEFT writes them by default (use_cayley_neumann=True, 5 terms): no "
            "adapter_config.json was there to say otherwise"
        )
    if OWN in tensors and not int(tensors[TERMS]):
        return (
            "rotations of the input are whole Cayley transforms, as earlier versions of this package wrote them: what "
            "is saved of them from here on is for this package alone"
        )
    return ""


def _says(tensors: Mapping[str, Tensor], flag: str) -> bool:
    """An empty flag is one that is there."""
    return flag in tensors and (not tensors[flag].numel() or bool(tensors[flag].any()))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
