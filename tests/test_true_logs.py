"""What the log says is so: of what is trained, of layers that never get a gradient, of kinds of values that move."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS
from registry import data_of as algorithm_data
from registry_archs import SPECS, data_of
from safetensors import safe_open
from tiny_denoisers import MODELS
from tiny_flow_models import qwen3, t5
from tiny_parts import inputs, sd_unet, sdxl_unet, text_encoder
from torch import Tensor, nn

import networks.lora
from networks.models.skeleton import skeleton
from networks.network import diagnosis
from networks.plan.report import totals

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {"hidream_o1"}  # without a class in diffusers; all its layers stand before the last one, whose output is read
TOKENS = torch.tensor([[0, 5, 7, 1], [0, 9, 3, 1]])


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def dead(network: Any, loss: Tensor) -> set[tuple[str, str]]:
    """Layers for which the loss has no gradient, or one of nothing but zeros, with random factors."""
    loss.backward()
    moving = {
        layer
        for layer in network.adapted_layers
        if any(p.grad is not None and p.grad.any() for p in layer.parameters())
    }
    return {(row.part, row.trainer_name) for row, layer in network.layers if layer not in moving}


ELSEWHERE = ("train_llm_adapter", "train_t5xxl", "connector_lora")  # arguments of layers that diffusers has elsewhere


def unread(network: Any) -> set[tuple[str, str]]:
    return {(row.part, row.trainer_name) for row, _ in network.layers if row.unread}


@torch.no_grad()
def randomise(*modules: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in (p for module in modules for p in module.parameters()):
        parameter.normal_(std=0.1)


# -- layers that never get a gradient


def test_every_architecture_is_looked_at() -> None:
    assert MODELS.keys() | OTHERS == SPECS.keys(), (
        "write a tiny denoiser of its real class in tests/tiny_denoisers.py, or put it into OTHERS with the reason"
    )


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", MODELS)
def test_layers_without_gradient_are_those_of_the_record(arch: str) -> None:
    """In the real classes, with every layer that can be trained and the normalisation layers."""
    make, call = MODELS[arch]
    model = make().train().requires_grad_(False)
    widest = {name: value for name, value in data_of(arch).widest.items() if name not in ELSEWHERE}
    network = networks.lora.create_network(1.0, 2, 1, None, None, model, train_norm="true", **widest)
    network.apply_to(None, model, False, True)
    randomise(model, network)
    found = dead(network, torch.stack([x.float().square().mean() for x in tensors(call(model))]).sum())
    assert found == unread(network)


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Gemma2Model(Gemma2Config(vocab_size=20, num_key_value_heads=1, head_dim=8, pad_token_id=0, **sizes))


def qwen() -> nn.Module:
    return qwen3(16)


def large() -> nn.Module:
    return t5(16)


def last(model: nn.Module) -> Tensor:
    return model(TOKENS).last_hidden_state


def before_last(model: nn.Module) -> Tensor:
    return model(TOKENS, output_hidden_states=True).hidden_states[-2]


def pooled(model: nn.Module) -> Tensor:
    return model(TOKENS).pooler_output


def both(model: nn.Module) -> Tensor:
    output = model(TOKENS, output_hidden_states=True)
    return torch.cat((output.hidden_states[-2].flatten(), output.text_embeds.flatten()))


# Architecture -> its encoders as its trainer uses them: a model, and what of it is read.
ENCODERS: dict[str, list[tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]]] = {
    "sd": [(text_encoder, last)],
    "sdxl": [(text_encoder, before_last), (lambda: text_encoder(True), both)],
    "sd3": [(lambda: text_encoder(True), both), (lambda: text_encoder(True), both), (large, last)],
    "flux": [(text_encoder, pooled), (large, last)],
    "lumina": [(gemma, before_last)],
    "anima": [(qwen, last)],
}  # fmt: skip


@pytest.mark.parametrize("arch", ENCODERS)
def test_layers_of_text_encoders_without_gradient_are_those_of_the_record(arch: str) -> None:
    made = [make().requires_grad_(False) for make, _ in ENCODERS[arch]]
    every = {"train_t5xxl": "True"} if "train_t5xxl" in SPECS[arch].arguments else {}
    network = networks.lora.create_network(1.0, 2, 1, None, made, MODELS[arch][0](), train_norm="true", **every)
    network.apply_to(made, None, True, False)
    assert {row.part for row, _ in network.layers} == {part.name for part in SPECS[arch].text_encoders}
    randomise(*made, network)
    losses = [read(model).square().mean() for (_, read), model in zip(ENCODERS[arch], made, strict=True)]
    assert dead(network, torch.stack(losses).sum()) == unread(network)
    assert bool(unread(network)) == (arch in ("sdxl", "lumina"))


@pytest.mark.parametrize("skip", (None, 1, 2))
def test_clip_skip_moves_the_line(skip: int | None) -> None:
    unet, encoder = sd_unet(), text_encoder().requires_grad_(False)
    network = networks.lora.create_network(1.0, 2, 1, None, encoder, unet)
    network.prepare_network(SimpleNamespace(clip_skip=skip))
    network.apply_to(encoder, unet, True, False)
    randomise(encoder, network)
    states = encoder(TOKENS, output_hidden_states=True).hidden_states
    read = encoder(TOKENS)[0] if skip is None else states[-skip]
    assert dead(network, read.square().mean()) == unread(network)
    assert len(unread(network)) == (6 if skip == 2 else 0)


def test_they_are_said_once_and_are_no_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SDXL's first encoder: its last layer stays in network and file. Another layer without gradient is told, with the
    argument that leaves it out."""
    unet, encoder = sdxl_unet().requires_grad_(False), text_encoder().requires_grad_(False)
    caplog.set_level(logging.INFO, logger="networks")
    network = networks.lora.create_network(1.0, 2, 1, None, [encoder, None], unet, diagnose_steps="2")
    network.apply_to(encoder, unet)
    assert any(
        line.startswith("text_encoder1: 12 layers") and ", 6 of them never get a gradient" in line
        for line in lines(caplog)
    )
    network.prepare_optimizer_params(1e-3, 1e-3)
    cut = next(layer for row, layer in network.layers if row.dotted_name.endswith("layers.0.mlp.fc2"))
    cut.base.forward = cut.sites[0].below  # as a host's own patch would
    optimizer = torch.optim.AdamW(network.get_trainable_params(), lr=1e-3)
    network.train()
    caplog.clear()
    for _ in range(3):
        network.on_step_start(None, unet)
        added = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.ones(2, 6)}
        noisy, times, _ = inputs()
        unet(noisy, times, before_last(encoder), added_cond_kwargs=added).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    (said,) = lines(caplog, logging.WARNING)
    row = next(row for row, layer in network.layers if layer is cut)
    assert said.startswith("after 2 steps, 1 layers have had no gradient, the loss does not depend on them: ")
    assert row.shown_name == "text_encoder1:text_model.encoder.layers.0.mlp.fc2" and f": {row.shown_name}; " in said
    advice = re.search(r"add (\w+)=(\S+) to leave them out$", said)
    assert advice is not None
    without = networks.lora.plan(2, 1, [encoder, None], unet, **{advice.group(1): advice.group(2)})
    left = {row.saved_name for row in without.trained}
    assert {row.saved_name for row, _ in network.layers} - left == {row.saved_name}
    network.save_weights(tmp_path / "a.safetensors", None, {})
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        health = json.loads(opened.metadata()["networks_health"])
        assert any("text_model_encoder_layers_1_mlp_fc2" in key for key in opened.keys())
    assert (health["layers"], health["no_gradient"]) == (len(network.adapted_layers) - 6, 1)


# -- what is trained


def announced(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """(layers, values that are trained) in the log."""
    (said,) = [line for line in lines(caplog) if line.startswith("in all ")]
    layers, parameters, trained = re.match(
        r"in all (\d+) layers, ([\d,]+) parameters(?: \(([\d,]+) of them)?", said
    ).groups()  # type: ignore[union-attr]
    return int(layers), int((trained or parameters).replace(",", ""))


@pytest.mark.parametrize("parts", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("options", [{}, {"use_dora": "True", "network_reg_lrs": "{'.*attn1.*': 0.0}"}])
def test_what_is_announced_is_what_the_optimizer_gets(
    options: dict[str, str], parts: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """sd-scripts' calls in its order; notes count the layers that are left."""
    unet, encoder = sd_unet(), text_encoder()
    caplog.set_level(logging.INFO, logger="networks")
    network = networks.lora.create_network(1.0, 2, 1, None, encoder, unet, **options)
    assert len(lines(caplog)) == 1, "nothing is known yet but the model"
    network.prepare_network(SimpleNamespace())
    network.apply_to(encoder, unet, *parts)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert announced(caplog) == (len(network.adapted_layers), trained)
    assert any(line.startswith("text_encoder: ") for line in lines(caplog)) == parts[0]
    if options:
        assert f"DoRA on {len(network.adapted_layers)} layers" in lines(caplog)


FORMS: dict[str, dict[str, str]] = {
    **{algo: {"algo": algo} for algo in FOR_LINEARS},
    "dora": {"use_dora": "True"},
    "diag-oft rescaled": {"algo": "diag-oft", "rescaled": "True"},
    "norms": {"train_norm": "true"},
    **{f"{algo} scalar": {"algo": algo, "use_scalar": "True"} for algo in ("lokr", "loha", "lora")},
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", FORMS)
def test_a_run_of_an_algorithm_says_what_it_trains_and_nothing_else(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """musubi's calls; kinds of values that do not move are looked for after three steps, when all have moved."""
    monkeypatch.setattr(diagnosis, "WAIT", 3)
    kwargs = FORMS[name]
    model = MODELS["ace_step"][0]().requires_grad_(False)
    dim = max(2, algorithm_data(kwargs.get("algo", "lora")).least_dim)
    network = networks.lora.create_arch_network(1.0, dim, 1, None, None, model, diagnose_steps="3", **kwargs)
    network.apply_to(None, model, False, True)
    groups, _ = network.prepare_optimizer_params(unet_lr=1e-3)
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert totals(network.plan)["learning"] == trained
    caplog.clear()  # what creation said of so small a model
    network.train()
    optimizer = torch.optim.AdamW(groups)
    for _ in range(5):
        network.on_step_start(None, model)
        (next(tensors(MODELS["ace_step"][1](model))) - 0.3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert lines(caplog, logging.WARNING) == []


def test_a_network_for_pictures_says_little(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 2, 1, None, None, unet)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    caplog.set_level(logging.INFO, logger="networks")
    caplog.clear()
    again, weights = networks.lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, None, unet, for_inference=True
    )
    again.apply_to(None, unet)
    again.load_state_dict(weights)
    (said,) = lines(caplog)
    assert said.endswith(f"{SPECS['sd'].title}, {len(network.adapted_layers)} layers")


def test_the_embedded_model_is_no_strange_one() -> None:
    """Of a size of its own, but with all kinds of layers."""
    model = skeleton(str(ROOT / "scripts" / "emoji" / "model"))
    plan = networks.lora.plan(4, 1, model.text_encoders, model.unet)
    assert not plan.warnings and any(note.startswith("of a size of its own") for note in plan.notes)
