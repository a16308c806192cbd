"""Architectures as data. Order = order of detection. Standard library only."""

from __future__ import annotations

from .sd import SD, SDXL
from .spec import ArchSpec

ARCHS: tuple[ArchSpec, ...] = (SDXL, SD)

__all__ = ["ARCHS", "ArchSpec"]
