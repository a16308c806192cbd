"""Linear and convolution layers seen as one thing: a matrix [O, I * K] and the operation that applies it.

Letters: B batch, T tokens or output pixels, O output features, I input features per group, K kernel positions, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RowRanges = tuple[tuple[int, int], ...]  # ranges (start, stop) of output rows, in an order

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NEVER_CALLED = ("NonDynamicallyQuantizableLinear",)  # the output projection inside nn.MultiheadAttention
_CONV_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Geometry:
    """What an adapter must know of the layer it sits on.

    Attributes:
        out_features: O.
        in_features: I, counted per group as in the weight [O, I, *kernel].
        kernel: () for a Linear, otherwise one size per spatial axis.
        stride, dilation: one value per spatial axis.
        pads: (before, after) per spatial axis.
        groups: convolution groups; the layer's input has I * groups channels.
        padding_mode: as torch spells it; everything but "zeros" is padded before the convolution.
        bias: whether the layer has one.
        family: which algorithms are for it; `norms` has the other one.
    """

    family: ClassVar[str] = "matrix"

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Geometry | None:
        """Geometry of a layer, or None if its kind cannot be adapted.

        Quantised Linears count: their weight may be packed, but they know their features. A Linear whose weight is
        used by its parent, which never calls it, does not.
        """
        if type(module).__name__ in _NEVER_CALLED:
            return None
        if isinstance(module, nn.Linear):
            return cls(module.out_features, module.in_features, bias=module.bias is not None)
        if isinstance(module, _CONV_CLASSES):
            return cls(
                module.out_channels,
                module.in_channels // module.groups,
                tuple(module.kernel_size),
                tuple(module.stride),
                _pads(module),
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
                module.bias is not None,
            )
        return None

    @classmethod
    def of_weight(cls, shape: Sequence[int]) -> Geometry:
        """Geometry of a bare weight [O, I, *kernel]: enough for updates and merges, not for a forward pass."""
        kernel = tuple(shape[2:])
        ones = (1,) * len(kernel)
        return cls(shape[0], shape[1], kernel, ones, ((0, 0),) * len(kernel), ones)

    @property
    def is_conv(self) -> bool:
        return bool(self.kernel)

    @property
    def kernel_size(self) -> int:
        """K, 1 for a Linear."""
        return math.prod(self.kernel)

    @property
    def has_kernel(self) -> bool:
        """A convolution that sees more than one pixel: the only kind that conv_dim and Tucker forms speak of."""
        return any(k != 1 for k in self.kernel)

    @property
    def columns(self) -> int:
        """I * K."""
        return self.in_features * self.kernel_size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features, *self.kernel)

    @property
    def ones(self) -> tuple[int, ...]:
        """The kernel of a 1x1 convolution of the same kind; () for a Linear."""
        return (1,) * len(self.kernel)

    @property
    def feature_axis(self) -> int:
        """Of the features in inputs and outputs, from the last axis back."""
        return -1 - len(self.kernel)

    @property
    def kind(self) -> str:
        """As a person would name it: Linear, Conv2d 3x3, Conv2d 3x3 g=4."""
        if not self.is_conv:
            return "Linear"
        groups = f" g={self.groups}" if self.groups > 1 else ""
        return f"Conv{len(self.kernel)}d {'x'.join(map(str, self.kernel))}{groups}"

    def on_outputs(self, vector_O: Tensor, y: Tensor | None = None) -> Tensor:
        """One value per output feature, shaped to multiply the layer's output y."""
        return vector_O.reshape(-1, *self.ones) if self.kernel else vector_O

    def on_inputs(self, vector_I: Tensor) -> Tensor:
        """One value per input feature, shaped to multiply the layer's input."""
        return vector_I.repeat(self.groups).reshape(-1, *self.ones)

    def tokens(self, x: Tensor) -> int:
        """T: how many output positions one call computes."""
        if not self.is_conv:
            return x.numel() // max(1, x.shape[-1])
        spatial = x.shape[-len(self.kernel) :]
        batch = x.shape[0] if x.dim() > len(self.kernel) + 1 else 1
        sizes = zip(spatial, self.pads, self.dilation, self.kernel, self.stride, strict=True)
        return batch * math.prod([(n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), d, k, s in sizes])

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation without bias, with any weight of this layer's shape."""
        return self.convolve(x, weight, self.groups) if self.is_conv else F.linear(x, weight)

    def convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Convolution with this layer's stride, padding and dilation, but another weight [*, *, *kernel] and groups."""
        padding: tuple[int, ...] = tuple(a for a, _ in self.pads)
        if self.padding_mode != "zeros" or any(a != b for a, b in self.pads):
            flat = [n for pair in reversed(self.pads) for n in pair]
            x = F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0,) * len(padding)
        return _CONVS[len(self.kernel)](x, weight, None, self.stride, padding, self.dilation, groups)

    def pointwise(self, h: Tensor, matrix: Tensor, groups: int = 1) -> Tensor:
        """Apply [out, in / groups] to every position: the 1x1 sibling of this layer."""
        if not self.is_conv:
            return F.linear(h, matrix)
        return _CONVS[len(self.kernel)](h, matrix.reshape(*matrix.shape[:2], *self.ones), groups=groups)


def _pads(module: Any) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis; torch keeps the resolved form of "same" as a reversed flat list."""
    if isinstance(module.padding, str):
        flat = list(module._reversed_padding_repeated_twice)
        return tuple(reversed([(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]))
    return tuple((p, p) for p in module.padding)


def cast_to_input(parameter: Tensor, x: Tensor) -> Tensor:
    """Parameter in the dtype of x, unless autocast will see to it: fp32 adapters also run on a bare bf16 model."""
    if parameter.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return parameter
    return parameter.to(x.dtype)
