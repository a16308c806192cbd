"""ACE-Step 1.5: music from a caption and lyrics; a flow transformer over 25 latent frames a second (2602.00744).

Data are sound files, (2, S) at the model's rate, from -1 to 1; latents are (B, C, frames). A prompt is its first line;
what follows is the lyrics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.caption_folder import SOUNDS, CaptionedImage
from ..data.sound import length_of, read_sound, write_wav
from .base import Condition, DataOptions, Family
from .noise import Noise, NoiseOptions

LOUDEST = 10 ** (-1 / 20)  # -1 dBFS, the level of what this model's own program writes
TIMBRE_SECONDS = 30  # of silence, which stands for "no reference sound"


class AceStep(Family):
    title, pipeline_class, version = "ACE-Step", "AceStepPipeline", "ace_step_v1.5"
    flow_mean, one_call = -0.4, False
    medium, suffix = SOUNDS, ".wav"

    @property
    def helpers(self) -> list[Any]:
        return [*super().helpers, self.pipeline.condition_encoder]

    def make_noise(self, options: NoiseOptions) -> Noise:
        if options.timestep_sampling == "flux_shift":
            raise ValueError("--timestep_sampling flux_shift follows the size of pictures; music has none. Use shift.")
        return super().make_noise(options)

    # -- sound

    @property
    def _frame(self) -> int:
        """Samples of one step of the transformer."""
        return math.prod(self.vae.config.downsampling_ratios) * int(self.denoiser.config.patch_size)

    def check_size(self, height: int, width: int, option: str) -> None:
        """Pictures have sizes, music has none."""

    def sizes(self, items: Sequence[CaptionedImage], options: DataOptions) -> list[tuple[int, int]]:
        """(1, samples) of each file, cut to whole steps and to the longest length asked for."""
        rate, frame, sizes = self.pipeline.sample_rate, self._frame, []
        for item in items:
            samples = int(min(length_of(item.path, rate), options.max_seconds * rate)) // frame * frame
            if not samples:
                raise ValueError(f"sound {item.path} is shorter than {frame / rate:.2f} s. Replace or remove it.")
            sizes.append((1, samples))
        return sizes

    @property
    def read_item(self) -> Callable[[Path, tuple[int, int]], dict[str, Tensor]]:
        return functools.partial(_read_sound, self.pipeline.sample_rate)

    def scale(self, latents: Tensor) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> list[Any]:
        """Latents (B, C, frames) -> B sounds (2, S), each at the same loudness."""
        vae = self.vae
        with torch.no_grad():
            sound = vae.decode(latents.to(vae.device, vae.dtype)).sample.float().cpu()
        return list(sound * (LOUDEST / sound.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)))

    # -- text

    def prompt_of(self, item: CaptionedImage, size: tuple[int, int]) -> str:
        """The model is told how long the piece is."""
        return f"{size[1] / self.pipeline.sample_rate}\n{item.caption}"

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        return [{"hidden": self._encode(*prompt.split("\n", 1))} for prompt in prompts]

    def _encode(self, seconds: str, text: str) -> Tensor:
        """Caption, lyrics and silence as one sequence (T, C); one piece at a time, so that none is padded."""
        pipeline, (caption, _, lyrics) = self.pipeline, text.partition("\n")
        encoder = pipeline.condition_encoder
        device, dtype = self.text_encoders[0].device, self.text_encoders[0].dtype
        words, word_mask, sung, sung_mask = pipeline.encode_prompt(
            [caption], [lyrics], device, audio_duration=float(seconds)
        )
        frames = math.ceil(TIMBRE_SECONDS * pipeline.latents_per_second)
        hidden, mask = encoder(
            text_hidden_states=words,
            text_attention_mask=word_mask,
            lyric_hidden_states=sung,
            lyric_attention_mask=sung_mask,
            refer_audio_acoustic_hidden_states_packed=encoder.silence_latent[:, :frames].to(device, dtype),
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
        )
        return hidden[0][mask[0].bool()]

    # -- training

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        """The model takes no mask: texts of unequal length go through one by one."""
        texts = [condition["hidden"] for condition in conditions]
        if len({len(text) for text in texts}) > 1:
            rows = [self._predict(noisy[i : i + 1], times[i : i + 1], text[None]) for i, text in enumerate(texts)]
            return torch.cat(rows)
        return self._predict(noisy, times, torch.stack(texts))

    def _predict(self, noisy: Tensor, times: Tensor, hidden: Tensor) -> Tensor:
        pipeline, dtype, (count, channels, frames) = self.pipeline, self.dtype, noisy.shape
        silence, _ = pipeline.prepare_src_latents(noisy.device, dtype, count, latent_length=frames)
        everything = torch.ones(count, frames, channels, device=noisy.device, dtype=dtype)
        moments = times.to(noisy.device, dtype)
        answer = self.denoiser(
            hidden_states=noisy.to(dtype).transpose(1, 2),
            timestep=moments,
            timestep_r=moments,
            encoder_hidden_states=hidden.to(dtype),
            context_latents=torch.cat([silence, everything], dim=-1),
            return_dict=False,
        )[0]
        return answer.transpose(1, 2)

    # -- generation

    def call_arguments(self, requests: Sequence[Any]) -> dict[str, Any]:
        lyrics = [request.prompt.partition("\n")[2] for request in requests]
        return {"lyrics": lyrics, "audio_duration": requests[0].seconds, "guidance_scale": requests[0].scale}

    def draw(self, requests: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            latents = self.pipeline(
                prompt=[request.prompt.partition("\n")[0] for request in requests],
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                num_inference_steps=requests[0].steps,
                output_type="latent",
                **self.call_arguments(requests),
            )[0]
        return self.decode(latents.transpose(1, 2))

    def save(self, drawn: Any, path: Path, request: Any, more: dict[str, str] | None = None) -> None:
        write_wav(path, drawn, self.pipeline.sample_rate)


def _read_sound(rate: int, path: Path, size: tuple[int, int]) -> dict[str, Tensor]:
    return {"data": read_sound(path, rate)[:, : size[1]]}
