"""Every architecture with every algorithm, and with DoRA, through the functions of its trainer: created, trained for
two steps, saved, loaded, the same output; merged from its file, the same output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS
from registry import data_of as algorithm_data
from registry_archs import SPECS, data_of
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora

FORMS = {**{algo: {"algo": algo} for algo in FOR_LINEARS}, "dora": {"use_dora": "True"}}
FORMS["lokr dora"] = {"algo": "lokr", "use_dora": "True"}


def model_of(arch: str) -> nn.Module:
    return toy(arch, shrink=data_of(arch).shrink)[SPECS[arch].denoiser.name].eval().requires_grad_(False)


def create(arch: str, model: nn.Module, **kwargs: str) -> Any:
    dim = max(2, algorithm_data(kwargs.get("algo", "lora")).least_dim)
    if data_of(arch).host == "musubi":
        network = networks.lora.create_arch_network(1.0, dim, 1, None, None, model, neuron_dropout=None, **kwargs)
        network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        return network
    network = networks.lora.create_network(1.0, dim, 1, None, None, model, neuron_dropout=None, **kwargs)
    network.apply_to(None, model, False, True)
    return network


def from_file(arch: str, model: nn.Module, tensors: dict[str, Tensor]) -> Any:
    if data_of(arch).host == "musubi":
        return networks.lora.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
    return networks.lora.create_network_from_weights(1.0, None, None, None, model, tensors, for_inference=True)[0]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("arch", SPECS)
def test_created_trained_saved_loaded(arch: str, tmp_path: Path) -> None:
    for name, kwargs in FORMS.items():
        model = model_of(arch)
        base = model(signal())
        network = create(arch, model, **kwargs)
        rates: dict[str, Any] = {"unet_lr": 1e-2} | (
            {} if data_of(arch).host == "musubi" else {"text_encoder_lr": None}
        )
        groups, _ = network.prepare_optimizer_params(**rates)
        network.train()
        optimizer = torch.optim.AdamW(groups)
        for _ in range(2):
            (model(signal()) - 0.3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        network.eval()
        wanted = model(signal()).detach()
        assert (wanted - base).abs().max() > 1e-4, f"{name} learnt nothing"
        file = str(tmp_path / f"{name}.safetensors")
        network.save_weights(file, torch.float32, {"ss_network_dim": "2"})
        network.detach()
        assert torch.equal(model(signal()), base), f"{name} left something behind"

        again = create(arch, model, **kwargs)
        assert not again.load_weights(file).missing
        again.eval()
        error = algorithm_data(kwargs.get("algo", "lora")).reloaded
        near = {"rtol": error, "atol": error} if error else {}
        torch.testing.assert_close(model(signal()), wanted, **near, msg=lambda m, n=name: f"{n}, loaded: {m}")
        again.detach()
        tensors = load_file(file)
        merged = from_file(arch, model, tensors)
        merged.merge_to(None, model, tensors, torch.float32, "cpu")
        torch.testing.assert_close(
            model(signal()), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}, merged: {m}"
        )
