"""A call with everything that the rules and the sources of values ask: arguments, preset, blocks, patterns, file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..algos import ALGOS, Adapter
from ..archs.spec import ArchSpec
from ..args.parse import NetArgs, Problems
from ..args.table import DROPOUTS
from ..files.codec import SavedLayer
from ..tensors.geometry import Geometry
from ..tensors.norms import NormGeometry
from .blocks import BlockChoices
from .patterns import Patterns
from .preset_choices import PresetChoices
from .speed import refuse_slow
from .walk import Candidate

if TYPE_CHECKING:
    from .plan import Request

_TRAINERS = ("sd_scripts", "musubi")  # hosts whose users speak of layers by the trainer's names
BY_EXPRESSION = {name: f"network_reg_{name}s" for name in DROPOUTS}
By = tuple[str, str]  # an argument, and which of its expressions; "" where it has none


@dataclass(frozen=True)
class Choice:
    """What a layer gets, by a file or by the arguments.

    Attributes:
        algorithm: its kind of adapter.
        alpha: 0 = the dim, or none that a file states.
        options: of the algorithm.
        split: output rows of parts that have adapters of their own.
        side: of a file's DoRA magnitudes, "output" or "input"; "" without.
        scale: the effective strength in a file; None = it follows from alpha and rank.
        dim_by, alpha_by: the arguments that these two come from.
    """

    algorithm: type[Adapter]
    dim: int
    alpha: float
    options: Mapping[str, Any]
    split: tuple[int, ...]
    side: str = ""
    scale: float | None = None
    dim_by: By | None = None
    alpha_by: By | None = None


@dataclass(frozen=True)
class Call:
    """A call on one model, as rules and values see it. Has no module and, but for a file's, no tensor.

    Attributes:
        arch: the record, with the block numbers of this model.
        dim, alpha: network_dim and network_alpha.
        saved: layers of the file that decides, by saved name; None without one.
        left_out: regular expression of the architecture -> why such layers are left out here.
        exclude, include, only, dims, alphas, lrs: the expressions of the call.
        dropouts: those for each of the dropouts.
        by_record: those of `left_out`.
        by_switch: the ones among them which an argument turns on and off.
        switched_off: those that this call turned off.
        taken: saved names of all layers.
        of_file: saved name -> what the file says of a layer, as far as that is known.
    """

    arch: ArchSpec
    dim: int
    alpha: float
    args: NetArgs
    saved: Mapping[str, SavedLayer] | None
    left_out: Mapping[str, str]
    exclude: Patterns
    include: Patterns
    only: Patterns
    dims: Patterns
    alphas: Patterns
    lrs: Patterns
    dropouts: Mapping[str, Patterns]
    by_record: Patterns
    by_switch: Patterns
    switched_off: Patterns
    preset: PresetChoices
    blocks: BlockChoices
    taken: frozenset[str]
    of_file: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, layers: Sequence[Candidate], problems: Problems) -> Call:
        """Arguments and record made ready for this model; what is wrong with either goes to `problems`.

        Args:
            layers: all layers of all parts.
        """
        arch, a = request.arch, request.args
        refuse_slow(request, layers, problems)
        named = [(c.part.name, c.trainer_name) for c in layers] if a.host in _TRAINERS else []
        denoiser = [c.trainer_name for c in layers if c.part is arch.denoiser]
        arch = arch.fit(denoiser)
        switches = {switch.argument for switch in arch.switches}
        left_out = arch.excluded(a.pick({*switches, "include_patterns", "lora_target_preset", "preset"}), a.host)
        given = {switch.regex for switch in arch.switches if switch.argument in a.given}
        return cls(
            arch,
            request.dim,
            request.alpha,
            a,
            request.saved,
            left_out,
            Patterns("exclude_patterns", a.exclude_patterns, arch, named),
            Patterns("include_patterns", a.include_patterns, arch, named),
            Patterns("only_patterns", a.only_patterns, arch, named),
            Patterns("network_reg_dims", a.network_reg_dims, arch, named),
            Patterns("network_reg_alphas", a.network_reg_alphas, arch, named),
            Patterns("network_reg_lrs", a.network_reg_lrs, arch, named),
            {name: Patterns(by, getattr(a, by), arch, named) for name, by in BY_EXPRESSION.items()},
            Patterns("default", left_out, arch),
            Patterns("default", left_out.keys() & {switch.regex for switch in arch.switches}, arch),
            Patterns("given", given & left_out.keys(), arch),
            PresetChoices(request, layers if named else (), problems),
            BlockChoices(arch, request, denoiser, problems),
            frozenset(c.saved_name for c in layers),
        )

    def is_on(self, argument: str) -> bool:
        """Whether an argument that waits for True has it."""
        return getattr(self.args, argument) is True

    @cached_property
    def conv_argument(self) -> str:
        """The argument that has a dim for kernels above 1x1; "" = none."""
        return next((name for name in ("conv_dim", "conv_block_dims") if getattr(self.args, name)), "")

    def of_denoiser(self, c: Candidate) -> bool:
        return c.part.name == self.arch.denoiser.name

    def shown_name(self, c: Candidate) -> str:
        return self.arch.shown_name(c.part.name, c.trainer_name)

    def is_inside(self, c: Candidate) -> bool:
        """Whether it is in a block whose layers are trained, without being asked for or because an argument says so."""
        return c.inside or any(map(self.is_on, c.switches))

    def is_off(self, c: Candidate) -> bool:
        """Whether it belongs to a model which is trained on request alone, and nobody asked."""
        return bool(c.part.argument) and not self.is_on(c.part.argument)

    def extra_of(self, c: Candidate) -> tuple[str, int] | None:
        """(argument, position in its list) of a layer outside the blocks that has an argument of its own."""
        return self.arch.extra_of(c.trainer_name) if self.of_denoiser(c) else None

    def extra_dim(self, argument: str, position: int) -> int:
        dims = getattr(self.args, argument)
        return (dims[position] or 0) if position < len(dims) else 0

    def kind_of(self, c: Candidate) -> str | None:
        """The given argument that speaks of layers of its kind."""
        return self.arch.kind_of(c.trainer_name, self.args.given) if self.of_denoiser(c) else None

    def alpha_of(self, c: Candidate) -> str | None:
        """The same for its alpha."""
        return self.arch.alpha_of(c.trainer_name, self.args.given) if self.of_denoiser(c) else None

    def saved_names(self, c: Candidate) -> tuple[str, str]:
        """That of the layer, and that which its own path would give, unless that is another layer's."""
        return c.saved_name, c.saved_name if c.own_saved_name in self.taken else c.own_saved_name

    def saved_layer(self, c: Candidate) -> SavedLayer | None:
        if self.saved is None:
            return None
        ours, own = self.saved_names(c)
        return self.saved.get(ours) or self.saved.get(own)


def speaks_of_norms(request: Request) -> bool:
    """Whether a file, the algorithm or an argument of a call means normalisation layers."""
    if request.saved is not None:
        return any(saved.algorithm.spec.family == NormGeometry.family for saved in request.saved.values())
    args = request.args
    algos = {args.algo, *(args.preset.algos if args.preset else ())}
    return args.train_norm != "false" or any(ALGOS[algo].spec.family != Geometry.family for algo in algos)
