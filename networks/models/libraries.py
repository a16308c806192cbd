"""Models of the real classes, without weights. The libraries that hold them are kept from remarks of their own."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from ..archs.releases import Encoder, Release


def _quiet_at_import() -> None:
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "transformers"):  # what they lack here
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # read as it is imported, when its logger is made anew


def quiet_libraries() -> None:
    """Silence the libraries' remarks at import time, which a user can do nothing about."""
    _quiet_at_import()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # the older name of `dtype`, which every version understands
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)


def library_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers.

    Raises:
        ValueError: the installed version has no such class.
    """
    _quiet_at_import()
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"{name} is not in the installed {library}: run this in an environment with a newer one (scripts/start.py "
            "makes one); leave the trainer's as it is"
        ) from None


def on_meta() -> torch.device:
    """A context in which models are built without weights."""
    quiet_libraries()
    return torch.device("meta")


def denoiser_of(release: Release) -> nn.Module:
    """Its model in diffusers' class, with what only the trainer's has.

    Raises:
        ValueError: the installed library lacks its class.
    """
    with on_meta():
        denoiser: nn.Module = library_class("diffusers", release.denoiser)(**release.sizes)
        for name, (cls, sizes) in release.added.items():
            _add(denoiser, name, getattr(nn, cls)(*sizes) if sizes else type(cls, (nn.Module,), {})())
    return denoiser


def encoder_of(encoder: Encoder) -> nn.Module:
    """A text encoder in transformers' class.

    Raises:
        ValueError: the installed library lacks its class.
    """
    with on_meta():
        config = library_class("transformers", encoder.config)(**encoder.sizes)
        return from_config(library_class("transformers", encoder.cls), config)


def from_config(cls: Any, config: Any) -> nn.Module:
    """A transformers model; its own constructor would need no more, but not all classes take a bare configuration."""
    built: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return built


def _add(model: nn.Module, dotted_name: str, module: nn.Module) -> None:
    *parents, last = dotted_name.split(".")
    for name in parents:
        if name not in dict(model.named_children()):
            model.add_module(name, nn.Module())
        model = model.get_submodule(name)
    model.add_module(last, module)
