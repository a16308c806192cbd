"""Layers that do not learn are named: after diagnose_steps steps of the optimizer, and at each save."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_parts import draw, sd_unet
from torch import nn

import networks.lora
from networks.network import diagnosis

SUMS = diagnosis._sums
CALM = {"no_gradient": 0, "at_start": 0, "dead_kinds": 0, "non_finite_tensors": 0, "underflow_tensors": 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def start(**kwargs: str) -> tuple[nn.Module, Any, Any]:
    """A network on a UNet, as a trainer has it, and its optimizer."""
    unet = sd_unet().requires_grad_(False)
    network = networks.lora.create_network(1.0, 2, 1.0, None, None, unet, **kwargs)
    network.apply_to(None, unet, False, True)
    network.prepare_optimizer_params(None, 1e-3, 1e-3)
    network.train()
    return unet, network, torch.optim.AdamW(network.get_trainable_params(), lr=1e-3, weight_decay=0.0)


def train(unet: nn.Module, network: Any, optimizer: Any, passes: int, accumulate: int = 1, loss: Any = None) -> None:
    """The trainer's loop: on_step_start in every pass, a step of the optimizer in every `accumulate`th."""
    for i in range(passes):
        network.on_step_start(None, unet)
        (draw(unet).square().mean() if loss is None else loss()).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def health(network: Any, tmp_path: Path, dtype: torch.dtype | None = None) -> dict[str, int] | None:
    network.save_weights(str(tmp_path / "x.safetensors"), dtype, {})
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        text = (opened.metadata() or {}).get("networks_health")
    return None if text is None else json.loads(text)


def test_a_run_in_good_health_says_nothing_but_its_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet, network, optimizer = start(diagnose_steps="2")
    caplog.clear()  # what creation said of so small a model
    assert health(network, tmp_path) is None  # nothing is known yet
    with caplog.at_level(logging.WARNING):
        train(unet, network, optimizer, 4)
        assert health(network, tmp_path) == {"layers": len(network.adapted_layers), **CALM}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())  # each watched its first gradient only


def test_layers_without_gradient_and_at_their_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One layer is bypassed by its host, one has no place in the optimizer."""
    unet, network, optimizer = start(diagnose_steps="2")
    caplog.clear()  # what creation said of so small a model
    dead, still, *_ = network.adapted_layers
    dead.base.forward = dead.sites[0].below  # as a host's own patch would
    frozen = {id(p) for p in still.parameters()}
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if id(p) not in frozen]
    with caplog.at_level(logging.WARNING):
        train(unet, network, optimizer, 2)
        assert not caplog.records  # the second step is seen at the next start
        train(unet, network, optimizer, 1)
    first, second = (record.getMessage() for record in caplog.records)
    gone, kept = (row.trainer_name for row, _ in network.layers[:2])
    assert first.startswith("after 2 steps, 1 layers have had no gradient") and f": {gone}; add" in first
    assert second.startswith("after 2 steps, 1 layers are at their start values") and f": {kept}; " in second
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = health(network, tmp_path)
    assert found == {"layers": len(network.adapted_layers), **CALM, "no_gradient": 1, "at_start": 1}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["at this save"] * 2


def test_steps_are_those_of_the_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    unet, network, optimizer = start(diagnose_steps="2")
    caplog.clear()  # what creation said of so small a model
    dead = network.adapted_layers[0]
    dead.base.forward = dead.sites[0].below
    with caplog.at_level(logging.WARNING):
        train(unet, network, optimizer, 6, accumulate=3)
        assert network.diagnosis.steps == 1 and not caplog.records
        train(unet, network, optimizer, 3, accumulate=3)
    assert network.diagnosis.steps == 2 and len(caplog.records) == 1


def test_values_that_are_not_finite_or_vanish_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet, network, optimizer = start(diagnose_steps="1")
    caplog.clear()  # what creation said of so small a model
    first, second, *_ = network.adapted_layers
    train(unet, network, optimizer, 1)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        next(first.parameters())[0, 0] = float("nan")
        for p in second.parameters():
            p.mul_(1e-12)
        network.on_step_start(None, unet)
        assert ["1 layers have NaN or infinite values" in r.getMessage() for r in caplog.records] == [True]
        assert network.layers[0][0].trainer_name in caplog.text
        caplog.clear()
        found = health(network, tmp_path, torch.float16)
    assert found is not None and found["non_finite_tensors"] == 1 and found["underflow_tensors"] == 2
    assert len(caplog.records) == 2  # one warning per kind, from the one place that looks at the saved values


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, "start again with an fp32 adapter (adapter_dtype=fp32), or with eps=1e-4 (optimizer_args)"),
        (torch.float32, "go on from an earlier file with a lower learning rate"),
    ],
)
def test_values_that_are_not_finite_are_told_after_the_first_step(
    dtype: torch.dtype, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Adam in fp16, whose eps is 0 there; a loss that is infinite, in fp32."""
    unet, network, _ = start(diagnose_steps="50")
    network.to(dtype)
    optimizer = torch.optim.AdamW(network.get_trainable_params(), lr=1e-4)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        factor = 1.0 if dtype == torch.float16 else float("inf")
        train(unet, network, optimizer, 3, loss=lambda: draw(unet).square().mean() * factor)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"after the first step, {len(network.adapted_layers)} layers have NaN") and words in said


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_kind_of_value_that_moves_nowhere_is_told_in_one_line(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Large values in bf16, or a learning rate of 0. The others of each layer move, so no layer is at its start."""
    unet, network, _ = start(diagnose_steps="20")
    with torch.no_grad():
        for layer in network.adapted_layers:
            layer.adapter.down.fill_(100.0 if dtype == torch.bfloat16 else 0.1)
    network.to(dtype)
    rates = {"up": 1e-4, "down": 1e-4 if dtype == torch.bfloat16 else 0.0}
    groups = [
        {"params": [getattr(la.adapter, kind) for la in network.adapted_layers], "lr": lr} for kind, lr in rates.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(unet, network, optimizer, 21)
    (said,) = (record.getMessage() for record in caplog.records)
    remedy = {torch.bfloat16: "steps are too small for bfloat16, adapter_dtype=fp32 keeps it in fp32"}
    assert said.startswith(f"after 20 steps, down has moved in none of {len(network.adapted_layers)} layers")
    assert said.endswith(remedy.get(dtype, "or its learning rate is too small"))
    found = health(network, tmp_path)
    assert found is not None and (found["dead_kinds"], found["at_start"]) == (1, 0)


def test_watching_costs_a_look_at_the_start_after_a_step_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(diagnosis, "_sums", lambda parameters: looks.append(1) or SUMS(parameters))
    unet, network, optimizer = start(diagnose_steps="4")
    train(unet, network, optimizer, 7)
    assert len(looks) == 3


def test_a_bf16_network_whose_updates_vanish_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """--full_bf16 with a low learning rate: the optimizer steps, the values do not."""
    unet, network, _ = start(diagnose_steps="3")
    caplog.clear()  # what creation said of so small a model
    network.to(torch.bfloat16)
    for layer in network.adapted_layers:
        for p in layer.parameters():
            p.data.fill_(1.0)
    optimizer = torch.optim.SGD(network.get_trainable_params(), lr=1e-12)
    with caplog.at_level(logging.WARNING):
        train(unet, network, optimizer, 4)
    assert "at their start values" in caplog.text and str(len(network.adapted_layers)) in caplog.text


@pytest.mark.parametrize("kwargs", ({"diagnose_steps": "0"}, {}))
def test_off_and_default(kwargs: dict[str, str], tmp_path: Path) -> None:
    unet, network, optimizer = start(**kwargs)
    train(unet, network, optimizer, 2)
    found = health(network, tmp_path)
    assert (found is None) == bool(kwargs)


def test_a_watched_network_can_be_copied_and_resumed() -> None:
    unet, network, optimizer = start(diagnose_steps="1")
    network.on_step_start(None, unet)
    again = copy.deepcopy(network.state_dict())
    network.load_state_dict(again)
    copied = copy.deepcopy(network.adapted_layers[0].adapter)
    assert [p.shape for p in copied.parameters()] == [p.shape for p in network.adapted_layers[0].adapter.parameters()]
