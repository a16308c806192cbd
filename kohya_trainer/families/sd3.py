"""Stable Diffusion 3 and 3.5: a flow transformer with three text encoders (2403.03206)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Condition, Family, split, stack


class StableDiffusion3(Family):
    title, pipeline_class, version = "Stable Diffusion 3 / 3.5", "StableDiffusion3Pipeline", "sd3"
    encoders, trains_text, flow_shift = ("text_encoder", "text_encoder_2", "text_encoder_3"), True, 3.0

    @property
    def native_size(self) -> int:
        return int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)

    @property
    def size_step(self) -> int:
        return int(self.pipeline.vae_scale_factor) * int(self.denoiser.config.patch_size)

    @property
    def _text_length(self) -> int:
        tokenizer = self.pipeline.tokenizer_3  # the T5 encoder may be left out of the folder
        return 256 if tokenizer is None else min(256, tokenizer.model_max_length)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        words, device = list(prompts), self.text_encoders[0].device
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            words, words, words, device=device, do_classifier_free_guidance=False, max_sequence_length=self._text_length
        )
        return split(hidden=hidden, pooled=pooled)

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        dtype = self.dtype
        return self.denoiser(
            hidden_states=noisy.to(dtype),
            timestep=times.to(noisy.device) * 1000,
            encoder_hidden_states=stack(conditions, "hidden").to(dtype),
            pooled_projections=stack(conditions, "pooled").to(dtype),
            return_dict=False,
        )[0]

    def call_arguments(self, requests: Sequence[Any]) -> dict[str, Any]:
        return {**super().call_arguments(requests), "max_sequence_length": self._text_length}
