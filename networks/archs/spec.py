"""The record of an architecture: which classes mark it, where its layers are, and what trainers call them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .releases import Release
from .spellings import Pairs, Rename, Spelling, Twins, subtrees


@dataclass(frozen=True)
class Signature:
    """A denoiser class by its name, told apart from its namesakes by the sub-modules it has and lacks."""

    cls: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


# What stands before the names of a denoiser's layers in checkpoints; "" = nothing.
DENOISER_ROOTS = (
    "model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.", "",
)  # fmt: skip


@dataclass(frozen=True)
class FusedRows:
    """A layer that computes several projections of its I inputs at once.

    Attributes:
        pattern: regular expression on the whole trainer's dotted name.
        square: how many of them, from the first row down, have I rows.
        rest: into how many equal ones the other rows divide.
    """

    pattern: str
    square: int
    rest: int

    def sizes(self, rows: int, columns: int) -> tuple[int, ...]:
        """Output rows of each; () if the layer is another shape."""
        left = rows - self.square * columns
        if left <= 0 or left % self.rest:
            return ()
        return (columns,) * self.square + (left // self.rest,) * self.rest


@dataclass(frozen=True)
class ByHead:
    """Fused layers which a program's adapters have head by head: the rows of the first head of each projection, then
    those of the second, where the trainer has one projection after the other.

    Attributes:
        mark: regular expression; a key in which it is found shows a file to be that program's.
        pattern: regular expression on the whole saved name.
        count: how many projections the layer is.
        head: how many rows of each are a head.
    """

    mark: str
    pattern: str
    count: int
    head: int

    def is_of(self, saved_name: str) -> bool:
        return re.fullmatch(self.pattern, saved_name) is not None


@dataclass(frozen=True)
class Unread:
    """Layers whose output nothing in their model reads, so that no loss ever gives them a gradient.

    Attributes:
        regex: on the whole trainer's dotted name; its first group, if it has one, is the number of a block.
        last: how many blocks at the end are meant, where there is such a group.
        option: of the trainer, which counts from the end the block whose output is read last, 1 = the last one; it
            decides in place of `last` where it is given.
    """

    regex: str
    last: int = 1
    option: str = ""

    def of(self, trainer_names: Iterable[str], options: object = None) -> set[str]:
        """Those among all layers of a model.

        Args:
            trainer_names: of all of them, trained or not.
            options: of the trainer, as attributes; None = not known.
        """
        found = {name: match for name in trainer_names if (match := re.fullmatch(self.regex, name))}
        if not re.compile(self.regex).groups:
            return {*found}
        number = {name: int(match.group(1)) for name, match in found.items()}
        read = getattr(options, self.option, None) if self.option else None
        last = self.last if read is None else int(read) - 1
        return {name for name in found if number[name] > max(number.values()) - last}


@dataclass(frozen=True)
class Part:
    """One trained model of an architecture: the denoiser or a text encoder.

    Attributes:
        name: as the plan and messages call it.
        prefix: of saved names.
        containers: class names; every Linear and 1x1 convolution below such a module is trained.
        conv_containers: class names that join when a dim for larger kernels is given.
        rename: (prefix of the model's own dotted name, prefix of the trainer's), first match wins: models with
            another library's classes are saved under the trainer's names.
        versions: the same for names which versions of one library changed, and nothing but that library knows.
        layouts: the same by regular expressions, for models that also divide layers otherwise; before `rename`.
        release: names in the original release's single file, for models which trainers load under others.
        comfyui: names in ComfyUI's own classes and in the files for it, where they are others.
        comfyui_divides: where one of its layers is several of the trainer's, it takes adapters of these under the
            trainer's dotted names.
        comfyui_root: what stands before dotted names in files for it.
        comfyui_saved: it knows the saved names, although its own layers are called otherwise.
        roots: what may stand before the names of its layers in a checkpoint.
        argument: the part is trained only if this argument is True; "" = always.
        optional: (argument, class names that join the containers if it is True).
        tasks: (attribute of the model, value, class names that join where it has that value): a trainer's mark.
        loose: the trainer's dotted names of layers that count as below a container in every library's classes.
        diffusers: the component of diffusers' pipelines for which they read adapters; "" = they read none.
        components: how the names of layers begin which in diffusers belong to other components: `connectors.`.
        twins: layers that may have each other's names in files.
        others: (program or layout, names of its layers in adapter files), where they are those of no other record.
        file_roots: what else may stand before the names of its layers in adapter files, with a dot behind it before
            dotted names, with an underscore before flat ones; see `names` for what stands there usually.
        tops: how its own names begin, where that may be what usually stands before names.
        unread: layers that never get a gradient. They are trained like all others, as in the trainers' files.
    """

    name: str
    prefix: str
    containers: tuple[str, ...]
    conv_containers: tuple[str, ...] = ()
    rename: Pairs = ()
    versions: Pairs = ()
    layouts: tuple[Rename, ...] = ()
    release: tuple[Rename, ...] = ()
    comfyui: tuple[Rename, ...] = ()
    comfyui_divides: bool = False
    comfyui_root: str = "diffusion_model."
    comfyui_saved: bool = False
    roots: tuple[str, ...] = DENOISER_ROOTS
    argument: str = ""
    optional: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tasks: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    loose: tuple[str, ...] = ()
    diffusers: str = "transformer"
    components: tuple[str, ...] = ()
    twins: tuple[Twins, ...] = ()
    others: tuple[tuple[str, tuple[Rename, ...]], ...] = ()
    file_roots: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    unread: tuple[Unread, ...] = ()

    def __hash__(self) -> int:  # that of all its tables would take longer than what is looked up by it
        return hash((self.name, self.prefix))

    @property
    def every_container(self) -> frozenset[str]:
        """Class names of all containers, whatever lets them join."""
        joining = (more for _, more in self.optional), (more for *_, more in self.tasks)
        return frozenset(self.containers + self.conv_containers).union(*(one for kind in joining for one in kind))

    @cached_property
    def swaps(self) -> frozenset[str]:
        """`own` of those layouts whose source is the trainer's name of another layer."""
        names = {one.trainer for one in self.layouts}
        return frozenset(one.own for one in self.layouts if one.template in names)

    def is_swap(self, layout: Rename | None) -> bool:
        return layout is not None and layout.own in self.swaps

    def is_own(self, dotted_names: Iterable[str]) -> bool:
        """Whether these are names of the trainer's class, where that decides how some of them are read."""
        if not self.swaps:
            return True
        only_other = re.compile("|".join(one.own for one in self.layouts if one.own not in self.swaps))
        return not any(map(only_other.fullmatch, dotted_names))

    def among(self, dotted_names: Iterable[str]) -> Part:
        """The part as it reads a model, a file or a checkpoint that has these layers.

        A name that both libraries have, for different layers, is translated only beside names which the other library
        alone has.
        """
        if not self.swaps or not self.is_own(dotted_names):
            return self
        return replace(self, layouts=tuple(one for one in self.layouts if one.own not in self.swaps))

    @cached_property
    def layouts_by_title(self) -> tuple[tuple[str, Spelling], ...]:
        """(whose names they are, for people; the names) of all ways of naming its layers but the trainer's own."""
        tables = (
            *self.others,  # first: they say most of a name
            ("another version of its library", subtrees(self.versions)),
            ("diffusers", (*self.layouts, *subtrees(self.rename))),
            ("the original release", self.release),
            ("ComfyUI", self.comfyui),
        )
        return tuple((title, Spelling(table)) for title, table in tables if table)

    @cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """The same without titles."""
        return tuple(spelling for _, spelling in self.layouts_by_title)

    def released_name(self, dotted_name: str) -> str:
        """The trainer's name for one in the original release; the same for other names."""
        found = self._release.of(dotted_name)
        return found[0].trainer if len(found) == 1 else dotted_name

    @cached_property
    def _release(self) -> Spelling:
        return Spelling(self.release)

    def layout_of(self, dotted_name: str) -> Rename | None:
        """The first of `layouts` that speaks of this layer, its trainer's name filled in."""
        known = self._layouts_of
        if dotted_name not in known:
            found = ((one, re.fullmatch(one.own, dotted_name)) for one in self.layouts)
            filled = (replace(one, trainer=match.expand(one.trainer)) for one, match in found if match)
            known[dotted_name] = next(filled, None)
        return known[dotted_name]

    @cached_property
    def _layouts_of(self) -> dict[str, Rename | None]:
        """Answers of `layout_of`, which a plan asks for several times."""
        return {}

    def trainer_name(self, dotted_name: str) -> str:
        """The dotted name which this layer has in the trainer's own model."""
        known = self._trainer_names
        if dotted_name not in known:
            layout = self.layout_of(dotted_name)
            known[dotted_name] = self._renamed(dotted_name) if layout is None else layout.trainer
        return known[dotted_name]

    @cached_property
    def _trainer_names(self) -> dict[str, str]:
        """Answers of `trainer_name`, which a plan asks for several times."""
        return {}

    def _renamed(self, dotted_name: str) -> str:
        for old, new in (*self.versions, *self.rename):
            if dotted_name.startswith(old):
                return new + dotted_name[len(old) :]
        return dotted_name

    def version_names(self, trainer_name: str) -> tuple[str, ...]:
        """The names of one of the trainer's layers in other versions of its library."""
        return tuple(
            old + trainer_name[len(new) :] for old, new in self.versions if new and trainer_name.startswith(new)
        )

    def saved_name(self, dotted_name: str) -> str:
        return f"{self.prefix}_{self.trainer_name(dotted_name)}".replace(".", "_")


@dataclass(frozen=True)
class BlockAxis:
    """A row of numbered blocks below one name.

    Attributes:
        prefix: of a trainer's dotted name, up to the number: `double_blocks.`.
        first: the number which its block 0 has in `blocks=`; None = it follows the blocks of the axis before, of
            which released models have different numbers.
        argument: selects among these blocks by their own numbers; "" if there is none.
    """

    prefix: str
    first: int | None = 0
    argument: str = ""

    def index(self, trainer_name: str) -> int | None:
        """The block's own number, or None for layers elsewhere."""
        if not trainer_name.startswith(self.prefix):
            return None
        number = trainer_name[len(self.prefix) :].partition(".")[0]
        return int(number) if number.isdigit() else None


@dataclass(frozen=True)
class Switch:
    """Layers inside the containers which one argument takes in or leaves out.

    Attributes:
        argument: a boolean one.
        regex: on the whole trainer's dotted name.
        trained_if: the value of the argument at which they are trained.
        default: whether they are trained when it is not given.
        per_host: (host, the same there) where hosts differ.
    """

    argument: str
    regex: str
    trained_if: bool
    default: bool = False
    per_host: tuple[tuple[str, bool], ...] = ()

    def trains(self, value: bool | None, host: str) -> bool:
        """Whether they are trained, with the argument's value; None = not given."""
        return dict(self.per_host).get(host, self.default) if value is None else value is self.trained_if


@dataclass(frozen=True)
class BlockLevels:
    """Depths of a UNet, for the learning rates by block: numbers of blocks on the way down, in the middle, up.

    Attributes:
        first: block number of the first one on the way down; the others follow it.
    """

    first: int
    down: int
    mid: int
    up: int

    def rates(self, down: list[float], mid: list[float], up: list[float]) -> dict[int, float]:
        """Block number -> factor on the learning rate."""
        return {self.first + i: rate for i, rate in enumerate([*down, *mid, *up])}


@dataclass(frozen=True)
class Timestep:
    """How a denoiser's own forward is told the time.

    Attributes:
        arguments: its name there, over the classes of the architecture; with a dot, an attribute of an argument.
        noise, clean: the values at which a sample is nothing but noise, and without any.
        shared: the values of a tensor are those of parts which every sample of the pass has, not of its samples.
        noise_of: (class, `noise` there), where it counts otherwise than the trainer's.
    """

    arguments: tuple[str, ...]
    noise: float = 1000.0
    clean: float = 0.0
    shared: bool = False
    noise_of: tuple[tuple[str, float], ...] = ()

    def at(self, cls: str) -> Timestep:
        """The same for models of a class."""
        return replace(self, noise=dict(self.noise_of).get(cls, self.noise))


@dataclass(frozen=True)
class Start:
    """Values to start from.

    Attributes:
        options: of the trainer's command line, dim, alpha and learning rate among them.
        source: the trainer's document that has them, `docs/wan.md`; "" = no document has.
    """

    options: str
    source: str = ""


@dataclass(frozen=True)
class ArchSpec:
    """An architecture.

    Attributes:
        name, title: for the machine and for people.
        entry: the module that stands for it, `lora_flux`; its own name asserts this architecture.
        signatures: denoiser classes that mark it.
        denoiser, text_encoders: its parts; text encoders in the order in which hosts hand them over.
        timestep: of the denoiser's forward.
        blocks: (prefix of a trainer's dotted name, block number), for `blocks=`.
        axes: the same for models whose blocks carry their number in the name.
        exclude: regular expressions left out by default.
        switches: more layers that are left out or not, each kind by an argument of its own.
        layer_dims: (argument, regular expression on the trainer's dotted name): the dim of a kind of layer; the first
            that is given and matches wins, 0 leaves the layer out.
        layer_alphas: the same for alphas.
        extra_dims: (argument, regular expressions): layers outside the containers, trained if the argument, a list with
            one dim for each expression, says so.
        block_sets: (name, regular expression): what `train_blocks=name` trains; `all` is understood everywhere.
        target_presets: (name, regular expression): what `lora_target_preset=name` trains in the containers, the first
            of them without it; include_patterns stand in its place, and a `preset` in that of the first.
        levels: for learning rates by depth, where an architecture has them.
        fused_rows: denoiser layers that hold several projections, for `split_qkv`.
        by_head: those which some program's files have in another order.
        usual: numbers of denoiser layers that are trained by default, over the released models.
        kinds: how many kinds of layer these are, whose names differ in more than numbers: the same at every size.
        regions: (role in regional prompts, regular expression on the trainer's dotted name) of denoiser layers, see
            layers.region; none = the architecture has no regional prompts.
        releases: released models of every size, in diffusers' classes.
        note: what every plan says of it; "" = nothing.
        start: values to start from; None = nobody has told any.
    """

    name: str
    title: str
    entry: str
    signatures: tuple[Signature, ...]
    denoiser: Part
    timestep: Timestep
    text_encoders: tuple[Part, ...] = ()
    blocks: tuple[tuple[str, int], ...] = field(default=())
    axes: tuple[BlockAxis, ...] = ()
    exclude: tuple[str, ...] = ()
    switches: tuple[Switch, ...] = ()
    layer_dims: Pairs = ()
    layer_alphas: Pairs = ()
    extra_dims: tuple[tuple[str, tuple[str, ...]], ...] = ()
    block_sets: Pairs = ()
    target_presets: Pairs = ()
    levels: BlockLevels | None = None
    fused_rows: tuple[FusedRows, ...] = ()
    by_head: tuple[ByHead, ...] = ()
    usual: frozenset[int] = frozenset()
    kinds: frozenset[int] = frozenset()
    regions: Pairs = ()
    releases: tuple[Release, ...] = field(default=(), hash=False)
    note: str = ""
    start: Start | None = None

    def __hash__(self) -> int:  # as of Part
        return hash(self.name)

    @property
    def arguments(self) -> frozenset[str]:
        """Arguments which only architectures with such layers have."""
        names = {name for name, _ in (*self.layer_dims, *self.layer_alphas, *self.extra_dims)}
        names |= {axis.argument for axis in self.axes} | {part.argument for part in self.parts}
        names |= {name for part in self.parts for name, _ in part.optional}
        names |= {switch.argument for switch in self.switches}
        if self.block_sets:
            names.add("train_blocks")
        if self.target_presets:
            names.add("lora_target_preset")
        if self.fused_rows:
            names.add("split_qkv")
        if self.levels:
            names |= {"down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"}
        return frozenset(names - {""})

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.text_encoders, self.denoiser)

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """As logs print them, and as patterns take them before a colon."""
        return tuple(part.name for part in self.parts)

    def shown_name(self, part: str, trainer_name: str) -> str:
        """A layer as plans, logs and messages print it: text encoders have names alike, so theirs begin with the part.
        A pattern takes it as it is.

        Args:
            part: the name of its part.
            trainer_name: dotted.
        """
        return trainer_name if part == self.denoiser.name else f"{part}:{trainer_name}"

    def excluded(self, values: Mapping[str, Any], host: str) -> dict[str, str]:
        """Regular expression -> why such layers are left out, under these arguments of a host's call."""
        reasons = {regex: f"excluded by default: {regex}" for regex in self.exclude} | self._beside_preset(values)
        for switch in self.switches:
            if not switch.trains(values.get(switch.argument), host):
                reasons[switch.regex] = f"give {switch.argument}={switch.trained_if} to train it"
        return reasons

    def _beside_preset(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The same for what the preset of layers has not."""
        if not self.target_presets:
            return {}
        if values.get("include_patterns"):
            return {".*": "not in include_patterns"}
        usual, _ = self.target_presets[0]
        name = values.get("lora_target_preset") or usual
        if values.get("preset") and name == usual:  # which says itself what is trained
            return {}
        return {rf"(?!(?:{dict(self.target_presets)[name]})\Z).*": f"not in lora_target_preset={name}"}

    def fit(self, trainer_names: Collection[str]) -> ArchSpec:
        """The record with the block numbers of one model, whose denoiser has these layers."""
        axes: list[BlockAxis] = []
        following = 0
        for axis in self.axes:
            first = following if axis.first is None else axis.first
            axes.append(replace(axis, first=first))
            indices = [index for index in map(axis.index, trainer_names) if index is not None]
            following = first + 1 + max(indices, default=-1)
        return replace(self, axes=tuple(axes))

    def kind_of(self, trainer_name: str, given: frozenset[str]) -> str | None:
        """The first of the given layer_dims arguments that speaks of this denoiser layer."""
        return _first(self.layer_dims, trainer_name, given)

    def alpha_of(self, trainer_name: str, given: frozenset[str]) -> str | None:
        """The same of layer_alphas."""
        return _first(self.layer_alphas, trainer_name, given)

    def split_of(self, trainer_name: str, rows: int, columns: int) -> tuple[int, ...]:
        """Output rows of the projections in a denoiser layer; () for a layer that is only one."""
        for one in self.fused_rows:
            if re.fullmatch(one.pattern, trainer_name):
                return one.sizes(rows, columns)
        return ()

    def extra_of(self, trainer_name: str) -> tuple[str, int] | None:
        """(argument, position in its list) of a denoiser layer outside the containers."""
        for name, expressions in self.extra_dims:
            for i, regex in enumerate(expressions):
                if re.fullmatch(regex, trainer_name):
                    return name, i
        return None

    def region_role(self, trainer_name: str) -> str:
        """What a denoiser layer does in regional prompts; "" for layers that know nothing of them."""
        return next((role for role, regex in self.regions if re.fullmatch(regex, trainer_name)), "")

    def block_of(self, trainer_name: str) -> int | None:
        """The block number of a denoiser layer, or None for layers outside all blocks."""
        for axis in self.axes:
            index = axis.index(trainer_name)
            if index is not None:
                assert axis.first is not None, "fit the record to the model first"
                return axis.first + index
        return next((n for prefix, n in self.blocks if trainer_name.startswith(prefix)), None)

    @property
    def block_count(self) -> int | None:
        """How many blocks there are, if that is the same in every model of the architecture."""
        return 1 + max(n for _, n in self.blocks) if self.blocks else None


def _first(kinds: Pairs, trainer_name: str, given: frozenset[str]) -> str | None:
    return next((name for name, regex in kinds if name in given and re.fullmatch(regex, trainer_name)), None)
