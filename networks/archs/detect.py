"""Which architecture a model is: by class name and sub-modules, so no model library is imported."""

from __future__ import annotations

from typing import Any

from . import ARCHS
from .spec import ArchSpec


def detect(denoiser: Any) -> ArchSpec:
    """The architecture of a denoiser (an nn.Module, possibly wrapped by compile or a data-parallel class).

    Raises:
        ValueError: no architecture has these classes.
    """
    arch = recognised(denoiser)
    if arch is not None:
        return arch
    name = type(unwrap(denoiser)).__name__
    known = ", ".join(f"{s.cls} ({a.title})" for a in ARCHS for s in a.signatures)
    raise ValueError(f"no architecture of ours has a denoiser of class {name}; known: {known}")


def recognised(denoiser: Any) -> ArchSpec | None:
    """The same, None for another model."""
    model = unwrap(denoiser)
    return next((arch for arch in ARCHS if is_of(arch, model)), None)


def is_of(arch: ArchSpec, model: Any) -> bool:
    """Whether an unwrapped model has the marks of an architecture."""
    return any(
        type(model).__name__ == signature.cls
        and all(_has(model, path) for path in signature.has)
        and not any(_has(model, path) for path in signature.lacks)
        for signature in arch.signatures
    )


def unwrap(model: Any) -> Any:
    """The model below the wrappers of torch.compile, data-parallel training and sd-scripts' image generation."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__.endswith("DataParallel"):
            inner = model.module
        if inner is None:
            inner = vars(model).get("delegate")
        if inner is None:
            return model
        model = inner


def _has(model: Any, path: str) -> bool:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model is not None
