"""Where an adapter sits: the base modules that it changes. Most layers have one; where a model keeps a trainer's fused
projection as several modules, one adapter serves them all, each with its own output rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..tensors import base_weight
from ..tensors.geometry import RowRanges
from ..tensors.products import OfWeight, weight_times
from .dropout import CallGate
from .over_base import over_base

if TYPE_CHECKING:
    from .adapted import AdaptedLayer


class Site:
    """One base module under one adapter. Not a module itself: the base stays out of our parameters and state.

    The base module keeps its class, name, parameters and children; only its instance attribute `forward` is replaced
    while the adapter is attached. Its weight is read when it is needed, never kept: hosts move, cast and swap weights.

    Who is above and below on the same module is read from the forwards themselves, whose `__self__` is the site that
    put it there, and kept nowhere else: hosts replace forwards, too, and put old ones back, after which a list of our
    own would be wrong; a copy of model and network has copies of the links; and torch.compile can follow them.

    Args:
        module: the base module.
        row_ranges: the layer's output rows which this module computes, in its own order; None = all of them.
    """

    # what is known of others on the same module; a second copy of this package in one process has a class of its own
    links = ("kohya-networks", "layer", "below", "under", "acts", "row_ranges", "accompanies")

    def __init__(self, module: nn.Module, row_ranges: RowRanges | None = None) -> None:
        self.module, self.row_ranges = module, row_ranges
        self.layer: AdaptedLayer | None = None
        self.below: Callable[..., Tensor] | None = None  # what the module's forward was before ours
        self.forms: dict[Any, Any] = {}  # of `over_base`, by the kind of the call
        self.in_weight = False  # the module's weight holds the update, which its forward must not add again

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output plus the update, in the base output's dtype."""
        layer = self.layer
        assert layer is not None and self.below is not None, "forward of a layer that is not attached"
        if layer.runtime.alone and not (args or kwargs or self.in_weight):
            y = over_base(self, x)
            if y is not None:
                return y
        return layer.run(self, x, *args, **kwargs)

    def attach(self) -> None:
        if self.below is None:
            self.below = self.module.forward
            self.module.forward = self.forward
            self.forms.clear()

    def detach(self) -> None:
        """Take this adapter out; what is below and above it on the same module stays."""
        below, above = self.below, self._above()
        self.below = None
        if below is None:
            return
        if above is not None:
            above.below = below
            above.forms.clear()
        elif getattr(below, "__func__", None) is type(self.module).forward:
            del self.module.forward  # that of its class comes to light again
        else:
            self.module.forward = below

    @property
    def acts(self) -> bool:
        """Whether the forward pass is to add the update."""
        return self.layer is not None and self.layer.runtime.acts and not self.in_weight

    @property
    def accompanies(self) -> bool:
        """Whether this is a training adapter's: it adds to the output, and what is above stands on what is below."""
        return self.layer is not None and self.layer.runtime.trained is not None

    def under(self) -> Site | None:
        """The site of another network right below this one on the same module."""
        return _owner(self.below)

    def beside(self) -> list[Site]:
        """Those of training adapters right below this one which act in this pass."""
        found, site = [], self.under()
        while site is not None and site.accompanies:
            found += [site] if site.acts else []
            site = site.under()
        return found

    def ground(self) -> tuple[Callable[..., Tensor] | None, Site | None]:
        """What this layer stands on: the forward below it, and whose that is, without training adapters."""
        below, site = self.below, self.under()
        while site is not None and site.accompanies:
            below, site = site.below, site.under()
        return below, site

    def on_ground(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of what this layer stands on."""
        below, _ = self.ground()
        assert below is not None, "forward of a layer that is not attached"
        return below(x, *args, **kwargs)

    def _above(self) -> Site | None:
        """The site of another network right on top of this one; None also where a forward of others lies between."""
        site = _owner(vars(self.module).get("forward"))
        if site is self:
            return None
        while site is not None and site.under() is not self:
            site = site.under()
        return site

    @property
    def first_row(self) -> int:
        """The layer's output row with which this module begins."""
        return self.row_ranges[0][0] if self.row_ranges else 0

    def select_rows(self, whole: Tensor) -> Tensor:
        """This module's part of something that has one row (axis 0) per output feature of the layer."""
        if self.row_ranges is None:
            return whole
        parts = [whole[start:stop] for start, stop in self.row_ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put_rows(self, whole: Tensor, rows: Tensor) -> None:
        """The inverse of `select_rows`, in place."""
        at = 0
        for start, stop in self.row_ranges or ((0, whole.shape[0]),):
            whole[start:stop] = rows[at : at + stop - start]
            at += stop - start

    @property
    def is_meta(self) -> bool:
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, Tensor) and weight.is_meta

    def read(self, device: torch.device | None = None) -> Tensor:
        """The module's weight, in fp32 or wider; on a device, or where it is."""
        return base_weight.read(self.module, device)

    @torch.no_grad()
    def weight(self, device: torch.device | None = None) -> Tensor:
        """The same below this layer, with what other networks do to it there: its rows [O', I, *kernel]."""
        _, under = self.ground()
        if under is None:
            return self.read(device)
        assert under.layer is not None
        if not under.acts:
            return under.weight(device)
        if under.row_ranges is None:
            return under.layer.new_weight(under.weight(device))
        return under.select_rows(under.layer.new_weight(under.layer.whole_weight(device)))

    def whole_weight(self, device: torch.device | None = None) -> Tensor:
        """The same of the whole layer [O, I, *kernel]."""
        assert self.layer is not None
        return self.layer.whole_weight(device)

    def bias(self, y: Tensor) -> Tensor | float:
        """The bias below this layer, with what other networks do to it there, shaped as a part of the output y; 0
        without one. Differentiable: their output has it as well."""
        assert self.layer is not None
        (_, under), bias = self.ground(), getattr(self.module, "bias", None)
        if under is None:
            return 0.0 if bias is None else self.layer.adapter.geometry.on_outputs(bias.to(y.dtype))
        assert under.layer is not None
        below = under.bias(y)
        more = under.bias_change(y, under.layer.runtime.multiplier) if under.acts else None
        return below if more is None else below + more

    def bias_change(self, y: Tensor, multiplier: float | Tensor) -> Tensor | None:
        """What the adapter adds to the output y by changing the bias, in its shape and dtype; None = nothing ever."""
        assert self.layer is not None
        adapter = self.layer.adapter
        change = adapter.bias_change()
        if change is None:
            return None
        part = adapter.geometry.on_outputs(self.select_rows(change), y).to(y).expand_as(y)
        return CallGate(multiplier).output(part)

    def times(self, matrix_IR: Tensor) -> Tensor:
        """W M [O, R, *kernel] for the weight W below the adapter, differentiable in M.

        A weight of the matrix's dtype is used as it is, also where autocast will see to that. Others are decoded, in
        the backward pass again: kept for it, a quantised model would be held in fp32.
        """
        own = base_weight.plain(self.module) if self.ground()[1] is None else None
        if own is not None and (own.dtype == matrix_IR.dtype or torch.is_autocast_enabled(own.device.type)):
            return weight_times(own, matrix_IR)

        def product(matrix_IR: Tensor) -> Tensor:
            return OfWeight(self.weight()).times(matrix_IR)

        if not torch.is_grad_enabled() or not matrix_IR.requires_grad:
            return product(matrix_IR)
        decoded: Tensor = checkpoint(product, matrix_IR, use_reentrant=False, preserve_rng_state=False)
        return decoded

    def add_to_bias(self, change: Tensor | None, multiplier: float | Tensor) -> None:
        """Add a change of the layer's bias, in place, rounded once."""
        if change is not None:
            bias = self.module.get_parameter("bias")
            # float8 has no promotion rules, and a host's model.to(float8) reaches biases, too
            wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
            bias.copy_(bias.to(wide) + multiplier * self.select_rows(change).to(bias.device, wide))

    def shares(self, weight: Tensor) -> bool:
        """Whether what was read is the module's own memory."""
        return base_weight.shares(self.module, weight)

    def change(self, new: Tensor) -> base_weight.Rounding:
        """Store another weight, in the module's own form."""
        return base_weight.change(self.module, new)

    def hold(self) -> None:
        """The module's weight has this layer's update from now on."""
        _set_holders(self.module, [*_HOLDERS.get(self.module, ()), self])

    def backup(self) -> None:
        """Remember the weight for `restore`, once for all networks on the module."""
        if not base_weight.has_backup(self.module):
            base_weight.backup(self.module)
            _KEPT[self.module] = WeakSet(_HOLDERS.get(self.module, ()))

    def restore(self) -> None:
        """Put the remembered weight back, bit for bit; what others have merged since then goes with it."""
        if base_weight.has_backup(self.module):
            base_weight.restore(self.module)
            _set_holders(self.module, _KEPT.pop(self.module, ()))


def _owner(forward: object) -> Site | None:
    """The site whose `forward` this is."""
    owner = getattr(forward, "__self__", None)
    return owner if getattr(owner, "links", None) == Site.links else None


_HOLDERS: WeakKeyDictionary[nn.Module, WeakSet[Site]] = WeakKeyDictionary()  # whose updates a weight has
_KEPT: WeakKeyDictionary[nn.Module, WeakSet[Site]] = WeakKeyDictionary()  # and the weight of its backup


def _set_holders(module: nn.Module, sites: Iterable[Site]) -> None:
    for site in _HOLDERS.get(module, ()):
        site.in_weight = False
    _HOLDERS[module] = WeakSet(sites)
    for site in _HOLDERS[module]:
        site.in_weight = True


class Whole:
    """The products of a whole layer, its modules put together."""

    def __init__(self, sites: Sequence[Site], out_features: int) -> None:
        self.sites, self.out_features = sites, out_features

    def times(self, matrix_IR: Tensor) -> Tensor:
        parts = {site: site.times(matrix_IR) for site in self.sites}
        return read_whole(self.sites, (self.out_features, *parts[self.sites[0]].shape[1:]), parts.__getitem__)


def read_whole(sites: Sequence[Site], shape: Sequence[int], read: Callable[[Site], Tensor]) -> Tensor:
    """Something with one row per output feature, put together from what `read` gives for each site."""
    first = read(sites[0])
    if sites[0].row_ranges is None:
        return first
    whole = first.new_empty(tuple(shape))
    for site in sites:
        site.put_rows(whole, first if site is sites[0] else read(site))
    return whole
