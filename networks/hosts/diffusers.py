"""Diffusers folders of Stable Diffusion 1.x, 2.x and SDXL: what our trainer and our generator share.

Tensors: B batch, T text tokens, C channels. Images are -1..1; latents are what the UNet works on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TEXT_LENGTH = 77  # tokens of one prompt in every Stable Diffusion, unless the tokenizer says less

Condition = dict[str, Tensor]
"""What the text encoders tell the UNet: `hidden` (B, T, C) and, for SDXL, `pooled` (B, C)."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of one loaded model."""

    pipeline: Any
    vae: Any
    unet: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    is_sdxl: bool

    @property
    def text_encoder_argument(self) -> Any:
        """What a trainer hands to a network: the model itself for SD 1 and 2, a list for SDXL."""
        return self.text_encoders if self.is_sdxl else self.text_encoders[0]

    @property
    def is_v2(self) -> bool:
        """Stable Diffusion 2.x: its text encoder is 1024 wide."""
        return not self.is_sdxl and self.unet.config.cross_attention_dim == 1024

    @property
    def base_model_version(self) -> str:
        """The value of metadata key ss_base_model_version."""
        return "sdxl_base_v1-0" if self.is_sdxl else "sd_v2" if self.is_v2 else "sd_v1"

    @property
    def native_size(self) -> int:
        """Side of the images that the model was made for, in pixels."""
        return int(self.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)

    @property
    def size_step(self) -> int:
        """Image sides must be multiples of this: each level of the UNet but the last halves the latent."""
        levels = len(self.unet.config.block_out_channels)
        return int(self.pipeline.vae_scale_factor) * 2 ** (levels - 1)

    def check_size(self, height: int, width: int, option: str) -> None:
        """Raise ValueError when the model cannot work at this image size (pixels)."""
        step = self.size_step
        if min(height, width) < step or height % step or width % step:
            near = " x ".join(str(max(step, round(side / step) * step)) for side in (width, height))
            raise ValueError(f"{option}: {width} x {height} pixels; both must be multiples of {step}. Try {near}.")


def quiet_libraries() -> None:
    """Silence the libraries' remarks at import time, which a user can do nothing about."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def check_model_folder(folder: Path, option: str) -> bool:
    """Return whether `folder` holds an SDXL model (else SD 1 or 2). Raises ValueError when it is neither."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{option} {folder} {what}. Give a model folder in diffusers' layout (with model_index.json).")
    index = folder / "model_index.json"
    if not index.is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
        hint = f" Its subfolder {inner[0]} has one: give that." if inner else " Give a folder in diffusers' layout."
        raise ValueError(f"{option} {folder} has no model_index.json.{hint}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{option}: {index} is not JSON ({error}). Download the model again.") from error
    name = content.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{option} {folder} is a {name}; these scripts work with {' and '.join(FAMILIES)}.")
    return name == FAMILIES[1]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, option: str, sdpa: bool = False) -> ModelParts:
    """Load a model folder, frozen and in eval mode. The VAE stays fp32: SDXL's overflows in fp16.

    On the CPU the plain attention is used unless `sdpa`: at a few hundred tokens it trains 1.5 times faster there.
    Raises ValueError when the folder is not a model of these families or cannot be read.
    """
    is_sdxl = check_model_folder(folder, option)
    quiet_libraries()
    from .pixel_autoencoder import load_pipeline

    extra = {} if is_sdxl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = load_pipeline(folder, **extra)
    except (OSError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{option} {folder} cannot be loaded: {first}. Is a part missing or truncated?") from error
    pipeline.set_progress_bar_config(disable=True)
    suffixes = ("", "_2") if is_sdxl else ("",)
    parts = ModelParts(
        pipeline=pipeline,
        vae=pipeline.vae,
        unet=pipeline.unet,
        text_encoders=[getattr(pipeline, f"text_encoder{suffix}") for suffix in suffixes],
        tokenizers=[getattr(pipeline, f"tokenizer{suffix}") for suffix in suffixes],
        is_sdxl=is_sdxl,
    )
    parts.vae.to(device, torch.float32).requires_grad_(False).eval()
    for model in (parts.unet, *parts.text_encoders):
        model.to(device, dtype).requires_grad_(False).eval()
    if device.type == "cpu" and not sdpa:
        from diffusers.models.attention_processor import AttnProcessor

        parts.unet.set_attn_processor(AttnProcessor())
    return parts


def encode_images(parts: ModelParts, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Turn images (B, 3, H, W) into latents (B, C, h, w); the VAE's noise comes from `generator` (CPU)."""
    vae = parts.vae
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.sample(generator=generator) * vae.config.scaling_factor


def decode_latents(parts: ModelParts, latents: Tensor) -> list[Image]:
    """Turn latents (B, C, h, w) into B images."""
    vae = parts.vae
    with torch.no_grad():
        pixels = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
    return parts.pipeline.image_processor.postprocess(pixels, output_type="pil")


def encode_prompts(parts: ModelParts, prompts: Sequence[str]) -> Condition:
    """Run the text encoders; gradients flow when they are enabled. Longer prompts are cut."""
    hidden, pooled = [], None
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=True):
        length = min(TEXT_LENGTH, tokenizer.model_max_length)
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), **options).input_ids.to(encoder.device)
        output = encoder(ids, output_hidden_states=parts.is_sdxl)
        if parts.is_sdxl:  # SDXL reads the layer before the last, and the second encoder's projection
            hidden.append(output.hidden_states[-2])
            pooled = output.text_embeds if hasattr(output, "text_embeds") else pooled
        else:
            hidden.append(output[0])
    condition = {"hidden": torch.cat(hidden, dim=-1)}
    return condition if pooled is None else {**condition, "pooled": pooled}


def split_condition(condition: Condition) -> list[Condition]:
    """One condition of B samples -> B conditions of one sample without the batch axis."""
    size = len(condition["hidden"])
    return [{key: value[row] for key, value in condition.items()} for row in range(size)]


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """The inverse of split_condition."""
    return {key: torch.stack([item[key] for item in conditions]) for key in conditions[0]}


def make_noise_scheduler(parts: ModelParts) -> Any:
    """The training noise process with the model's own betas and prediction type."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(parts.pipeline.scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the model predicts {kind!r}; these scripts train epsilon and v_prediction models.")
    return scheduler


def denoising_loss(
    parts: ModelParts,
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Condition,
    time_ids: Tensor,
) -> Tensor:
    """Mean squared error of the UNet's prediction for each sample: (B,), fp32.

    latents and noise (B, C, h, w); timesteps (B,) integers; time_ids (B, 6), read by SDXL only.
    """
    dtype = parts.unet.dtype
    noisy = scheduler.add_noise(latents, noise, timesteps)
    added = {"text_embeds": condition["pooled"], "time_ids": time_ids} if parts.is_sdxl else None
    prediction = parts.unet(
        noisy.to(dtype), timesteps, encoder_hidden_states=condition["hidden"].to(dtype), added_cond_kwargs=added
    ).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    return (prediction.float() - target.float()).pow(2).flatten(1).mean(1)


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR loss weights (B,): signal-to-noise ratios above `gamma` count no more than `gamma`."""
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor
