"""Records what is known of architectures: names of layers for the tests, outlines of released models for planning.

    python scripts/names.py                  # everything
    python scripts/names.py flux sd3         # these architectures
    python scripts/names.py --skeletons      # only networks/models/skeletons
    python scripts/names.py --check          # compare, write nothing

Names (tests/names/ARCH.txt) come from the class which trainers load, built by the factory that tests/registry_archs.py
names; skeletons from diffusers' and transformers' classes, by the sizes in the record of the architecture. What cannot be
built here stays as it was recorded, and one line says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's networks, whatever is installed

from networks.archs import ARCHS, ArchSpec  # noqa: E402
from networks.models import outline  # noqa: E402
from networks.models.libraries import denoiser_of, encoder_of  # noqa: E402
from networks.models.skeleton import OUTLINES  # noqa: E402


def skeletons(arch: ArchSpec) -> Iterator[tuple[Path, str]]:
    """File -> text of the outlines of an architecture's releases and their text encoders."""
    for release in arch.releases:
        yield OUTLINES / f"{release.name}.txt", outline.write(denoiser_of(release))
        for encoder in filter(None, release.text_encoders):
            yield OUTLINES / f"{encoder.name}.txt", outline.write(encoder_of(encoder))


if __name__ == "__main__":
    for arch in ARCHS:
        for path, text in skeletons(arch):
            path.write_text(text, encoding="utf-8", newline="\n")
