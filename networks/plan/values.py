"""Dim, alpha and learning rate of a layer: the first source in each list that says something decides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..args.table import BY_NAME, DROPOUTS
from .call import BY_EXPRESSION, By, Call
from .patterns import Patterns
from .walk import Candidate


@dataclass(frozen=True)
class Found:
    """A value, and the argument that it comes from; None = no argument of a network."""

    value: Any
    by: By | None = None


@dataclass(frozen=True)
class Source:
    """One place where a value can come from.

    Attributes:
        name: the argument or the place, as documentation and `plan.why` call it.
        find: what it says of a layer; None = nothing.
    """

    name: str
    find: Callable[[Candidate, Call], Found | None]

    @property
    def arguments(self) -> frozenset[str]:
        """Those that its name lists."""
        return frozenset(self.name.split(", ")) & BY_NAME.keys()

    @property
    def sentence(self) -> str:
        """What it means, for documentation."""
        return " ".join((inspect.getdoc(self.find) or "").split())


def first(sources: Sequence[Source], c: Candidate, call: Call) -> Found:
    """What the first source says that says anything; the last one always does."""
    for source in sources:
        found = source.find(c, call)
        if found is not None:
            return found
    raise AssertionError("the last source says something of every layer")


def _matching(patterns: Patterns, values: Any, c: Candidate) -> Found | None:
    pattern = patterns.first(c)
    return None if pattern is None else Found(values[pattern], (patterns.argument, pattern))


# -- dim


def _file_dim(c: Candidate, call: Call) -> Found | None:
    """The shapes in a file."""
    found = call.of_file.get(c.saved_name)
    return None if found is None else Found(found.dim)


def _expression_dim(c: Candidate, call: Call) -> Found | None:
    """The first regular expression that matches."""
    return _matching(call.dims, call.args.network_reg_dims, c)


def _extra_dim(c: Candidate, call: Call) -> Found | None:
    """Layers outside the blocks have the dim of their own argument, 0 without it."""
    extra = call.extra_of(c)
    return None if extra is None else Found(call.extra_dim(*extra), (extra[0], ""))


def _kind_dim(c: Candidate, call: Call) -> Found | None:
    """The argument for layers of this kind, if it is given."""
    kind = call.kind_of(c)
    return None if kind is None else Found(int(getattr(call.args, kind)), (kind, ""))


def _block_dim(c: Candidate, call: Call) -> Found | None:
    """The number of the layer's block; for kernels above 1x1 that of conv_block_dims."""
    kernel = c.geometry.has_kernel
    own = call.blocks.dim(c.trainer_name, kernel) if call.of_denoiser(c) else None
    return None if own is None else Found(own, ("conv_block_dims" if kernel else "block_dims", ""))


def _preset_dim(c: Candidate, call: Call) -> Found | None:
    """dim or conv_dim in the preset's options for this layer."""
    own = call.preset.dim(c)
    return None if own is None else Found(own, ("preset", ""))


def _conv_dim(c: Candidate, call: Call) -> Found | None:
    """For kernels above 1x1 alone; 0 if it is not given."""
    return Found(int(call.args.conv_dim or 0), ("conv_dim", "")) if c.geometry.has_kernel else None


def _network_dim(c: Candidate, call: Call) -> Found | None:
    """The trainer's option."""
    return Found(call.dim)


# -- alpha


def _file_alpha(c: Candidate, call: Call) -> Found | None:
    """The alpha in a file."""
    found = call.of_file.get(c.saved_name)
    return None if found is None else Found(found.alpha)


def _expression_alpha(c: Candidate, call: Call) -> Found | None:
    """The first regular expression that matches."""
    return _matching(call.alphas, call.args.network_reg_alphas, c)


def _kind_alpha(c: Candidate, call: Call) -> Found | None:
    """The argument for layers of this kind, if it is given."""
    kind = call.alpha_of(c)
    return None if kind is None else Found(float(getattr(call.args, kind)), (kind, ""))


def _block_alpha(c: Candidate, call: Call) -> Found | None:
    """The number of the layer's block; for kernels above 1x1 that of conv_block_alphas."""
    kernel = c.geometry.has_kernel
    own = call.blocks.alpha(c.trainer_name, kernel) if call.of_denoiser(c) else None
    return None if own is None else Found(own, ("conv_block_alphas" if kernel else "block_alphas", ""))


def _preset_alpha(c: Candidate, call: Call) -> Found | None:
    """alpha or conv_alpha in the preset's options for this layer."""
    own = call.preset.alpha(c)
    return None if own is None else Found(own, ("preset", ""))


def _conv_alpha(c: Candidate, call: Call) -> Found | None:
    """For kernels above 1x1 alone."""
    return Found(float(call.args.conv_alpha), ("conv_alpha", "")) if c.geometry.has_kernel else None


def _network_alpha(c: Candidate, call: Call) -> Found | None:
    """The trainer's option; 0 means the dim."""
    return Found(call.alpha)


# -- learning rate


def _expression_lr(c: Candidate, call: Call) -> Found | None:
    """The first regular expression that matches."""
    return _matching(call.lrs, call.args.network_reg_lrs, c)


def _part_lr(c: Candidate, call: Call) -> Found | None:
    """unet_lr or text_encoder_lr of the trainer."""
    return Found(None)


def _block_factor(c: Candidate, call: Call) -> Found | None:
    """The factor of the layer's block on either of them, by down_lr_weight, mid_lr_weight and up_lr_weight."""
    rate = call.blocks.rate(c.trainer_name) if call.of_denoiser(c) else None
    return None if rate is None else Found(rate)


def _no_factor(c: Candidate, call: Call) -> Found | None:
    """None, as in a network without such lists."""
    return Found(None)


def _own_plus(c: Candidate, call: Call) -> Found | None:
    """The ratio for the denoiser alone or for the text encoders alone."""
    name = "loraplus_unet_lr_ratio" if call.of_denoiser(c) else "loraplus_text_encoder_lr_ratio"
    return _given(name, call)


def _plus(c: Candidate, call: Call) -> Found | None:
    """The ratio for all layers."""
    return _given("loraplus_lr_ratio", call)


def _no_plus(c: Candidate, call: Call) -> Found | None:
    """One learning rate for both factors."""
    return Found(None)


def _given(name: str, call: Call) -> Found | None:
    value = getattr(call.args, name)
    return None if value is None else Found(float(value), (name, ""))


# -- dropouts


def _dropout(name: str) -> tuple[Source, ...]:
    argument = BY_EXPRESSION[name]

    def by_expression(c: Candidate, call: Call) -> Found | None:
        """The first regular expression that matches."""
        return _matching(call.dropouts[name], getattr(call.args, argument), c)

    def for_all(c: Candidate, call: Call) -> Found | None:
        """The argument for all layers."""
        return Found(getattr(call.args, name), (name, ""))

    return Source(argument, by_expression), Source(name, for_all)


DIM = (
    Source("file", _file_dim),
    Source("network_reg_dims", _expression_dim),
    Source("layers outside the blocks", _extra_dim),
    Source("kind of layer", _kind_dim),
    Source("block_dims, conv_block_dims", _block_dim),
    Source("preset", _preset_dim),
    Source("conv_dim", _conv_dim),
    Source("network_dim", _network_dim),
)
ALPHA = (
    Source("file", _file_alpha),
    Source("network_reg_alphas", _expression_alpha),
    Source("kind of layer", _kind_alpha),
    Source("block_alphas, conv_block_alphas", _block_alpha),
    Source("preset", _preset_alpha),
    Source("conv_alpha", _conv_alpha),
    Source("network_alpha", _network_alpha),
)
LR = (
    Source("network_reg_lrs", _expression_lr),
    Source("the rate of its part", _part_lr),
)
FACTOR = (
    Source("down_lr_weight, mid_lr_weight, up_lr_weight", _block_factor),
    Source("no factor", _no_factor),
)
PLUS = (
    Source("loraplus_unet_lr_ratio, loraplus_text_encoder_lr_ratio", _own_plus),
    Source("loraplus_lr_ratio", _plus),
    Source("no ratio", _no_plus),
)
DROPOUT = {name: _dropout(name) for name in DROPOUTS}
VALUES = {
    "dim": DIM,
    "alpha": ALPHA,
    "learning rate": LR,
    "factor of its block": FACTOR,
    "LoRA+ ratio": PLUS,
    **DROPOUT,
}
