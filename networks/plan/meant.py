"""What a user meant by expressions that match no layer: other programs search in names, or look at saved names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..archs.spec import Part
from ..args.coerce import split_top
from ..args.expressions import as_list, quoted, would_be_part
from ..args.parse import Problems
from .causes import subject
from .patterns import Pattern, Patterns
from .walk import Candidate

Others = Sequence[tuple[Candidate, str]]

_EITHER = "[._]"  # an underscore of a saved name, which may be a dot of the dotted one
_SIDES = (("", ""), ("", ".*"), (".*", ""), (".*", ".*"))
_OTHERS_CALL_IT = ("unet", "dit", "transformer", "denoiser", "diffusion_model")


def read_otherwise(patterns: Patterns, trainable: Sequence[Candidate]) -> list[str]:
    """Where another library's classes have names of their own: which expressions are on those, and which of the others
    would mean more layers there.

    Args:
        patterns: of an argument.
        trainable: layers that can be trained.
    """
    found = [*_on_own_names(patterns, trainable), *_on_trainers_names(patterns, trainable)] if patterns.named else []
    return [f"{patterns.argument}: {text}" for text in found]


def _on_own_names(patterns: Patterns, trainable: Sequence[Candidate]) -> Iterator[str]:
    own = [one for one in patterns.patterns if one.own and any(map(one.means, trainable))]
    texts = [one.text for one in own if not any(one.matches(c, c.trainer_names) for c in trainable)]
    if texts:
        yield f"{subject(texts, 'is', 'are')} read on names of this model's classes: the trainer's have no such layer"


def _on_trainers_names(patterns: Patterns, trainable: Sequence[Candidate]) -> Iterator[str]:
    trainers = (one for one in patterns.patterns if not one.own)
    more = {one.text: [c for c in trainable if one.matches(c, c.names) and not one.means(c)] for one in trainers}
    texts, others = [text for text, layers in more.items() if layers], dict.fromkeys(itertools.chain(*more.values()))
    for first in itertools.islice(others, 1):
        yield (
            f"{subject(texts, 'is', 'are')} read on the trainer's names; the names of this model's classes would match "
            f"in {len(others)} more layers, such as {patterns.arch.shown_name(first.part.name, first.trainer_name)}"
        )


@dataclass(frozen=True)
class _Hint:
    """About one pattern.

    Attributes:
        cause: the same for those of which one sentence speaks.
        text: what it matches, and why: the sentence after `matches`.
        written: what to write in its place; "" = nothing that is known.
    """

    cause: str
    text: str
    written: str = ""


def report_unmatched(
    patterns: Patterns, trainable: Sequence[Candidate], others: Others, problems: Problems
) -> set[str]:
    """Report the patterns of an argument that match no layer which can be trained, those of one cause together.

    Args:
        patterns: of the argument.
        trainable: layers that can be.
        others: the rest, each with the reason.
        problems: takes the reports.

    Returns:
        Those patterns.
    """
    causes: dict[tuple[str, bool], dict[str, _Hint]] = {}
    for pattern in patterns.patterns:
        if not any(map(pattern.means, trainable)):
            hint = _Meant(pattern, trainable, others, patterns).hint
            causes.setdefault((hint.cause, bool(hint.written)), {})[pattern.text] = hint
    for hints in causes.values():
        first, *more = hints.values()
        written = as_list([hint.written for hint in hints.values()]) if more else quoted(first.written)
        remedy = f": write {written}" if first.written else ""
        problems.add(f"{patterns.argument}: {subject(hints, 'matches', 'match')} {first.text}{remedy}")
    return {text for hints in causes.values() for text in hints}


class _Meant:
    """One pattern on the layers of a model."""

    def __init__(self, pattern: Pattern, layers: Sequence[Candidate], others: Others, patterns: Patterns) -> None:
        self.pattern, self.layers, self.others, self.arch = pattern, layers, others, patterns.arch
        self.read = patterns.read

    @property
    def hint(self) -> _Hint:
        for c, reason in self.others:
            if self.pattern.means(c):
                return self._not_trained("only", c, reason)
        named = self.pattern.part or would_be_part(self.pattern.text)
        if named and not any(c.part.name == named for c in self.layers):
            return self._no_part(named)
        return self._searched() or self._saved() or self._outside() or self._like()

    def _not_trained(self, how: str, c: Candidate, reason: str) -> _Hint:
        return _Hint(f"{how} {reason}", f"{how} layers that are not trained, such as {self._shown(c)} ({reason})")

    def _no_part(self, named: str) -> _Hint:
        """The parts that there are."""
        cause = f"part {named}"
        if named in self.arch.part_names:
            reason = next((reason for c, reason in self.others if c.part.name == named), "this call does not have it")
            return _Hint(cause, f"no layer; none of {named} can be trained here: {reason}")
        part = next((part for part in self.arch.parts if named in _nicknames(part, part is self.arch.denoiser)), None)
        if part is not None:
            written = f"{part.name}:{self.pattern.text.partition(':')[2].strip()}"
            return _Hint(cause, f"no layer; this model calls that part {part.name}", written)
        parts = ", ".join(self.arch.part_names)
        return _Hint(cause, f"no layer; {named!r} is no part of {self.arch.title}, whose parts are {parts}")

    def _searched(self) -> _Hint | None:
        """Found inside a dotted name, as trainers search that look for a pattern anywhere."""
        trainers = [c for c in self.layers if self.pattern.is_found_in(c, [c.trainer_name])]
        wanted = trainers or [c for c in self.layers if self.pattern.is_found_in(c, c.names)]
        if not wanted:
            return None
        written = self._whole(_unmarked(self.pattern.regex.pattern), self.pattern.part, wanted)
        return _Hint("searched", f"no layer; a pattern must match the whole name {self._shown(wanted[0])!r}", written)

    def _saved(self) -> _Hint | None:
        """Found in a saved name, as sd-scripts looks for patterns on FLUX."""
        wanted = [c for c in self.layers if self.pattern.is_found_in(c, (c.saved_name, c.own_saved_name))]
        if not wanted:
            return None
        text = (
            f"no layer; saved names such as {wanted[0].saved_name} have it, but a pattern must match the whole dotted "
            f"name {self._shown(wanted[0])!r}"
        )
        return _Hint("saved", text, self._dotted(wanted))

    def _outside(self) -> _Hint | None:
        """The same in layers that cannot be trained."""
        for c, reason in self.others:
            if self.pattern.is_found_in(c, (*c.names, c.saved_name)):
                return self._not_trained("no layer; it is found in", c, reason)
        return None

    def _like(self) -> _Hint:
        if not self.layers:
            return _Hint("none", "no layer; this model has none that can be trained")
        here = [c for c in self.layers if self.pattern.part in ("", c.part.name)]
        names = {c.part.name: self._shown(c) for c in reversed(here)}
        like = " or ".join(repr(name) for name in reversed(names.values()))
        return _Hint("like", f"no layer; layer names look like {like}; kohya-networks plan lists them all")

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
            pattern = self.read(text)
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
