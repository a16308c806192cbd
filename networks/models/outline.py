"""A model written down without weights: one line per module, indented below the one that holds it.

    transformer_blocks ModuleList
     0..18 FluxTransformerBlock
      norm1 AdaLayerNormZero
       linear Linear 3072 18432
       norm LayerNorm 3072 eps=1e-06 elementwise_affine=False

A line is a name (a range stands for siblings that are all alike), the name of the class, with the class of torch below
it in brackets where that is another, and what decides about shapes: arguments of torch's class, or else
`parameter:shape` and the attributes which say what a normalisation does. Everything else of a model, its forward pass
above all, is left out: this is enough to plan a network for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_LINE = re.compile(r"( *)(\S+) (\w+)(?:\((\w*)\))?(.*)")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SHAPE = re.compile(r"\d+(x\d+)*")
_WORDS = {"True": True, "False": False, "None": None}
# Attributes of classes which are not torch's: what tensors.norms reads.
_ATTRIBUTES = ("eps", "variance_epsilon", "normalized_shape", "num_channels", "dim")


@dataclass(frozen=True)
class _Torch:
    """One of torch's classes: which arguments it is made with.

    Attributes:
        needed: attributes which are its first arguments, in their order.
        defaults: further arguments, left out where they are this.
    """

    cls: type[nn.Module]
    needed: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)


def _convolution(cls: type[nn.Module], axes: int) -> _Torch:
    one, none = (1,) * axes, (0,) * axes
    plain = {"stride": one, "padding": none, "dilation": one, "groups": 1, "padding_mode": "zeros", "bias": True}
    return _Torch(cls, ("in_channels", "out_channels", "kernel_size"), plain)


_TORCH = {
    "Linear": _Torch(nn.Linear, ("in_features", "out_features"), {"bias": True}),
    "Conv1d": _convolution(nn.Conv1d, 1),
    "Conv2d": _convolution(nn.Conv2d, 2),
    "Conv3d": _convolution(nn.Conv3d, 3),
    "GroupNorm": _Torch(nn.GroupNorm, ("num_groups", "num_channels"), {"eps": 1e-5, "affine": True}),
    "LayerNorm": _Torch(nn.LayerNorm, ("normalized_shape",), {"eps": 1e-5, "elementwise_affine": True, "bias": True}),
    "ModuleList": _Torch(nn.ModuleList),
    "Sequential": _Torch(nn.Sequential),
}


def write(model: nn.Module) -> str:
    """The outline of a model; its weights may be on the meta device."""
    return "".join(f"{line}\n" for line in _lines(".", model))


def build(outline: str) -> nn.Module:
    """The model of an outline on the meta device: classes of the same names, without a forward pass."""
    root, *others = _read(outline)
    assert root.names == (".",) and not others, "one model"
    return _module(root)


# -- from a model to text


def _lines(name: str, module: nn.Module) -> list[str]:
    lines = [" ".join([name, *_described(module)])]
    children = [_lines(child, one) for child, one in module.named_children()]
    lines += [f" {line}" for child in _ranges(children) for line in child]
    return lines


def _ranges(children: Sequence[list[str]]) -> Iterator[list[str]]:
    """Numbered siblings that follow each other and are alike become one."""
    waiting: list[str] = []
    for child in children:
        if waiting and _is_next(waiting, child):
            start = waiting[0].partition(" ")[0].partition("..")[0]
            name, _, rest = child[0].partition(" ")
            waiting = [f"{start}..{name} {rest}", *child[1:]]
            continue
        if waiting:
            yield waiting
        waiting = child
    if waiting:
        yield waiting


def _is_next(before: list[str], child: list[str]) -> bool:
    (old, _, same), (new, _, rest) = (lines[0].partition(" ") for lines in (before, child))
    last = old.rpartition("..")[2]
    return last.isdigit() and new == str(int(last) + 1) and (same, before[1:]) == (rest, child[1:])


def _described(module: nn.Module) -> Iterator[str]:
    name = type(module).__name__
    base = next((key for key, torchs in _TORCH.items() if isinstance(module, torchs.cls)), "")
    said = name if name in _TORCH else ""  # a reader takes torch's names for torch's classes
    yield name if said == base else f"{name}({base})"
    yield from _arguments(module, _TORCH[base]) if base else _contents(module)


def _arguments(module: nn.Module, torchs: _Torch) -> Iterator[str]:
    yield from (_text(getattr(module, key)) for key in torchs.needed)
    bare = getattr(module, "weight", None) is None  # then nothing is to be said of its bias
    for key, default in torchs.defaults.items():
        value = getattr(module, key) if key != "bias" else bare or module.bias is not None
        if value != default:
            yield f"{key}={_text(value)}"


def _contents(module: nn.Module) -> Iterator[str]:
    for key, parameter in module.named_parameters(recurse=False):
        yield f"{key}:{_text(parameter.shape)}"
    for key in _ATTRIBUTES if "norm" in type(module).__name__.lower() else ():
        if hasattr(module, key):
            yield f"{key}={_text(getattr(module, key))}"


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list, torch.Size)) else str(value)


# -- from text to a model


@dataclass
class _Node:
    names: tuple[str, ...]
    cls: str
    base: str
    words: list[str]
    children: list[_Node] = field(default_factory=list)


def _read(outline: str) -> list[_Node]:
    levels: list[list[_Node]] = [[]]
    for line in outline.splitlines():
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        assert match, line
        indent, name, cls, base, rest = match.groups()
        numbers = _RANGE.fullmatch(name)
        names = tuple(map(str, range(int(numbers[1]), int(numbers[2]) + 1))) if numbers else (name,)
        node = _Node(names, cls, (cls if cls in _TORCH else "") if base is None else base, rest.split())
        del levels[len(indent) + 1 :]
        levels[-1].append(node)
        levels.append(node.children)
    return levels[0]


def _module(node: _Node) -> nn.Module:
    module = _of_torch(node) if node.base else _of_others(node)
    for child in node.children:
        for name in child.names:
            module.add_module(name, _module(child))
    return module


def _of_torch(node: _Node) -> nn.Module:
    torchs = _TORCH[node.base]
    cls: Any = _class(node.cls, torchs.cls)
    if not torchs.needed:
        return cls()
    given = dict(_values(word for word in node.words if "=" in word))
    return cls(*(_value(word) for word in node.words if "=" not in word), device="meta", **given)


def _of_others(node: _Node) -> nn.Module:
    module = _class(node.cls, nn.Module)()
    for key, value in _values(word for word in node.words if "=" in word):
        setattr(module, key, value)
    for word in node.words:
        key, colon, shape = word.partition(":")
        if colon:
            sizes = tuple(map(int, shape.split("x"))) if shape else ()
            module.register_parameter(key, nn.Parameter(torch.empty(sizes, device="meta"), requires_grad=False))
    return module


_classes: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def _class(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """Without start values, which cost time and, on the meta device, are none."""
    if (name, base) not in _classes:
        _classes[name, base] = type(name, (base,), {"reset_parameters": lambda self: None})
    return _classes[name, base]


def _values(words: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for word in words:
        key, _, text = word.partition("=")
        yield key, _value(text)


def _value(text: str) -> Any:
    if _SHAPE.fullmatch(text):
        sizes = tuple(map(int, text.split("x")))
        return sizes if len(sizes) > 1 else sizes[0]
    if text in _WORDS:
        return _WORDS[text]
    try:
        return float(text)
    except ValueError:
        return text
