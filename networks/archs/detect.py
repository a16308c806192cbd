"""Which architecture a model is: by class name and sub-modules, so no model library is imported."""

from __future__ import annotations

from typing import Any

from . import ARCHS
from .generic import record_of
from .spec import ArchSpec


def detect(denoiser: Any) -> ArchSpec:
    """The architecture of a denoiser (an nn.Module, possibly wrapped by compile or a data-parallel class): a recorded
    one, or one made from its modules."""
    return recognised(denoiser) or record_of(unwrap(denoiser))


def recognised(denoiser: Any) -> ArchSpec | None:
    """The recorded architecture of a denoiser; None = no record knows it, nor a class that its class is made from."""
    model = unwrap(denoiser)
    classes = [cls.__name__ for cls in type(model).__mro__]
    found = next((arch for name in classes for arch in ARCHS if is_of(arch, model, name)), None)
    return None if found is not None and _is_namesake(found, model) else found


def _is_namesake(arch: ArchSpec, model: Any) -> bool:
    """Whether it is another model of the same class name: it has repeated blocks, and none of the architecture's."""
    wanted = arch.denoiser.every_container
    return not any(type(module).__name__ in wanted for module in model.modules()) and bool(record_of(model).axes)


def is_of(arch: ArchSpec, model: Any, cls: str) -> bool:
    """Whether an unwrapped model, taken for one of a class of this name, has the marks of an architecture."""
    return any(
        cls == signature.cls
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
