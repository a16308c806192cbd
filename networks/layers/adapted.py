"""One adapted layer: the single place where scale, multiplier and dropouts meet an algorithm.

    y = base(x) + multiplier * scale * scalar * op(x, dW)         W' = W + multiplier * scale * scalar * dW

`forward` and `new_weight` are two readings of that line and are tested equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algos import Adapter
from ..tensors import base_weight
from .dropout import CallGate, Dropouts, module_mask, rank_mask
from .region import Region

LIVE_SCALE = "live_scale"  # marks a live state among the keys; a file has alpha instead


@dataclass
class Runtime:
    """What all layers of one network share; plain values, so that a change reaches every layer at once.

    multiplier: the user's strength; one number, or a tensor [N] with one value per sample.
    enabled: False lets the base model through untouched.
    sampling: the model's own forward was entered without gradients (hosts draw sample images in train mode).
    for_inference: made for generation; such networks are never put into eval mode by some hosts.
    region: this network's place in a picture of several prompts, or None.
    """

    multiplier: float | Tensor = 1.0
    enabled: bool = True
    sampling: bool = False
    for_inference: bool = False
    region: Region | None = None


@dataclass
class _Base:
    """The frozen layer, kept out of our parameters and state."""

    module: nn.Module
    forward: Callable[..., Tensor] | None = field(default=None)


class AdaptedLayer(nn.Module):
    """An adapter, its scale, and the layer it changes.

    The base module keeps its class, name, parameters and children; only its instance attribute `forward` is replaced
    while the layer is attached.

    Args:
        name: the saved name, `lora_unet_..._to_q`.
        module: the base layer. Its weight is read when it is needed, never kept: hosts move, cast and swap weights.
        scale: alpha / dim, alpha / sqrt(dim), or 1 for a form without rank.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        adapter: Adapter,
        scale: float,
        dropouts: Dropouts | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        super().__init__()
        self.lora_name, self.adapter, self.scale = name, adapter, float(scale)
        self.dropouts, self.runtime = dropouts or _NONE, runtime or Runtime()
        self._base = _Base(module)

    # -- attachment

    @property
    def base(self) -> nn.Module:
        return self._base.module

    def attach(self) -> None:
        if self._base.forward is None:
            self._base.forward = self.base.forward
            self.base.forward = self.forward

    def detach(self) -> None:
        """Take this adapter out; what is below and above it on the same layer stays."""
        below, above = self._base.forward, self._above()
        self._base.forward = None
        if below is None:
            return
        if above is not None:
            above._base.forward = below
        elif getattr(below, "__func__", None) is type(self.base).forward:
            del self.base.forward
        else:
            self.base.forward = below

    def _above(self) -> AdaptedLayer | None:
        """The adapter of another network that was attached on top of this one."""
        above, forward = None, vars(self.base).get("forward")
        while isinstance(owner := getattr(forward, "__self__", None), AdaptedLayer) and owner is not self:
            above, forward = owner, owner._base.forward
        return above if owner is self else None

    # -- alpha

    @property
    def alpha(self) -> float:
        """The value for which plain alpha / rank readers get our scale; a form without rank states its dim."""
        rank = self.adapter.record.rank
        return self.scale * rank if rank is not None else float(max(1, self.adapter.dim))

    def take_alpha(self, alpha: float | None) -> None:
        """The effective scale of a file: its alpha / its rank. None and 0 stand for the rank, as everywhere."""
        rank = self.adapter.record.rank
        if rank is not None:
            self.scale = alpha / rank if alpha else 1.0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The live state carries the scale in float64: casting the network must not round it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + LIVE_SCALE] = torch.tensor(self.scale, dtype=torch.float64)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """For wrappers (data-parallel, compile), whose own walk never reaches the network's load_state_dict."""
        scale = state_dict.pop(prefix + LIVE_SCALE, None)
        if scale is None:
            missing.append(prefix + LIVE_SCALE)
        else:
            self.scale = float(scale)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)

    # -- the formula

    def _strength(self, multiplier: float | Tensor) -> float | Tensor:
        strength, scalar = multiplier * self.scale, self.adapter.scalar
        return strength if scalar is None else strength * scalar.to(torch.promote_types(scalar.dtype, torch.float32))

    def new_weight(self, weight: Tensor, multiplier: float | None = None) -> Tensor:
        """W' for a base weight W [O, I, *kernel] of fp32 or wider, on W's device; W itself at multiplier 0."""
        m = self.runtime.multiplier if multiplier is None else multiplier
        if isinstance(m, Tensor):
            raise ValueError("one multiplier per sample cannot be merged into a weight: set a single number")
        if m == 0:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # hosts merge inside their autocast, too
            delta = self._wide_adapter().delta() * self._strength(m)
            return weight + delta.to(device=weight.device, dtype=weight.dtype)

    def _wide_adapter(self) -> Adapter:
        """The adapter in fp32 at least: some hosts cast a network to half precision before they merge it."""
        if all(p.dtype.itemsize >= 4 for p in self.adapter.parameters()):
            return self.adapter
        return copy.deepcopy(self.adapter).float()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update, in the base output's dtype."""
        assert self._base.forward is not None, "forward of a layer that is not attached"
        y = self._base.forward(x, *args, **kwargs)
        runtime = self.runtime
        if not runtime.enabled or (not isinstance(runtime.multiplier, Tensor) and runtime.multiplier == 0):
            return y
        if runtime.region is not None:
            return runtime.region.add(self.lora_name, lambda x, y: self.update(x).to(y.dtype), x, y)
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """The adapter's part of the output, in the cheaper of its exact forms."""
        adapter, drops = self.adapter, self._active_dropouts()
        if adapter.geometry.is_conv and x.dim() == len(adapter.geometry.kernel) + 1:
            return self.update(x[None])[0]
        strength = self._strength(self.runtime.multiplier)
        if isinstance(strength, Tensor) and strength.device != x.device:
            strength = strength.to(x.device)
        if drops.module_dropout:
            strength = strength * module_mask(drops.module_dropout, x)
        gate = CallGate(strength, drops.dropout, drops.rank_dropout)
        factored, materialised = adapter.flops(adapter.geometry.tokens(x))
        # Elementwise dropout needs the rank activation, which only the factored form has.
        if factored <= materialised or (drops.dropout and adapter.record.rank_axis):
            return adapter.apply_delta(x, gate)
        masked = drops.rank_dropout and adapter.record.rank_axis
        mask = rank_mask((adapter.dim,), drops.rank_dropout, x) if masked else None
        delta = adapter.delta(mask)
        if not torch.is_autocast_enabled(x.device.type):
            delta = delta.to(x.dtype)
        return gate.output(adapter.geometry.op(x, delta))

    def _active_dropouts(self) -> Dropouts:
        active = self.training and not self.runtime.sampling and not self.runtime.for_inference
        return self.dropouts if active else _NONE

    # -- weight space

    def merge(self, multiplier: float | None = None, device: torch.device | None = None) -> None:
        """Put W' into the base layer, computed in fp32 or wider and rounded once."""
        with torch.no_grad():
            base_weight.write(self.base, self.new_weight(base_weight.read(self.base, device), multiplier))

    def backup(self) -> None:
        """Remember the base weight for `restore`."""
        base_weight.backup(self.base)

    def restore(self) -> None:
        """Put the remembered weight back, bit for bit."""
        base_weight.restore(self.base)

    # -- max norm

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """Frobenius norm of the true update scale * scalar * dW, 0-d."""
        strength = self._strength(1.0)
        size = strength.abs() if isinstance(strength, Tensor) else abs(strength)
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self._wide_adapter().norm() * size


_NONE = Dropouts()
