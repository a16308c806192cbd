"""What happens to the base layer in training: it is compiled, quantised, or moved between the passes."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.layers.adapted import AdaptedLayer

from .cases import CASES, LAYERS, MAIN, Case, Layer
from .layers import FROZEN
from .peers import Adapted, Ours, Peer, adapted, fitted, trained
from .report import Table
from .setting import AUTOCAST, MODES, Setting
from .timing import now, seconds


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# -- torch.compile


def compiled(setting: Setting) -> Iterator[Table]:
    """Times of compiled layers over the compiled frozen one; `fullgraph` for ours, what they have for the others."""
    peers = [peer for peer in setting.peers if peer.name != "lyc"]  # which is slow in any form
    layer, rows = LAYERS[setting.sizes.base_layer], []
    for name in setting.sizes.compiled:
        torch._dynamo.reset()
        runs, off = dict[str, Callable[[], None]](), "-"
        for title, peer in {FROZEN: None, **{peer.name: peer for peer in peers}}.items():
            setting.progress.step(f"compile: {title}, {name}")
            try:
                run, difference = _compiled(setting, peer, layer, CASES[name])
            except Exception as problem:  # whatever a compiler, or a library under it, raises
                setting.lines.append(f"not compiled: {title}, {name}: {_first_line(problem)}")
                continue
            runs |= {} if run is None else {title: run}
            off = f"{difference:.1e}" if title == "ours" else off
        rows.append([name, *_over_frozen(setting, runs, [peer.name for peer in peers]), off])
    yield Table(
        f"{setting.sizes.base_layer}, autocast, torch.compile with {setting.sizes.backend}: time over the frozen layer",
        "The last column: how far our compiled output is from the plain one, relative to its largest value.",
        ["adapter", *(peer.name for peer in peers), "difference"],
        rows,
    )


def _over_frozen(setting: Setting, runs: dict[str, Callable[[], None]], names: list[str]) -> list[str]:
    if FROZEN not in runs:
        return ["-"] * len(names)
    found = seconds(runs, setting.sizes.seconds, setting.device)
    return [f"{found[name] / found[FROZEN]:.2f}" if name in found else "-" for name in names]


def _compiled(setting: Setting, peer: Peer | None, layer: Layer, case: Case) -> tuple[Callable[[], None] | None, float]:
    """A compiled pass, and the difference of its output from the plain one; None where there is no such adapter."""
    made = adapted(peer, layer, case, MODES[AUTOCAST], setting.device)
    if made is None:
        return None, 0.0
    x = layer.input(MODES[AUTOCAST], setting.device)
    plain, _ = setting.passes(made, x, AUTOCAST)
    whole = peer is None or isinstance(peer, Ours)
    call = torch.compile(made.call, backend=setting.sizes.backend, fullgraph=whole)
    forward, both = setting.passes(Adapted(call, made.parameters, made.known), x, AUTOCAST)  # type: ignore[arg-type]
    both()
    a, b = forward().detach().float(), plain().detach().float()
    return both, float((a - b).abs().max() / b.abs().max())


# -- quantised weights


def _scaled_float8(linear: nn.Linear) -> nn.Module:
    """As the trainers keep it: codes, a scale beside them, and a forward that multiplies both out."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = linear.weight.abs().amax().float().reshape(1) / largest
    codes = (linear.weight / scale).to(torch.float8_e4m3fn)
    linear.weight = nn.Parameter(codes, requires_grad=False)
    linear.register_buffer("scale_weight", scale.bfloat16())
    linear.bias.data = linear.bias.data.bfloat16()

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(self.scale_weight.dtype) * self.scale_weight, self.bias)

    linear.forward = types.MethodType(forward, linear)  # type: ignore[method-assign]
    return linear


def _of_bitsandbytes(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        kinds: Any = importlib.import_module("bitsandbytes").nn
        made = getattr(kinds, name)(linear.in_features, linear.out_features, **options)
        device, state = linear.weight.device, {key: t.detach().cpu() for key, t in linear.state_dict().items()}
        made.load_state_dict(state)
        moved: nn.Module = made.to(device)  # which quantises
        return moved

    return make


BASES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bf16": lambda linear: linear.bfloat16(),
    "float8": lambda linear: linear.to(torch.float8_e4m3fn),
    "scaled float8": _scaled_float8,
    "bitsandbytes 8 bit": _of_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": _of_bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.bfloat16),
}


def _base(kind: str, layer: Layer, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    linear = layer.build(torch.float32, device)
    assert isinstance(linear, nn.Linear)
    return BASES[kind](linear).requires_grad_(False)


def quantised(setting: Setting) -> Iterator[Table]:
    """Times over the same base without an adapter, and errors against float64."""
    rows, layer = [], LAYERS[setting.sizes.base_layer]
    for kind in BASES:
        setting.progress.step(f"bases: {kind}")
        try:
            rows += [_quantised(setting, kind, layer, name) for name in setting.sizes.base_cases]
        except Exception as error:  # a library that is missing, or whose kernels are
            setting.lines.append(f"no base {kind}: {_first_line(error)}")
    yield Table(
        f"{setting.sizes.base_layer}, autocast, on bases of every form",
        "Errors are those of outputs, relative to their largest value, against float64 with the weight that the base "
        "stands for.",
        ["base", "adapter", "time over the base", "error", "error of the base alone"],
        rows,
    )


def _quantised(setting: Setting, kind: str, layer: Layer, name: str) -> list[str]:
    model, x = nn.Sequential(), layer.input(torch.bfloat16, setting.device)
    model.add_module("layer", _base(kind, layer, setting.device))
    base = _base(kind, layer, setting.device)
    made = fitted(setting.peers[0], model, ["layer"], CASES[name])
    if made is None:
        raise ValueError(f"{name} has no form on it")
    adapter = cast(AdaptedLayer, made[0])
    frozen, frozen_both = setting.passes(Adapted(base, [], []), x, AUTOCAST)
    ours, ours_both = setting.passes(Adapted(model.get_submodule("layer"), trained([adapter]), []), x, AUTOCAST)
    errors = [_error(run(), exact) for run, exact in zip((ours, frozen), _exact(adapter, x), strict=True)]
    found = seconds({"ours": ours_both, FROZEN: frozen_both}, setting.sizes.seconds, setting.device)
    return [kind, name, f"{found['ours'] / found[FROZEN]:.2f}", *(f"{error:.1e}" for error in errors)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().cpu().double() - exact).abs().max() / exact.abs().max())


def _exact(adapter: AdaptedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in float64 with and without the adapter, by W' and W."""
    weight = adapter.whole_weight().detach().float()
    with torch.no_grad():
        new = adapter.new_weight(weight, 1.0)
    x, changed, W, bias = (t.detach().cpu().double() for t in (x, new, weight, adapter.base.get_parameter("bias")))
    return F.linear(x, changed, bias), F.linear(x, W, bias)


# -- weights that are moved


def swapped(setting: Setting) -> Iterator[Table]:
    """Weights leave the device after the forward pass, and come back to other memory before the backward pass. With
    checkpointing their former memory is another's by then, as the trainers have it."""
    layer, rows = LAYERS[setting.sizes.base_layer], []
    for name in setting.sizes.base_cases:
        setting.progress.step(f"block swap: {name}")
        made = adapted(setting.peers[0], layer, CASES[name], MODES[AUTOCAST], setting.device)
        assert made is not None
        x = layer.input(MODES[AUTOCAST], setting.device)
        cells = []
        for checkpointing in (False, True):
            plain, plain_time = _gradients(setting, made, x, checkpointing, swap=False)
            moved, moved_time = _gradients(setting, made, x, checkpointing, swap=True)
            off = max(map(_difference, plain, moved))
            cells += ["equal" if off == 0 else f"off by {off:.1e}", f"{moved_time / plain_time:.2f}"]
        rows.append([name, *cells])
    yield Table(
        f"{setting.sizes.base_layer}: block swap between forward and backward",
        "Gradients against those without it, and the time of the step over that without it.",
        ["adapter", "gradients", "time", "gradients, checkpointing", "time, checkpointing"],
        rows,
    )


def _difference(a: Tensor, b: Tensor) -> float:
    if not bool(b.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))


def _gradients(
    setting: Setting, made: Adapted, x: Tensor, checkpointing: bool, swap: bool
) -> tuple[list[Tensor], float]:
    """Gradients of the input and the adapter, and the seconds of the step."""
    weight = next(t for t in made.known if t.dtype == MODES[AUTOCAST] and t.dim() > 1)
    for _ in range(2):  # the first of them settles what a first call settles
        for t in (x, *made.parameters):
            t.grad = None
        start = now(setting.device)
        with setting.autocast():
            y = checkpoint(made.call, x, use_reentrant=False) if checkpointing else made.call(x)
        if swap:
            here = weight.data
            weight.data = here.to("cpu", copy=True)
            if checkpointing:
                here.fill_(float("nan"))
            del here
            weight.data = weight.data.to(setting.device, copy=True)
        y.backward(torch.ones_like(y))
        taken = now(setting.device) - start
    return [t.grad.clone() for t in (x, *made.parameters) if t.grad is not None], taken


# -- memory of a GPU


def memory(setting: Setting) -> Iterator[Table]:
    """The most that a pass takes at once, over what the frozen layer takes."""
    if setting.device.type != "cuda":
        return
    layer, rows = LAYERS[MAIN], []
    names = [peer.name for peer in setting.peers]
    for name in setting.sizes.cases:
        setting.progress.step(f"memory: {name}")
        found = {}
        for peer in (None, *setting.peers):
            made = adapted(peer, layer, CASES[name], MODES[AUTOCAST], setting.device)
            if made is None:
                continue
            _, both = setting.passes(made, layer.input(MODES[AUTOCAST], setting.device), AUTOCAST)
            both()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            torch.cuda.synchronize()
            found[peer.name if peer else FROZEN] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append([name, *(f"{found[n] - found[FROZEN]:.1f}" if n in found else "-" for n in names)])
    yield Table(f"{MAIN}, autocast: peak of GPU memory over the frozen layer's, MiB", "", ["adapter", *names], rows)
