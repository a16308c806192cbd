"""Model families of the trainer and generator: each file here is the record of one, or of near relatives.

To add one, put its file here: a subclass of base.Family with `title`, `pipeline_class`, `version`, `encode_prompts` and
`predict`, and whatever else is not as in a latent image model with flow matching. It is found by its place. Nothing
else knows the families: options that do not fit are refused by its methods, --help and errors list its title.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import Condition, DataOptions, Family
from .noise import NoiseOptions

_MODULES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
FAMILIES: tuple[type[Family], ...] = tuple(
    each
    for module in _MODULES
    for each in vars(module).values()
    if isinstance(each, type) and each.__module__ == module.__name__ and "pipeline_class" in vars(each)
)

__all__ = ["FAMILIES", "Condition", "DataOptions", "Family", "NoiseOptions"]
