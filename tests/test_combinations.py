"""Options together: every pair of values of every two of them occurs in some case (a covering array).

The single options have tests of their own; here forward, gradients, merge and file are held to one dense definition
while several options act at once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numeric import (
    FACTORED,
    KINDS,
    MULTIPLIER,
    assert_close,
    dense_update,
    learn_lengths,
    make_input,
    make_layer,
    options_for,
    randomise,
    with_weight,
)
from quantised_layers import FORMS, IN, OUT, quantised
from test_dora import definition
from torch import Tensor

from networks.algos import ALGOS
from networks.files import codec
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry

Case = Mapping[str, Any]


def covering(values: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Few cases in which every value of one factor meets every value of another; the same ones each time."""
    names = list(values)
    left = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(values[a]))
        for y in range(len(values[b]))
    }
    cases = []
    while left:
        a, x, b, y = min(left)
        chosen = {a: x, b: y}
        for name in names:
            if name not in chosen:
                chosen[name] = max(range(len(values[name])), key=lambda v: (_new(chosen | {name: v}, left), -v))
        left -= set(_pairs(chosen))
        cases.append({name: values[name][chosen[name]] for name in names})
    return cases


def _pairs(chosen: Mapping[str, int]) -> Iterator[tuple[str, int, str, int]]:
    for a, b in itertools.permutations(chosen, 2):
        yield a, chosen[a], b, chosen[b]


def _new(chosen: Mapping[str, int], left: set[tuple[str, int, str, int]]) -> int:
    return sum(pair in left for pair in _pairs(chosen))


def named(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


COMMON: dict[str, Sequence[Any]] = {
    "algo": list(FACTORED),
    "side": ["", "output", "input"],
    "use_scalar": [False, True],
    "factored": [None, True, False],
    "rs_lora": [False, True],
}
IN_FLOAT64 = covering({**COMMON, "kind": list(KINDS), "use_tucker": [False, True], "multiplier": ["one", "per sample"]})
ON_FORMS = covering({**COMMON, "form": list(FORMS)})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(case: Case, base: torch.nn.Module, dtype: torch.dtype, runtime: Runtime) -> AdaptedLayer:
    adapter = ALGOS[case["algo"]](Geometry.of(base), 4, options_for(case["algo"], case)).to(dtype)
    randomise(adapter)
    rank = adapter.laid_out.rank
    scale = 3.0 / (math.sqrt(rank) if case["rs_lora"] else rank) if rank else 1.0
    runtime.factored = case["factored"]
    layer = AdaptedLayer("lora_unet_x", base, adapter, scale, Dropouts(), runtime, dora=case["side"]).to(dtype)
    if case["side"]:
        layer.load_magnitude(None)
        learn_lengths(layer)
    return layer


def wanted(layer: AdaptedLayer, W: Tensor, m: float) -> Tensor:
    return definition(layer, W, m) if layer.side else W + dense_update(layer, m)


@pytest.mark.parametrize("case", IN_FLOAT64, ids=named)
def test_forward_gradients_merge_and_file_are_the_definition(case: Case) -> None:
    base, x = make_layer(case["kind"]), make_input(case["kind"]).requires_grad_()
    plain, W = copy.deepcopy(base), base.weight.clone()
    strengths = [MULTIPLIER, -0.4] if case["multiplier"] == "per sample" else [MULTIPLIER]
    if len(x) != len(strengths):
        strengths = strengths[:1]
    multiplier = torch.tensor(strengths, dtype=torch.float64) if len(strengths) > 1 else MULTIPLIER
    layer = layer_of(case, base, torch.float64, Runtime(multiplier))
    weights = [wanted(layer, W, m) for m in strengths]
    geometry, bias = layer.adapter.geometry, plain.bias
    outside = 0 if bias is None else geometry.on_outputs(bias)
    rows = [geometry.op(part, weight) for part, weight in zip(x.chunk(len(weights)), weights, strict=True)]
    expected = torch.cat(rows) + outside
    saved = codec.decode(codec.encode([layer]))[0]["lora_unet_x"]
    assert_close(merged_weight(saved, W, MULTIPLIER) - W, (weights[0] - W).detach(), "merge from the file")
    assert_close(layer.new_weight(W, MULTIPLIER) - W, weights[0] - W, "new_weight")
    layer.attach()
    y = base(x)
    assert_close(y - plain(x), expected - plain(x), "forward")
    upstream = torch.randn_like(y)
    names, values = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    ours = torch.autograd.grad(y, (x, *values), upstream)
    theirs = torch.autograd.grad(expected, (x, *values), upstream)
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        assert_close(a, b, f"gradient of {name}")
    layer.detach()
    assert torch.equal(base(x), plain(x))
    assert_close(
        with_weight(plain, weights[0])(x) - plain(x), geometry.op(x, weights[0] - W), "the base's own operation"
    )


@pytest.mark.parametrize("case", ON_FORMS, ids=named)
def test_every_form_of_base_weight(case: Case) -> None:
    form = FORMS[case["form"]]
    base = quantised(case["form"])
    wide = torch.float64 if case["form"] == "float64" else torch.float32
    layer = layer_of(case, base, wide, Runtime(MULTIPLIER))
    W = form.dense(base)
    with torch.no_grad():
        weight = wanted(layer, W.to(wide), MULTIPLIER).double()
    x = torch.randn(6, IN, dtype=wide)
    layer.attach()
    with torch.autocast("cpu", torch.bfloat16) if form.autocast else contextlib.nullcontext():
        y = base(x.to(form.input))
    expected = F.linear(x.to(form.input).double(), weight, base.bias.to(torch.float32).double())
    # the arithmetic of the base: bf16 (autocast, too) and fp16 round every term, int8 layers round their input
    tolerance = 5e-3 if y.dtype == torch.float16 else 4e-2 if y.dtype == torch.bfloat16 or not form.exact else 1e-5
    assert y.shape == (6, OUT)
    assert_close(y.double(), expected, "forward", tolerance)
    y.double().square().sum().backward()
    for name, p in layer.named_parameters():
        assert not p.requires_grad or (p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any())), (
            name
        )


def test_the_arrays_cover_every_pair() -> None:
    for cases in (IN_FLOAT64, ON_FORMS):
        for a, b in itertools.combinations(cases[0], 2):
            values = [{repr(case[name]) for case in cases} for name in (a, b)]
            assert {(repr(case[a]), repr(case[b])) for case in cases} == set(itertools.product(*values)), (a, b)
