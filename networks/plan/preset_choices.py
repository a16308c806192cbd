"""What a preset says about the layers of one model. It decides nothing where a file does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..args import presets
from ..args.parse import NetArgs, Problems
from ..args.table import BY_NAME
from .select import Candidate

if TYPE_CHECKING:
    from .plan import Request

_OWN = ("dim", "alpha")  # not arguments of a network, but of the trainer


class PresetChoices:
    """The preset of one call, or none.

    Args:
        on: boolean arguments that are True, for parts that wait for one of them.
    """

    def __init__(self, request: Request, on: set[str], problems: Problems) -> None:
        self.request, self.on, self.problems = request, on, problems
        self.preset: presets.Preset | None = request.args.preset if request.saved is None else None
        self.unused = {*self.preset.patterns} if self.preset else set()
        if self.preset and self.preset.architectures and request.arch.name not in self.preset.architectures:
            here = [p.title for p in map(presets.load, presets.names()) if request.arch.name in p.architectures]
            problems.add(
                f"preset={self.preset.title} is for {', '.join(self.preset.architectures)}; this model is "
                f"{request.arch.title}, which has {', '.join(here) or 'no presets of its own'}, and those for all"
            )

    @property
    def off(self) -> bool:
        """Whether it leaves out kernels above 1x1."""
        return self.preset is not None and not self.preset.enable_conv

    def admit(self, c: Candidate) -> Candidate:
        """The layer with the preset's decision whether it can be trained."""
        p = self.preset
        if p is None or (c.part.argument and c.part.argument not in self.on):
            return c
        targets = p.unet if c.part is self.request.arch.denoiser else p.text_encoder
        excluded = self._first(p.exclude_name, c)
        if excluded is not None:
            return replace(c, reason=f"excluded by the preset: {excluded!r}")
        by_name = self._first(targets.names, c) is not None
        own = presets.OWN in targets.modules and (not c.reason or c.by_conv_dim)
        if not (by_name or own or not c.classes.isdisjoint(targets.modules)):
            return replace(c, reason=c.reason or f"not in the preset {p.title}", by_conv_dim=False)
        if targets.only and self._first(targets.only, c) is None:
            return replace(c, reason=f"not in the preset {p.title}", by_conv_dim=False)
        options = self.options(c)
        a = self.request.args
        if c.geometry.has_kernel and "dim" not in options and "conv_dim" not in options:
            if not p.enable_conv:
                return replace(c, reason="the preset has enable_conv = false", by_conv_dim=False)
            if not (a.conv_dim or a.conv_block_dims):
                return replace(c, reason="kernel above 1x1: give conv_dim to train it", by_conv_dim=True)
        elif c.by_conv_dim and not by_name and c.classes.isdisjoint(targets.modules):
            if not p.enable_conv:
                return replace(c, reason="the preset has enable_conv = false", by_conv_dim=False)
            return c
        return replace(c, reason="", by_conv_dim=c.geometry.has_kernel)

    def options(self, c: Candidate) -> Mapping[str, Any]:
        """Options of this layer in place of the network's."""
        p = self.preset
        if p is None:
            return {}
        pattern = self._first(tuple(p.name_algo_map), c)
        if pattern is not None:
            return p.name_algo_map[pattern]
        inner = next((cls for cls in reversed(c.path_classes) if cls in p.module_algo_map), None)
        return {} if inner is None else p.module_algo_map[inner]

    def args(self, c: Candidate) -> NetArgs:
        """The arguments as they are for this layer."""
        options, a = self.options(c), self.request.args
        values = {key: value for key, value in options.items() if key not in _OWN}
        if not values:
            return a
        algo = values.get("algo", a.algo)
        for key, value in values.items():
            row = BY_NAME[key]
            if row.algos is not None and algo not in row.algos and not row.is_neutral(value):
                self.problems.add(f"preset={self.request.args.preset.title}: {key} has no effect with algo={algo}")
        return replace(a, values={**a.values, **values})

    def dim(self, c: Candidate) -> int | None:
        """Its dim if the preset has one; below every argument that speaks of the layer."""
        options = self.options(c)
        found = options.get("conv_dim", options.get("dim")) if c.geometry.has_kernel else options.get("dim")
        return None if found is None else int(found)

    def alpha(self, c: Candidate) -> float | None:
        options = self.options(c)
        found = options.get("conv_alpha", options.get("alpha")) if c.geometry.has_kernel else options.get("alpha")
        return None if found is None else float(found)

    def warnings(self) -> list[str]:
        """Patterns of a user's file that mean no layer of this model; ours are shared by many models."""
        if self.preset is None or not self.unused or self.preset.title in presets.names():
            return []
        return [f"preset={self.preset.title}: {sorted(self.unused)} decide no layer of this model"]

    def _first(self, patterns: tuple[str, ...], c: Candidate) -> str | None:
        assert self.preset is not None
        found = self.preset.first(patterns, c.names)
        self.unused.discard(found or "")
        return found
