"""An optimizer's state through tensors and JSON: every class goes on to the last bit, and nothing is a pickle."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny_parts import randomise, sd_unet
from torch import Tensor, nn

import networks.lora
from kohya_trainer.state import optimizer_state, partitioned


class Peculiar(torch.optim.Optimizer):
    """What optimizers keep beside plain moments: values of the whole run in the group, fp32 moments of parameters in
    half precision, counts, lists with holes, one tensor in several places."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.99), "d": 1e-6, "d0": torch.tensor(1e-6), "k": 0, "growth": float("inf")}
        super().__init__(params, {**defaults, "safeguard": None, "decouple": True, "name": "é", "dtype": torch.float32})
        self.table = torch.linspace(0, 1, 5)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["betas"], tuple) and group["dtype"] is torch.float32
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"s": torch.zeros_like(p, dtype=torch.float32), "old": [None, p.float().T.clone()], "n": 0}
                    state |= {"table": self.table, "inner": {"flag": False, 3: torch.zeros(2, dtype=torch.uint8)}}
                state["n"] += 1
                state["s"].mul_(0.9).add_(p.grad.float(), alpha=1 / 3)
                state["inner"][3] += 1
                scale = group["d"] * (1 + state["table"][1]) * (1 + state["inner"][3][0] + state["n"])
                p.sub_((group["lr"] * scale * (state["s"] + state["old"][1].T)).to(p.dtype))
            group["d"] *= 1.7
            group["d0"] *= 1.3
            group["k"] += 1


KINDS: dict[str, Any] = {
    name: getattr(torch.optim, name)
    for name in ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")
}
KINDS["Adafactor"] = torch.optim.Adafactor
KINDS["SGD with momentum"] = lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
KINDS["AMSGrad"] = lambda groups, lr: torch.optim.Adam(groups, lr=lr, amsgrad=True)
KINDS["Peculiar"] = Peculiar
if sys.platform == "linux":  # bitsandbytes is among the test requirements there only
    import bitsandbytes

    KINDS["AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    KINDS["Lion8bit"] = bitsandbytes.optim.Lion8bit


class Run:
    """Three parameters in two groups; the last one never has a gradient."""

    def __init__(self, kind: Any, dtype: torch.dtype) -> None:
        own = torch.Generator().manual_seed(0)
        shapes = {"a": (70, 80), "b": (3,), "idle": (2, 2)}
        self.named = {name: nn.Parameter(torch.randn(shape, generator=own).to(dtype)) for name, shape in shapes.items()}
        a, b, idle = self.named.values()
        self.optimizer = kind([{"params": [a, idle], "lr": 1e-2}, {"params": [b], "lr": 1e-3}], lr=1e-3)
        self.groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self.names = {p: name for name, p in self.named.items()}

    def step(self, number: int) -> None:
        for name in ("a", "b"):
            draws = torch.Generator().manual_seed(number)
            p = self.named[name]
            p.grad = torch.randn(p.shape, generator=draws).to(p.dtype)
        self.optimizer.step()


def alike(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        [alike(value, other[key]) for key, value in one.items()]
    elif isinstance(one, (list, tuple)):
        [alike(*pair) for pair in zip(one, other, strict=True)]
    else:
        assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_goes_on_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    run = Run(KINDS[kind], dtype)
    for number in range(3):
        run.step(number)
    tensors, text = optimizer_state.pack(optimizer_state.read(run.optimizer, run.groups, run.names))
    data = save(tensors, {"optimizer": text})  # a file's bytes: nothing but tensors and text
    again = Run(KINDS[kind], dtype)
    for name, p in again.named.items():
        p.data.copy_(run.named[name].data)
    whole = optimizer_state.unpack(load(data), text)
    optimizer_state.check(whole, again.optimizer, again.groups, again.names)
    optimizer_state.write(again.optimizer, whole)
    for number in range(3, 6):
        run.step(number)
        again.step(number)
    for name, p in run.named.items():
        assert torch.equal(p, again.named[name]), name
    alike(*(optimizer_state.read(r.optimizer, r.groups, r.names) for r in (run, again)))


def test_what_no_state_can_hold_is_told() -> None:
    run = Run(KINDS["SGD"], torch.float32)
    run.optimizer.param_groups[1]["rule"] = len
    with pytest.raises(ValueError, match="rule is a builtin_function_or_method"):
        optimizer_state.pack(optimizer_state.read(run.optimizer, run.groups, run.names))


def test_another_runs_state_is_told() -> None:
    run, other = Run(KINDS["AdamW"], torch.float32), Run(KINDS["AdamW"], torch.float32)
    for group in (*run.optimizer.param_groups, *other.optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    whole = optimizer_state.read(run.optimizer, run.groups, run.names)
    optimizer_state.check(whole, other.optimizer, other.groups, other.names)
    other.optimizer.param_groups[1]["initial_lr"] = 2e-3
    with pytest.raises(ValueError, match="a learning rate of 0.001, not 0.002"):
        optimizer_state.check(whole, other.optimizer, other.groups, other.names)
    with pytest.raises(ValueError, match="other parameters"):
        optimizer_state.check(whole, other.optimizer, other.groups, {p: name + "x" for p, name in other.names.items()})
    with pytest.raises(ValueError, match="other parameters"):
        optimizer_state.named(run.optimizer.state_dict(), other.groups[:1], other.names)


# ---- divided over processes ----


def mapping(inside: int, start: int, length: int) -> SimpleNamespace:
    """As DeepSpeed describes where a parameter lies in the flat part of a process."""
    flat = SimpleNamespace(start=start, numel=length)
    return SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=inside, numel=length), get_hp_fragment_address=lambda: flat
    )


def part(parameters: dict[str, nn.Parameter], rank: int, ranks: int) -> tuple[Tensor, list[nn.Parameter]]:
    """A process's flat part of the parameters, padded to equal parts, and its own view of them."""
    values = torch.cat([p.detach().flatten() for p in parameters.values()])
    size = -(-len(values) // ranks)
    values = nn.functional.pad(values, (0, size * ranks - len(values)))
    begin, own, at = rank * size, [], 0
    for p in parameters.values():
        mine: Any = nn.Parameter(p.detach().clone())
        first, last = max(at, begin), min(at + p.numel(), begin + size)
        mine._hp_mapping = mapping(first - at, first - begin, last - first) if first < last else None
        mine.set_full_hp_param = lambda value: None
        own.append(mine)
        at += p.numel()
    return nn.Parameter(values[begin : begin + size].clone()), own


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum", "RMSprop"])
def test_a_whole_state_is_cut_into_the_parts_of_any_number_of_processes(kind: str, ranks: int) -> None:
    """The parts step as the whole does; what optimizers do is elementwise."""
    run = Run(KINDS[kind], torch.float32)
    named = {"a": run.named["a"], "b": run.named["b"]}
    run.optimizer = KINDS[kind]([{"params": list(named.values())}], lr=1e-2)
    run.groups = [list(named.values())]
    for number in range(3):
        run.step(number)
    whole = optimizer_state.read(run.optimizer, run.groups, run.names)
    parts = []
    for rank in range(ranks):
        flat, own = part(named, rank, ranks)
        base = KINDS[kind]([{"params": [flat]}], lr=1e-2)
        partitioned.write(base, [own], dict(zip(own, named, strict=True)), whole)
        parts.append((flat, base))
    run.step(3)
    gradient = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    gradient = nn.functional.pad(gradient, (0, len(parts[0][0]) * ranks - len(gradient)))
    for (flat, base), own_gradient in zip(parts, gradient.chunk(ranks), strict=True):
        flat.grad = own_gradient
        base.step()
    stepped = torch.cat([flat.detach() for flat, _ in parts])
    expected = torch.cat([p.detach().flatten() for p in named.values()])
    assert torch.equal(stepped[: len(expected)], expected)


def test_a_state_that_does_not_divide_is_told() -> None:
    run = Run(torch.optim.Adafactor, torch.float32)
    run.groups = [[run.named["a"], run.named["idle"]]]
    run.optimizer = torch.optim.Adafactor([{"params": run.groups[0]}])
    run.step(0)
    whole = optimizer_state.read(run.optimizer, run.groups, run.names)
    flat, own = part({"a": run.named["a"], "idle": run.named["idle"]}, 0, 2)
    base = torch.optim.Adafactor([{"params": [flat]}])
    with pytest.raises(ValueError, match="belongs to whole parameters, and ZeRO cuts them"):
        partitioned.write(base, [own], dict(zip(own, ("a", "idle"), strict=True)), whole)


def test_a_limit_of_norms_acts_on_what_the_optimizer_steps_from() -> None:
    """The copies of the layers that were shrunk, and of no others: in half precision the rest would lose bits."""
    unet = sd_unet()
    network: Any = networks.lora.create_network(1.0, 4, 4, None, None, unet)
    network.apply_to(None, unet, False, True)
    randomise(network)
    norms = {layer.lora_name: float(layer.adapter.norm()) for layer in network.adapted_layers}
    limit = sorted(norms.values())[len(norms) // 2]
    masters: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        parameter._hp_mapping = None  # this process has no part of it; the call has to be made all the same
        parameter.set_full_hp_param = functools.partial(masters.__setitem__, name)
    shrunk = network.apply_max_norm_regularization(limit)[0]
    above = {name for name, norm in norms.items() if norm > limit}
    assert shrunk == len(above) > 5 and {name.partition(".")[0] for name in masters} == above
    for name, value in masters.items():
        assert torch.equal(value, network.get_parameter(name))
