"""Max-norm regularisation of every form and start: at the limit, not below it, and the norms that are told are true."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS, Case, cases, dense_update, learn_lengths, make_input, make_layer, randomise
from registry import data_of
from torch import Tensor, nn

from networks.algos import ALGOS, make_adapter
from networks.layers.adapted import AdaptedLayer
from networks.layers.max_norm import limit_norms, update_norm
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

SINGLE = [case for case in cases() if len(case.options) <= 1]
SHARES = (0.9, 0.3, 0.01)  # of the norm before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adapted(case: Case, kind: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> AdaptedLayer:
    base = make_layer(kind, dtype)
    adapter = ALGOS[case.algo](layer_geometry(base), case.dim, case.options).to(dtype).eval()
    layer = AdaptedLayer("x", base, adapter, case.scale(adapter.laid_out), **kwargs).to(dtype)
    layer.attach()
    randomise(adapter)
    return layer


def true_norm(layer: AdaptedLayer) -> float:
    """||scale * scalar * dW||, or ||W' - W||, of the dense definition in float64."""
    wide = copy.deepcopy(layer).double()
    wide.sites[0].module.double()
    return float(dense_update(wide, 1.0).detach().norm())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_every_form_reaches_the_limit(case: Case) -> None:
    kind = next(kind for kind in ("conv_3x3", "linear", "layer_norm") if kind in case.kinds)
    layer = adapted(case, kind)
    for share in SHARES:
        before = true_norm(layer)
        assert limit_norms([layer], before * 1.001)[0] == 0 and true_norm(layer) == before
        count, mean, largest = limit_norms([layer], limit := before * share)
        assert count == 1 and mean == largest == pytest.approx(true_norm(layer), rel=1e-6)
        assert limit * (1 - 1.1e-6) <= true_norm(layer) <= limit * (1 + 2e-6)
        assert limit_norms([layer], limit)[0] == 0


def whole(layer: AdaptedLayer) -> Tensor:
    """The factors of PiSSA with their start."""
    parts = getattr(layer.adapter, "parts", [layer.adapter])
    start = [part.up0.flatten(1) @ part.down0.flatten(1) for part in parts]
    now = [(p.up0 + p.up).flatten(1) @ (p.down0 + p.down).flatten(1) for p in parts]
    return layer.scale * (torch.cat(now) - torch.cat(start))


@pytest.mark.parametrize("moved", (1e-3, 0.1, 2.0))
@pytest.mark.parametrize("sizes", ((), (48, 24)), ids=["one", "split"])
def test_a_start_from_the_base_weight(sizes: tuple[int, ...], moved: float) -> None:
    """The product of two changes falls with the square of the ratio: 0.82 of the limit if it is shrunk once."""
    base = nn.Linear(36, 72).double().requires_grad_(False)
    adapter = make_adapter(ALGOS["lora"], Geometry.of(base), 4, {}, sizes).double()
    adapter.defer_init_(0.75)
    layer = AdaptedLayer("x", base, adapter, 0.75)
    layer.attach()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * moved)
    for share in SHARES:
        limit = float(whole(layer).detach().norm()) * share
        count, _, largest = limit_norms([layer], limit)
        assert count == 1 and largest == pytest.approx(float(whole(layer).detach().norm()), rel=1e-6)
        assert limit * (1 - 1.1e-6) <= largest <= limit * (1 + 1e-6)


@pytest.mark.parametrize("plus", (1.0, 8.0))
@pytest.mark.parametrize("algo", [algo for algo, cls in ALGOS.items() if "use_dora" in cls.spec.features])
def test_with_a_unit_and_magnitudes_of_its_own(algo: str, plus: float) -> None:
    """LoRA+ in the parametrisation; lengths are no part of the norm, and stay."""
    base = make_layer("linear")
    adapter = ALGOS[algo](Geometry.of(base), 4).double().eval()
    adapter.fold_plus_(plus)
    layer = AdaptedLayer("x", base, adapter, 0.75, dora="output").double()
    layer.attach()
    adapter.mark_initialised_()
    randomise(adapter)
    learn_lengths(layer)
    lengths, direction = layer.magnitude.clone(), layer.update(x := make_input("linear")).detach()
    before = float(update_norm(layer))
    limit_norms([layer], before / 4)
    torch.testing.assert_close(layer.update(x), direction / 4, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.magnitude, lengths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("algo", FOR_LINEARS)
def test_other_dtypes_never_stay_above(algo: str, dtype: torch.dtype) -> None:
    layer = adapted(Case(algo, dim=max(4, data_of(algo).least_dim)), "linear", torch.float32)
    layer.to(dtype)
    limit = true_norm(layer) * 0.3
    _, _, largest = limit_norms([layer], limit)
    below = 1e-4 if dtype == torch.float32 else 1e-2
    assert limit * (1 - below) <= true_norm(layer) <= limit * (1 + 1e-5)
    assert largest == pytest.approx(true_norm(layer), rel=1e-5)


def test_what_is_told_of_several_layers() -> None:
    layers = [adapted(Case(algo), "linear") for algo in ("lora", "diag-oft", "ia3", "full")]
    norms = sorted(map(true_norm, layers))
    limit = (norms[1] + norms[2]) / 2
    count, mean, largest = limit_norms(layers, limit)
    after = list(map(true_norm, layers))
    assert (
        count == 2
        and mean == pytest.approx(sum(after) / 4, rel=1e-6)
        and largest == pytest.approx(max(after), rel=1e-6)
    )
    assert sorted(after)[:2] == pytest.approx(norms[:2], rel=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_one_wait_for_the_device_where_the_ratio_is_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of all layers, and once more of those that shrank: no search."""
    algos = ("lora", "loha", "lokr", "lora_fa", "dylora", "glora", "full", "tlora", "ia3")
    layers = [adapted(Case(algo), kind, dtype) for algo in algos for kind in ("linear", "conv_3x3")]
    seen = []
    monkeypatch.setattr(
        "networks.layers.max_norm.update_norm", lambda layer: seen.append(layer.adapter.spec.name) or update_norm(layer)
    )
    assert limit_norms(layers, min(map(true_norm, layers)) / 2)[0] == len(layers)
    assert len(seen) == 2 * len(layers)
