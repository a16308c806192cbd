"""Regular expressions on the names of layers, and what a user meant by those that match none."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..archs.spec import ArchSpec, Part
from ..args.coerce import split_top
from ..args.expressions import part_of, would_be_part
from ..args.parse import Problems
from .walk import Candidate

_EITHER = "[._]"  # an underscore of a saved name, which may be a dot of the dotted one
_SIDES = (("", ""), ("", ".*"), (".*", ""), (".*", ".*"))
_OTHERS_CALL_IT = ("unet", "dit", "transformer", "denoiser", "diffusion_model")


@dataclass(frozen=True)
class Pattern:
    """One expression.

    Attributes:
        text: as the user wrote it.
        part: the part that it names; "" = it means all.
        regex: on names in that part.
    """

    text: str
    part: str
    regex: re.Pattern[str]

    @classmethod
    def of(cls, text: str, arch: ArchSpec) -> Pattern:
        part, expression = part_of(text, arch.part_names)
        return cls(text, part, re.compile(expression))

    def means(self, c: Candidate) -> bool:
        """Whether it matches the whole of one of the layer's dotted names."""
        return self.part in ("", c.part.name) and any(map(self.regex.fullmatch, c.names))

    def is_found_in(self, c: Candidate, names: Iterable[str]) -> bool:
        """Whether it stands somewhere in one of these names of the layer."""
        return self.part in ("", c.part.name) and any(map(self.regex.search, names))


class Patterns:
    """Regular expressions of one argument.

    Args:
        argument: its name.
        patterns: as the user wrote them; each must match the whole dotted name, see `Candidate.names`.
        arch: whose parts they may name.
    """

    def __init__(self, argument: str, patterns: Iterable[str], arch: ArchSpec) -> None:
        self.argument, self.arch = argument, arch
        self.patterns = [Pattern.of(text, arch) for text in patterns]

    def __bool__(self) -> bool:
        return bool(self.patterns)

    @property
    def quoted(self) -> str:
        """As the user wrote them."""
        return ", ".join(repr(pattern.text) for pattern in self.patterns)

    def first(self, candidate: Candidate) -> str | None:
        """The first pattern that matches."""
        return next((pattern.text for pattern in self.patterns if pattern.means(candidate)), None)

    def report_unmatched(
        self, trainable: Sequence[Candidate], others: Sequence[tuple[Candidate, str]], problems: Problems
    ) -> set[str]:
        """Report every pattern that matches no layer which can be trained.

        Args:
            trainable: layers that can be.
            others: the rest, each with the reason.
            problems: takes the reports.

        Returns:
            Those patterns.
        """
        reported: set[str] = set()
        for pattern in self.patterns:
            if any(map(pattern.means, trainable)):
                continue
            reported.add(pattern.text)
            outside = next((pair for pair in others if pattern.means(pair[0])), None)
            if outside is not None:
                problems.add(
                    f"{self.argument}: {pattern.text!r} matches only layers that are not trained, "
                    f"such as {self._shown(outside[0])} ({outside[1]})"
                )
                continue
            hint = _Meant(pattern, trainable, others, self.arch).hint
            problems.add(f"{self.argument}: {pattern.text!r} matches no layer; {hint}")
        return reported

    def _shown(self, c: Candidate) -> str:
        return self.arch.shown_name(c.part.name, c.trainer_name)


class _Meant:
    """What was meant by a pattern that matches no layer: other programs search in names, or look at saved names."""

    def __init__(
        self,
        pattern: Pattern,
        layers: Sequence[Candidate],
        others: Sequence[tuple[Candidate, str]],
        arch: ArchSpec,
    ) -> None:
        self.pattern, self.layers, self.others, self.arch = pattern, layers, others, arch

    @property
    def hint(self) -> str:
        """What to do, as the end of a sentence."""
        named = self.pattern.part or would_be_part(self.pattern.text)
        if named and not any(c.part.name == named for c in self.layers):
            return self._no_part(named)
        return self._searched() or self._saved() or self._outside() or self._like()

    def _no_part(self, named: str) -> str:
        """The parts that there are."""
        expression = self.pattern.text.partition(":")[2].strip()
        if named in self.arch.part_names:
            reason = next((reason for c, reason in self.others if c.part.name == named), "this call does not have it")
            return f"no layer of {named} can be trained here: {reason}"
        part = next((part for part in self.arch.parts if named in _nicknames(part, part is self.arch.denoiser)), None)
        if part is not None:
            return f"this model calls that part {part.name}: write '{part.name}:{expression}'"
        return f"{named!r} is no part of {self.arch.title}, whose parts are {', '.join(self.arch.part_names)}"

    def _searched(self) -> str:
        """Found inside a dotted name, as trainers search that look for a pattern anywhere."""
        wanted = [c for c in self.layers if self.pattern.is_found_in(c, c.names)]
        if not wanted:
            return ""
        written = self._whole(_unmarked(self.pattern.regex.pattern), self.pattern.part, wanted)
        return self._must(wanted[0], written)

    def _saved(self) -> str:
        """Found in a saved name, as sd-scripts looks for patterns on FLUX."""
        wanted = [c for c in self.layers if self.pattern.is_found_in(c, (c.saved_name, c.own_saved_name))]
        if not wanted:
            return ""
        first = wanted[0]
        found = f"saved names such as {first.saved_name} have it, but patterns go by dotted names: "
        return found + self._must(first, self._dotted(wanted))

    def _outside(self) -> str:
        """The same in layers that cannot be trained."""
        names = ((c, reason, (*c.names, c.saved_name)) for c, reason in self.others)
        found = next(((c, reason) for c, reason, own in names if self.pattern.is_found_in(c, own)), None)
        return (
            f"only layers that are not trained have it, such as {self._shown(found[0])} ({found[1]})" if found else ""
        )

    def _must(self, c: Candidate, written: str) -> str:
        remedy = f": write {written!r}" if written else ""
        return f"it must match the whole name {self._shown(c)!r}{remedy}"

    def _like(self) -> str:
        if not self.layers:
            return "this model has no layer that can be trained"
        here = [c for c in self.layers if self.pattern.part in ("", c.part.name)]
        names = {c.part.name: self._shown(c) for c in reversed(here)}
        like = " or ".join(repr(name) for name in reversed(names.values()))
        return f"layer names look like {like}; kohya-networks plan lists them all"

    def _shown(self, c: Candidate) -> str:
        return self.arch.shown_name(c.part.name, c.trainer_name)

    # -- what to write

    def _whole(self, text: str, part: str, wanted: Sequence[Candidate]) -> str:
        """The expression with what it lacks on either side; "" if nothing makes it mean these layers alone."""
        head, inner = f"{part}:" if part else "", f"({text})" if len(split_top(text, "|")) > 1 else text
        forms = (f"{head}{_joined(inner, before, after)}" for before, after in _SIDES)
        return next((form for form in forms if self._is(form, wanted)), "")

    def _is(self, text: str, wanted: Sequence[Candidate]) -> bool:
        """Whether this pattern means these layers and no others."""
        try:
            pattern = Pattern.of(text, self.arch)
        except re.error:
            return False
        return [c for c in self.layers if pattern.means(c)] == list(wanted)

    def _dotted(self, wanted: Sequence[Candidate]) -> str:
        """The expression on saved names as one on dotted names; "" if there is none that means the same layers."""
        text, part = _unmarked(self.pattern.regex.pattern), self.pattern.part
        for one in self.arch.parts:
            if f"{one.prefix}_" in text:
                text = text.replace(f"{one.prefix}_", "")
                part = "" if one is self.arch.denoiser else one.name
        pieces = self._whole(_EITHER.join(_at_underscores(text)), part, wanted).split(_EITHER)
        signs = [_EITHER] * (len(pieces) - 1)
        for i, sign in itertools.product(range(len(signs)), ("_", "[.]")):
            tried = [*signs[:i], sign, *signs[i + 1 :]]
            signs = tried if self._is(_put_together(pieces, tried), wanted) else signs
        return _put_together(pieces, signs)


def _nicknames(part: Part, is_denoiser: bool) -> Iterator[str]:
    """What others call a part."""
    yield part.prefix
    yield part.prefix.removeprefix("lora_")
    yield from _OTHERS_CALL_IT if is_denoiser else ()


def _unmarked(text: str) -> str:
    """Without the marks of either end, which a match of the whole has anyway."""
    return text.removeprefix("^").removesuffix("$")


def _joined(text: str, before: str, after: str) -> str:
    return ("" if text.startswith(".*") else before) + text + ("" if text.endswith(".*") else after)


def _put_together(pieces: Sequence[str], signs: Sequence[str]) -> str:
    return "".join(itertools.chain(*itertools.zip_longest(pieces, signs, fillvalue="")))


def _at_underscores(text: str) -> Iterator[str]:
    """What stands between the underscores, those in [...] and behind a backslash apart."""
    start, inside = 0, False
    for i, sign in enumerate(text):
        escaped = i > 0 and text[i - 1] == "\\"
        inside = not escaped and (sign == "[" or (inside and sign != "]"))
        if sign == "_" and not escaped and not inside:
            yield text[start:i]
            start = i + 1
    yield text[start:]
