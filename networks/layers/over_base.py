"""Where a base layer lies open, it and its update are one function; how that is decided, once for each kind of call.

Open is a plain Linear or convolution, whose own forward is right below the adapter, with a weight of 16-bit numbers or
wider. Everything else takes the way through the base's own forward: quantised and wrapped layers, other networks on the
same layer, several multipliers, regions, dropouts, compiled models, and passes that are differentiated in other ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..tensors.forms import HALF_AND_WIDER
from ..tensors.fused import Call, OverBase, Switch, is_open
from ..tensors.fused_magnitude import scaled
from .precision import without_autocast

if TYPE_CHECKING:
    from .adapted import AdaptedLayer
    from .site import Site

Form = Callable[["AdaptedLayer", Tensor, Tensor, Tensor | None, float], Tensor]

KINDS = 64  # of calls that a layer remembers: buckets of sizes, times what is switched

_OWN: dict[type[nn.Module], tuple[str, ...]] = {nn.Linear: ("forward",)}  # methods in which its formula is
_OWN |= {conv: ("forward", "_conv_forward") for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def over_base(site: Site, x: Tensor) -> Tensor | None:
    """The output of a base module with its update, by one function; None = not to be had so."""
    if torch.compiler.is_compiling() or not Switch.on or type(x) is not Tensor or _is_transformed():
        return None
    layer, own = site.layer, site.module._parameters
    weight = own.get("weight")
    if layer is None or weight is None:
        return None
    runtime = layer.runtime
    kind = (x.shape, weight.dtype, type(weight), weight.requires_grad, runtime.multiplier == 1, runtime.factored)
    if kind not in site.forms:
        if len(site.forms) >= KINDS:
            site.forms.clear()
        site.forms[kind] = _decide(site, layer, x, weight)
    form = site.forms[kind]
    assert not isinstance(runtime.multiplier, Tensor)
    return None if form is None else form(layer, x, weight, own["bias"], runtime.multiplier)


def _is_transformed() -> bool:
    """Whether functions without a rule for it are in the way: torch.func, forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _decide(site: Site, layer: AdaptedLayer, x: Tensor, weight: Tensor) -> Form | None:
    if not _is_usual(layer) or site.row_ranges is not None or not _lies_open(site, x, weight):
        return None
    if layer.side and layer.runtime.multiplier != 1:
        return None
    adapter = layer.adapter
    form = adapter.over_base(Call(x.shape, adapter.geometry.tokens(x), layer.runtime.factored))
    if form is None:
        return None
    found: Form = _WithMagnitude(form, layer.on_output) if layer.side else _Plain(form)
    return _Stepwise(found) if adapter.spec.stepwise else found


def _is_usual(layer: AdaptedLayer) -> bool:
    """Whether the update is strength * op(x, dW) and nothing else."""
    adapter = layer.adapter
    return not (layer.dropouts or layer.perturbation) and adapter.scalar is None and adapter.bias_parameter is None


def _lies_open(site: Site, x: Tensor, weight: Tensor) -> bool:
    """Whether the base's own forward is right below, of a kind that is known, and its weight is plain numbers."""
    assert site.layer is not None
    module, geometry = site.module, site.layer.adapter.geometry
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in HALF_AND_WIDER and not weight.requires_grad
    shaped = weight.shape == geometry.weight_shape and (not geometry.is_conv or x.dim() == weight.dim())
    return plain and shaped and is_open(geometry) and _has_own_forward(module, site.below)


def _has_own_forward(module: nn.Module, below: object) -> bool:
    kind = next((kind for kind in _OWN if isinstance(module, kind)), None)
    if kind is None or any(getattr(type(module), name) is not getattr(kind, name) for name in _OWN[kind]):
        return False
    return getattr(below, "__self__", None) is module and getattr(below, "__name__", "") == "forward"


def _adapter(layer: AdaptedLayer) -> Any:
    """Without the walk of `nn.Module.__getattr__`, as everywhere below: a call of a layer asks for a dozen."""
    return layer._modules["adapter"]


@dataclass(frozen=True)
class _Plain:
    form: OverBase

    def __call__(
        self, layer: AdaptedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float
    ) -> Tensor:
        adapter = _adapter(layer)
        return self.form(adapter, x, weight, bias, adapter.strength(multiplier, layer.scale))


@dataclass(frozen=True)
class _WithMagnitude:
    """DoRA at multiplier 1: the form's output, without its bias times g / n, or the form's output for x times g / n."""

    form: OverBase
    on_output: bool

    def __call__(
        self, layer: AdaptedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float
    ) -> Tensor:
        adapter = _adapter(layer)
        ones = adapter.geometry.ones
        strength = adapter.strength(multiplier, layer.scale)
        with torch.no_grad(), without_autocast(x.device.type):
            squares = adapter.norm_sq(weight, strength, self.on_output)
        change = cast(Tensor, layer._parameters["magnitude_change"])
        start = cast(Tensor, layer._buffers["magnitude_start"])
        if not self.on_output:
            return self.form(adapter, scaled(x, change, start, squares, None, ones), weight, bias, strength)
        return scaled(self.form(adapter, x, weight, bias, strength), change, start, squares, bias, ones)


@dataclass(frozen=True)
class _Stepwise:
    form: Form

    def __call__(
        self, layer: AdaptedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float
    ) -> Tensor:
        if not layer.in_step:
            return self.form(layer, x, weight, bias, multiplier)
        layer.adapter.begin(x)
        try:
            return self.form(layer, x, weight, bias, multiplier)
        finally:  # checkpointing leaves a layer by an exception, too, once it has computed enough again
            layer.adapter.end()
