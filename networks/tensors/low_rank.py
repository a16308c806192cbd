"""x -> up(down(x)) for every layer kind: the cheap form that LoRA and LoHa share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import FEW
from .geometry import Geometry


class Gate(Protocol):
    """Strength and dropouts of one call, applied where they cost least: on the rank activation."""

    @property
    def uniform(self) -> bool:
        """One strength for all samples: `output` may be called on a factor instead of on the update."""
        ...

    def rank(self, h: Tensor, dim: int) -> Tensor:
        """Scale and drop the rank activation.

        Args:
            h: its first axis is the samples.
            dim: its rank axis.
        """
        ...

    def output(self, update: Tensor) -> Tensor:
        """Scale an update which has no rank activation."""
        ...


class PassGate(Gate, Protocol):
    """The gate of a whole pass, before anything is known of the form of the update."""

    @property
    def elementwise(self) -> bool:
        """Whether elements of the rank activation are dropped one by one, which no weight change can stand for."""
        ...

    def mask(self, size: int, like: Tensor) -> Tensor | None:
        """[size], the weights of the rank indices in this pass, for a weight change which all samples share; None =
        1 each. On the device and in the dtype of `like`."""
        ...


class _NoGate:
    uniform = True

    def rank(self, h: Tensor, dim: int) -> Tensor:
        return h

    def output(self, update: Tensor) -> Tensor:
        return update


NO_GATE = _NoGate()


def low_rank(geometry: Geometry, x: Tensor, down_RIK: Tensor, up_OR: Tensor, gate: Gate) -> Tensor:
    """Update of a layer whose weight change is up [O, R] @ down [R, I, *kernel]; never builds the product.

    With groups every group reads its own input channels through the same R rows, so the middle has groups * R
    channels and the second product is grouped too.

    Args:
        x: [.., I] of a Linear, [B, I * groups, *space] of a convolution.
        down_RIK: [R, I, *kernel].
        up_OR: [O, R].
        gate: strength and dropouts, on the rank activation.
    """
    if not geometry.is_conv:
        return F.linear(gate.rank(F.linear(x, down_RIK), -1), up_OR)
    groups = geometry.groups
    if groups == 1:
        h = gate.rank(geometry.convolve(x, down_RIK, 1), 1)
    else:
        h = geometry.convolve(x, down_RIK.repeat(groups, *[1] * (down_RIK.dim() - 1)), groups)
        h = gate.rank(h.unflatten(1, (groups, -1)), 2).flatten(1, 2)
    return geometry.pointwise(h, up_OR, groups)


def product_norm_sq(left_OR: Tensor, right_RJ: Tensor) -> Tensor:
    """Squared row norms [O] of left @ right, by the Gram matrix of right."""
    return ((left_OR @ (right_RJ @ right_RJ.T)) * left_OR).sum(1).clamp_min(0)


def sum_norm_sq(weight: Tensor, left_OR: Tensor, right_RIK: Tensor, on_output: bool) -> Tensor:
    """||W + left right||^2 of every output row [O] or every input column [I], without building the product, in fp32 or
    wider.

    Args:
        weight: W [O, I, *kernel]. In half precision it is not widened: its product with the factors, small beside its
            own squares, is as exact as it is.
        left_OR: [O, R].
        right_RIK: [R, I, *kernel].
        on_output: of rows; False = of columns.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.numel() <= FEW:
        whole = weight + (left_OR.to(wide) @ right_RIK.flatten(1).to(wide)).reshape(weight.shape)
        return square_sums(whole.flatten(1) if on_output else whole.transpose(0, 1).flatten(1), 1)
    W, left, right = weight.flatten(1), left_OR.to(wide), right_RIK.flatten(1).to(wide)
    if not on_output:
        W, left, right = W.T, right.T, left.T
    cross = (W @ right.T.to(W.dtype)).to(wide)
    more = torch.addmm(cross, left, right @ right.T, beta=2).mul_(left).sum(1)  # 2 <W, left right> + ||left right||^2
    squares = square_sums(W, 1).add_(more)
    return (squares if on_output else squares.reshape(weight.shape[1], -1).sum(1)).clamp_min_(0)


def square_sums(matrix: Tensor, axis: int) -> Tensor:
    """Sums of squares along an axis, in fp32 or wider, without a wide copy."""
    return torch.linalg.vector_norm(matrix, dim=axis, dtype=torch.promote_types(matrix.dtype, torch.float32)).square()


def product_error(factors: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> float:
    """||other product - product|| / ||product||, as some random vectors see it; 0 for products of 0.

    In float64 on the CPU, and without building either, so that what rounding there is belongs to the factors.
    """
    (left, right), (other_left, other_right) = ([t.cpu().double() for t in pair] for pair in (factors, others))
    probe = torch.randn(right.shape[1], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = left @ (right @ probe)
    size = float(whole.norm())
    return float((other_left @ (other_right @ probe) - whole).norm()) / size if size else 0.0


def refactor(left_OR: Tensor, right_RJ: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same product, or the nearest one of a lower rank, with factors of equal length and orthogonal directions.

    By QR of both factors and SVD of the small middle, in the dtype of the factors; the product is never built.

    Args:
        rank: of the result, the smaller factors' sizes at most; None = as many as there are.

    Returns:
        left [O, rank], right [rank, J], and all singular values of the product, in descending order.
    """
    q_left, r_left = torch.linalg.qr(left_OR)
    q_right, r_right = torch.linalg.qr(right_RJ.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    root = s[:kept].sqrt()
    return q_left @ (u[:, :kept] * root), (vh[:kept] * root[:, None]) @ q_right.T, s


def nearest_products(
    pairs: Sequence[tuple[Tensor, Tensor]], count: Callable[[Tensor], int], parts: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Factors [O, r] and [r, J] of the nearest products of fewer ranks, as many in all of them: the most that one
    keeps, with zeros behind those of others.

    Args:
        pairs: [O, R] and [R, J] of each.
        count: how many of the singular values of one, the largest first, are kept.
        parts: the ranks belong to so many parts, one after the other, with rows of their own; each keeps as many.
    """
    pieces = [piece for left, right in pairs for piece in zip(left.chunk(parts, 1), right.chunk(parts), strict=True)]
    found = [refactor(left, right) for left, right in pieces]
    kept = max((count(s) for *_, s in found), default=0)
    lefts = [
        F.pad(new * left.any(1, keepdim=True), (0, kept - new.shape[1]))
        for (left, _), (new, *_) in zip(pieces, found, strict=True)
    ]
    rights = [F.pad(right, (0, 0, 0, kept - len(right))) for _, right, _ in found]
    return [
        (torch.cat(lefts[at : at + parts], 1), torch.cat(rights[at : at + parts]))
        for at in range(0, len(pieces), parts)
    ]


EXACT_BELOW = 512  # of the smaller side: a full SVD costs little there
_EXTRA, _ROUNDS = 16, 4  # of the iteration: more directions than are asked for, and how often they are refined


def singular(
    matrix_OJ: Tensor, rank: int, part: str = "principal", exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples u [O, rank], s [rank], vh [rank, J] of a matrix, the largest value first; fewer if it has fewer.

    Args:
        part: "principal", "middle" or "last" of them.
        exact: by a full SVD, too, where subspace iteration from a fixed seed would do: principal and last ones of
            large matrices, for which a full SVD takes seconds.
    """
    full = min(matrix_OJ.shape)
    rank, wider = min(rank, full), rank + _EXTRA
    if not exact and full > max(EXACT_BELOW, 4 * wider):
        found = _NEAR.get(part, _no_way)(matrix_OJ, rank)
        if found is not None:
            return found
    u, s, vh = torch.linalg.svd(matrix_OJ, full_matrices=False)
    first = {"principal": 0, "middle": (full - rank) // 2, "last": full - rank}[part]
    return u[:, first : first + rank], s[first : first + rank], vh[first : first + rank]


Triples = tuple[Tensor, Tensor, Tensor]


def _largest(matrix_OJ: Tensor, rank: int) -> Triples:
    right = _directions(matrix_OJ.shape[1], rank, matrix_OJ)
    for _ in range(_ROUNDS):
        left = torch.linalg.qr(matrix_OJ @ right)[0]
        right = torch.linalg.qr(matrix_OJ.T @ left)[0]
    v, s, uh = torch.linalg.svd(right.T @ matrix_OJ.T, full_matrices=False)
    return uh[:rank].T, s[:rank], (right @ v[:, :rank]).T


def _smallest(matrix_OJ: Tensor, rank: int) -> Triples | None:
    """By the inverse of the smaller Gram matrix, in fp64, as it has the squares; None where it has no inverse."""
    if matrix_OJ.shape[0] > matrix_OJ.shape[1]:
        found = _smallest(matrix_OJ.T, rank)
        return found and (found[2].T, found[1], found[0].T)
    wide = matrix_OJ.to("cpu" if matrix_OJ.device.type == "mps" else matrix_OJ.device, torch.float64)
    gram = wide @ wide.T
    gram.diagonal().add_(len(gram) * torch.finfo(gram.dtype).eps * gram.trace())  # for weights of a lower rank
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    left = _directions(len(gram), rank, wide)
    for _ in range(_ROUNDS):
        left = torch.linalg.qr(torch.cholesky_solve(left, factor))[0]
    u, s, vh = torch.linalg.svd(left.T @ wide, full_matrices=False)
    return (left @ u[:, -rank:]).to(matrix_OJ), s[-rank:].to(matrix_OJ), vh[-rank:].to(matrix_OJ)


def _directions(size: int, rank: int, like: Tensor) -> Tensor:
    """To start from [size, rank + _EXTRA], drawn on the CPU: the same whatever the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((size, rank + _EXTRA), generator=generator, dtype=like.dtype).to(like.device)


def _no_way(matrix_OJ: Tensor, rank: int) -> None:
    return None


_NEAR: dict[str, Callable[[Tensor, int], Triples | None]] = {"principal": _largest, "last": _smallest}
