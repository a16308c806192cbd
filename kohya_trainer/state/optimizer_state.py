"""An optimizer's state as tensors and JSON: of any class, by the names of the parameters, without a pickle.

Whole = {"groups": [{"params": [name, ...], key: value}], "state": {name: {key: value}}}, with values made of tensors,
numbers, text, None, lists, tuples and dicts of these. It does not depend on how many processes share the optimizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.foreign.texts import parse_json

Whole = dict[str, Any]
Groups = Sequence[Sequence[nn.Parameter]]
"""The optimizer's parameters, group by group."""

PARTS = "parts"  # key of a value of which each process has its own: the scales of 8-bit blocks under ZeRO
OTHER_PARAMETERS = "its optimizer had other parameters. Give the options that decide what is trained as they were."


def read(optimizer: torch.optim.Optimizer, groups: Groups, names: Mapping[nn.Parameter, str]) -> Whole:
    """The state of an optimizer that has the parameters themselves, these groups of them."""
    return named(optimizer.state_dict(), groups, names)


def named(given: Mapping[str, Any], groups: Groups, names: Mapping[nn.Parameter, str]) -> Whole:
    """What torch's state_dict has by numbers.

    Raises:
        ValueError: it is of other groups.
    """
    if [len(group["params"]) for group in given["param_groups"]] != [len(group) for group in groups]:
        raise ValueError(OTHER_PARAMETERS)
    whole: Whole = {"groups": [], "state": {}}
    of_number: dict[Any, str] = {}
    for group, parameters in zip(given["param_groups"], groups, strict=True):
        own = [names[parameter] for parameter in parameters]
        of_number |= dict(zip(group["params"], own, strict=True))
        whole["groups"].append({**group, "params": own})
    whole["state"] = {of_number.get(key, key): value for key, value in given["state"].items()}
    return whole


def write(optimizer: torch.optim.Optimizer, whole: Whole) -> None:
    """The inverse of `read`, after `check`.

    Raises:
        ValueError: it is the state of several processes' parts.
    """
    numbers = {name: number for number, name in enumerate(name for g in whole["groups"] for name in g["params"])}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in whole["groups"]]
    for values in whole["state"].values():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, dict) and PARTS in value:
                raise ValueError(f"{key} of its optimizer belongs to the parts of ZeRO. Go on under DeepSpeed.")
    load(optimizer, {"state": {numbers.get(k, k): v for k, v in whole["state"].items()}, "param_groups": groups})


def load(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
    """torch's load_state_dict without two faults: it casts floating states to the dtype of their parameters, and keeps
    the tensors that it is given, so that a count which stands in several places would be counted in all of them.

    Raises:
        ValueError: the groups are others.
    """
    given = {**given, "state": {key: _apart(values) for key, values in given["state"].items()}}
    optimizer.load_state_dict(given)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in given["state"].get(number, {}).items():
            if key in optimizer.state[parameter]:
                optimizer.state[parameter][key] = _uncast(optimizer.state[parameter][key], value)


def _apart(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _apart(each) for key, each in value.items()}
    return type(value)(map(_apart, value)) if isinstance(value, (list, tuple)) else value


def _uncast(own: Any, given: Any) -> Any:
    """What was loaded, with the tensors of `given` where it has others of another dtype."""
    if isinstance(own, Tensor) and isinstance(given, Tensor):
        return own if own.dtype == given.dtype else given.to(own.device)
    if isinstance(own, dict) and isinstance(given, dict):
        return {key: _uncast(value, given.get(key)) for key, value in own.items()}
    if isinstance(own, (list, tuple)) and isinstance(given, (list, tuple)):
        return type(own)(_uncast(*pair) for pair in zip(own, given, strict=True))
    return own


def check(whole: Whole, optimizer: torch.optim.Optimizer, groups: Groups, names: Mapping[nn.Parameter, str]) -> None:
    """Refuse a state that is not of this run's parameters and learning rates.

    Args:
        whole: the state.
        optimizer: this run's, with its learning rates.
        groups: its parameters, group by group.
        names: of the parameters.

    Raises:
        ValueError: with what is different.
    """
    if [group["params"] for group in whole["groups"]] != [[names[p] for p in group] for group in groups]:
        raise ValueError(OTHER_PARAMETERS)
    for group, own in zip(whole["groups"], optimizer.param_groups, strict=True):
        then, now = group.get("initial_lr"), own.get("initial_lr")
        if then is not None and now is not None and float(then) != float(now):
            raise ValueError(f"that run had a learning rate of {float(then):g}, not {float(now):g}. Give the same.")


# ---- tensors and JSON ----


def pack(whole: Whole) -> tuple[dict[str, Tensor], str]:
    """Tensors by their places, and the rest as JSON. A tensor that stands in several places is kept once.

    Raises:
        ValueError: there is something in it that neither can hold.
    """
    packer = _Packer()
    content = packer.encode(whole, "")
    return packer.tensors, json.dumps(content, separators=(",", ":"))


def unpack(tensors: Mapping[str, Tensor], text: str) -> Whole:
    """The inverse.

    Raises:
        ValueError: it is not what `pack` made.
    """
    whole = _decode(parse_json(text), tensors)
    if not isinstance(whole, dict) or not {"groups", "state"} <= whole.keys():
        raise ValueError("it holds no state of an optimizer")
    return whole


def alone(tensor: Tensor) -> Tensor:
    """In memory of its own, on the CPU, as files want it."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.numel() * own.element_size() else own.clone()


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[tuple[Any, ...], str] = {}
        self._used: set[int] = set()

    def encode(self, value: Any, place: str) -> Any:
        """JSON, in which what JSON lacks is an object with its kind as the only key."""
        if type(value) in (Tensor, nn.Parameter):
            return {"tensor": self._keep(value.detach(), place)}
        if isinstance(value, dict):
            return {"dict": [[key, self.encode(each, f"{place}/{key}")] for key, each in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [self.encode(each, f"{place}/{number}") for number, each in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"{place.strip('/')} is a {type(value).__name__}")

    def _keep(self, tensor: Tensor, place: str) -> str:
        known = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (place,)
        if known not in self._places:
            self._places[known] = place
            own = alone(tensor)
            self.tensors[place] = own.clone() if own.data_ptr() in self._used else own
            self._used.add(own.data_ptr())
        return self._places[known]


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(each, tensors) for key, each in content}
    if kind == "tuple":
        return tuple(_decode(each, tensors) for each in content)
    found = getattr(torch, content) if kind == "dtype" else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"it has a value of the unknown kind {kind}")
    return found
