"""Z-Image: a flow transformer over one sequence of image and text, which counts time from the noise (2511.22699).

Its pipeline counts guidance from 0, which is none (and what the Turbo model wants).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Condition, Family


class ZImage(Family):
    title, pipeline_class, version = "Z-Image", "ZImagePipeline", "z_image"
    flow_shift = 2.0

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        hidden, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.text_encoders[0].device, do_classifier_free_guidance=False
        )
        return [{"hidden": row} for row in hidden]

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        """The model takes lists (one frame each) and 1 - time, and answers with the negative direction."""
        dtype = self.dtype
        images = list(noisy.to(dtype).unsqueeze(2).unbind(0))
        texts = [condition["hidden"].to(dtype) for condition in conditions]
        answers = self.denoiser(images, 1 - times.to(noisy.device), texts, return_dict=False)[0]
        return -torch.stack([answer.float() for answer in answers])[:, :, 0]
