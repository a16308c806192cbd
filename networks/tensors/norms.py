"""Normalisation layers seen as what the other layers are: an operation with a weight, here one value per feature.

    op(x, w) = xhat * w,      xhat = (x - mean) / sqrt(variance + eps), or x / sqrt(mean(x^2) + eps)

xhat is the normalised input without weight and bias; it is computed in fp32 or wider, whatever x is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import Geometry

# torch.nn.RMSNorm and its namesakes: the trainers' and diffusers' own, LlamaRMSNorm, T5LayerNorm, RMSNormFramePack.
_RMS = re.compile(r"\w*RMSNorm(FramePack)?|\w*T5LayerNorm")
_EPS = ("eps", "variance_epsilon")
_EPS_IN_CODE = 1e-6  # of the classes that have no attribute for it: FLUX.1's and FLUX.2's, whose weight is `scale`


@dataclass(frozen=True)
class NormGeometry(Geometry):
    """What an adapter must know of a LayerNorm, GroupNorm or RMSNorm.

    Attributes:
        mode: "layer", "group" or "rms".
        size: shape of weight and bias; () = not known.
        parts: groups of channels that are normalised together, in a GroupNorm.
        eps: beside the variance; None = torch's, for the dtype of the input.
        affine: whether the layer has a weight of its own; without one it counts as 1, and a missing bias as 0.
        bias: whether a bias belongs to it: its own or, without a weight, the one which a layer of its kind would have.
        unfit: why it cannot be trained; "" if it can.
    """

    family: ClassVar[str] = "norm"

    mode: str = ""
    size: tuple[int, ...] = ()
    parts: int = 1
    eps: float | None = None
    affine: bool = True
    unfit: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> NormGeometry | None:
        """Geometry of a normalisation layer, None for layers of other kinds and for what is made of several."""
        name = type(module).__name__
        if "norm" not in name.lower() or next(module.children(), None) is not None:
            return None
        mode, weight = _mode(module), _tensor(module, "weight", "scale")
        if not mode:
            return cls(0, 1, unfit=f"its formula is not known ({name})")
        size = _size(module, weight)
        return cls(
            size[0] if size else 0,
            1,
            bias=_tensor(module, "bias") is not None or (weight is None and mode != "rms"),
            mode=mode,
            size=size,
            parts=module.num_groups if isinstance(module, nn.GroupNorm) else 1,
            eps=_eps(module),
            affine=weight is not None,
            unfit="" if size else f"{name} has neither a weight nor a size",
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def kind(self) -> str:
        return {"layer": "LayerNorm", "group": f"GroupNorm {self.parts}", "rms": "RMSNorm"}.get(self.mode, "norm")

    def on_outputs(self, vector_O: Tensor, y: Tensor | None = None) -> Tensor:
        if self.mode != "group" or y is None:
            return vector_O
        return vector_O.reshape(-1, *[1] * (y.dim() - 2))  # channels come before the places

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """xhat * weight, in fp32 or wider, of the shape of x.

        Args:
            x: the layer's input.
            weight: of the layer's `size`.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(wide), weight.to(wide)
        if self.mode == "group":
            return F.group_norm(x, self.parts, weight, None, self.eps or 0.0)
        if self.mode == "layer":
            return F.layer_norm(x, self.size, weight, None, self.eps or 0.0)
        return F.rms_norm(x, self.size, weight, self.eps)


def layer_geometry(module: nn.Module) -> Geometry | None:
    """Geometry of a Linear, a convolution or a normalisation layer, or None."""
    return Geometry.of(module) or NormGeometry.of(module)


def weight_geometry(shape: Sequence[int]) -> Geometry:
    """Geometry of a bare weight: [O, I, *kernel], or [C] of a normalisation layer. Enough for updates and merges."""
    if len(shape) == 1:
        return NormGeometry(shape[0], 1, bias=True, size=tuple(shape))
    return Geometry.of_weight(shape)


def _mode(module: nn.Module) -> str:
    """How a class normalises; "" for those whose formula is not known."""
    if isinstance(module, nn.GroupNorm):
        return "group"
    if isinstance(module, nn.LayerNorm):
        return "layer"
    return "rms" if _RMS.fullmatch(type(module).__name__) else ""


def _eps(module: nn.Module) -> Any:
    return next((getattr(module, name) for name in _EPS if hasattr(module, name)), _EPS_IN_CODE)


def _tensor(module: nn.Module, *names: str) -> Tensor | None:
    """The first of these attributes that is a tensor."""
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, Tensor)), None)


def _size(module: Any, weight: Tensor | None) -> tuple[int, ...]:
    """Without a weight, by the attribute in which a class keeps its size."""
    if weight is not None:
        return tuple(weight.shape)
    size = next((getattr(module, n) for n in ("normalized_shape", "num_channels", "dim") if hasattr(module, n)), ())
    return (size,) if isinstance(size, int) else tuple(size)
