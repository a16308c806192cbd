"""Counted bounds of every algorithm in the precision in which people train: bf16 layers under fp32 adapters.

Four numbers: FLOPs relative to the frozen layer's, bytes kept for backward and bytes read and written relative to the
input's, and launches, forward and backward together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from bench.counting import Counts, count
from helpers_numeric import randomise
from torch import Tensor, nn

from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry


class Bound(NamedTuple):
    """The most of each."""

    algo: str
    dim: int
    options: dict[str, Any]
    dora: str
    flops: float
    kept: float
    traffic: float
    launches: int


# Linear 1280 -> 1280, T = 1024, under autocast.
BOUNDS = {
    "lora16": Bound("lora", 16, {}, "", 1.04, 0.05, 15.5, 12),
    "dora16": Bound("lora", 16, {}, "output", 1.06, 1.1, 32, 45),
    "loha8": Bound("loha", 8, {}, "", 1.15, 0.10, 17, 24),
    "loha32": Bound("loha", 32, {}, "", 2.63, 0.15, 46, 26),
    "lokr_f8_r8": Bound("lokr", 8, {"factor": 8}, "", 1.02, 0.11, 16, 19),
    "lokr_f16_whole_dora": Bound("lokr", 8, {"factor": 16, "full_matrix": True}, "output", 1.12, 2.1, 42, 50),
    "oft32": Bound("diag-oft", 32, {}, "", 1.04, 1.16, 20, 22),
    "boft16": Bound("boft", 16, {}, "", 1.31, 2.0, 173, 100),
    "dylora16": Bound("dylora", 16, {}, "", 1.02, 0.05, 16, 18),
    "glora16": Bound("glora", 16, {}, "", 1.09, 0.09, 22.5, 24),
    "ia3": Bound("ia3", 1, {}, "", 1.00, 1.01, 16.5, 10),
    "tlora16": Bound("tlora", 16, {}, "", 1.08, 0.09, 17, 20),
}


def counts(base: nn.Module, x: Tensor, bound: Bound, autocast: bool) -> Counts:
    geometry = Geometry.of(base)
    assert geometry is not None
    with torch.device(x.device):
        adapter = ALGOS[bound.algo](geometry, bound.dim, bound.options)
    if not x.is_meta:
        randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, 0.5, runtime=Runtime(1.0), dora=bound.dora)
    layer.train()
    layer.attach()
    parameters = [*base.parameters(), *layer.parameters(), *layer.buffers()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        gradient = torch.randn_like(base(x))

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return base(x)  # type: ignore[no-any-return]

    return count(forward, x, gradient, parameters)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_linear_as_trainers_run_it(name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bound = BOUNDS[name]
    base = nn.Linear(1280, 1280).bfloat16().requires_grad_(False)
    x = torch.randn(1, 1024, 1280, dtype=torch.bfloat16).requires_grad_()
    found, size = counts(base, x, bound, autocast=True), x.numel() * x.element_size()
    numbers = (found.flops / (4 * 1024 * 1280**2), found.kept / size, found.traffic / size, len(found.launches))
    told = " · ".join(f"{number:.3g} of {most:g}" for number, most in zip(numbers, bound[4:], strict=True))
    rounded = round(numbers[0], 2), round(numbers[1], 2), round(numbers[2], 1), numbers[3]
    assert all(number <= most for number, most in zip(rounded, bound[4:], strict=True)), (
        f"{told}\n{' '.join(launch.name for launch in found.launches)}"
    )
