"""One adapted layer: the single place where scale, multiplier and dropouts meet an algorithm.

    y = base(x) + multiplier * scale * scalar * op(x, dW)         W' = W + multiplier * scale * scalar * dW

`forward` and `new_weight` are two readings of that line and are tested equal; `magnitude` has the line with DoRA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..algos import Reweight
from ..tensors import base_weight
from ..tensors.geometry import cast_to_input
from .attached import AttachedAdapter
from .dropout import CallGate, Dropouts, module_mask, rank_mask
from .magnitude import ratio
from .site import Site, read_whole

_NONE = Dropouts()


class AdaptedLayer(AttachedAdapter):
    """The formula of an adapted layer, see AttachedAdapter for what it is made of."""

    def new_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """W' for a base weight W [O, I, *kernel] of fp32 or wider, on W's device; W itself at multiplier 0."""
        m = self.runtime.multiplier if multiplier is None else multiplier
        if isinstance(m, Tensor):
            raise ValueError("one multiplier per sample cannot be merged into a weight: set a single number")
        if m == 0:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # hosts merge inside their autocast, too
            change, magnitude = self.wide_adapter().weight_change(weight, self.strength), self.magnitude
            if magnitude is None:
                return weight + m * change
            magnitude, whole = magnitude.to(weight), weight + change
            kept = 0 if self.on_output else 1
            norms = torch.linalg.vector_norm(whole, dim=[i for i in range(whole.dim()) if i != kept], keepdim=True)
            return weight + m * (whole * ratio(magnitude, norms.detach()) - weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the one base module, with the update."""
        return self.run(self.sites[0], x, *args, **kwargs)

    def run(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of one base module, with the update, in the base output's dtype."""
        assert site.below is not None, "forward of a layer that is not attached"
        runtime = self.runtime
        if not site.acts or (not isinstance(runtime.multiplier, Tensor) and runtime.multiplier == 0):
            return site.below(x, *args, **kwargs)
        if not (self.adapter.stepwise and self._trains):
            return self._changed(site, x, *args, **kwargs)
        self.adapter.begin(x)
        try:
            return self._changed(site, x, *args, **kwargs)
        finally:  # checkpointing leaves a layer by an exception, too, once it has computed enough again
            self.adapter.end()

    def _changed(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert site.below is not None
        runtime = self.runtime
        gate = CallGate(self._dropped(runtime.multiplier, x))
        more = self._more(x) if runtime.region is None else None
        if more is not None:  # one call of the base for both of its terms
            y = site.below(x + gate.output(more), *args, **kwargs)
            y = y if self.adapter.side else y + gate.output(self._product(site, x + more, self.strength)).to(y.dtype)
        else:
            y = site.below(x, *args, **kwargs)
            if runtime.region is not None:
                y = runtime.region.add(self.lora_name, lambda x, y: self._change(site, x, y, gate), x, y)
            else:
                y = y + self._change(site, x, y, gate)
        if self.perturbation is not None and self._trains:
            noise = self.perturbation.output(self.adapter.geometry, x, site.take_rows, site.first_row)
            y = y if noise is None else y + CallGate(runtime.multiplier).output(noise.to(y.dtype))
        return y

    def update(self, x: Tensor) -> Tensor:
        """The adapter's part of the output of the one base module, without magnitude."""
        return self._product(self.sites[0], x, self._strength(self._dropped(self.runtime.multiplier, x)))

    def _change(self, site: Site, x: Tensor, y: Tensor, gate: CallGate) -> Tensor:
        """What is added to the output y of a base module, in its dtype; `gate` holds the multiplier."""
        magnitude, geometry = self.magnitude, self.adapter.geometry
        if magnitude is None and not self.adapter.side:
            change = self._product(site, x, self._strength(gate.scale)).to(y.dtype)
            more = bias_part(site, y, gate)
            return change if more is None else change + more
        outside, more = self.bias_below(site, y), self._more(x)
        if more is not None:
            assert site.below is not None
            change = site.below(gate.output(more)) - outside
            return change if self.adapter.side else change + gate.output(self._product(site, x + more, self.strength))
        if isinstance(self.adapter, Reweight):
            return gate.output(self._reweighted(site, x, y - outside))
        assert magnitude is not None
        r = ratio(site.take_rows(magnitude), self._norms(site).to(magnitude.device)).flatten()
        update = self._product(site, x, self.strength)
        change = geometry.on_outputs(r - 1).to(y) * (y - outside) + (geometry.on_outputs(r).to(update) * update).to(y)
        return gate.output(change)

    def bias_below(self, site: Site, y: Tensor) -> Tensor | float:
        """The bias below this layer at one of its modules, with what other networks do to it there, shaped as a part of
        the output y; 0 without one. Differentiable: their output has it as well."""
        under, bias = site.under(), getattr(site.module, "bias", None)
        if under is None:
            return 0.0 if bias is None else self.adapter.geometry.on_outputs(bias.to(y.dtype))
        layer = under.layer
        assert isinstance(layer, AdaptedLayer)
        below = layer.bias_below(under, y)
        more = bias_part(under, y, CallGate(layer.runtime.multiplier)) if under.acts else None
        return below if more is None else below + more

    def _reweighted(self, site: Site, x: Tensor, plain: Tensor) -> Tensor:
        """(T - 1) y for the rows of one module; those of the others are in the weights only, and so are columns."""
        assert isinstance(self.adapter, Reweight)
        if self.adapter.side == "output":
            at, pieces = self._axis, site.pieces
            own = self.adapter.change(plain, at) if pieces is None else self.adapter.change_rows(plain, at, pieces)
            if own is not None:
                return own
        change = site.take_rows(self.adapter.weight_change(self.whole_weight(x.device)))
        return self.adapter.geometry.op(x, cast_to_input(change, x)).to(plain.dtype)

    def _more(self, x: Tensor) -> Tensor | None:
        """(T - 1) x, for what acts on the input features: magnitudes of that side, or a multiplicative adapter."""
        if isinstance(self.adapter, Reweight):
            return self.adapter.change(x, self._axis) if self.adapter.side == "input" else None
        magnitude = self.magnitude
        if magnitude is None or self.on_output:
            return None
        r = ratio(magnitude, self._norms().to(magnitude.device)).flatten()
        return x * self.adapter.geometry.on_inputs(r - 1).to(x)

    @property
    def _axis(self) -> int:
        """Of the features in inputs and outputs."""
        return -1 - len(self.adapter.geometry.kernel)

    def _dropped(self, multiplier: float | Tensor, x: Tensor) -> float | Tensor:
        """The multiplier, or 0 where module_dropout leaves the call out."""
        if isinstance(multiplier, Tensor) and multiplier.device != x.device:
            multiplier = multiplier.to(x.device)
        p = self._active_dropouts().module_dropout
        return multiplier * module_mask(p, x) if p else multiplier

    def _product(self, site: Site, x: Tensor, strength: float | Tensor) -> Tensor:
        """strength * op(x, dW) for the rows of a site, in the cheaper of its exact forms."""
        adapter, drops = self.adapter.on(site), self._active_dropouts()
        if adapter.geometry.is_conv and x.dim() == len(adapter.geometry.kernel) + 1:
            return self._product(site, x[None], strength)[0]
        if isinstance(strength, Tensor) and strength.device != x.device:
            strength = strength.to(x.device)
        gate = CallGate(strength, drops.dropout, drops.rank_dropout, drops.rank_dropout_scale)
        if site.pieces is not None:
            return adapter.apply_rows(x, gate, site.pieces)
        factored, materialised = adapter.flops(adapter.geometry.tokens(x))
        if self.runtime.factored is not None and factored < math.inf:
            factored = 0 if self.runtime.factored else math.inf
        # Elementwise dropout needs the rank activation, which only the factored form has.
        if factored <= materialised or (drops.dropout and adapter.record.rank_axis):
            return adapter.apply_delta(x, gate)
        masked = drops.rank_dropout and adapter.record.rank_axis
        mask = rank_mask((adapter.mask_size,), drops.rank_dropout, x, drops.rank_dropout_scale) if masked else None
        delta = adapter.delta(mask)
        if not torch.is_autocast_enabled(x.device.type):
            delta = delta.to(x.dtype)
        return gate.output(adapter.geometry.op(x, delta))

    @property
    def _trains(self) -> bool:
        return self.training and not self.runtime.sampling and not self.runtime.for_inference

    def _active_dropouts(self) -> Dropouts:
        return self.dropouts if self._trains else _NONE

    # -- weight space

    def merge(self, multiplier: float | None = None, device: torch.device | None = None) -> base_weight.Rounding:
        """Put W' into the base layer, computed in fp32 or wider and rounded once; what its form lost in that. The
        forward pass adds nothing from then on."""
        m = self.runtime.multiplier if multiplier is None else multiplier
        if not isinstance(m, Tensor) and m == 0:
            for site in self.sites:
                site.hold()
            return base_weight.EXACT
        with torch.no_grad():
            W = read_whole(self.sites, self.adapter.geometry.weight_shape, lambda site: site.read(device))
            new = self.new_weight(W, multiplier)
            lost = base_weight.EXACT
            for site in self.sites:
                lost += site.change(site.take_rows(W), site.take_rows(new))
                site.hold()
            for site in self.sites:
                site.add_to_bias(self.adapter.bias_change(), m)
            return lost


def bias_part(site: Site, y: Tensor, gate: CallGate) -> Tensor | None:
    """What the adapter of a site adds to the output y by changing the bias; None = nothing ever."""
    assert site.layer is not None
    adapter = site.layer.adapter
    change = adapter.bias_change()
    if change is None:
        return None
    return gate.output(adapter.geometry.on_outputs(site.take_rows(change), y).to(y).expand_as(y))
