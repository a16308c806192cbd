"""Tiny Stable Diffusion and SDXL folders with random weights, made of the real classes, and images to train on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

SIZE = 32  # pixels; the VAE halves it


def make_tokenizer():
    """A CLIP tokenizer that knows single letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    arguments = {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
    return CLIPTokenizer(**arguments, model_max_length=77)


def make_text_encoder(width: int, *, projection: bool, tokenizer):
    """A text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_vae():
    """An autoencoder that halves the sides."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def make_sd(folder: Path) -> Path:
    """Write an SD 1.x folder."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(16, projection=False, tokenizer=tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_v_prediction(source: Path, folder: Path) -> Path:
    """Write a copy of an SD folder that says it predicts v."""
    shutil.copytree(source, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}), encoding="utf-8")
    return folder


def make_sdxl(folder: Path) -> Path:
    """Write an SDXL folder: two text encoders, pooled embeddings, time ids."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=16 + 24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(16, projection=False, tokenizer=tokenizer),
        text_encoder_2=make_text_encoder(24, projection=True, tokenizer=tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_images(folder: Path, count: int = 4, side: int = SIZE, seed: int = 0) -> Path:
    """Write coloured rectangles with captions."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    draws = random.Random(seed)
    for number in range(count):
        colour = draws.choice(("red", "green", "blue"))
        image = Image.new("RGB", (side, side + 4), "white")
        left, top = draws.randrange(side // 2), draws.randrange(side // 2)
        ImageDraw.Draw(image).rectangle((left, top, left + side // 2, top + side // 2), fill=colour)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder
