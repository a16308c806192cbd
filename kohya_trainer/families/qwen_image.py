"""Qwen-Image: a flow transformer over 2 x 2 patches that reads the hidden states of a language model (2508.02324)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Condition, Family, pad


class QwenImage(Family):
    title, pipeline_class, version = "Qwen-Image", "QwenImagePipeline", "qwen_image"
    flow_shift = 2.2

    @property
    def native_size(self) -> int:
        return int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        hidden, mask = self.pipeline.encode_prompt(list(prompts), device=self.text_encoders[0].device)
        return [{"hidden": row if mask is None else row[mask[i].bool()]} for i, row in enumerate(hidden)]

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        pipeline, model, (count, channels, height, width) = self.pipeline, self.denoiser, noisy.shape
        hidden, mask = pad([condition["hidden"] for condition in conditions])
        answer = model(
            hidden_states=pipeline._pack_latents(noisy.to(self.dtype), count, channels, height, width),
            timestep=times.to(noisy.device, self.dtype),
            guidance=torch.full((count,), self.training_guidance, device=noisy.device)
            if model.config.guidance_embeds
            else None,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            encoder_hidden_states=hidden.to(self.dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(answer, height * scale, width * scale, scale)[:, :, 0]

    # The autoencoder is one for video: a picture is a film of one frame.

    def to_vae(self, data: Tensor) -> Tensor:
        return data[:, :, None]

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (torch.tensor(value).to(latents) for value in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def scale(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents[:, :, 0] - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents * std + mean)[:, :, None]

    def decode(self, latents: Tensor) -> list[Any]:
        vae = self.vae
        with torch.no_grad():
            pixels = vae.decode(self.unscale(latents.to(vae.device, vae.dtype))).sample[:, :, 0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)[:, :, 0]

    def call_arguments(self, requests: Sequence[Any]) -> dict[str, Any]:
        arguments = super().call_arguments(requests)
        scale = arguments.pop("guidance_scale")
        arguments["negative_prompt"] = [text or " " for text in arguments["negative_prompt"]]  # "" has no tokens
        if scale <= 1:
            del arguments["negative_prompt"]
        guided = {"guidance_scale": scale} if self.denoiser.config.guidance_embeds else {}
        return {**arguments, **guided, "true_cfg_scale": scale}
