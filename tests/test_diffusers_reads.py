"""Saved files, read by diffusers' own conversion of kohya's names: the same update as ours, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from tiny_parts import randomise, sd_unet
from torch import Tensor, nn

import networks.lora
from networks.files import reader


def whole_sdxl_unet() -> nn.Module:
    """All levels and layers, from whose numbers diffusers works out where a block is."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        use_linear_projection=True,
        projection_class_embeddings_input_dim=40,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def updates(network: Any) -> dict[str, Tensor]:
    """The model's own layer name -> its part of the true update."""
    found = {}
    for _, layer in network.layers:
        delta = layer.adapter.delta().detach() * layer.scale
        for site in layer.sites:
            found[_path(network, site.module)] = site.select_rows(delta)
    return found


def _path(network: Any, module: nn.Module) -> str:
    return next(name for root in network._roots.values() for name, m in root.named_modules() if m is module)


def theirs(state: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    """lora_B lora_A times alpha / rank, where diffusers keeps alphas apart."""
    found = {}
    for key, down in state.items():
        name = key.removesuffix(".lora_A.weight")
        if name != key:
            scale = alphas[f"{name}.alpha"] / down.shape[0] if f"{name}.alpha" in alphas else 1.0
            found[name.removeprefix("transformer.")] = state[f"{name}.lora_B.weight"] @ down * scale
    return found


@pytest.mark.parametrize("rs", ["False", "True"])
@pytest.mark.parametrize("conv", ["0", "2"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_stable_diffusion(model: str, conv: str, rs: str, tmp_path: Path) -> None:
    unet = sd_unet() if model == "sd" else whole_sdxl_unet()
    # conv_dim brings layers (time embeddings) which diffusers' conversion of SDXL leaves out.
    only = {} if conv == "0" else {"exclude_patterns": ".*(time_emb_proj|emb_layers|conv_shortcut|skip_connection).*"}
    network = networks.lora.create_network(1.0, 4, 3, None, None, unet, conv_dim=conv, rs_lora=rs, **only)
    randomise(network)
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), None, {})
    mixin: Any = StableDiffusionLoraLoaderMixin if model == "sd" else StableDiffusionXLLoraLoaderMixin
    state, alphas, *_ = mixin.lora_state_dict(str(file), unet_config=unet.config)
    twin = sd_unet() if model == "sd" else whole_sdxl_unet()
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=twin, adapter_name="read")
    read = {name: m.get_delta_weight("read") for name, m in twin.named_modules() if isinstance(m, LoraLayer)}
    ours = updates(network)
    assert ours.keys() == read.keys()
    for name, update in ours.items():
        torch.testing.assert_close(read[name].detach(), update, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("split", ["False", "True"])
def test_flux(split: str, tmp_path: Path) -> None:
    """Full-size layers of one block of each kind: diffusers' conversion knows their sizes by heart."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    kinds = ".*(img_attn.qkv|txt_attn.proj|img_mlp.2|linear1|modulation.lin)"
    network = networks.lora.create_network(1.0, 2, 3, None, None, model, split_qkv=split, only_patterns=kinds)
    randomise(network)
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), None, {})
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(str(file), return_alphas=True)
    read = theirs(state, alphas or {})
    ours = updates(network)
    assert ours.keys() == read.keys() and len(ours) == 3 + 1 + 1 + 4 + 1
    for name, update in ours.items():
        torch.testing.assert_close(read[name], update, rtol=1e-4, atol=1e-5, msg=name)
    assert all(t.dtype == torch.float32 for t in reader.read_tensors(file)[0].values())
