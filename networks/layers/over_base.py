"""Where a base layer lies open, it and its update are one function; how that is decided, once for each kind of call.

Open is a plain Linear or convolution, whose own forward is right below the adapter, with a weight of 16-bit numbers or
wider. On others, quantised and wrapped ones and those with other networks on them, the update alone is one function,
beside the base's own forward. Plain autograd has the rest: several multipliers, regions, dropouts, compiled
models, and passes that are differentiated in other ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..tensors.forms import HALF_AND_WIDER
from ..tensors.fused import BesideBase, Call, OverBase, Switch, autocast_dtype, is_open, is_wide, without_autocast
from ..tensors.fused_scaling import with_lengths
from ..tensors.products import AsItLies

if TYPE_CHECKING:
    from .adapted import AdaptedLayer
    from .site import Site

Form = Callable[["Site", Tensor, Any, Tensor | None, float], Tensor]

KINDS = 64  # of calls that a layer remembers: buckets of sizes, times what is switched

_OWN: dict[type[nn.Module], tuple[str, ...]] = {nn.Linear: ("forward",)}  # methods in which its formula is
_OWN |= {conv: ("forward", "_conv_forward") for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def over_base(site: Site, x: Tensor) -> Tensor | None:
    """The output of a base module with its update, by one function; None = not to be had so."""
    if torch.compiler.is_compiling() or not Switch.on or type(x) is not Tensor or _is_transformed():
        return None
    layer, own = site.layer, site.module._parameters
    assert layer is not None
    if layer.dropouts.acts or layer.perturbation is not None:
        return None
    weight, bias, runtime = own.get("weight"), own.get("bias"), layer.runtime
    stored = None if weight is None else (weight.dtype, type(weight), weight.requires_grad or _learns(bias))
    kind = (x.shape, stored, autocast_dtype(x), runtime.multiplier == 1, runtime.factored)
    if kind not in site.forms:
        if len(site.forms) >= KINDS:
            site.forms.clear()
        site.forms[kind] = _decide(site, layer, x, weight)
    form = site.forms[kind]
    assert not isinstance(runtime.multiplier, Tensor)
    return None if form is None else form(site, x, weight, bias, runtime.multiplier)


def _learns(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _is_transformed() -> bool:
    """Whether functions without a rule for it are in the way: torch.func, forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _decide(site: Site, layer: AdaptedLayer, x: Tensor, weight: Tensor | None) -> Form | None:
    if not _is_usual(site, layer, x):
        return None
    adapter, found = layer.adapter, cast("Form | None", None)
    call = Call(x.shape, adapter.geometry.tokens(x), layer.runtime.factored)
    if _lies_open(site, x, weight):
        found = _open_form(layer, replace(call, sums=is_wide(autocast_dtype(x) or x.dtype)))
    elif not layer.side and adapter.bias_parameter is None and (beside := adapter.beside_base(call)) is not None:
        found = Beside(beside)
    return _Stepwise(found) if found is not None and adapter.spec.stepwise else found


def _open_form(layer: AdaptedLayer, call: Call) -> Form | None:
    form, biased = layer.adapter.over_base(call), layer.adapter.bias_change() is not None
    if form is None or (layer.side and (biased or layer.runtime.multiplier != 1)):
        return None
    if layer.side:
        return _WithMagnitude(form, layer.on_output)
    return _WithBias(form) if biased else _Plain(form)


def _is_usual(site: Site, layer: AdaptedLayer, x: Tensor) -> bool:
    """Whether the update is strength * op(x, dW) and nothing else, for all rows of a layer of usual shape."""
    adapter = layer.adapter
    alone = adapter.scalar is None and site.row_ranges is None
    return alone and bool(x.numel()) and is_open(adapter.geometry)


def _lies_open(site: Site, x: Tensor, weight: Tensor | None) -> bool:
    """Whether the base's own forward is right below, of a kind that is known, and its weight is plain numbers."""
    assert site.layer is not None
    module, geometry = site.module, site.layer.adapter.geometry
    if type(weight) not in (Tensor, nn.Parameter) or weight is None:
        return False
    if weight.requires_grad or _learns(module._parameters.get("bias")):  # which a form has no gradient for
        return False
    shaped = weight.shape == geometry.weight_shape and (not geometry.is_conv or x.dim() == weight.dim())
    return shaped and weight.dtype in HALF_AND_WIDER and _has_own_forward(module, site.below)


def _has_own_forward(module: nn.Module, below: object) -> bool:
    kind = next((kind for kind in _OWN if isinstance(module, kind)), None)
    if kind is None or any(getattr(type(module), name) is not getattr(kind, name) for name in _OWN[kind]):
        return False
    return getattr(below, "__self__", None) is module and getattr(below, "__name__", "") == "forward"


def _parts(site: Site) -> tuple[Any, Any]:
    """Layer and adapter, without the walk of `nn.Module.__getattr__`, as everywhere below: a call asks for a dozen."""
    layer: Any = site.layer
    return layer, layer._modules["adapter"]


@dataclass(frozen=True)
class _Plain:
    form: OverBase

    def __call__(self, site: Site, x: Tensor, weight: Any, bias: Tensor | None, multiplier: float) -> Tensor:
        layer, adapter = _parts(site)
        return self.form(adapter, x, weight, bias, adapter.strength(multiplier, layer.scale))


@dataclass(frozen=True)
class _WithBias(_Plain):
    """With a change of the bias, which has no scale."""

    def __call__(self, site: Site, x: Tensor, weight: Any, bias: Tensor | None, multiplier: float) -> Tensor:
        y = super().__call__(site, x, weight, bias, multiplier)
        change = site.bias_change(y, multiplier)
        assert change is not None
        return y + change


@dataclass(frozen=True)
class Beside:
    """On whatever the base's own forward is: of other weights, of other networks, of a host."""

    form: BesideBase

    def __call__(self, site: Site, x: Tensor, weight: Any, bias: Tensor | None, multiplier: float) -> Tensor:
        layer, adapter = _parts(site)
        y = cast(Any, site.below)(x)
        if type(y) is not Tensor or y.dtype != (autocast_dtype(x) or x.dtype):
            return cast(Tensor, layer.added(site, x, y, multiplier))
        return self.form(adapter, x, y, adapter.strength(multiplier, layer.scale))


@dataclass(frozen=True)
class _WithMagnitude:
    """DoRA at multiplier 1: the form's output, without its bias times g / n, or the form's output for x times g / n."""

    form: OverBase
    on_output: bool

    def __call__(self, site: Site, x: Tensor, weight: Any, bias: Tensor | None, multiplier: float) -> Tensor:
        layer, adapter = _parts(site)
        ones = adapter.geometry.ones
        strength = adapter.strength(multiplier, layer.scale)
        change, start = layer._parameters["magnitude_change"], layer._buffers["magnitude_start"]
        with torch.no_grad(), without_autocast(x):
            wide = adapter if change.dtype.itemsize >= 4 else layer.wide_adapter()  # hosts cast all of a layer alike
            squares = wide.on(AsItLies(weight)).norm_sq(weight, strength, self.on_output)
        if not self.on_output:
            return self.form(adapter, with_lengths(x, change, start, squares, None, ones), weight, bias, strength)
        return with_lengths(self.form(adapter, x, weight, bias, strength), change, start, squares, bias, ones)


@dataclass(frozen=True)
class _Stepwise:
    form: Form

    def __call__(self, site: Site, x: Tensor, weight: Any, bias: Tensor | None, multiplier: float) -> Tensor:
        layer, adapter = _parts(site)
        if not layer.in_step:
            return self.form(site, x, weight, bias, multiplier)
        adapter.begin(x)
        try:
            return self.form(site, x, weight, bias, multiplier)
        finally:  # checkpointing leaves a layer by an exception, too, once it has computed enough again
            adapter.end()
