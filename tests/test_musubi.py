"""The calls of musubi-tuner and its forks, in their order and with their arguments, on stand-ins of their models."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import randomise, sd_unet
from torch import nn
from toy_models import signal, toy

import networks.loha
import networks.lokr
import networks.lora

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {"lora": networks.lora, "loha": networks.loha, "lokr": networks.lokr}
MODEL = "flux"


def split_by_the_trainer(network_args: list[str]) -> dict[str, str]:
    """What these trainers make of --network_args: exactly one `=` each, twice."""
    kwargs = {}
    for argument in network_args:
        key, value = argument.split("=")
        kwargs[key] = value
    return kwargs


def dit(seed: int = 0) -> nn.Module:
    return toy(MODEL, seed=seed)["dit"].eval().requires_grad_(False)


def create(model: nn.Module, *network_args: str, algo: str = "lora", dim: int = 4, alpha: float = 1) -> Any:
    """The trainer's call; network_alpha is an int unless it was given."""
    kwargs = split_by_the_trainer(list(network_args))
    return ENTRIES[algo].create_arch_network(1.0, dim, alpha, None, None, model, neuron_dropout=None, **kwargs)


def attached(model: nn.Module, *network_args: str, **kwargs: Any) -> Any:
    network = create(model, *network_args, **kwargs)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return network


def entries() -> Iterator[str]:
    for file in sorted((ROOT / "networks").glob("lo*.py")):
        yield file.stem


@pytest.mark.parametrize("name", entries())
def test_every_entry_offers_the_functions_of_both_hosts(name: str) -> None:
    module = importlib.import_module(f"networks.{name}")
    for function in (
        "create_network",
        "create_network_from_weights",
        "create_arch_network",
        "create_arch_network_from_weights",
        "plan",
    ):
        assert getattr(module, function).__name__ == function
        assert getattr(module, function).__self__.name == f"networks.{name}"
    assert not hasattr(module, "prepare_network"), "these trainers would call it on the network"


@pytest.mark.parametrize("algo", ENTRIES)
def test_training_sequence(algo: str, tmp_path: Path) -> None:
    """Section by section what the trainer does, with a resume from a file; the loss falls."""
    model = dit()
    base = model(signal())
    network = attached(model, algo=algo)
    assert type(network) is not nn.Module and isinstance(network, nn.Module)
    network.enable_gradient_checkpointing()
    result = network.prepare_optimizer_params(unet_lr=2e-3)
    assert type(result) is tuple
    groups, descriptions = result
    assert descriptions == ["dit"] and [g["lr"] for g in groups] == [2e-3]
    network.prepare_grad_etc(model)
    network.on_epoch_start(model)
    assert network.training
    optimizer = torch.optim.AdamW(groups)
    target, losses = model(signal()).detach() + 0.3, []
    for _ in range(6):
        network.on_step_start()
        loss = (model(signal()) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scaled, mean, largest = network.apply_max_norm_regularization(50.0, torch.device("cpu"))
        assert scaled == 0 and 0 <= mean <= largest < 50
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert not any(p.requires_grad for p in model.parameters())

    wanted = model(signal()).detach()
    metadata = {"ss_network_dim": "4"}  # the host keeps using this dict
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), torch.float32, metadata)
    assert metadata == {"ss_network_dim": "4"}
    network.set_enabled(False)
    assert torch.equal(model(signal()), base) and network.training
    network.set_enabled(True)
    network.detach()

    again = attached(model, algo=algo)
    assert "layers loaded" in str(again.load_weights(str(file)))
    torch.testing.assert_close(model(signal()), wanted)


def test_a_fork_sends_a_text_encoder_rate() -> None:
    network = attached(dit())
    groups, _ = network.prepare_optimizer_params(text_encoder_lr=0, unet_lr=1e-3)
    assert [g["lr"] for g in groups] == [1e-3]
    with pytest.raises(ValueError, match="every learning rate is 0"):
        network.prepare_optimizer_params(unet_lr=0.0)


@pytest.mark.parametrize("algo", ENTRIES)
@pytest.mark.parametrize("call", ["training", "inference"])
def test_base_weights_are_merged(algo: str, call: str, tmp_path: Path) -> None:
    model = dit()
    network = attached(model, algo=algo, alpha=3)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    network.set_multiplier(0.7)
    applied = model(signal()).detach()
    network.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    module = ENTRIES[algo].create_arch_network_from_weights(0.7, tensors, unet=model, for_inference=True)
    if call == "training":
        module.merge_to(None, model, tensors, torch.float32, "cpu")
    else:
        module.merge_to(None, model, tensors, device=torch.device("cpu"), non_blocking=True)
    torch.testing.assert_close(model(signal()), applied)


def test_files_hold_what_these_readers_want(tmp_path: Path) -> None:
    """Floating 0-d alpha although network_alpha is the int 1, whole lokr_w1, no further keys."""
    wanted = {
        "lora": {"lora_down.weight", "lora_up.weight", "alpha"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
    }
    for algo, suffixes in wanted.items():
        file = tmp_path / f"{algo}.safetensors"
        create(dit(), algo=algo, dim=1).save_weights(str(file), torch.bfloat16, {"ss_network_dim": "1"})
        tensors = load_file(file)
        assert {key.partition(".")[2] for key in tensors} <= suffixes and all("." in key for key in tensors)
        assert {key.partition(".")[2] for key in tensors} >= suffixes - {"lokr_w2"}
        alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
        assert all(alpha.is_floating_point() and alpha.shape == () and alpha == 1 for alpha in alphas)


def test_conv_defaults_follow_the_host() -> None:
    """conv_dim and conv_alpha: off and 1 in sd-scripts, network_dim and network_alpha here."""
    unet = sd_unet()
    theirs = {row.saved_name: row for row in networks.lora.plan(8, 2, None, unet).trained}
    here = {row.saved_name: row for row in networks.lora.plan(8, 2, None, unet, host="musubi").trained}
    kernels = [row for row in here.values() if row.geometry.has_kernel]
    assert kernels and not any(row.saved_name in theirs for row in kernels)
    assert {(row.dim, row.alpha) for row in here.values()} == {(8, 2.0)}
    assert len(create(unet, dim=8, alpha=2).layers) == len(here)
    assert len(create(unet, "conv_dim=0", dim=8, alpha=2).layers) == len(theirs)
    given = networks.lora.plan(8, 2, None, unet, host="musubi", conv_dim="4", conv_alpha="3").trained
    assert {(row.dim, row.alpha) for row in given if row.geometry.has_kernel} == {(4, 3.0)}
    half = networks.lora.plan(8, 2, None, unet, host="musubi", conv_alpha="3").trained
    assert {(row.dim, row.alpha) for row in half if row.geometry.has_kernel} == {(8, 3.0)}


def test_a_model_without_convolutions_does_not_mind_the_default() -> None:
    assert create(dit()).layers
    with pytest.raises(ValueError, match="conv_dim has no effect"):
        create(dit(), "conv_dim=4")
