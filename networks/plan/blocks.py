"""What arguments say about the blocks of a denoiser: which are trained, with which dim, alpha and learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..archs import ARCHS
from ..archs.spec import ArchSpec
from ..args.coerce import nearest
from ..args.parse import Problems
from ..args.table import BY_NAME

if TYPE_CHECKING:
    from .plan import Request


class BlockChoices:
    """The block arguments of one call, checked against one model.

    Args:
        arch: the record, with the block numbers of this model.
        names: trainer's dotted names of all layers of the denoiser.
        problems: takes what is wrong with the arguments.

    Attributes:
        numbers: block number of each of these layers, None for those outside all blocks.
    """

    def __init__(self, arch: ArchSpec, request: Request, names: Sequence[str], problems: Problems) -> None:
        self.arch, self.args, self.problems = arch, request.args, problems
        self.network_alpha = request.alpha
        self.conv_alpha = request.args.conv_alpha
        self.numbers = {name: arch.block_of(name) for name in names}
        found = [number for number in self.numbers.values() if number is not None]
        self.count = self.arch.block_count or 1 + max(found, default=-1)
        self.names = names
        self.set_pattern = self._train_blocks()
        self.rates = self._rates()
        self._foreign()
        self._lengths()
        self._pairs()
        self._extras()
        self._numbers()

    # -- answers, by the trainer's dotted name

    def left_out(self, name: str) -> tuple[str, str]:
        """(argument, reason) for a layer of the denoiser; "" and "" if nothing here leaves it out."""
        block = self.numbers[name]
        if self.args.blocks is not None and block not in self.args.blocks:
            return "blocks", "in no numbered block" if block is None else f"block {block} is not in blocks"
        for axis in self.arch.axes:
            index = axis.index(name)
            chosen = getattr(self.args, axis.argument) if axis.argument else None
            if index is not None and chosen is not None and index not in chosen:
                return axis.argument, f"block {index} is not in {axis.argument}"
        if self.set_pattern and not re.fullmatch(self.set_pattern, name):
            return "train_blocks", f"not in train_blocks={self.args.train_blocks}"
        return "", ""

    def dim(self, name: str, kernel: bool) -> int | None:
        """The dim of a layer's block, or None where blocks do not decide; `kernel`: above 1x1."""
        value = self._item(self.args.conv_block_dims if kernel else self.args.block_dims, name)
        return None if value is None else int(value)

    def alpha(self, name: str, kernel: bool) -> float | None:
        """Likewise; an empty item of a list stands for the alpha of the network, or of its convolutions."""
        a = self.args
        given, default = (a.conv_block_alphas, self.conv_alpha) if kernel else (a.block_alphas, self.network_alpha)
        if not given or self.numbers[name] is None:
            return None
        value = self._item(given, name)
        return default if value is None else float(value)

    def rate(self, name: str) -> float | None:
        """The factor of a layer's block on the learning rate; None without such factors."""
        block = self.numbers[name]
        return None if self.rates is None or block is None else self.rates.get(block, 1.0)

    def _item(self, values: Sequence[Any], name: str) -> Any:
        block = self.numbers[name]
        return values[block] if block is not None and block < len(values) else None

    # -- checks

    def _train_blocks(self) -> str:
        word, sets = self.args.train_blocks, dict(self.arch.block_sets)
        if word == "all" or not sets:  # where there are none, `_foreign` speaks
            return ""
        if word not in sets:
            known = ["all", *sets]
            self.problems.add(f"train_blocks={word} is none of {', '.join(known)}{nearest(word, known)}")
        return sets.get(word, "")

    def _rates(self) -> dict[int, float] | None:
        a, levels = self.args, self.arch.levels
        if levels is None or not (a.down_lr_weight or a.mid_lr_weight or a.up_lr_weight):
            if levels is not None and a.block_lr_zero_threshold:
                self.problems.idle("block_lr_zero_threshold", " without down_, mid_ or up_lr_weight")
            return None
        lists = []
        for argument, count in (
            ("down_lr_weight", levels.down),
            ("mid_lr_weight", levels.mid),
            ("up_lr_weight", levels.up),
        ):
            try:
                values = getattr(a, argument).expand(count)
            except ValueError as error:
                self.problems.add(f"{argument} {error}")
                values = [1.0] * count
            lists.append([0.0 if value <= a.block_lr_zero_threshold else value for value in values])
        return levels.rates(*lists)

    def _foreign(self) -> None:
        """Arguments that only other architectures have."""
        everyone = {name for arch in ARCHS for name in arch.arguments}
        for name in sorted(self.args.given & (everyone - self.arch.arguments)):
            if self.args.asks(name):
                owners = ", ".join(arch.title for arch in ARCHS if name in arch.arguments)
                self.problems.idle(name, f" on {self.arch.title}; it belongs to {owners}")

    def _lengths(self) -> None:
        for argument in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
            values = getattr(self.args, argument)
            if values and len(values) != self.count:
                self.problems.add(
                    f"{argument} has {len(values)} values, but {self.arch.title} has {self.count} blocks: give one each"
                )

    def _pairs(self) -> None:
        for first, second in (
            ("block_alphas", "block_dims"),
            ("conv_block_dims", "block_dims"),
            ("conv_block_alphas", "conv_block_dims"),
        ):
            if getattr(self.args, first) and not getattr(self.args, second):
                self.problems.add(f"{first} is given without {second}: give both, or neither")

    def _extras(self) -> None:
        """One dim for each kind of layer outside the blocks, and 0 for those that this model has not."""
        for argument, expressions in self.arch.extra_dims:
            values = getattr(self.args, argument)
            if values and len(values) != len(expressions):
                what = BY_NAME[argument].help.split(": ", 1)[-1]
                self.problems.add(f"{argument} has {len(values)} values and wants {len(expressions)}: {what}")
            for value, regex in zip(values, expressions, strict=False):
                if value and not any(re.fullmatch(regex, name) for name in self.names):
                    self.problems.add(f"{argument}: this model has no layer {regex}; write 0 in its place")

    def _numbers(self) -> None:
        a = self.args
        if any(block >= self.count for block in a.blocks or ()):
            self.problems.add(f"blocks: {self.arch.title} has the blocks 0 to {self.count - 1}")
        for axis in self.arch.axes:
            chosen = getattr(a, axis.argument) if axis.argument else None
            last = max((n for n in map(axis.index, self.names) if n is not None), default=-1)
            if any(index > last for index in chosen or ()):
                self.problems.add(f"{axis.argument}: this model has the blocks 0 to {last} of {axis.prefix}")
