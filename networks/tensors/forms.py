"""How a frozen layer stores its weight: one record per form, able to read, to write and to remember all bits of it.

Here are the contract and the forms that are plain tensors: numbers, and the trainers' fp8 with a scale beside it.
`forms_quantised` has those of libraries with classes of their own, `base_weight` chooses among all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .blocks import SLICE, Codes, block_of_scale, widened

HALF_AND_WIDER = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
REMEDY = "load the model in fp32, fp16 or bf16, or apply the network without merging and without DoRA"


class Form:
    """A way to store a weight. Instances have no state: the tensors are read from the module at every call.

    Attributes:
        title: as a person would name it.
        coarse: so few bits that a merge loses much of a small update.
    """

    title: ClassVar[str]
    coarse: ClassVar[bool] = True

    def matches(self, module: Any) -> bool:
        """Whether a layer stores its weight so, now."""
        raise NotImplementedError

    def check(self, module: Any) -> None:
        """Whether the weight can be read and written, before anything is changed.

        Raises:
            ValueError: what is missing or cannot be read, and the remedy.
        """

    def read(self, module: Any, device: torch.device | None) -> Tensor:
        """W [O, I, *kernel] in fp32 or wider, detached; on a device, or where it is stored."""
        raise NotImplementedError

    def slices(self, module: Any) -> list[tuple[int, int]]:
        """Ranges of rows which `rows` reads alone; one of all where the form has no rows."""
        return [(0, self.read(module, None).shape[0])]

    def rows(self, module: Any, start: int, stop: int, device: torch.device | None) -> Tensor:
        """`read` of one of the `slices`."""
        return self.read(module, device)

    def write(self, module: Any, weight: Tensor, largest: float) -> None:
        """Store a weight [O, I, *kernel], in place: hosts hold the tensors.

        Args:
            largest: its largest absolute value.

        Raises:
            ValueError: it has values which the form cannot hold; nothing was changed.
        """
        raise NotImplementedError

    def save(self, module: Any) -> Callable[[Any], None]:
        """Remember all bits.

        Returns:
            What puts them back into a layer of this form, wherever its tensors are by then.
        """
        raise NotImplementedError


class Plain(Form):
    """Numbers as they are: fp64, fp32, bf16, fp16."""

    title = "plain"
    coarse = False

    def matches(self, module: Any) -> bool:
        return _is_plain(module.weight, HALF_AND_WIDER)

    def read(self, module: Any, device: torch.device | None) -> Tensor:
        weight = bare(module)
        return weight.to(device or weight.device).to(torch.promote_types(weight.dtype, torch.float32))

    def write(self, module: Any, weight: Tensor, largest: float) -> None:
        own = bare(module)
        limit = torch.finfo(own.dtype).max
        if largest > limit:
            raise ValueError(
                f"the merged weight reaches {largest:.4g}, but {own.dtype} ends at {limit:g}: lower the strength, or "
                "merge into wider weights"
            )
        own.copy_(weight)
        _forget_codes(module)

    def save(self, module: Any) -> Callable[[Any], None]:
        kept = bare(module).clone()

        def put_back(target: Any) -> None:
            bare(target).copy_(kept)
            _forget_codes(target)

        return put_back


class PlainFloat8(Plain):
    """float8 without a scale (--fp8_base): autocast widens it in the layer's own forward."""

    title = "float8 without a scale"
    coarse = True

    def matches(self, module: Any) -> bool:
        return _is_plain(module.weight, _FLOAT8) and not scales_beside(module)

    def read(self, module: Any, device: torch.device | None) -> Tensor:
        weight = bare(module)
        return widened(weight.to(device or weight.device), torch.float32)  # float8 has no promotion rules

    def slices(self, module: Any) -> list[tuple[int, int]]:
        return _slices(module.weight)

    def rows(self, module: Any, start: int, stop: int, device: torch.device | None) -> Tensor:
        rows = bare(module)[start:stop]
        return widened(rows.to(device or rows.device), torch.float32)


class Coded(Form):
    """Codes with a scale per block, wherever they are kept."""

    def codes(self, module: Any) -> Codes:
        """The layer's own tensors, as codes of the weight's shape with a scale for each block.

        Raises:
            ValueError: one is missing, or does not fit the others.
        """
        raise NotImplementedError

    def check(self, module: Any) -> None:
        self.codes(module)

    def read(self, module: Any, device: torch.device | None) -> Tensor:
        return self.codes(module).decode(device)

    def slices(self, module: Any) -> list[tuple[int, int]]:
        return _slices(self.codes(module).codes)

    def rows(self, module: Any, start: int, stop: int, device: torch.device | None) -> Tensor:
        return self.codes(module).rows(start, stop, device)

    def write(self, module: Any, weight: Tensor, largest: float) -> None:
        self.codes(module).encode_(weight)

    def save(self, module: Any) -> Callable[[Any], None]:
        own = self.codes(module)
        kept = [t.clone() for t in (own.codes, own.scale, own.zero) if t is not None]

        def put_back(target: Any) -> None:
            now = self.codes(target)
            for tensor, bits in zip([t for t in (now.codes, now.scale, now.zero) if t is not None], kept, strict=True):
                tensor.copy_(bits)

        return put_back


class ScaledFloat8(Coded):
    """The trainers' --fp8_scaled: a Linear with a buffer scale_weight and a forward of its own."""

    title = "scaled float8"

    def matches(self, module: Any) -> bool:
        return _is_plain(module.weight, _FLOAT8) and scales_beside(module) == _TRAINERS

    def codes(self, module: Any) -> Codes:
        weight, scale = bare(module), module.scale_weight
        assert isinstance(scale, Tensor)
        block = block_of_scale(weight.shape, scale.shape)
        if block is None:
            raise ValueError(
                f"scale_weight of shape {tuple(scale.shape)} does not fit a weight of {tuple(weight.shape)}: "
                f"[1], [O, 1], [O, blocks, 1] and [blocks, blocks] are known; {REMEDY}"
            )
        limit = torch.finfo(weight.dtype).max
        return Codes(weight, scale.detach(), block, -limit, limit)


class Unknown(Form):
    """Everything else is refused: to guess at a weight would be silent nonsense."""

    title = "unknown"

    def matches(self, module: Any) -> bool:
        return True

    def check(self, module: Any) -> None:
        weight = module.weight
        found = getattr(weight, "dtype", type(weight).__name__)
        kind = type(weight).__name__
        told = f"{found}" if kind in ("Parameter", "Tensor") else f"{kind}, {found}"
        scales = scales_beside(module)
        beside = f", with {', '.join(sorted(scales))} beside it" if scales else ""
        raise ValueError(f"a weight of this form ({told}{beside}, in {type(module).__name__}) cannot be read: {REMEDY}")


_TRAINERS = {"scale_weight"}


def bare(module: Any) -> Tensor:
    """The weight without its class, sharing memory: a parameter of bitsandbytes quantises itself when it is moved."""
    plain = module.weight.detach()  # of a plain parameter that is all; torch.compile knows no `as_subclass`
    return plain if type(module.weight) in (Tensor, nn.Parameter) else plain.as_subclass(torch.Tensor)


def _is_plain(weight: object, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Bits that are the numbers: not a tensor that only looks as if it had this dtype (quanto, sharded tensors)."""
    return isinstance(weight, Tensor) and weight.dtype in dtypes and not hasattr(weight, "__tensor_flatten__")


def has_class(weight: object, package: str, name: str) -> bool:
    if type(weight) in (Tensor, nn.Parameter):  # the usual ones first: torch.compile cannot walk over base classes
        return False
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(weight).__mro__)


def _slices(weight: Tensor) -> list[tuple[int, int]]:
    step = max(1, SLICE * len(weight) // max(1, weight.numel()))
    return [(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def scales_beside(module: Any) -> set[str]:
    """Names of tensors beside the weight that may scale it."""
    own = (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
    return {name for name, value in own if "scale" in name and isinstance(value, Tensor)}


def _forget_codes(module: Any) -> None:
    """A Linear8bitLt that keeps fp16 weights caches their codes."""
    state = getattr(module, "state", None)
    if has_class(module.weight, "bitsandbytes", "Int8Params") and state is not None:
        state.CB = state.SCB = None
