"""What the models of other programs say of a file, in words."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .readers import READERS, Given, Reader, Reading
from .readers.contract import STRENGTHS

log = logging.getLogger(__name__)

_MOST = 3  # reasons that are told one by one


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file.

    Attributes:
        name, title: of the program.
        reading: by its model.
        total: layers of the file.
        unasked: it is told at creation and at saves, too.
    """

    name: str
    title: str
    reading: Reading
    total: int
    unasked: bool = True

    @property
    def exact(self) -> bool:
        return self.reading.exact

    @property
    def count(self) -> str:
        """`208/210 layers`."""
        return f"{self.reading.loaded}/{self.total} layers"

    @property
    def inexact(self) -> int:
        """How many layers it loads, and not exactly."""
        return sum(fate.loaded and bool(fate.reason) for fate in self.reading.fates.values())

    @property
    def rank(self) -> tuple[int, int]:
        """Greater is better."""
        return self.reading.loaded, -self.inexact

    @property
    def short(self) -> str:
        """Name and number, for a line with all programs."""
        if self.reading.refused or self.reading.failed:
            return f"{self.title}: {'refused' if self.reading.refused else 'not known'}"
        return f"{self.title}: {self.count}" + (f", {self.inexact} not exact" if self.inexact else "")

    @property
    def sentence(self) -> str:
        """With the reasons and the errors that are known."""
        if self.reading.refused or self.reading.failed:
            return self._without_layers
        fates = self.reading.fates
        parts = [f"{self.title}: {self.count}" + (", exactly" if self.exact else "")]
        parts += _reasons(((f.reason, name) for name, f in fates.items() if not f.loaded), "not loaded")
        parts += _reasons(((f.reason, name) for name, f in fates.items() if f.loaded and f.reason), "not exact")
        return "; ".join([*parts, *self._errors(), *self.reading.notes])

    @property
    def _without_layers(self) -> str:
        if self.reading.refused:
            return f"{self.title} refuses the file: {self.reading.refused}"
        return f"{self.title}: not known ({self.reading.failed}); please report it"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        reading = self.reading
        return {
            "program": self.title,
            "loaded": reading.loaded,
            "layers": self.total,
            "exact": self.exact,
            "refused": reading.refused,
            "errors": dict(zip(map(str, STRENGTHS), reading.errors, strict=True)),
            "sentence": self.sentence,
            "not_loaded": {name: fate.reason for name, fate in reading.fates.items() if not fate.loaded},
            "not_exact": {name: fate.reason for name, fate in reading.fates.items() if fate.loaded and fate.reason},
        }

    def _errors(self) -> list[str]:
        """The largest errors, where the layers are loaded and not exact."""
        if not self.inexact:
            return []
        pairs = zip(STRENGTHS, self.reading.errors, strict=True)
        known = [f"{error:.2g} at strength {strength:g}" for strength, error in pairs if error is not None]
        return [f"error of the update up to {' and '.join(known)}"] if known else []


def _reasons(found: Iterable[tuple[str, str]], what: str) -> list[str]:
    """`120 not loaded (it knows no layer of this name), e.g. lora_unet_x`."""
    groups: dict[str, list[str]] = {}
    for reason, name in found:
        groups.setdefault(reason, []).append(name)
    common = Counter({reason: len(names) for reason, names in groups.items()}).most_common()
    lines = [f"{count} {what} ({reason}), e.g. {groups[reason][0]}" for reason, count in common[:_MOST]]
    rest = sum(count for _, count in common[_MOST:])
    return lines + ([f"{rest} more {what}"] if rest else [])


def verdicts(given: Given) -> tuple[Verdict, ...]:
    """Of all programs that know the architecture, in their order."""
    found = ((reader, _read(reader, given)) for reader in READERS)
    return tuple(
        Verdict(reader.name, reader.title, reading, len(given.meant), reader.unasked)
        for reader, reading in found
        if reading is not None
    )


def _read(reader: Reader, given: Given) -> Reading | None:
    try:
        return reader.read(given)
    except Exception as error:  # what is said of other programs must end no training
        log.debug("%s: its model fails", reader.title, exc_info=True)
        return Reading(failed=f"{type(error).__name__}: {error}")
