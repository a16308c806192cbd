"""Every argument of the table changes something that can be observed; a new row without a line here fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from registry import ALGORITHMS
from tiny_parts import draw, randomise, sd_unet, text_encoder
from toy_models import signal, toy

import networks.lora
from networks.archs import ARCHS
from networks.args.table import TABLE

FLUX_KINDS = [name for name, _ in next(arch for arch in ARCHS if arch.name == "flux").layer_dims]
SD3_KINDS = [name for name, _ in next(arch for arch in ARCHS if arch.name == "sd3").layer_dims]
CONV = {"conv_dim": "2"}
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
    "init": ({}, "orthogonal"),
    "init_seed": ({}, "7"),
    "dropout": ({}, "0.5"),
    "rank_dropout": ({}, "0.5"),
    "rank_dropout_scale": ({"rank_dropout": "0.5"}, "False"),
    "module_dropout": ({}, "0.5"),
    "network_reg_dropouts": ({}, ".*attn1.*=0.5"),
    "network_reg_rank_dropouts": ({}, ".*attn1.*=0.5"),
    "network_reg_module_dropouts": ({}, ".*attn1.*=0.5"),
    "preset": ({}, "attn-only"),
    "exclude_patterns": ({}, ".*attn1.*"),
    "include_patterns": ({"exclude_patterns": ".*attn1.*"}, ".*to_q"),
    "only_patterns": ({}, ".*attn1.*"),
    "blocks": ({}, "1"),
    "network_reg_lrs": ({}, ".*attn1.*=0.5"),
    "loraplus_lr_ratio": ({}, "4"),
    "loraplus_mode": ({"loraplus_lr_ratio": "4"}, "reparam"),
    "loraplus_unet_lr_ratio": ({}, "4"),
    "loraplus_text_encoder_lr_ratio": ({}, "4"),
}
EFFECTS |= {
    "use_dora": ({}, "True"),
    "enable_conv": ({}, "True"),
    "train_norm": ({}, "True"),
    "enable_all_linear": ({}, "False"),
    "wd_on_output": ({"use_dora": "True"}, "False"),
    "dora_lr_ratio": ({"use_dora": "True"}, "0.5"),
}
EFFECTS |= {
    name: ({"algo": algo, **others}, value)
    for algo, data in ALGORITHMS.items()
    for name, (others, value) in data.effects.items()
}
DIMS = {"block_dims": ",".join(["4"] * 25)}
CONV_DIMS = {**DIMS, "conv_block_dims": ",".join(["2"] * 25)}
EFFECTS |= {
    "block_dims": ({}, ",".join(map(str, range(1, 26)))),
    "block_alphas": (DIMS, ",".join(["2"] * 25)),
    "conv_block_dims": (DIMS, ",".join(["2"] * 25)),
    "conv_block_alphas": (CONV_DIMS, ",".join(["2"] * 25)),
    "down_lr_weight": ({}, "cosine"),
    "mid_lr_weight": ({}, "0.5"),
    "up_lr_weight": ({}, "linear+.5"),
    "block_lr_zero_threshold": ({"down_lr_weight": "0.1,0.1,0.1"}, "0.2"),
}
# Arguments of layers that only some architectures have: (architecture, value).
OF_ARCHS: dict[str, tuple[str, str]] = {
    **{name: ("flux", "2") for name in FLUX_KINDS},
    **{name: ("sd3", "2") for name in SD3_KINDS},
    **{name: ("lumina", "2") for name in ("refiner_dim", "attn_dim", "mlp_dim", "mod_dim")},
    "in_dims": ("flux", "[2,0,2,0,1]"),
    "emb_dims": ("sd3", "2,2,2,2,2,2"),
    "embedder_dims": ("lumina", "2,0,2"),
    "train_blocks": ("flux", "single"),
    "train_double_block_indices": ("flux", "1"),
    "train_single_block_indices": ("flux", "none"),
    "train_block_indices": ("sd3", "0"),
    "train_t5xxl": ("flux", "True"),
    "split_qkv": ("flux", "True"),
    "train_llm_adapter": ("anima", "True"),
    "exclude_mod": ("qwen_image", "False"),
    "include_refiner": ("zimage", "True"),
    "train_mlp": ("ace_step", "True"),
    "lora_target_preset": ("ltx2", "v2v"),
    "connector_lora": ("ltx2", "True"),
    **{name: ("ltx2", "2") for name in ("audio_dim", "audio_alpha", "cross_modal_dim", "cross_modal_alpha")},
}
NEUTRAL = {
    "exclude_mod": "True",
    "include_refiner": "False",
    "train_mlp": "False",
    "split_qkv": "off",
    "train_blocks": "all",
    "train_t5xxl": "False",
    "train_llm_adapter": "0",
    "lora_target_preset": "lycoris",
    "connector_lora": "False",
}
NEUTRAL |= {name: "all" for name in OF_ARCHS if name.endswith("_indices")}
ONLY_LOGGED = {"verbose": "attn1.to_q", "allow_unknown": "unknown argument foo"}  # with what the log then has
AFTER_A_STEP = {"ggpo_sigma", "ggpo_beta"}  # test_ggpo.py
WATCHING = {"diagnose_steps", "ema_decay", "ema_save", "ema_device"}  # test_diagnosis.py, test_average.py
IN_THE_FORM = {"bypass_mode"}  # test_lycoris_entry.py
BETWEEN_NETWORKS = {"mask_group_id"}  # test_tlora.py
AFTER_A_CAST = {"adapter_dtype"}  # test_half_precision.py
IN_FILES = {"save_format", "save_also", "save_dims"}  # test_dialects.py, test_save_also.py, test_resize.py
IN_LOADING = {"allow_missing", "resume_resize"}  # test_adapter_file.py, test_resume_resize.py
STOPPING = {"help", "dry_run"}  # test_stops.py
BESIDE = {"training_adapter"}  # test_training_adapter.py


def observed(**kwargs: str) -> tuple[Any, ...]:
    """Shapes, strengths, start values, optimizer groups, and a training forward pass with fixed random numbers."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, **kwargs)
    network.apply_to(encoder, unet, True, True)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-2, 1e-2)
    shapes = [(name, tuple(p.shape)) for name, p in network.named_parameters()]
    scales = [layer.scale for layer in network.adapted_layers]
    starts = [p.detach().sum().item() for p in network.parameters()]
    rates = [(text, group["lr"], len(group["params"])) for text, group in zip(descriptions, groups, strict=True)]
    randomise(network)
    network.train()
    torch.manual_seed(9)
    return shapes, scales, starts, rates, draw(unet).detach().sum().item()


def observed_on(arch: str, **kwargs: str) -> tuple[Any, ...]:
    """Shapes, strengths, and a forward pass, on a stand-in for the trainer's model."""
    spec, models = next(spec for spec in ARCHS if spec.name == arch), toy(arch)
    encoders, denoiser = [models.get(part.name) for part in spec.text_encoders], models[spec.denoiser.name]
    network = networks.lora.create_network(1.0, 4, 1, None, encoders, denoiser, **kwargs)
    network.apply_to(encoders, denoiser, True, True)
    shapes = [(name, tuple(p.shape)) for name, p in network.named_parameters()]
    randomise(network)
    return shapes, [layer.scale for layer in network.adapted_layers], denoiser(signal()).sum().item()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", OF_ARCHS)
def test_effect_on_its_architecture(name: str) -> None:
    arch, value = OF_ARCHS[name]
    assert observed_on(arch) == observed_on(arch)
    assert observed_on(arch) != observed_on(arch, **{name: value})


@pytest.mark.parametrize("name", OF_ARCHS)
def test_refused_elsewhere(name: str) -> None:
    """With the architectures that have it; a neutral value passes."""
    with pytest.raises(ValueError, match=f"{name} has no effect on Stable Diffusion 1.x / 2.x; it belongs to"):
        networks.lora.plan(4, 1, None, sd_unet(), **{name: OF_ARCHS[name][1]})
    networks.lora.plan(4, 1, None, sd_unet(), **{name: NEUTRAL.get(name, "none")})


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(name: str) -> None:
    common, value = EFFECTS[name]
    assert observed(**common) == observed(**common)
    assert observed(**common) != observed(**common, **{name: value})


def test_the_list_is_complete() -> None:
    others = AFTER_A_STEP | AFTER_A_CAST | WATCHING | IN_FILES | IN_LOADING | IN_THE_FORM | BETWEEN_NETWORKS
    others |= STOPPING | BESIDE
    tried, rows = EFFECTS.keys() | OF_ARCHS.keys() | ONLY_LOGGED.keys() | others, {arg.name for arg in TABLE}
    assert not rows - tried, (
        f"{sorted(rows - tried)}: say with which value something changes, in EFFECTS (OF_ARCHS, of layers that some "
        "architectures have; ONLY_LOGGED and its like, of what shows elsewhere, with a test there) of this file, or as "
        "effects of its algorithm in tests/registry.py"
    )
    assert not tried - rows, f"{sorted(tried - rows)} are no rows of the table"


def test_what_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    given = dict.fromkeys(ONLY_LOGGED, "True") | {"foo": "1"}
    for kwargs in ({}, given):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="networks"):
            networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), **kwargs).apply_to(None, None, False, True)
        for name, text in ONLY_LOGGED.items():
            assert (text in caplog.text) == bool(kwargs), name
