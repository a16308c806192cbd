"""Every argument of the table changes something that can be observed; a new row without a line here fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_parts import draw, randomise, sd_unet, text_encoder

import networks.lora
from networks.args.table import TABLE

CONV = {"conv_dim": "2"}
LOKR = {"algo": "lokr", "factor": "2"}
# argument -> (arguments on both sides, the argument's value)
EFFECTS: dict[str, tuple[dict[str, str], str]] = {
    "algo": ({}, "loha"),
    "conv_dim": ({}, "2"),
    "conv_alpha": (CONV, "2"),
    "rs_lora": ({}, "True"),
    "network_reg_dims": ({}, ".*attn1.*=2"),
    "network_reg_alphas": ({}, ".*attn1.*=2"),
    "use_tucker": (CONV, "True"),
    "use_scalar": ({}, "True"),
    "factor": ({"algo": "lokr"}, "2"),
    "decompose_both": ({"algo": "lokr", "network_reg_dims": ".*=1"}, "True"),
    "full_matrix": ({**LOKR, "network_reg_dims": ".*=2"}, "True"),
    "unbalanced_factorization": (LOKR, "True"),
    "dropout": ({}, "0.5"),
    "rank_dropout": ({}, "0.5"),
    "module_dropout": ({}, "0.5"),
    "exclude_patterns": ({}, ".*attn1.*"),
    "include_patterns": ({"exclude_patterns": ".*attn1.*"}, ".*to_q"),
    "only_patterns": ({}, ".*attn1.*"),
    "blocks": ({}, "1"),
    "network_reg_lrs": ({}, ".*attn1.*=0.5"),
    "loraplus_lr_ratio": ({}, "4"),
    "loraplus_unet_lr_ratio": ({}, "4"),
    "loraplus_text_encoder_lr_ratio": ({}, "4"),
}
ONLY_LOGGED = {"verbose", "allow_unknown"}


def observed(**kwargs: str) -> tuple[Any, ...]:
    """Shapes, strengths, optimizer groups, and a training forward pass with fixed random numbers."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, **kwargs)
    network.apply_to(encoder, unet, True, True)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-2, 1e-2)
    shapes = [(name, tuple(p.shape)) for name, p in network.named_parameters()]
    scales = [layer.scale for layer in network.adapted_layers]
    rates = [(text, group["lr"], len(group["params"])) for text, group in zip(descriptions, groups, strict=True)]
    randomise(network)
    network.train()
    torch.manual_seed(9)
    return shapes, scales, rates, draw(unet).detach().sum().item()


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(name: str) -> None:
    common, value = EFFECTS[name]
    assert observed(**common) == observed(**common)
    assert observed(**common) != observed(**common, **{name: value})


def test_the_list_is_complete(caplog: pytest.LogCaptureFixture) -> None:
    assert EFFECTS.keys() | ONLY_LOGGED == {arg.name for arg in TABLE}
    with caplog.at_level(logging.INFO, logger="networks"):
        networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), verbose="True", allow_unknown="True", foo="1")
    assert "attn1.to_q" in caplog.text and "unknown argument foo" in caplog.text
