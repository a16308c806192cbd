"""OFT, BOFT, IA3 and the full difference on base layers in every form, against dense formulas and plain layers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close, definition
from quantised_layers import FORMS, IN, OUT, bits, quantised
from registry import data_of
from torch import Tensor, nn

from networks.algos import ALGOS, Multiplicative
from networks.files import codec
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.tensors import base_weight
from networks.tensors.geometry import Geometry

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("diag-oft", {"constraint": 2**-7}),
    "oft_count": ("diag-oft", {"dim_is_count": True, "rescaled": True}),
    "oft_input": ("diag-oft", {"train_on_input": True}),
    "boft": ("boft", {"rescaled": True}),
    "ia3": ("ia3", {}),
    "ia3_input": ("ia3", {"train_on_input": True}),
    "full": ("full", {}),
}
_HERE = {algo for algo, _ in CASES.values()}
CASES |= {algo: (algo, {}) for algo, cls in ALGOS.items() if issubclass(cls, Multiplicative) and algo not in _HERE}
every_form = pytest.mark.parametrize("form", FORMS)
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adapted(base: nn.Module, case: str, std: float = 0.1) -> AdaptedLayer:
    algo, options = CASES[case]
    geometry = Geometry.of(base)
    assert geometry is not None
    adapter = ALGOS[algo](geometry, 6, options)
    for p in adapter.parameters():
        nn.init.normal_(p, std=std)
    return AdaptedLayer("lora_unet_x", base, adapter, 1.0, runtime=Runtime(0.7))


def changed(layer: AdaptedLayer, W: Tensor) -> Tensor:
    """W' in float64 by the definition."""
    adapter = copy.deepcopy(layer.adapter).double()
    new = definition(adapter, W)
    return (W + 0.7 * (new - W)).detach()


def autocast(form: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if FORMS[form].autocast else contextlib.nullcontext()


def tolerances(form: str) -> float:
    """fp16 and bf16 layers compute in their dtype; int8 ones round their input to 8 bits."""
    rounding = {"float16": 5e-3, "bfloat16": 4e-2, "scaled_block_bf16": 4e-2, "float64": 1e-6}.get(form, 5e-6)
    return rounding if FORMS[form].exact and not FORMS[form].autocast else 4e-2


@every_form
@every_case
def test_training_on_it_is_training_on_the_dequantised_weight(
    case: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, gradients of input and adapter: those of F.linear with W' in float64. The weight is never decoded."""
    base = quantised(form)
    layer = adapted(base, case)
    W, low = FORMS[form].dense(base), FORMS[form].input
    x, probe = torch.randn(5, IN).to(low), torch.randn(5, OUT).to(low)
    wide = copy.deepcopy(layer)
    wide.double()
    bias = base.bias.to(torch.float32).double()
    if (change := wide.adapter.bias_change()) is not None:
        bias = bias + 0.7 * change
    own = x.double().requires_grad_()
    values = list(wide.adapter.parameters())
    new = definition(wide.adapter, W)
    wanted = own @ (W + 0.7 * (new - W)).T + bias
    gradients = torch.autograd.grad((wanted * probe.double()).sum(), (own, *values))
    monkeypatch.setattr(base_weight, "read", lambda *args: pytest.fail("the weight was decoded"))
    layer.attach()
    inputs = x.detach().clone().requires_grad_()
    before = bits(base)
    with autocast(form):
        y = base(inputs)
    (y * probe.to(y.dtype)).sum().backward()
    assert_close(y.double().detach(), wanted.detach(), "output", tolerances(form))
    assert_close(inputs.grad.double(), gradients[0], "gradient of the input", tolerances(form))
    rounding = data_of(layer.adapter.spec.name).rounding
    for p, theirs in zip(layer.adapter.parameters(), gradients[1:], strict=True):
        assert p.grad is not None
        assert_close(p.grad.double(), theirs, "gradient of the adapter", rounding * tolerances(form))
    assert bits(base) == before and all(p.grad is None for p in base.parameters())


@every_form
@every_case
def test_merge_is_one_quantisation_of_the_exact_weight(case: str, form: str) -> None:
    """And the file alone gives the weight that is quantised; the backup brings back every bit."""
    base = quantised(form)
    layer = adapted(base, case, std=0.3)
    dense, before = FORMS[form].dense(base), bits(base)
    wanted = changed(layer, dense)
    layer.backup()
    layer.merge()
    computed = 5e-7 * wanted.abs().max()  # in fp32, BOFT in five steps
    error = (FORMS[form].dense(base) - wanted).abs() / (FORMS[form].error(wanted) + computed)
    assert float(error.max()) <= 1.001, f"{form}: {float(error.max()):.3f} of the allowed error"
    assert bits(base) != before
    layer.restore()
    assert bits(base) == before
    saved = codec.decode(codec.encode([layer]))[0]["lora_unet_x"]
    saved.tensors.pop("diff_b", None)
    assert_close(merged_weight(saved, base_weight.read(base), 0.7).double(), wanted, "from the file", 1e-5)


@every_form
def test_a_merged_layer_computes_what_the_attached_one_does(form: str) -> None:
    """Up to one quantisation of the weight, the bias included."""
    for case in CASES:
        base = quantised(form)
        layer = adapted(base, case)
        x = torch.randn(7, IN).to(FORMS[form].input)
        layer.attach()
        with torch.no_grad(), autocast(form):
            attached = base(x).double()
        layer.detach()
        wanted = changed(layer, FORMS[form].dense(base))
        layer.merge()
        with torch.no_grad(), autocast(form):
            merged = base(x).double()
        allowed = x.double().abs() @ FORMS[form].error(wanted).T + tolerances(form) * attached.abs().max()
        assert ((merged - attached).abs() <= allowed * 1.01).all(), case


@pytest.mark.parametrize("case", CASES)
def test_a_weight_that_cannot_be_read_trains_but_is_not_merged(case: str) -> None:
    """Packed for a kernel: the forward needs no weight, a merge names the remedy and changes nothing."""
    from test_base_weight import REFUSED

    make, words = REFUSED["a wrapper"]
    base = make()
    layer = adapted(base, case)
    with pytest.raises(ValueError, match=words) as caught:
        layer.merge()
    assert "fp32, fp16 or bf16" in str(caught.value)
