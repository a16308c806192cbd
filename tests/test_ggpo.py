"""GGPO: noise of the stated size, on the true update, only in training, and nothing at all while it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_numeric import FACTORED, make_layer, options_for, randomise
from tiny_parts import draw, sd_unet
from tiny_parts import randomise as randomise_network
from torch import nn
from torch.utils.checkpoint import checkpoint

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


# ---- steps that are counted ----


def stepped(**kwargs: str) -> tuple[Any, nn.Module]:
    """After a step, so that there is noise."""
    made, unet = network(ggpo_sigma="0.1", ggpo_beta="0.1", **kwargs)
    randomise_network(made)
    made.train()
    made.on_step_start()
    draw(unet).square().sum().backward()
    made.update_grad_norms()
    made.update_norms()
    return made, unet


def test_processes_draw_the_same_noise() -> None:
    """Whatever their generators are at; another one in each step, and the same in a recomputation."""
    (one, first), (other, second) = stepped(), stepped()
    for network in (one, other):
        network.follow_step(3, 1)
    torch.manual_seed(1)
    known = draw(first)
    torch.manual_seed(2)
    assert torch.equal(draw(second), known) and torch.equal(draw(second), known)
    other.follow_step(3, 2)
    assert not torch.equal(draw(second), known)
    other.eval()
    assert not torch.equal(draw(second), known)


def test_the_noise_of_a_step_has_the_stated_size_and_is_each_modules_own() -> None:
    layer = perturbed("lora")
    noise, x = layer.perturbation, torch.eye(108, dtype=torch.float64)
    noise.combined_norms = torch.ones(110, dtype=torch.float64)
    noise.gradient_norms = torch.zeros(110, dtype=torch.float64)
    noise.number = torch.tensor(5)
    first, second = (noise.output(layer.adapter.geometry, x, lambda whole: whole[:50], at) for at in (0, 50))
    again = noise.output(layer.adapter.geometry, x, lambda whole: whole[:50], 0)
    assert torch.equal(first, again) and not torch.equal(first, second)
    for each in (first, second):
        assert float(each.std()) == pytest.approx(0.5 / 110**0.5, rel=0.05)
        assert abs(float(each.mean())) < 0.05 * 0.5 / 110**0.5
    assert abs(float((first * second).mean())) < 0.05 * 0.25 / 110


def test_the_noise_of_a_step_is_that_of_recomputation_and_of_compiled_graphs() -> None:
    layer = perturbed("lora")
    noise = layer.perturbation
    noise.combined_norms = noise.gradient_norms = torch.ones(110, dtype=torch.float64)
    noise.number = torch.tensor(0)
    torch._dynamo.reset()
    compiled = torch.compile(layer.base, fullgraph=True, backend="aot_eager")
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            noise.number.fill_(step)
            x = torch.ones(2, 108, dtype=torch.float64, requires_grad=True)
            plain = layer.base(x)
            for reentrant in (True, False):
                again = checkpoint(layer.base, x, use_reentrant=reentrant)
                layer.zero_grad()
                again.square().sum().backward()
                gradient = layer.adapter.down.grad.clone()
                layer.zero_grad()
                plain.square().sum().backward(retain_graph=True)
                assert torch.equal(again, plain) and torch.equal(layer.adapter.down.grad, gradient)
            torch.testing.assert_close(compiled(x), plain, rtol=1e-12, atol=1e-12)
            seen.append(plain.detach())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    torch._dynamo.reset()


def test_what_a_step_leaves_goes_into_a_state() -> None:
    (one, first), (other, second) = stepped(), network(ggpo_sigma="0.1", ggpo_beta="0.1")
    other.load_state_dict(one.state_dict())
    other.train()
    for made in (one, other):
        made.follow_step(0, 7)
    assert not torch.equal(draw(first), draw(second))
    state = one.step_state()
    assert len(state) == 3 * len(one.adapted_layers)
    other.load_step_state(state)
    assert torch.equal(draw(first), draw(second))
    other.load_step_state({})
    assert other.weight_norms() is None


@pytest.mark.parametrize("calls", (True, False))
def test_a_trainer_that_does_not_call_is_told_once(calls: bool, caplog: pytest.LogCaptureFixture) -> None:
    """sd-scripts looks for the calls on the wrapper of several processes and does not find them."""
    made, unet = network(ggpo_sigma="0.1", ggpo_beta="0.1")
    optimizer = torch.optim.SGD(made.get_trainable_params(), lr=1e-3)
    made.train()
    for step in range(6):
        for _ in range(1 if step else 5):  # passes of an accumulation are no steps, nor is what a limit changes
            made.on_step_start()
            draw(unet).square().sum().backward()
            made.apply_max_norm_regularization(1e-9)
        if calls:
            made.update_grad_norms()
            made.update_norms()
        optimizer.step()
        optimizer.zero_grad()
        told = [record for record in caplog.records if "update_norms" in record.getMessage()]
        assert len(told) == (not calls and step >= 3)
    assert not told or "ggpo_sigma and ggpo_beta have no effect: in 3 steps" in told[0].getMessage()
