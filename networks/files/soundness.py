"""Whether the tensors of a file can be layers at all, found out before anything is made of them: a broken value, or
factors that do not go together, are told here in one sentence, and nobody behind has to ask.

What this needs is in the file: whether a layer fits a weight is asked where there is one (`Adapter.describe`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .._errors import located
from ..algos import ALGOS, recognise
from ..records.spec import NUMBER, AlgoSpec
from . import dialects, dotted

LARGEST = 1e8  # of a value: training ends far below, and the product of a few is finite in fp32
_FLAGS = {flag for dialect in dialects.DIALECTS.values() for flag in dialect.flags}
_NAMES = {"R": "ranks"}  # of letters of axes; others are told as lengths

Layer = Mapping[str, tuple[str, Tensor]]  # our suffix -> that of the file, and the tensor


def readable(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a file in types that can be computed with: float8 has no operations.

    Args:
        tensors: under the file's own keys.
        source: name of the file, for messages.

    Raises:
        ValueError: for the first layer or key that cannot be what it is called.
    """
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    found: dict[str, Tensor] = {}
    for key, path, suffix in dotted.divided(tensors):
        own, what = dotted.own_suffix(path, suffix), suffix if path and suffix else repr(key)
        with located(f"{source}: {path}" if suffix and path else source):
            found[key] = tensor = _wide(what, tensors[key])
            if own == dotted.ALPHA or key in _FLAGS:
                _check_number(what, tensor)
                _check_small(what, tensor)
            _check_values(what, tensor, limited=_of_layer(suffix) and own != dotted.ALPHA)
        layers.setdefault(path, {})[own] = suffix, tensor
    for path, layer in layers.items():
        with located(f"{source}: {path}"):
            _check_layer(layer)
    return found


def _of_layer(suffix: str) -> bool:
    """Whether a layer has tensors of this suffix, with the number of a part behind it or without."""
    whole, _, number = suffix.rpartition(".")
    return suffix in dotted.SUFFIXES or (number.isdecimal() and whole in dotted.SUFFIXES)


def _wide(what: str, tensor: Tensor) -> Tensor:
    """Itself, but for types of one byte and less: all of these are exact in bf16."""
    if not tensor.is_floating_point() or tensor.itemsize > 1:
        return tensor
    try:
        return tensor.to(torch.bfloat16)
    except RuntimeError:  # of types whose values share bytes
        raise ValueError(f"{what} is of type {_type(tensor)}, which is not read: save the file in another") from None


def _check_number(what: str, tensor: Tensor) -> None:
    if tensor.numel() != 1 or tensor.is_complex():
        raise ValueError(
            f"{what} is no number, but {tuple(tensor.shape)} of type {_type(tensor)}: the file is broken, download or "
            "save it again"
        )


def _check_small(what: str, number: Tensor) -> None:
    """Raises ValueError for a number that becomes 0 where it is read in fp32: an alpha of 0 stands for the dim."""
    if float(number) and not float(number.float()):
        raise ValueError(
            f"{what} is {float(number):g}, which is 0 in fp32, as files and programs have it: the file is broken, use "
            "an earlier save"
        )


def _check_values(what: str, tensor: Tensor, limited: bool) -> None:
    """Raises ValueError for values that are not finite; with `limited`, beyond all that training gives."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return
    largest = max(abs(value.item()) for value in tensor.aminmax())
    if not math.isfinite(largest):
        raise ValueError(f"{what} has NaN or infinite values: the file is broken, use an earlier save")
    if limited and largest > LARGEST:
        raise ValueError(f"{what} has values up to {largest:.1e}, which no training gives: use an earlier save")


def _check_layer(layer: Layer) -> None:
    """Raises ValueError where tensors of one layer are no factors, or do not go together."""
    tensors = {own: tensor for own, (_, tensor) in layer.items()}
    algorithm = recognise(tensors) or next((cls for cls in ALGOS.values() if cls.spec.recognises(tensors)), None)
    if algorithm is None:
        return
    for form in _forms(algorithm.spec, tensors):
        known: dict[str, tuple[int, str]] = {}
        for own, letters in form.items():
            suffix, tensor = layer[own]
            _check_factor(suffix, tensor, letters)
            _check_axes(suffix, tensor, letters, known)
    if algorithm.spec.alpha_option and dotted.ALPHA in layer:
        _check_limit(*layer[dotted.ALPHA], algorithm.spec)
    for own in (dotted.MAGNITUDE, dialects.BLISSFUL.magnitude, algorithm.spec.bias_key):
        if own in layer:
            _check_factor(*layer[own], "*")


def _forms(spec: AlgoSpec, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Our suffix -> letters, of those tensors of a layer whose axes have to do with each other."""
    found: dict[str, str] = {}
    for form in spec.axes:
        if form.keys() <= tensors.keys() and form.keys().isdisjoint(found):
            found |= form
        for own in tensors:  # of parts: each is by itself
            whole, _, number = own.rpartition(".")
            if whole in spec.numbered & form.keys() and number.isdecimal():
                yield {own: form[whole]}
    yield found


def _check_factor(suffix: str, tensor: Tensor, letters: str) -> None:
    shape = tuple(tensor.shape)
    if letters == NUMBER:
        _check_number(suffix, tensor)
    elif not tensor.is_floating_point():
        raise ValueError(f"{suffix} is of type {_type(tensor)}, not floating point: save the file again")
    elif not tensor.numel() and letters == letters.upper():
        raise ValueError(f"{suffix} {shape} is empty: the file is broken, download or save it again")


def _check_limit(suffix: str, alpha: Tensor, spec: AlgoSpec) -> None:
    """Raises ValueError for an alpha that is no limit of a rotation."""
    if not 0 <= float(alpha) <= LARGEST:
        raise ValueError(
            f"{suffix} is {float(alpha):g}, and in {spec.name} it is the {spec.alpha_option}, a limit from 0 on: the "
            "file is broken, use an earlier save"
        )


def _check_axes(suffix: str, tensor: Tensor, letters: str, known: dict[str, tuple[int, str]]) -> None:
    """Compare the axes of a tensor with those of others.

    Args:
        suffix: in the file, for messages.
        tensor: the factor.
        letters: see `AlgoSpec.axes`.
        known: letter -> what it stands for, and where; is added to.
    """
    shape, names = tuple(tensor.shape), letters.rstrip("*")
    if letters == NUMBER:
        return
    more = shape[len(names) :] if names == letters else ()
    if len(shape) < len(names) or any(size != 1 for size in more):
        raise ValueError(f"{suffix} {shape} has {len(shape)} axes, not {len(names)}: choose another save of the file")
    for letter, size in zip(names, shape, strict=False):
        wanted, where = known.setdefault(letter, (size, f"{suffix} {shape}"))
        if wanted != size:
            kind = _NAMES.get(letter, "values on one axis")
            raise ValueError(
                f"{where} and {suffix} {shape} do not go together, {wanted} and {size} {kind}: choose another save of "
                "the file"
            )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
