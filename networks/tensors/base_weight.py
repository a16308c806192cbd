"""Reading and writing the weight of a frozen base layer, whatever it is stored as.

Merges compute in fp32 (or wider) and round once, to what the layer stores: plain numbers, float8 with or without the
trainers' scale, bitsandbytes' int8, nf4 and fp4, torchao's weight-only tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._errors import Told
from .forms import HALF_AND_WIDER, Form, Plain, PlainFloat8, ScaledFloat8, Unknown, bare
from .forms_quantised import BitsAndBytes4, BitsAndBytes8, TorchAO

_PLAIN = Plain()
_FORMS: tuple[Form, ...] = (
    TorchAO(),
    BitsAndBytes8(),
    BitsAndBytes4(),
    ScaledFloat8(),
    PlainFloat8(),
    _PLAIN,
    Unknown(),
)
_BACKUPS: WeakKeyDictionary[nn.Module, Callable[[nn.Module], None]] = WeakKeyDictionary()
_BIASES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def form_of(module: nn.Module) -> Form:
    """The form of this layer's weight, as it is now: hosts cast and quantise after a network was made."""
    weight = module.weight
    if type(weight) in (Tensor, nn.Parameter) and weight.dtype in HALF_AND_WIDER:
        return _PLAIN  # nearly always, and asked for several times in each merge
    return next(form for form in _FORMS if form.matches(module))


class NotFinite(Told):
    """A weight to be stored has NaN or infinite values."""


class _ByAnotherName(nn.Module):
    """A layer whose weight is called `scale`, as in FLUX.1's RMSNorm, seen as one that has a weight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        vars(self)["module"] = module  # not a child

    @property
    def weight(self) -> Tensor:
        scale = vars(self)["module"].scale
        assert isinstance(scale, Tensor)
        return scale


def _holder(module: nn.Module) -> nn.Module:
    """Where the forms find the weight."""
    renamed = not hasattr(module, "weight") and isinstance(getattr(module, "scale", None), Tensor)
    return _ByAnotherName(module) if renamed else module


def check(module: nn.Module) -> None:
    """Whether the weight can be read and written, found out before anything is changed.

    Raises:
        ValueError: with what was found and what to do.
    """
    module = _holder(module)
    if getattr(module, "weight", None) is None:
        raise ValueError(
            f"{type(module).__name__} has no weight that could be changed: apply the network without merging, or leave "
            "such layers out when it is trained (train_norm=affine)"
        )
    weight = module.weight
    divided = hasattr(weight, "device_mesh") or getattr(weight, "_fsdp_flattened", False)  # FSDP2, FSDP1
    if divided or not isinstance(weight, Tensor) or not weight.numel():
        raise ValueError(
            f"the weight of {type(module).__name__} is not here (sharded over processes, or emptied by its host): do "
            "this in one process, on a model that is whole"
        )
    form_of(module).check(module)


def read(module: nn.Module, device: torch.device | None = None) -> Tensor:
    """The weight [O, I, *kernel] as it is now, dequantised, in fp32 or wider, detached.

    Args:
        device: where the answer is wanted; None means where the weight is.

    Raises:
        ValueError: the weight is stored in a form that cannot be read.
    """
    check(module)
    with torch.no_grad():
        module = _holder(module)
        return form_of(module).read(module, device)


def plain(module: nn.Module) -> Tensor | None:
    """The weight itself, detached, where it is stored as 16-bit numbers or wider; None for other forms."""
    form = form_of(module)
    return bare(module) if isinstance(form, Plain) and not form.coarse else None


def shares(module: nn.Module, weight: Tensor) -> bool:
    """Whether what `read` gave is the layer's own memory."""
    held = _holder(module)
    return isinstance(form_of(held), Plain) and bare(held).data_ptr() == weight.data_ptr()


def write(module: nn.Module, weight: Tensor) -> None:
    """Store a weight [O, I, *kernel] in the layer's own form, in place, so that hosts which hold its tensors see the
    change.

    Raises:
        ValueError: the form cannot be written, or the weight does not fit it; nothing was changed.
    """
    check(module)
    low, high = (value.item() for value in weight.aminmax())
    if not math.isfinite(low + high):
        raise NotFinite("the merged weight has NaN or infinite values: the adapter is broken, choose an earlier file")
    with torch.no_grad():
        module = _holder(module)
        form_of(module).write(module, weight, max(abs(low), abs(high)))


@dataclass(frozen=True)
class Rounding:
    """What became of an update when it was stored with few bits. They add up.

    Attributes:
        title: the form; "" if it is exact enough not to be measured (16 bits and more).
        kept, update: <stored - W, W' - W> and ||W' - W||^2; their ratio is the strength that is left.
    """

    title: str = ""
    kept: float = 0.0
    update: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.title or other.title, self.kept + other.kept, self.update + other.update)


EXACT = Rounding()
_SAMPLE = 4  # slices of a weight, about, from which a loss is known well enough
LOSS = 0.1  # of the strength; more is worth a warning


def change(module: nn.Module, new: Tensor) -> Rounding:
    """Store another weight. An equal one changes nothing: not even a quantisation is done again.

    Args:
        module: the layer.
        new: W', of the shape and dtype of what `read` gave.

    Returns:
        What was lost of W' - W, as some rows of a large weight show it.

    Raises:
        ValueError: as `write`.
    """
    check(module)
    holder = _holder(module)
    form = form_of(holder)
    if not form.coarse:
        write(module, new)
        return EXACT
    with torch.no_grad():
        slices = form.slices(holder)
        sample = slices[:: max(1, len(slices) // _SAMPLE)]
        updates = {rows: new[slice(*rows)] - form.rows(holder, *rows, new.device) for rows in sample}
        if not any(bool(update.any()) for update in updates.values()) and _is_stored(form, holder, new, slices):
            return EXACT
        write(module, new)
        lost = Rounding(form.title)
        for rows, update in updates.items():
            kept = form.rows(holder, *rows, new.device) - new[slice(*rows)] + update
            lost += Rounding(form.title, (kept * update).sum().item(), update.square().sum().item())
    share = len(new) / sum(stop - start for start, stop in sample)
    return Rounding(form.title, lost.kept * share, lost.update * share)


def _is_stored(form: Form, holder: nn.Module, new: Tensor, slices: Sequence[tuple[int, int]]) -> bool:
    return all(torch.equal(new[slice(*rows)], form.rows(holder, *rows, new.device)) for rows in slices)


def rounding_warning(roundings: Sequence[Rounding]) -> str:
    """A warning for the user if a merge lost a part of the strength that can be seen; otherwise ""."""
    total = sum(roundings, EXACT)
    share = total.kept / total.update if total.update else 1.0
    if share >= 1 - LOSS:
        return ""
    return (
        f"merged into weights stored as {total.title}: rounding kept {max(0.0, share):.0%} of the update's strength; "
        "merge into bf16 or fp16 weights and quantise those, or apply the network without merging"
    )


def backup(module: nn.Module) -> None:
    """Remember the weight until it is restored. Networks on one module share the backup, from before any merge."""
    if module not in _BACKUPS:
        check(module)
        held = _holder(module)
        _BACKUPS[module] = form_of(held).save(held)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            _BIASES[module] = bias.detach().clone()


def has_backup(module: nn.Module) -> bool:
    """Whether `restore` would put a weight back."""
    return module in _BACKUPS


def restore(module: nn.Module) -> None:
    """Put the remembered weight back, bit for bit, and forget it; nothing without a backup."""
    put_back = _BACKUPS.pop(module, None)
    if put_back is not None:
        with torch.no_grad():
            put_back(_holder(module))
    bias = _BIASES.pop(module, None)
    if bias is not None:
        with torch.no_grad():
            module.get_parameter("bias").copy_(bias)
