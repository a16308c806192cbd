"""DeepSpeed's ZeRO 1 and 2: each process steps its part of a flat copy of the parameters.

The parts are put together, so that a state is that of the whole optimizer and goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.hosts.zero_masters import write_master

from . import optimizer_state
from .optimizer_state import PARTS, Groups, Whole


def read(base: torch.optim.Optimizer, groups: Groups, names: Mapping[nn.Parameter, str]) -> Whole:
    """The whole state. Every process takes part.

    Args:
        base: the optimizer of this process's parts, one flat tensor for each of the groups.
    """
    whole: Whole = {"groups": [], "state": {}, "masters": {}}
    for group, parameters in zip(base.param_groups, groups, strict=True):
        flat = group["params"][0]
        own = [names[parameter] for parameter in parameters]
        whole["groups"].append({**group, "params": own})
        for key, value in base.state.get(flat, {}).items():
            for name, each in zip(own, _gathered(value, flat, parameters), strict=True):
                whole["state"].setdefault(name, {})[key] = each
        if any(parameter.dtype != flat.dtype for parameter in parameters):
            whole["masters"] |= dict(zip(own, _gathered(flat.detach(), flat, parameters), strict=True))
    return whole


def write(base: torch.optim.Optimizer, groups: Groups, names: Mapping[nn.Parameter, str], whole: Whole) -> None:
    """Each process takes its parts, from the state of any number of processes; the parameters have their values.

    Args:
        base: the optimizer of this process's parts, one flat tensor for each of the groups.
        groups: the whole parameters, group by group.
        names: of the parameters.
        whole: the state.

    Raises:
        ValueError: values of the state do not divide.
    """
    state: dict[int, dict[str, Any]] = {}
    for index, (group, parameters) in enumerate(zip(base.param_groups, groups, strict=True)):
        given = {parameter: whole["state"].get(names[parameter], {}) for parameter in parameters}
        keys = dict.fromkeys(key for values in given.values() for key in values)
        state[index] = {key: _divided(key, given, group["params"][0]) for key in keys}
        for parameter in parameters:
            master = whole.get("masters", {}).get(names[parameter], parameter.detach())
            write_master(parameter, master.to(parameter.device))
    own = [{**group, "params": [index]} for index, group in enumerate(whole["groups"])]
    optimizer_state.load(base, {"state": {i: v for i, v in state.items() if v}, "param_groups": own})


def _spans(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[int, int, int, int]]:
    """This process's part: (position among the parameters, offset in that one, offset in the part, length)."""
    for position, parameter in enumerate(parameters):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            inside, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            yield position, inside.start, flat.start, flat.numel


def _gathered(value: Any, flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """What a value of the flat tensor's state is for each parameter."""
    import torch.distributed as distributed

    if not isinstance(value, Tensor) or not value.dim():
        return [value] * len(parameters)
    if value.shape != flat.shape:
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, value.cpu())
        return [{PARTS: parts}] * len(parameters)
    whole = [torch.zeros(p.numel(), dtype=value.dtype, device=p.device) for p in parameters]
    for position, inside, start, length in _spans(parameters):
        whole[position][inside : inside + length] = value[start : start + length].to(whole[position].device)
    together = torch.cat(whole)
    distributed.all_reduce(together)
    each = together.split([parameter.numel() for parameter in parameters])
    return [part.reshape(parameter.shape) for part, parameter in zip(each, parameters, strict=True)]


def _divided(key: str, given: Mapping[nn.Parameter, Mapping[str, Any]], flat: Tensor) -> Any:
    """The inverse for one key, of the state of each parameter."""
    values = {parameter: state[key] for parameter, state in given.items() if key in state}
    first = next(iter(values.values()))
    if isinstance(first, dict) and PARTS in first:
        return _own_part(key, first[PARTS])
    if key != "step" and _elementwise(values):
        return _cut(list(given), values, flat)
    if any(isinstance(value, Tensor) and value.dim() for value in values.values()):
        raise ValueError(
            f"{key} of its optimizer belongs to whole parameters, and ZeRO cuts them. Leave DeepSpeed out."
        )
    counts = all(isinstance(value, (int, float, Tensor)) for value in values.values())
    return max(values.values(), key=float) if counts else first  # who had no gradient at first has fewer steps


def _elementwise(values: Mapping[nn.Parameter, Any]) -> bool:
    return all(isinstance(value, Tensor) and value.shape == p.shape for p, value in values.items())


def _cut(parameters: Sequence[nn.Parameter], values: Mapping[nn.Parameter, Tensor], flat: Tensor) -> Tensor:
    """This process's part of values of the parameters' shapes; 0 where there is none."""
    part = torch.zeros(flat.shape, dtype=next(iter(values.values())).dtype, device=flat.device)
    for position, inside, start, length in _spans(parameters):
        value = values.get(parameters[position])
        if value is not None:
            part[start : start + length] = value.flatten()[inside : inside + length].to(part.device)
    return part


def _own_part(key: str, parts: Sequence[Tensor]) -> Tensor:
    import torch.distributed as distributed

    if all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]  # a table
    if len(parts) != distributed.get_world_size():
        raise ValueError(f"{key} of its optimizer belongs to the parts of {len(parts)} processes. Go on with as many.")
    return parts[distributed.get_rank()]
