"""GGPO: noise of the stated size, on the true update, only in training, and nothing at all while it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_numeric import FACTORED, make_layer, options_for, randomise
from tiny_parts import draw, sd_unet
from torch import nn

import networks.lora
from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.perturbation import Perturbation
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry


def perturbed(algo: str, sigma: float = 0.5, beta: float = 0.25) -> AdaptedLayer:
    torch.manual_seed(0)
    base = make_layer("linear")
    adapter = ALGOS[algo](Geometry.of(base), 4, options_for(algo, {})).double()
    randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, 0.75, runtime=Runtime(0.5), perturbation=Perturbation(sigma, beta))
    layer.attach()
    return layer


@pytest.mark.parametrize("algo", list(FACTORED))
def test_statistics_are_of_the_true_update(algo: str) -> None:
    layer = perturbed(algo)
    noise = layer.perturbation
    layer.base(torch.randn(6, 108, dtype=torch.float64)).square().sum().backward()
    before = layer.acting.delta().detach()
    noise.see_gradients(layer)
    noise.see_weights(layer)
    dW = 0.75 * before
    base_norm = layer.base.weight.norm(dim=1).mean()
    torch.testing.assert_close(noise.weight_norms, dW.norm(dim=1))
    torch.testing.assert_close(noise.combined_norms, (base_norm**2 + dW.square().sum(1)).sqrt())
    # The change along the gradients, by a finite difference.
    step = 1e-7
    with torch.no_grad():
        for p in layer.adapter.parameters():
            p.add_(0 if p.grad is None else p.grad, alpha=step)
        change = 0.75 * (layer.acting.delta() - before) / step
    torch.testing.assert_close(noise.gradient_norms, change.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_the_noise_has_the_stated_size() -> None:
    layer = perturbed("lora")
    noise, x = layer.perturbation, torch.eye(108, dtype=torch.float64)
    clean = layer.base(x)
    assert torch.equal(clean, layer.base(x))  # before the first step there is none
    noise.combined_norms = torch.linspace(1, 2, 110, dtype=torch.float64)
    noise.gradient_norms = torch.linspace(0, 3, 110, dtype=torch.float64)
    wanted = 0.5 * (0.5 * noise.combined_norms + 0.25 * noise.gradient_norms**2) / 110**0.5
    drawn = torch.stack([layer.base(x) - clean for _ in range(200)]).flatten(0, 1)
    torch.testing.assert_close(drawn.std(0), wanted, rtol=0.05, atol=0)
    assert drawn.mean(0).abs().max() < 0.05 * wanted.max()
    for off in ("eval", "multiplier", "sampling"):
        layer.train()
        layer.runtime = Runtime(0.0 if off == "multiplier" else 0.5)
        layer.runtime.sampling = off == "sampling"
        layer.train(off != "eval")
        assert torch.equal(layer.base(x), layer.base(x)), off


def network(**kwargs: str) -> tuple[Any, nn.Module]:
    unet = sd_unet()
    made = networks.lora.create_network(1.0, 4, 2, None, None, unet, **kwargs)
    made.apply_to(None, unet, False, True)
    made.prepare_optimizer_params(None, 1e-3, 1e-3)
    return made, unet


def test_calls_of_the_host() -> None:
    made, unet = network(ggpo_sigma="0.1", ggpo_beta="0.1", conv_dim="2")
    made.train()
    assert made.weight_norms() is None and made.grad_norms() is None
    draw(unet).square().sum().backward()
    made.update_grad_norms()
    made.update_norms()
    count = len(made.adapted_layers)
    for norms in (made.weight_norms(), made.grad_norms(), made.combined_weight_norms()):
        assert norms.shape == (count,) and norms.isfinite().all()
    assert not torch.equal(draw(unet), draw(unet))
    made.eval()
    assert torch.equal(draw(unet), draw(unet))


def test_off_is_free() -> None:
    """The host calls update_grad_norms at every step of a network that has it."""
    made, _ = network()
    names = ("update_grad_norms", "update_norms", "weight_norms", "grad_norms", "combined_weight_norms")
    assert not any(hasattr(made, name) for name in names)
    assert all(layer.perturbation is None for layer in made.adapted_layers)


def test_both_or_neither() -> None:
    with pytest.raises(ValueError, match="ggpo_sigma and ggpo_beta work together"):
        network(ggpo_sigma="0.1")
