"""The layers of a file as the layers of a model that is there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..archs.spec import Part
from ..files.adapter_file import AdapterFile
from ..layers.site import Site, read_whole
from .walk import Candidate, candidates


def on_model(file: AdapterFile, parts: Sequence[tuple[Part, nn.Module]]) -> AdapterFile:
    """What is a part of a layer here, or several of them, joined and divided.

    Args:
        file: opened with the names of the model's architecture.
        parts: the models.

    Raises:
        ValueError: the rows of a layer cannot be made of what the file has for it.
    """
    if not file.portions:
        return file
    found: dict[str, Candidate] = {}
    for c in (c for part, model in parts for c in candidates(part, model, norms=True)):
        found |= {c.own_saved_name: c, c.saved_name: c}
    return file.on(
        lambda name: found[name].geometry.weight_shape if name in found else None, lambda n: _weight(found[n])
    )


def _weight(candidate: Candidate) -> Tensor:
    sites = [Site(module, row_ranges) for module, row_ranges in candidate.bases]
    return read_whole(sites, candidate.geometry.weight_shape, Site.weight)
