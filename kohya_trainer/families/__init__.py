"""Model families of our trainer and generator, one record each."""

from __future__ import annotations

from .ace_step import AceStep
from .base import Condition, DataOptions, Family
from .flux import Flux
from .noise import NoiseOptions
from .qwen_image import QwenImage
from .sd import StableDiffusion, StableDiffusionXL
from .sd3 import StableDiffusion3
from .z_image import ZImage

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    QwenImage,
    ZImage,
    AceStep,
)

__all__ = ["FAMILIES", "Condition", "DataOptions", "Family", "NoiseOptions"]
