"""Small stand-ins for the trainers' denoisers: their class and layer names, from the recorded lists, at a few blocks.

The forward pass sends a signal through every layer in turn: enough to see that adapters act, train and load.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = Path(__file__).parent / "names"
SHRINK = 64
CONVOLUTIONS: dict[str, Any] = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
KEPT = re.compile(r"(?:^|\.)(?:\w*blocks|layers|block|\w*refiner)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Recorded:
    part: str
    dotted: str
    cls: str
    shape: tuple[int, ...]
    saved: str
    block: str


def recorded(arch: str) -> list[Recorded]:
    """The lines of tests/names/<arch>.txt."""
    found, path = [], NAMES / f"{arch}.txt"
    assert path.is_file(), f"the names of {arch} are not recorded: run `python scripts/names.py {arch}`"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            part, dotted, cls, shape, saved, block = line.split("\t")
            sizes = tuple(map(int, shape.split("x"))) if shape != "-" else ()
            found.append(Recorded(part, dotted, cls, sizes, saved, block))
    return found


class _Chain:
    """A forward pass through all layers, each fed with as much of the signal as it wants. It can be told the time by
    any of the names that the trainers' models have for it."""

    def forward(  # type: ignore[misc]
        self: nn.Module, x: Tensor, timestep: Any = None, timesteps: Any = None, t: Any = None, time: Any = None
    ) -> Tensor:
        out = x
        for module in self.modules():
            if isinstance(module, nn.Linear):
                out = out + fit(torch.tanh(module(fit(out, module.in_features))), x.shape[-1])
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                sides = [max(4, 2 * size) for size in module.kernel_size]
                image = fit(out.flatten(1), module.in_channels * math.prod(sides))
                y = torch.tanh(module(image.reshape(-1, module.in_channels, *sides)))
                out = out + fit(y.flatten(1), x.shape[-1])[:, None]
        return out


def fit(x: Tensor, width: int) -> Tensor:
    """[.., n] -> [.., width] by cutting or repeating."""
    times = -(-width // x.shape[-1])
    return x.repeat(*[1] * (x.dim() - 1), times)[..., :width]


def toy(arch: str, blocks: int = 2, seed: int = 0, shrink: int = SHRINK) -> dict[str, nn.Module]:
    """Part name -> model, with the first blocks of each row and sizes divided by `shrink`."""
    torch.manual_seed(seed)
    roots: dict[str, nn.Module] = {}
    for entry in recorded(arch):
        if entry.dotted == ".":
            roots[entry.part] = type(entry.cls, (_Chain, nn.Module), {})()
            continue
        if any(int(n) >= blocks for n in KEPT.findall(entry.dotted)):
            continue
        at = roots[entry.part]
        *parents, last = entry.dotted.split(".")
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        sizes = [max(4, size // shrink) for size in entry.shape[:2]]
        if entry.cls == "Linear":
            at.add_module(last, nn.Linear(sizes[1], sizes[0]))
        elif entry.cls in CONVOLUTIONS:
            padding = tuple(k // 2 for k in entry.shape[2:])
            at.add_module(last, CONVOLUTIONS[entry.cls](sizes[1], sizes[0], entry.shape[2:], padding=padding))
        else:
            at.add_module(last, type(entry.cls, (nn.Module,), {})())
    return roots


def signal(width: int = 64, batch: int = 2, tokens: int = 3) -> Tensor:
    """[B, T, width], the same at each call."""
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(5))
