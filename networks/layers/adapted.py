"""One adapted layer: the single place where scale, multiplier and dropouts meet an algorithm.

    y = base(x) + multiplier * scale * scalar * op(x, dW)         W' = W + multiplier * scale * scalar * dW

`forward` and `new_weight` are two readings of that line and are tested equal; `magnitude` has the line with DoRA. With
a multiplicative algorithm both are what its own file says, the multiplier in front of what it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..algos import Adapter, Additive
from ..tensors import base_weight
from .dropout import CallGate, Dropouts, module_mask
from .magnitude import magnitude_shape, norms, ratio
from .perturbation import Perturbation
from .precision import kept_wide
from .runtime import Runtime
from .site import Site, Whole, read_whole

LIVE_SCALE = "live_scale"  # marks a live state among the keys; a file has alpha instead
WHOLE_MAGNITUDE = "magnitude"  # in live states from before a change was learnt

_NONE = Dropouts()


class AdaptedLayer(nn.Module):
    """An adapter on its base modules.

    Args:
        name: the saved name, `lora_unet_..._to_q`.
        base: the base layer, or the sites on which the adapter sits together.
        adapter: of the layer's geometry.
        scale: alpha / dim, alpha / sqrt(dim), or 1 for a form without rank.
        dropouts: that act in training; None = none.
        runtime: what all layers of a network share; None = of its own.
        dora: the side, "output" or "input", on which magnitudes are learnt; "" for none.
        perturbation: noise on the weight in training (GGPO), or None.

    Attributes:
        side: `dora`.
        magnitude_change: what is learnt of its magnitudes, from 0; None without DoRA.
        magnitude_start: what that is added to, in fp32 or wider whatever the rest is cast to.
    """

    magnitude_change: nn.Parameter | None
    magnitude_start: Tensor | None

    def __init__(
        self,
        name: str,
        base: nn.Module | Sequence[Site],
        adapter: Adapter,
        scale: float,
        dropouts: Dropouts | None = None,
        runtime: Runtime | None = None,
        dora: str = "",
        perturbation: Perturbation | None = None,
    ) -> None:
        super().__init__()
        self.lora_name, self.adapter, self.scale, self.side = name, adapter, float(scale), dora
        self.dropouts, self.runtime = dropouts or Dropouts(), runtime or Runtime()
        self.perturbation = perturbation
        self.sites = (Site(base),) if isinstance(base, nn.Module) else tuple(base)
        for site in self.sites:
            site.layer = self
        self.register_parameter("magnitude_change", None)
        self.register_buffer("magnitude_start", None)
        self._start_settled = False  # training, or what was loaded, goes on from the start of the magnitudes as it is
        if dora:
            assert not (self.dropouts.dropout or self.dropouts.rank_dropout), "DoRA with a dropout on the rank"
            like, shape = next(adapter.parameters()), magnitude_shape(adapter.geometry, self.on_output)
            self.magnitude_change = nn.Parameter(like.new_zeros(shape))
            self.magnitude_start = like.new_ones(shape, dtype=torch.promote_types(like.dtype, torch.float32))
            if adapter.started:  # what a file is to set comes with its magnitudes
                self.start_magnitude()

    @property
    def base(self) -> nn.Module:
        """The base module of a layer that has one."""
        return self.sites[0].module

    @property
    def on_output(self) -> bool:
        """Whether magnitudes are those of output rows."""
        return self.side != "input"

    @property
    def magnitude(self) -> Tensor | None:
        """The magnitudes as they act, in fp32 or wider, differentiable; None without DoRA."""
        if self.magnitude_start is None or self.magnitude_change is None:
            return None
        return self.magnitude_start + self.magnitude_change

    def learnt(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Path and parameter of all that its algorithm trains."""
        for path, parameter in self.named_parameters():
            if path.rpartition(".")[2] not in self.adapter.spec.frozen:
                yield path, parameter

    # -- attachment

    def attach(self) -> None:
        """Take over the forwards of its base modules.

        Raises:
            ValueError: start values are to come from a base weight that cannot be read, or is another's.
        """
        if not self.in_weight:
            self.init_from_base()
        for site in self.sites:
            site.attach()
        if not self.in_weight:
            self.start_magnitude()  # of the weight as it is with the networks below
            self._start_settled = not self._on_meta

    def detach(self) -> None:
        """Take this adapter out; what is below and above it on the same layer stays."""
        for site in self.sites:
            site.detach()

    def init_from_base(self) -> None:
        """Start values which follow from the base weight, where the adapter still waits for them.

        Raises:
            ValueError: the weight cannot be read, or is not the one that the adapter is for.
        """
        if not self.adapter.wants_base:
            return
        if self._on_meta:
            if self.adapter.needs_base:
                raise ValueError(
                    "its start values come from the base weight, which is not there yet (meta device): load the model "
                    "before the network is applied to it"
                )
            return
        with torch.no_grad():
            weight = self.whole_weight()
            with torch.autocast(weight.device.type, enabled=False):
                self.adapter.init_from_base(weight)

    def start_magnitude(self) -> None:
        """The lengths of W + s dW, unless training or a file has gone on from others. Hosts may load base weights until
        the layer is attached, so it is called again there."""
        if self.magnitude_start is None or self.magnitude_change is None or self._start_settled or self._on_meta:
            return
        with torch.no_grad():
            if not self.magnitude_change.any():
                self.magnitude_start.copy_(self._norms())

    @property
    def _on_meta(self) -> bool:
        """Whether a base weight is not there yet."""
        return any(site.is_meta for site in self.sites)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        """Casts and moves, from `.to()`, `.half()` and the like, of this module or of one around it."""
        start, self.magnitude_start = self.magnitude_start, None
        super()._apply(kept_wide(fn) if self.runtime.keeps_fp32 else fn, recurse)
        self.magnitude_start = None if start is None else kept_wide(fn)(start)
        return self

    # -- the forward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the one base module, with the update."""
        return self.run(self.sites[0], x, *args, **kwargs)

    def run(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of one base module, with the update, in the base output's dtype.

        Args:
            site: the module's.
            x: its input.
            args, kwargs: whatever else a host gives its forward.

        Raises:
            ValueError: there are multipliers for another number of samples.
        """
        assert site.below is not None, "forward of a layer that is not attached"
        runtime = self.runtime
        if not site.acts or (not isinstance(runtime.multiplier, Tensor) and runtime.multiplier == 0):
            return site.below(x, *args, **kwargs)
        if not (self.adapter.spec.stepwise and self.in_step):
            return self._changed(site, x, *args, **kwargs)
        self.adapter.begin(x)
        try:
            return self._changed(site, x, *args, **kwargs)
        finally:  # checkpointing leaves a layer by an exception, too, once it has computed enough again
            self.adapter.end()

    def _changed(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert site.below is not None
        m, region = self._dropped(self.runtime.multiplier, x), self.runtime.region
        beside = site.beside() if self.runtime.accompanied else []
        more = self._input_change(x) if region is None and not beside else None
        if more is not None:  # one call of the base for both of its terms
            y = site.below(x + CallGate(m).output(more), *args, **kwargs)
            y = _plus(y, self._output_change(site, x + more, y, m))
        elif region is not None:
            y = site.below(x, *args, **kwargs)
            y = region.add(self.lora_name, lambda x, y: self._change(site, x, y, m), x, y)
        else:
            y = base = site.on_ground(x, *args, **kwargs) if beside else site.below(x, *args, **kwargs)
            for other in beside:
                assert other.layer is not None
                y = _plus(y, other.layer._change(other, x, base, other.layer.runtime.multiplier))
            y = _plus(y, self._change(site, x, base, m) if beside else self._output_change(site, x, base, m))
        if self.perturbation is not None and self.in_step:
            noise = self.perturbation.output(self.adapter.geometry, x, site.select_rows, site.first_row)
            y = y if noise is None else y + CallGate(self.runtime.multiplier).output(noise.to(y.dtype))
        return y

    def added(self, site: Site, x: Tensor, y: Tensor, multiplier: float | Tensor) -> Tensor:
        """The output y of a base module with the update of the output side added."""
        return _plus(y, self._output_change(site, x, y, multiplier))

    def _change(self, site: Site, x: Tensor, y: Tensor, m: float | Tensor) -> Tensor:
        """All that the update adds to the output y of a base module, in its dtype; m is the multiplier."""
        more = self._input_change(x)
        if more is None:
            change = self._output_change(site, x, y, m)
            assert change is not None, "an adapter changes what goes in, what comes out, or both"
            return change
        part = site.on_ground(CallGate(m).output(more)) - site.bias(y)
        return _plus(part, self._output_change(site, x + more, y, m))

    def _input_change(self, x: Tensor) -> Tensor | None:
        """What the layer's input has to get added, at multiplier 1; None = nothing ever."""
        magnitude = None if self.on_output else self.magnitude
        if magnitude is None:
            return self.adapter.input_change(x)
        r = ratio(magnitude, self._norms().to(magnitude.device)).flatten()
        return x * self.adapter.geometry.on_inputs(r - 1).to(x)

    def _output_change(self, site: Site, x: Tensor, y: Tensor, m: float | Tensor) -> Tensor | None:
        """m times what the output of a module has to get added, in its dtype; None = nothing ever."""
        magnitude = self.magnitude if self.side == "output" else None
        change = self._update(site, x, y, m if magnitude is None else 1.0)
        if magnitude is not None and change is not None:
            geometry = self.adapter.geometry
            r = ratio(site.select_rows(magnitude), self._norms(site).to(magnitude.device)).flatten()
            update = geometry.on_outputs(r).to(change) * change
            change = CallGate(m).output(geometry.on_outputs(r - 1).to(y) * (y - site.bias(y)) + update.to(y))
        bias = site.bias_change(y, m)
        if change is None:
            return bias
        return change.to(y.dtype) if bias is None else change.to(y.dtype) + bias

    def _update(self, site: Site, x: Tensor, y: Tensor, m: float | Tensor) -> Tensor | None:
        """The adapter's own part of that."""
        return self.adapter.output_change(x, y, site, self._gate(m, x), self.runtime.factored)

    def _gate(self, m: float | Tensor, x: Tensor) -> CallGate:
        strength, drops = self.adapter.strength(m, self.scale), self._active_dropouts()
        if isinstance(strength, Tensor) and strength.device != x.device:
            strength = strength.to(x.device)
        return CallGate(strength, drops.dropout, drops.rank_dropout, drops.rank_dropout_scale)

    def update(self, x: Tensor) -> Tensor:
        """An additive adapter's part of the output of the one base module, without magnitude."""
        site, gate = self.sites[0], self._gate(self._dropped(self.runtime.multiplier, x), x)
        return cast(Additive, self.adapter).on(site).update(x, gate, site.row_ranges, self.runtime.factored)

    def _dropped(self, multiplier: float | Tensor, x: Tensor) -> float | Tensor:
        """The multiplier, or 0 where module_dropout leaves the call out."""
        if isinstance(multiplier, Tensor) and multiplier.device != x.device:
            multiplier = multiplier.to(x.device)
        p = self._active_dropouts().module_dropout
        return multiplier * module_mask(p, x) if p else multiplier

    @property
    def acts_otherwise(self) -> bool:
        """Whether it acts otherwise in training than in sampling."""
        return bool(self.dropouts or self.perturbation or self.adapter.spec.stepwise)

    @property
    def in_step(self) -> bool:
        """Whether the pass of this thread is one of training."""
        return self.training and not self.runtime.sampling and not self.runtime.for_inference

    def _active_dropouts(self) -> Dropouts:
        return self.dropouts if self.in_step else _NONE

    @property
    def strength(self) -> float | Tensor:
        """What multiplies dW at multiplier 1: scale * scalar."""
        return self.adapter.strength(1.0, self.scale)

    # -- weight space

    def new_weight(self, weight: Tensor, multiplier: float | None = None, in_place: bool = False) -> Tensor:
        """W' of a base weight.

        Args:
            weight: W [O, I, *kernel] of fp32 or wider.
            multiplier: None = that of the network.
            in_place: W may be written over, without gradient: the memory of one large weight is saved.

        Returns:
            As W, on its device; W itself at multiplier 0, or changed in place.

        Raises:
            ValueError: there is a multiplier for each sample.
        """
        m = self.runtime.multiplier if multiplier is None else multiplier
        if isinstance(m, Tensor):
            raise ValueError("one multiplier per sample cannot be merged into a weight: set a single number")
        if m == 0:
            return weight
        adapter, magnitude = self.wide_adapter(), self.magnitude
        with torch.autocast(weight.device.type, enabled=False):  # hosts merge inside their autocast, too
            if magnitude is None:
                return adapter.add_change_(weight if in_place else weight.clone(), m, self.strength)
            alone = in_place and m == 1
            whole = adapter.add_change_(weight if alone else weight.clone(), 1.0, self.strength)
            kept = 0 if self.on_output else 1
            norms = torch.linalg.vector_norm(whole, dim=[i for i in range(whole.dim()) if i != kept], keepdim=True)
            factor = ratio(magnitude.to(weight), norms.detach())
            if not in_place:
                return weight + m * (whole * factor - weight)
            whole.mul_(factor)
            return whole if alone else weight.lerp_(whole, m)

    def merge(self, multiplier: float | None = None, device: torch.device | None = None) -> base_weight.Rounding:
        """Put W' into the base layer, computed in fp32 or wider and rounded once. The forward pass adds nothing from
        then on.

        Args:
            multiplier: None = that of the network.
            device: to compute on; None = where the weight is.

        Returns:
            What the form in which the weight is stored lost of the update.

        Raises:
            ValueError: the weight cannot be read or written, or there is a multiplier for each sample.
        """
        m = self.runtime.multiplier if multiplier is None else multiplier
        if not isinstance(m, Tensor) and m == 0:
            for site in self.sites:
                site.hold()
            return base_weight.EXACT
        with torch.no_grad():
            W = read_whole(self.sites, self.adapter.geometry.weight_shape, lambda site: site.read(device))
            new = self.new_weight(W, multiplier, in_place=not any(site.shares(W) for site in self.sites))
            lost = base_weight.EXACT
            for site in self.sites:
                lost += site.change(site.select_rows(new))
                site.hold()
            for site in self.sites:
                site.add_to_bias(self.adapter.bias_change(), m)
            return lost

    @property
    def in_weight(self) -> bool:
        """Whether the base weight has the update."""
        return any(site.in_weight for site in self.sites)

    @torch.no_grad()
    def whole_weight(self, device: torch.device | None = None) -> Tensor:
        """The weight below this layer [O, I, *kernel], with what other networks do to it there, its modules put
        together; on a device, or where it is."""
        return read_whole(self.sites, self.adapter.geometry.weight_shape, lambda site: site.weight(device))

    def wide_adapter(self) -> Adapter:
        """The adapter in fp32 at least: some hosts cast a network to half precision before they merge it."""
        wide = all(p.dtype.itemsize >= 4 for p in self.adapter.parameters())
        return self.adapter if wide else copy.deepcopy(self.adapter).float()

    @property
    def acting(self) -> Additive:
        """The adapter on its own base, for what asks for dW itself: magnitudes and noise, which additive ones alone
        have (their `features`)."""
        return cast(Additive, self.adapter).on(Whole(self.sites, self.adapter.geometry.out_features))

    def _norms(self, only: Site | None = None) -> Tensor:
        """||W + s dW|| in the magnitude's shape; on the output side for the rows of one site if asked."""
        assert self.magnitude_start is not None
        sites = self.sites if only is None else (only,)
        with torch.no_grad():
            near = {site: site.weight().to(self.magnitude_start.device) for site in sites}
        shape = tuple(self.magnitude_start.shape)
        return norms(cast(Additive, self.wide_adapter()), near, self.strength, shape, self.on_output, only is not None)

    @property
    def has_backup(self) -> bool:
        """Whether `restore` would put a weight back."""
        return any(base_weight.has_backup(site.module) for site in self.sites)

    def backup(self) -> None:
        """Remember the base weight for `restore`."""
        for site in self.sites:
            site.backup()

    def restore(self) -> None:
        """Put the remembered weight back, bit for bit."""
        for site in self.sites:
            site.restore()

    # -- what a file says

    @property
    def alpha(self) -> float:
        """The value for which plain alpha / rank readers get our scale; a form without rank states its dim."""
        return self.alpha_at(self.adapter.laid_out.saved_rank)

    def alpha_at(self, rank: int | None) -> float:
        """The same in a file that holds the adapter with this rank."""
        return self.adapter.alpha_at(self.scale, rank)

    def set_alpha(self, alpha: float | None, file_rank: int | None = None) -> None:
        """The effective scale of a file: its alpha / its rank. None and 0 stand for the rank, as everywhere."""
        rank, option = file_rank or self.adapter.laid_out.saved_rank, self.adapter.spec.alpha_option
        if option:
            self.adapter.chosen[option] = alpha or 0.0
        if rank is not None:
            self.scale = alpha / rank if alpha else 1.0

    def load_magnitude(self, magnitude: Tensor | None, folded: bool = False) -> None:
        """The magnitude of a file; without one the update's own length, so that it acts as the plain one it is."""
        if self.magnitude_start is None or self.magnitude_change is None:
            return
        with torch.no_grad():
            own = self._norms() if magnitude is None else magnitude.reshape(self.magnitude_start.shape)
            self.magnitude_start.copy_(self.folded(own, back=True) if folded else own)
            self.magnitude_change.zero_()
        self._start_settled |= magnitude is not None

    @torch.no_grad()
    def folded(self, magnitude: Tensor, back: bool = False) -> Tensor:
        """A magnitude of output rows for readers that divide by ||W|| where we divide by ||W + s dW||; `back`: ours
        from theirs. On the input side nothing changes."""
        if not self.on_output:
            return magnitude
        W = self.whole_weight(magnitude.device)
        base = torch.linalg.vector_norm(W.flatten(1), dim=1).reshape(magnitude.shape).to(magnitude.device)
        changed = self._norms().to(base)
        known = (base > 0) & (changed > 0)
        factor = torch.where(known, changed / base if back else base / changed, 1.0)
        return magnitude * factor.to(magnitude.device)

    # -- live state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The live state carries the scale in float64: casting the network must not round it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + LIVE_SCALE] = torch.tensor(self.scale * self.adapter.plus_gain, dtype=torch.float64)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """For wrappers (data-parallel, compile), whose own walk never reaches the network's load_state_dict."""
        scale = state_dict.pop(prefix + LIVE_SCALE, None)
        if scale is None:
            missing.append(prefix + LIVE_SCALE)
        self.renew_state(state_dict, prefix)
        self.see_state(scale)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        """Say a live state of an earlier version in today's terms, in place; one of today stays as it is."""
        whole = state.pop(prefix + WHOLE_MAGNITUDE, None)
        if whole is not None:  # training goes on from there: no digit of it is lost
            state[f"{prefix}magnitude_start"], state[f"{prefix}magnitude_change"] = whole, torch.zeros_like(whole)
        self.adapter.renew_state(state, f"{prefix}adapter.")

    def see_state(self, scale: Tensor | None) -> None:
        """A live state is taken over: its scale, and that nothing starts any more."""
        if scale is not None:
            self.scale = float(scale) / self.adapter.plus_gain
        self.adapter.mark_initialised_()
        self._start_settled = True


def _plus(y: Tensor, change: Tensor | None) -> Tensor:
    return y if change is None else y + change
