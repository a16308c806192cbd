"""Released models by the names which users type."""

from __future__ import annotations

import difflib
import re

from ..archs import ARCHS
from ..archs.releases import Encoder, Release
from ..archs.spec import ArchSpec

RELEASES: dict[str, Release] = {release.name: release for arch in ARCHS for release in arch.releases}
ENCODERS: dict[str, Encoder] = {
    encoder.name: encoder for release in RELEASES.values() for encoder in release.text_encoders if encoder
}


def plain(text: str) -> str:
    """A name without what people write differently: case, blanks, hyphens, underscores, dots."""
    return re.sub("[^a-z0-9]", "", text.lower())


_ALIKE = {plain(arch.name): arch.releases[0] for arch in ARCHS if arch.releases}
_ALIKE |= {plain(word): one for one in RELEASES.values() for word in (*one.also, one.title, one.name)}


def release_called(name: str) -> Release | None:
    """The release of this name, of one that is written almost so, or of another that people have for it."""
    return RELEASES.get(name) or _ALIKE.get(plain(name))


def hint(name: str) -> str:
    """The nearest name, as the end of a sentence; "" without one."""
    close = difflib.get_close_matches(plain(name), [*_ALIKE], n=1, cutoff=0.6)
    return f"; did you mean {_ALIKE[close[0]].name}?" if close else ""


def arch_of(release: Release) -> ArchSpec:
    return next(arch for arch in ARCHS if release in arch.releases)


def others_of(release: Release) -> list[Release]:
    """The other released models of its architecture."""
    return [one for one in arch_of(release).releases if one is not release]
