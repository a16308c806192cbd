"""What a preset says about the layers of one model. It decides nothing where a file does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..args import presets
from ..args.expressions import part_of
from ..args.parse import NetArgs, Problems
from ..args.table import BY_NAME
from .walk import Candidate

if TYPE_CHECKING:
    from .plan import Request

_OWN = ("dim", "alpha")  # not arguments of a network, but of the trainer
_NO_OPTIONS: Mapping[str, Any] = {}
_NOTHING = presets.Targets(modules=())


class PresetChoices:
    """The preset of one call, or none.

    Args:
        layers: of the model, by whose trainer's names patterns are read first, see Patterns.
        problems: takes what is wrong with it on this model.
    """

    def __init__(self, request: Request, layers: Sequence[Candidate], problems: Problems) -> None:
        self.arch, self.base, self.problems = request.arch, request.args, problems
        self.preset: presets.Preset | None = request.args.preset if request.saved is None else None
        self.unused = {*self.preset.patterns} if self.preset else set()
        self._own = {p for p in self.unused if not any(self._matches(p, c, (c.trainer_name,)) for c in layers)}
        self._options: dict[tuple[str, str], Mapping[str, Any]] = {}
        if self.preset and self.preset.architectures and self.arch.name not in self.preset.architectures:
            here = [p.title for p in map(presets.load, presets.names()) if self.arch.name in p.architectures]
            problems.add(
                f"preset={self.preset.title} is for {', '.join(self.preset.architectures)}; this model is "
                f"{self.arch.title}, which has {', '.join(here) or 'no presets of its own'}, and those for all"
            )

    @property
    def speaks(self) -> bool:
        return self.preset is not None

    @property
    def title(self) -> str:
        return self.preset.title if self.preset else ""

    @property
    def off(self) -> bool:
        """Whether it leaves out kernels above 1x1 and convolutional blocks."""
        return self.preset is not None and not self.preset.enable_conv

    def _targets(self, c: Candidate) -> presets.Targets:
        """What it says of the layer's model."""
        if self.preset is None:
            return _NOTHING
        return self.preset.unet if c.part.name == self.arch.denoiser.name else self.preset.text_encoder

    def names_it(self, c: Candidate) -> bool:
        """Whether it names the layer, or a class of it or above it."""
        targets = self._targets(c)
        return self._first(targets.names, c) is not None or not c.classes.isdisjoint(targets.modules)

    def wants_own(self, c: Candidate) -> bool:
        """Whether it wants what the architecture trains anyway."""
        return presets.OWN in self._targets(c).modules

    def restricts(self, c: Candidate) -> bool:
        """Whether every layer of its model must match a pattern, and this one matches none."""
        only = self._targets(c).only
        return bool(only) and self._first(only, c) is None

    def excludes(self, c: Candidate) -> str | None:
        """The pattern that leaves the layer out."""
        return self._first(self.preset.exclude_name, c) if self.preset else None

    def has_dim_of_its_own(self, c: Candidate) -> bool:
        """Whether it names a layer and so gives it a dim without conv_dim: to a kernel above 1x1 by its options."""
        return self.names_it(c) and (not c.geometry.has_kernel or not {"dim", "conv_dim"}.isdisjoint(self.options(c)))

    def options(self, c: Candidate) -> Mapping[str, Any]:
        """Options of this layer in place of the network's."""
        if self.preset is None:
            return _NO_OPTIONS
        key = c.part.name, c.dotted_name
        if key not in self._options:
            self._options[key] = self._find_options(self.preset, c)
        return self._options[key]

    def _find_options(self, p: presets.Preset, c: Candidate) -> Mapping[str, Any]:
        pattern = self._first(tuple(p.name_algo_map), c)
        if pattern is not None:
            return p.name_algo_map[pattern]
        inner = next((cls for cls in reversed(c.path_classes) if cls in p.module_algo_map), None)
        return _NO_OPTIONS if inner is None else p.module_algo_map[inner]

    def args(self, c: Candidate) -> NetArgs:
        """The arguments as they are for this layer."""
        options = self.options(c)
        values = {key: value for key, value in options.items() if key not in _OWN}
        if not values:
            return self.base
        algo = values.get("algo", self.base.algo)
        for key, value in values.items():
            row = BY_NAME[key]
            if row.algos is not None and algo not in row.algos and not row.is_neutral(value):
                self.problems.add(f"preset={self.title}: {key} has no effect with algo={algo}")
        return replace(self.base, values={**self.base.values, **values})

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
        names = ((pattern, c.names if pattern in self._own else (c.trainer_name,)) for pattern in patterns)
        found = next((pattern for pattern, own in names if self._matches(pattern, c, own)), None)
        self.unused.discard(found or "")
        return found

    def _matches(self, pattern: str, c: Candidate, names: tuple[str, ...]) -> bool:
        part, expression = part_of(pattern, self.arch.part_names)
        return self.preset is not None and part in ("", c.part.name) and self.preset.matches(expression, names)
