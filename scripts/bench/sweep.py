"""Whether every algorithm with every option computes on a device what it computes in float64 on the CPU."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.tensors.fused import unfused
from networks.tensors.geometry import Geometry

from .report import Table
from .setting import AUTOCAST, MODES, Setting

DIM, SCALE, MULTIPLIER = 4, 0.5, 0.75
WIDTH = 64  # channels, which every factor and block divides
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(WIDTH, WIDTH), (1, 9, WIDTH)),
    "conv 3x3": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), (1, WIDTH, 5, 6)),
    "conv 1x1": (lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False), (1, WIDTH, 5, 6)),
}
# What is tried of an option that is no switch.
VALUES: dict[str, Any] = {
    "factor": 4, "block_size": 2, "constraint": 2**-5, "butterflies": 2, "sig_type": "last", "alpha_rank_scale": 0.5,
    "min_rank": 2, "mask_group_id": 1,
}  # fmt: skip
TOLERANCES = {"fp32": 2e-4, AUTOCAST: 6e-2}  # relative to the largest value


@dataclass(frozen=True)
class Combination:
    """An algorithm with options on a layer, and the side of its magnitudes; "" = none."""

    algo: str
    options: Mapping[str, Any]
    layer: str
    side: str = ""

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([self.layer, *words, *([f"DoRA on the {self.side}"] if self.side else [])])

    def build(self, device: torch.device, base_dtype: torch.dtype, dtype: torch.dtype) -> AdaptedLayer:
        """The layer, attached; its values are of no account.

        Args:
            device: of all.
            base_dtype: of the base layer.
            dtype: of the adapter.

        Raises:
            ValueError: there is no such form.
        """
        base = LAYERS[self.layer][0]().to(device, base_dtype).requires_grad_(False)
        geometry = Geometry.of(base)
        assert geometry is not None
        adapter = ALGOS[self.algo](geometry, DIM, dict(self.options)).to(device, dtype)
        adapter.mark_initialised_()
        scale = SCALE if adapter.laid_out.rank is not None else 1.0
        layer = AdaptedLayer("x", base, adapter, scale, dora=self.side).to(device)
        layer.runtime.multiplier = 1.0 if self.side else MULTIPLIER
        layer.attach()
        return layer.eval()  # what is drawn in training would be no matter of arithmetic


def combinations(algo: str) -> Iterator[Combination]:
    """Plain, with each option and each two of them, and with magnitudes; on each layer."""
    spec, parameters = ALGOS[algo].spec, inspect.signature(ALGOS[algo].layout).parameters
    singles: list[dict[str, Any]] = []
    for option in sorted(spec.options):
        default = parameters[option].default
        singles += [{option: not default}] if isinstance(default, bool) else []
        singles += [{option: VALUES[option]}] if option in VALUES and not isinstance(default, bool) else []
    pairs = [a | b for a, b in itertools.combinations(singles, 2)]
    for layer in LAYERS:
        sides = ["output", "input"] if "use_dora" in spec.features else []
        yield from (Combination(algo, options, layer) for options in ({}, *singles, *pairs))
        yield from (Combination(algo, options, layer, side) for side in sides for options in ({}, *singles))


def untried() -> list[str]:
    """A line for each option that has no value here."""
    lines = []
    for algo, adapter in ALGOS.items():
        parameters = inspect.signature(adapter.layout).parameters
        for option in sorted(adapter.spec.options):
            if option not in VALUES and not isinstance(parameters[option].default, bool):
                lines.append(f"the sweep has no value for {option} of {algo}")
    return lines


def errors(combination: Combination, device: torch.device) -> dict[str, float]:
    """Mode -> the largest error of output and gradients, relative to the largest value of each; that of a number's
    gradient, which may be 0 by chance, to the output's norm, which is its usual size.

    Args:
        combination: what is tried.
        device: where it is tried.
    """
    cpu, shape = torch.device("cpu"), LAYERS[combination.layer][1]
    exact = combination.build(cpu, torch.float64, torch.float64)
    with torch.no_grad():
        for t in (*exact.base.parameters(), *exact.adapter.parameters()):
            t.copy_((torch.randn_like(t) * 0.2).bfloat16())  # is the same in every dtype
        if exact.magnitude_change is not None:
            exact.start_magnitude()
            exact.magnitude_change.copy_((torch.rand_like(exact.magnitude_change) - 0.5).bfloat16())
    # Of one sample, and with axes swapped: as of an image that was made to tokens without a copy.
    x, gradient = (torch.randn(shape).bfloat16().transpose(1, -1).contiguous().transpose(1, -1) for _ in "xg")
    with unfused():
        wanted = _results(exact, x.double(), gradient.double(), contextlib.nullcontext())
    found = {}
    for mode, dtype in MODES.items():
        layer = combination.build(device, dtype, torch.float32)
        _copy(exact, layer)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=mode == AUTOCAST)
        got = _results(layer, x.to(device, dtype), gradient.to(device, dtype), autocast)
        sizes = [float(t.abs().max()) if t.numel() > 1 else float(wanted[0].norm()) for t in wanted]
        found[mode] = max(_error(a, b, size) for a, b, size in zip(got, wanted, sizes, strict=True))
    return found


def _copy(source: AdaptedLayer, target: AdaptedLayer) -> None:
    with torch.no_grad():
        for a, b in ((source.base, target.base), (source, target)):
            for kind in ("named_parameters", "named_buffers"):
                values = dict(getattr(a, kind)())
                for name, t in getattr(b, kind)():
                    t.copy_(values[name])


def _results(layer: AdaptedLayer, x: Tensor, gradient: Tensor, autocast: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with autocast:
        y = layer.base(x)
    y.backward(gradient.to(y.dtype))
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert x.grad is not None
    return [t.detach().cpu().double() for t in (y, x.grad, *grads)]


def _error(found: Tensor, wanted: Tensor, size: float) -> float:
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - wanted).abs().max()) / max(size, 1e-6)


def sweep(setting: Setting) -> Iterator[Table]:
    """One row for each algorithm."""
    former = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    rows = []
    for algo, adapter in ALGOS.items():
        if adapter.spec.family != Geometry.family:
            continue
        setting.progress.step(f"sweep: {algo}")
        rows.append(_row(setting, algo))
    torch.backends.cudnn.allow_tf32 = former
    setting.lines += untried()
    yield Table(
        "Every algorithm with every option against float64 on the CPU",
        "The largest error of output and gradients, relative to the largest value of each; allowed: "
        + ", ".join(f"{mode} {each:.0e}" for mode, each in TOLERANCES.items())
        + ".",
        ["algorithm", "combinations", *(f"error, {mode}" for mode in MODES), "beyond what is allowed"],
        rows,
    )


def _row(setting: Setting, algo: str) -> list[str]:
    worst, number, wrong = dict.fromkeys(MODES, 0.0), 0, []
    torch.manual_seed(0)
    for combination in combinations(algo):
        try:
            combination.build(torch.device("cpu"), torch.float64, torch.float64)
        except ValueError:  # no such form on this layer
            continue
        try:
            found = errors(combination, setting.device)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # the row says so, others go on
            wrong.append(f"{combination}: {str(error).splitlines()[0]}")
            continue
        number += 1
        worst = {mode: max(worst[mode], each) for mode, each in found.items()}
        wrong += [f"{combination}, {mode}: {e:.1e}" for mode, e in found.items() if not e <= TOLERANCES[mode]]
    return [algo, str(number), *(f"{worst[mode]:.1e}" for mode in MODES), "; ".join(wrong) or "none"]
