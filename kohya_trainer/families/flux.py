"""FLUX.1: a flow transformer over 2 x 2 patches, with a distilled guidance input in the dev model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Condition, Family, split, stack


class Flux(Family):
    title, pipeline_class, version = "FLUX.1", "FluxPipeline", "flux1"
    encoders, trains_text = ("text_encoder", "text_encoder_2"), True

    @property
    def native_size(self) -> int:
        return int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        length = min(512, self.pipeline.tokenizer_2.model_max_length)
        hidden, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.text_encoders[0].device, max_sequence_length=length
        )
        return split(hidden=hidden, pooled=pooled)

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        pipeline, model, (count, channels, height, width) = self.pipeline, self.denoiser, noisy.shape
        dtype, hidden = self.dtype, stack(conditions, "hidden")
        guidance = torch.full((count,), self.training_guidance, device=noisy.device)
        answer = model(
            hidden_states=pipeline._pack_latents(noisy.to(dtype), count, channels, height, width),
            timestep=times.to(noisy.device, dtype),
            guidance=guidance if model.config.guidance_embeds else None,
            pooled_projections=stack(conditions, "pooled").to(dtype),
            encoder_hidden_states=hidden.to(dtype),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=noisy.device, dtype=dtype),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, dtype),
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(answer, height * scale, width * scale, scale)

    def call_arguments(self, requests: Sequence[Any]) -> dict[str, Any]:
        """Guidance is an input of the model; a negative prompt needs `true_cfg_scale`, which costs a second pass."""
        arguments = super().call_arguments(requests)
        negative = arguments.pop("negative_prompt")
        if any(negative):
            arguments.update(negative_prompt=negative, true_cfg_scale=arguments["guidance_scale"], guidance_scale=1.0)
        return {**arguments, "max_sequence_length": min(512, self.pipeline.tokenizer_2.model_max_length)}

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
