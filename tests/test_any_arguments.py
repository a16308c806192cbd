"""Arguments drawn at random, on every architecture: a network that trains, saves and loads to the same output, or one
ValueError. Nothing else: no other exception, no file that says something else than what was trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import signal, toy

import networks.lora
import networks.lycoris
import networks.oft
from networks.archs import ARCHS
from networks.records import ALGORITHMS

VALUES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("use_dora", "use_tucker", "use_scalar", "rs_lora", "split_qkv", "decompose_both"), ("True",)),
    **dict.fromkeys(("full_matrix", "rescaled", "train_on_input", "dim_is_count"), ("True",)),
    **dict.fromkeys(("wd_on_output", "use_data_init", "exclude_mod"), ("False",)),
    **dict.fromkeys(("dropout", "rank_dropout", "module_dropout", "ggpo_sigma", "ggpo_beta"), ("0.2",)),
    **dict.fromkeys(("conv_dim", "block_size", "save_dims", "min_rank", "factor"), ("2",)),
    "train_norm": ("True", "affine"),
    "init": ("pissa", "orthogonal"),
    "init_seed": ("3",),
    "loraplus_lr_ratio": ("4",),
    "loraplus_mode": ("reparam",),
    "bypass_mode": ("True", "False"),
    "save_format": ("diffusers", "comfyui", "peft", "blissful", "oft"),
    "save_also": ("none", "comfyui", "diffusers,peft"),
    "constraint": ("0.1",),
    "sig_type": ("last", "middle"),
    "preset": ("attn-only", "full", "no-mod", "unet-transformer-only"),
    "blocks": ("0",),
    "network_reg_dims": (".*=2",),
}
OF_FILES = (
    "algo",
    "use_dora",
    "wd_on_output",
    "save_format",
    "save_also",
    "rs_lora",
    "min_rank",
    "sig_type",
    "use_data_init",
    "preset",
)


def trained_and_loaded(draw: random.Random, folder: Path) -> bool:
    """Whether the drawn arguments make a network; if so, its file gives the same output."""
    arch, algo = draw.choice(ARCHS), draw.choice(list(ALGORITHMS))
    arguments = {name: draw.choice(VALUES[name]) for name in draw.sample(list(VALUES), draw.randint(0, 4))}
    arguments["algo"] = algo
    entry, musubi = draw.choice((networks.lora, networks.lycoris, networks.oft)), draw.random() < 0.5
    models = toy(arch.name)
    encoders, denoiser = [models.get(part.name) for part in arch.text_encoders], models[arch.denoiser.name]
    make: Any = entry.create_arch_network if musubi else entry.create_network
    told = f"{arch.name} {entry.__name__} {'musubi' if musubi else 'sd-scripts'} {arguments}"
    try:
        network = make(1.0, 4, 1.0, None, [] if musubi else encoders, denoiser, **arguments)
        network.apply_to(encoders, denoiser, bool(encoders) and not musubi, True)
        network.train()
        denoiser(signal()).square().sum().backward()
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p), alpha=0.05 if p.requires_grad else 0.0)
        network.eval()
        output = denoiser(signal()).detach()
        network.save_weights(str(folder / "a.safetensors"), None, {})
        network.detach()
        same = {name: value for name, value in arguments.items() if name in OF_FILES}
        loaded, _ = entry.create_network_from_weights(
            1.0, str(folder / "a.safetensors"), None, encoders, denoiser, for_inference=True, **same
        )
        loaded.apply_to(encoders, denoiser, bool(encoders), True)
        loaded.load_weights(str(folder / "a.safetensors"))
        loaded.eval()
        torch.testing.assert_close(denoiser(signal()), output, atol=1e-4, rtol=1e-3, msg=lambda m: f"{told}: {m}")
    except ValueError as error:
        assert len(str(error)) > 20, told
        return False
    except Exception as error:
        raise AssertionError(told) from error
    return True


@pytest.mark.sweep(4)
@pytest.mark.parametrize("seed", range(8))
def test_a_network_or_one_clear_error(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    made = [trained_and_loaded(draw, tmp_path) for _ in range(60)]
    assert sum(made) >= 6, "too few of them made a network to say anything"
