"""What a layer asks of an adapter is the same for every algorithm, and its answers are one formula.

Not covered: magnitudes, dropouts, regions (their own files); gradients (test_algo_matrix.py).
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from helpers_numeric import assert_close, randomise
from torch import Tensor, nn

from networks.algos import ALGOS, Adapter, Additive, Multiplicative
from networks.layers.dropout import CallGate
from networks.tensors.norms import layer_geometry
from networks.tensors.products import OfWeight

PACKAGE = Path(__file__).resolve().parents[1] / "networks"
LAYERS = {
    "linear": (lambda: nn.Linear(24, 32), (2, 5, 24)),
    "conv_3x3": (lambda: nn.Conv2d(24, 32, 3, padding=1), (2, 24, 5, 6)),
    "norm": (lambda: nn.LayerNorm(24), (2, 5, 24)),
}
OPTIONS = [(algo, {}) for algo in ALGOS]
OPTIONS += [(algo, {"train_on_input": True}) for algo, cls in ALGOS.items() if "train_on_input" in cls.spec.options]


class Whole(OfWeight):
    """A base module that is the whole layer, at hand."""

    row_ranges = None

    def __init__(self, module: nn.Module, outputs: object) -> None:
        super().__init__(module.weight.detach())
        self.__dict__.update(module=module, outputs=outputs)

    def bias(self, y: Tensor) -> Tensor:
        return self.outputs(self.module.bias.detach())

    def whole_weight(self, device: torch.device | None = None) -> Tensor:
        return self.weight

    def select_rows(self, whole: Tensor) -> Tensor:
        return whole


def made(algo: str, options: dict[str, bool], kind: str) -> tuple[Adapter, nn.Module, Tensor] | None:
    make, shape = LAYERS[kind]
    base = make().double().requires_grad_(False)
    geometry = layer_geometry(base)
    if geometry.family != ALGOS[algo].spec.family:
        return None
    adapter = ALGOS[algo](geometry, 4, options).double()
    randomise(adapter)
    return adapter, base, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("algo", "options"), OPTIONS, ids=str)
def test_what_goes_in_and_comes_out_more_is_the_change_of_the_weight(
    algo: str, options: dict[str, bool], kind: str
) -> None:
    """base(x + input_change) + output_change == op(x, W + weight_change) + bias, for every algorithm alike."""
    torch.manual_seed(0)
    if (found := made(algo, options, kind)) is None:
        return
    adapter, base, x = found
    g, W = adapter.geometry, base.weight
    strength = adapter.strength(1.0, 0.75)
    with torch.no_grad():
        change = adapter.weight_change(W, strength)
        assert change.shape == W.shape and change.dtype == W.dtype and bool(change.any())
        expected = g.op(x, W + change) + g.on_outputs(base.bias, x)
        more = adapter.input_change(x)
        x = x if more is None else x + more
        y = base(x)
        out = adapter.output_change(x, y, Whole(base, g.on_outputs), CallGate(strength))
        assert_close(y if out is None else y + out, expected, "output")
        assert more is not None or out is not None
        norm = copy.deepcopy(adapter).change_norm(lambda: W, strength)  # without what was asked before
        assert_close(norm, torch.linalg.vector_norm(change), "norm")
        adapter.shrink_(0.0)
        assert not bool(adapter.weight_change(W, strength).any()), "nothing is left at 0"


def test_neither_family_has_methods_of_the_other() -> None:
    for cls in ALGOS.values():
        assert issubclass(cls, Additive) != issubclass(cls, Multiplicative), cls.spec.name
    for name in ("delta", "apply_delta", "rows", "flops", "norm_sq", "update"):
        assert hasattr(Additive, name) and not hasattr(Multiplicative, name), name
    for name in ("change", "change_rows", "side"):
        assert hasattr(Multiplicative, name) and not hasattr(Additive, name), name


def test_what_is_left_to_be_defined_is_defined() -> None:
    """`raise NotImplementedError` marks what every algorithm has, by itself or by its family; those of stacks belong to
    a feature."""
    families = (Adapter, Additive, Multiplicative)
    left = {name for cls in families for name, member in vars(cls).items() if _is_left(member)}
    assert {"layout", "describe", "delta", "change", "output_change", "weight_change", "stack"} <= left
    for cls in ALGOS.values():
        wanted = left if "split_qkv" in cls.spec.features else left - {"stack", "unstack"}
        missing = [name for name in wanted if hasattr(cls, name) and _is_left(_of(cls, name))]
        assert not missing, f"{cls.spec.name} lacks {', '.join(missing)}"


def _of(cls: type, name: str) -> object:
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base))


def _is_left(member: object) -> bool:
    code = getattr(getattr(member, "__func__", member), "__code__", None)
    return code is not None and "NotImplementedError" in code.co_names


def test_nobody_asks_an_adapter_what_it_is() -> None:
    """Layers, files and hosts ask it to do something: what differs between algorithms is a method or a record."""
    classes = {"Adapter", "Additive", "Multiplicative", "Parts", *(cls.__name__ for cls in ALGOS.values())}
    for file in (file for file in PACKAGE.rglob("*.py") if file.parent.name != "algos"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & classes
                assert not asked, f"{file.name}:{node.lineno} asks whether something is {', '.join(asked)}"
