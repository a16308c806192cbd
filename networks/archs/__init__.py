"""Architectures as data. Order = order of detection. Standard library only."""

from __future__ import annotations

from .ace_step import ACE_STEP
from .anima import ANIMA
from .flux import CHROMA, FLUX
from .flux_2 import FLUX_2
from .hidream_o1 import HIDREAM_O1
from .hunyuan_image import HUNYUAN_IMAGE
from .hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO, HV_1_5
from .ideogram4 import IDEOGRAM4
from .kandinsky import KANDINSKY
from .krea2 import KREA2
from .lumina import LUMINA
from .qwen_image import QWEN_IMAGE
from .sd import SD, SDXL
from .sd3 import SD3
from .spec import ArchSpec
from .wan import WAN
from .zimage import ZIMAGE

ARCHS: tuple[ArchSpec, ...] = (
    SDXL, SD, FLUX, CHROMA, SD3, LUMINA, HUNYUAN_IMAGE, ANIMA, WAN, QWEN_IMAGE, HUNYUAN_VIDEO, HV_1_5, FRAMEPACK,
    FLUX_2, ZIMAGE, KANDINSKY, KREA2, IDEOGRAM4, HIDREAM_O1, ACE_STEP,
)  # fmt: skip

__all__ = ["ARCHS", "ArchSpec"]
