"""Tiny random models of the real classes, in memory, and a way to call them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

_COMMON: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def sd_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **_COMMON).eval()


def sdxl_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(
        down_block_types=down, up_block_types=up, projection_class_embeddings_input_dim=40, **extra, **_COMMON
    ).eval()


def text_encoder(projection: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 4, 8, 8], timesteps [B], text [B, 5, 16]."""
    own = torch.Generator().manual_seed(2)  # the global one belongs to dropouts
    latents, text = torch.randn(batch, 4, 8, 8, generator=own), torch.randn(batch, 5, 16, generator=own)
    return latents, torch.arange(1, batch + 1) * 100, text


def draw(unet: nn.Module, batch: int = 2) -> Tensor:
    """One call of the UNet, with gradients."""
    return unet(*inputs(batch)).sample


def randomise(network: nn.Module, std: float = 0.1) -> None:
    """Give every adapter parameter a random value, so that the update is not 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)
