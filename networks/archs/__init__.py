"""Architectures as data. Order = order of detection. Standard library only."""

from __future__ import annotations

from .anima import ANIMA
from .flux import CHROMA, FLUX
from .hunyuan_image import HUNYUAN_IMAGE
from .lumina import LUMINA
from .qwen_image import QWEN_IMAGE
from .sd import SD, SDXL
from .sd3 import SD3
from .spec import ArchSpec
from .wan import WAN

ARCHS: tuple[ArchSpec, ...] = (SDXL, SD, FLUX, CHROMA, SD3, LUMINA, HUNYUAN_IMAGE, ANIMA, WAN, QWEN_IMAGE)

__all__ = ["ARCHS", "ArchSpec"]
