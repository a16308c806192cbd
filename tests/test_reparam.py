"""LoRA+ in the parametrisation (`loraplus_mode=reparam`): the same training as by learning rates, in one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FACTORED
from safetensors.torch import load_file
from tiny_parts import randomise, sd_unet
from torch import nn
from toy_models import signal, toy

import networks.lora
from networks.layers.max_norm import update_norm

RATIO = 8.0
FORMS: dict[str, dict[str, str]] = {
    **{algo: {"algo": algo} for algo, cls in FACTORED.items() if cls.spec.plus},
    "lokr both low rank": {"algo": "lokr", "decompose_both": "True", "factor": "8"},
    "scalar": {"use_scalar": "True"},
    "dora": {"use_dora": "True"},
    "split": {"split_qkv": "True"},
    "split loha": {"algo": "loha", "split_qkv": "True"},
}


def made(mode: str, ratio: float = RATIO, **kwargs: str) -> tuple[Any, nn.Module]:
    """A network in float64 on a model in float64, both always with the same start values."""
    model = toy("flux")["dit"].requires_grad_(False)
    torch.manual_seed(3)
    dim = 1 if "decompose_both" in kwargs else 2
    network = networks.lora.create_network(
        1.0, dim, 3, None, None, model, loraplus_lr_ratio=str(ratio), loraplus_mode=mode, **kwargs
    )
    model.double()
    network.double().apply_to(None, model, False, True)
    network.eval()  # DyLoRA draws its ranks in training
    return network, model


def file_of(network: Any, path: Path) -> dict[str, torch.Tensor]:
    network.save_weights(path, None, {})
    return load_file(path)


@pytest.mark.parametrize("form", FORMS)
def test_adam_does_the_same_with_one_rate(form: str, tmp_path: Path) -> None:
    """Three steps of Adam, whose step is blind to the size of the gradient: the same files as with two rates."""
    files = []
    for mode in ("lr", "reparam"):
        network, model = made(mode, **FORMS[form])
        groups, descriptions = network.prepare_optimizer_params(None, 1e-3)
        rates = {"dit plus"} if form == "lora_fa" else {"dit", "dit plus"}  # its other factor does not learn
        assert set(descriptions) == (rates if mode == "lr" else {"dit"})
        optimizer = torch.optim.Adam(groups, eps=1e-40)
        if form == "scalar":  # from 0 the other factors have no gradient at all, only noise that Adam blows up
            for layer in network.adapted_layers:
                layer.adapter.scalar.data.fill_(0.5)
        for _ in range(3):
            loss = (model(signal().double()) - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        files.append(file_of(network, tmp_path / f"{mode}.safetensors"))
    by_rate, by_unit = files
    assert by_rate.keys() == by_unit.keys()
    assert all((by_rate[key] - by_unit[key]).abs().max() < 1e-9 for key in by_rate)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_is_what_is_loaded(form: str, tmp_path: Path) -> None:
    """Start, forward, merge, norm, state and files agree with a network that folds nothing."""
    network, model = made("reparam", **FORMS[form])
    plain, other = made("lr", **FORMS[form])
    torch.testing.assert_close(model(signal().double()), other(signal().double()), rtol=1e-9, atol=1e-9)
    randomise(network)
    wanted = model(signal().double())
    tensors = file_of(network, tmp_path / "a.safetensors")
    plain.load_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(other(signal().double()), wanted, rtol=1e-9, atol=1e-9)
    again = file_of(plain, tmp_path / "b.safetensors")
    assert all((again[key] - tensors[key]).abs().max() < 1e-9 for key in tensors)

    back, _ = made("reparam", **FORMS[form])
    back.load_weights(str(tmp_path / "b.safetensors"))
    for name, parameter in back.named_parameters():
        if (
            form not in ("scalar", "tlora") and "magnitude" not in name
        ):  # which a file holds multiplied out, or added up
            torch.testing.assert_close(parameter, network.get_parameter(name), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(back.adapted_layers, network.adapted_layers, strict=True):
        if theirs.magnitude is not None:
            torch.testing.assert_close(ours.magnitude, theirs.magnitude, rtol=1e-9, atol=1e-9)
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(signal().double()), wanted, rtol=1e-9, atol=1e-9)
    norms = [
        (update_norm(a), update_norm(b)) for a, b in zip(network.adapted_layers, plain.adapted_layers, strict=True)
    ]
    assert all(abs(a - b) < 1e-9 * b for a, b in norms)
    network.merge_to(None, model)
    network.detach()
    torch.testing.assert_close(model(signal().double()), wanted, rtol=1e-9, atol=1e-9)


def test_prodigy_and_its_like_get_one_group() -> None:
    network, _ = made("reparam")
    groups, descriptions = network.prepare_optimizer_params(None, 1.0)
    assert [group["lr"] for group in groups] == [1.0] and descriptions == ["dit"]
    assert len(groups[0]["params"]) == len(list(network.parameters()))


def test_what_decides_nothing_is_refused() -> None:
    for kwargs, message in (
        ({"loraplus_mode": "reparam"}, "no effect without a ratio"),
        ({"loraplus_mode": "reparam", "loraplus_lr_ratio": "1"}, "no effect without a ratio"),
        ({"loraplus_mode": "reparam", "loraplus_lr_ratio": "0"}, "cannot be folded"),
        ({"loraplus_mode": "reparametrize"}, "is none of lr, reparam"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.lora.plan(4, 1, None, sd_unet(), **kwargs)
