"""What is measured: adapters and layers by the names of the tables, and how much of both a run takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from networks.algos import ALGOS
from networks.tensors.geometry import Geometry


@dataclass(frozen=True)
class Case:
    """An adapter.

    Attributes:
        algo: its algorithm.
        dim: rank; of rotations the size of their blocks.
        options: as its algorithm has them.
        dora: with magnitudes of the output rows.
    """

    algo: str
    dim: int
    options: Mapping[str, Any] = field(default_factory=dict)
    dora: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([f"{self.algo} {self.dim}", *words, *(["DoRA"] if self.dora else [])])


_WHOLE = {"factor": 16, "full_matrix": True}
CASES = {
    "lora16": Case("lora", 16),
    "lora64": Case("lora", 64),
    "lora_fa16": Case("lora_fa", 16),
    "dora16": Case("lora", 16, dora=True),
    "loha8": Case("loha", 8),
    "loha32": Case("loha", 32),
    "lokr f8 r8": Case("lokr", 8, {"factor": 8}),
    "lokr f16 whole": Case("lokr", 8, _WHOLE),
    "lokr f16 whole + DoRA": Case("lokr", 8, _WHOLE, dora=True),
    "oft32": Case("diag-oft", 32),
    "boft16": Case("boft", 16),
    "dylora16": Case("dylora", 16, {"block_size": 4}),
    "glora16": Case("glora", 16),
    "ia3": Case("ia3", 1),
    "tlora16": Case("tlora", 16, {"use_data_init": False}),  # or a start would decompose every weight
}
_LINEAR = [name for name, adapter in ALGOS.items() if adapter.spec.family == Geometry.family]
CASES |= {name: Case(name, 16) for name in _LINEAR if name not in {case.algo for case in CASES.values()}}


@dataclass(frozen=True)
class Layer:
    """A base layer, and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """It, frozen, with random weights."""
        with torch.device("meta"):
            layer = self.make()
        layer = layer.to_empty(device=device).to(dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, 0.02)
        return layer.requires_grad_(False)

    def input(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A random input that wants a gradient."""
        return torch.randn(self.shape, dtype=dtype, device=device).requires_grad_()


def _linear(inputs: int, outputs: int, tokens: int) -> Layer:
    return Layer(lambda: nn.Linear(inputs, outputs), (1, tokens, inputs))


def _conv(channels: int, outputs: int, kernel: int, size: int) -> Layer:
    return Layer(lambda: nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), (1, channels, size, size))


MAIN = "Linear 1280, T 1024"
LAYERS = {
    MAIN: _linear(1280, 1280, 1024),
    "Linear 640, T 4096": _linear(640, 640, 4096),
    "Linear 1280, T 256": _linear(1280, 1280, 256),
    "Linear 3072, T 256": _linear(3072, 3072, 256),
    "Linear 3072, T 4096": _linear(3072, 3072, 4096),
    "Linear 1280 -> 10240, T 1024": _linear(1280, 10240, 1024),
    "Linear 3072 -> 12288, T 4096": _linear(3072, 12288, 4096),
    "conv 3x3 320 at 64 x 64": _conv(320, 320, 3, 64),
    "conv 3x3 1280 at 16 x 16": _conv(1280, 1280, 3, 16),
    "conv 1x1 640 at 32 x 32": _conv(640, 640, 1, 32),
}
SMALL = _linear(16, 16, 4)  # of which a pass takes nothing but Python and launches


@dataclass(frozen=True)
class Step:
    """A whole step of a shrunken model: with which adapter, of how many channels, with checkpointing or without, under
    autocast with the model in bf16 or all in fp32."""

    case: str
    channels: int
    checkpointing: bool = False
    fp32: bool = False


@dataclass(frozen=True)
class Sizes:
    """How much a run takes.

    Attributes:
        cases: the adapters, by name.
        counted, timed: layers, by name.
        few: of the cases, those timed on the other layers.
        seconds: of timing for each candidate of a comparison.
        models: shrunken ones, of which a whole step is taken.
        steps: what is taken of each of them.
        release: the model that networks are made for; "" = a small stand-in.
        networks: their algorithms.
        base_layer: the one that is compiled, quantised and moved.
        base_cases: its adapters.
        compiled: those of them that are compiled.
        backend: of torch.compile.
        merged: width of the square weights in the merge, and their number.
    """

    cases: tuple[str, ...]
    counted: tuple[str, ...]
    timed: tuple[str, ...]
    few: tuple[str, ...]
    seconds: float
    models: tuple[str, ...]
    steps: tuple[Step, ...]
    release: str
    networks: tuple[str, ...]
    merged: tuple[int, int]
    base_layer: str = MAIN
    base_cases: tuple[str, ...] = ("lora16", "dora16", "loha8", "lokr f8 r8", "oft32")
    compiled: tuple[str, ...] = ("lora16", "dora16", "lokr f8 r8")
    backend: str = "inductor"


_STEPS = [Step(case, 64) for case in ("lora16", "lokr f8 r8", "loha8", "dora16")]
_STEPS += [Step(case, 64, checkpointing=True) for case in ("lora16", "lokr f8 r8")]
_STEPS += [Step("lora16", 128), Step("lokr f8 r8", 128)]
_STEPS += [Step("lora16", 64, fp32=True), Step("lokr f8 r8", 64, fp32=True), Step("lora16", 128, fp32=True)]
FULL = Sizes(
    cases=tuple(CASES),
    counted=tuple(LAYERS),
    timed=(MAIN, "Linear 3072, T 256", "conv 3x3 320 at 64 x 64"),
    few=("lora16", "dora16", "loha8", "lokr f8 r8"),
    seconds=0.25,
    models=("SDXL", "FLUX", "Wan"),
    steps=tuple(_STEPS),
    release="sdxl",
    networks=("lora", "loha", "lokr"),
    merged=(1280, 44),
)
QUICK = Sizes(
    cases=("lora16", "dora16", "lokr f8 r8", "oft32"),
    counted=(MAIN,),
    timed=(MAIN,),
    few=(),
    seconds=0.1,
    models=("FLUX", "Wan"),
    steps=(Step("lora16", 64),),
    release="sdxl",
    networks=("lora",),
    merged=(1280, 4),
    base_cases=("lora16",),
    compiled=("lora16",),
)
