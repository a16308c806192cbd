"""What an adapted layer is made of: an adapter, its scale, its magnitude, and the base modules that it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algos import Adapter
from ..tensors import base_weight
from .dropout import Dropouts
from .magnitude import magnitude_shape, norms
from .perturbation import Perturbation
from .precision import kept_wide
from .runtime import Runtime
from .site import Site, Whole, read_whole

LIVE_SCALE = "live_scale"  # marks a live state among the keys; a file has alpha instead
WHOLE_MAGNITUDE = "magnitude"  # in live states from before a change was learnt


class AttachedAdapter(nn.Module):
    """An adapter on its base modules: attachment, alpha, state, and the weights below it.

    Args:
        name: the saved name, `lora_unet_..._to_q`.
        base: the base layer, or the sites on which the adapter sits together.
        scale: alpha / dim, alpha / sqrt(dim), or 1 for a form without rank.
        dora: the side, "output" or "input", on which magnitudes are learnt; "" for none.
        perturbation: noise on the weight in training (GGPO), or None.

    Attributes:
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
        self.lora_name, self.adapter, self.scale = name, adapter, float(scale)
        self.dropouts, self.runtime = dropouts or Dropouts(), runtime or Runtime()
        self.perturbation = perturbation
        self.sites = (Site(base),) if isinstance(base, nn.Module) else tuple(base)
        for site in self.sites:
            site.layer = self
        self.register_parameter("magnitude_change", None)
        self.register_buffer("magnitude_start", None)
        self.on_output = dora != "input"
        self._start_settled = False  # training, or what was loaded, goes on from the start of the magnitudes as it is
        if dora:
            assert not (self.dropouts.dropout or self.dropouts.rank_dropout), "DoRA with a dropout on the rank"
            like, shape = next(adapter.parameters()), magnitude_shape(adapter.geometry, self.on_output)
            self.magnitude_change = nn.Parameter(like.new_zeros(shape))
            self.magnitude_start = like.new_ones(shape, dtype=torch.promote_types(like.dtype, torch.float32))
            self.start_magnitude()

    @property
    def side(self) -> str:
        """Where its magnitudes are, "output" or "input"; "" without DoRA."""
        return "" if self.magnitude_change is None else "output" if self.on_output else "input"

    @property
    def magnitude(self) -> Tensor | None:
        """The magnitudes as they act, in fp32 or wider, differentiable; None without DoRA."""
        if self.magnitude_start is None or self.magnitude_change is None:
            return None
        return self.magnitude_start + self.magnitude_change

    @property
    def base(self) -> nn.Module:
        """The base module of a layer that has one."""
        return self.sites[0].module

    @property
    def in_weight(self) -> bool:
        """Whether the base weight has the update."""
        return any(site.in_weight for site in self.sites)

    # -- attachment

    def attach(self) -> None:
        if not self.in_weight:
            self.see_base()
        for site in self.sites:
            site.attach()
        if not self.in_weight:
            self.start_magnitude()  # of the weight as it is with the networks below
            self._start_settled = not self._on_meta

    def detach(self) -> None:
        """Take this adapter out; what is below and above it on the same layer stays."""
        for site in self.sites:
            site.detach()

    def run(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of one base module, with the update, in the base output's dtype."""
        raise NotImplementedError

    def new_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """W' for a base weight W [O, I, *kernel]."""
        raise NotImplementedError

    # -- what a file says

    @property
    def alpha(self) -> float:
        """The value for which plain alpha / rank readers get our scale; a form without rank states its dim."""
        return self.alpha_at(self.adapter.record.saved_rank)

    def alpha_at(self, rank: int | None) -> float:
        """The same in a file that holds the adapter with this rank."""
        option = self.adapter.alpha_option
        if option:
            return float(self.adapter.chosen.get(option) or 0.0)
        return self.scale * rank if rank is not None else float(max(1, self.adapter.dim))

    def take_alpha(self, alpha: float | None, file_rank: int | None = None) -> None:
        """The effective scale of a file: its alpha / its rank. None and 0 stand for the rank, as everywhere."""
        rank, option = file_rank or self.adapter.record.saved_rank, self.adapter.alpha_option
        if option:
            self.adapter.chosen[option] = alpha or 0.0
        if rank is not None:
            self.scale = alpha / rank if alpha else 1.0

    def take_magnitude(self, magnitude: Tensor | None, folded: bool = False) -> None:
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

    def see_base(self) -> None:
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
                self.adapter.see_base(weight)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttachedAdapter:
        """Casts and moves, from `.to()`, `.half()` and the like, of this module or of one around it."""
        start, self.magnitude_start = self.magnitude_start, None
        super()._apply(kept_wide(fn) if self.runtime.keeps_fp32 else fn, recurse)
        self.magnitude_start = None if start is None else kept_wide(fn)(start)
        return self

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
        self.adapter.settle_()
        self._start_settled = True

    # -- what the formula reads

    @property
    def strength(self) -> float | Tensor:
        """scale * scalar: what multiplies dW at multiplier 1."""
        return self._strength(1.0)

    def _strength(self, multiplier: float | Tensor) -> float | Tensor:
        strength, scalar = multiplier * (self.scale * self.adapter.plus_gain), self.adapter.scalar
        return strength if scalar is None else strength * scalar.to(torch.promote_types(scalar.dtype, torch.float32))

    @property
    def acting(self) -> Adapter:
        """The adapter on its own base."""
        return self._on_base(self.adapter)

    def wide_adapter(self) -> Adapter:
        """The same in fp32 at least: some hosts cast a network to half precision before they merge it."""
        wide = all(p.dtype.itemsize >= 4 for p in self.adapter.parameters())
        return self._on_base(self.adapter if wide else copy.deepcopy(self.adapter).float())

    def _on_base(self, adapter: Adapter) -> Adapter:
        return adapter.on(Whole(self.sites, adapter.geometry.out_features))

    @torch.no_grad()
    def weight_below(self, site: Site, device: torch.device | None = None) -> Tensor:
        """The weight below this layer at one of its modules, with what other networks do to it there."""
        under = site.under()
        if under is None:
            return site.read(device)
        assert under.layer is not None
        if not under.acts:
            return under.layer.weight_below(under, device)
        if under.pieces is None:
            return under.layer.new_weight(under.layer.weight_below(under, device))
        return under.take_rows(under.layer.new_weight(under.layer.whole_weight(device)))

    @torch.no_grad()
    def whole_weight(self, device: torch.device | None = None) -> Tensor:
        """The same for the whole layer, its modules put together."""
        return read_whole(self.sites, self.adapter.geometry.weight_shape, lambda site: self.weight_below(site, device))

    def _norms(self, only: Site | None = None) -> Tensor:
        """||W + s dW|| in the magnitude's shape; on the output side for the rows of one site if asked."""
        assert self.magnitude_start is not None
        sites = self.sites if only is None else (only,)
        with torch.no_grad():
            near = {site: self.weight_below(site).to(self.magnitude_start.device) for site in sites}
        shape = tuple(self.magnitude_start.shape)
        return norms(self.wide_adapter(), near, self.strength, shape, self.on_output, only is not None)

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
