"""Released models by the names which users type."""

from __future__ import annotations

from ..archs import ARCHS
from ..archs.releases import Encoder, Release

RELEASES: dict[str, Release] = {release.name: release for arch in ARCHS for release in arch.releases}
ENCODERS: dict[str, Encoder] = {
    encoder.name: encoder for release in RELEASES.values() for encoder in release.text_encoders if encoder
}
