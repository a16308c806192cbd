"""The contract of a model family: how its parts are found, what text and data become, and what the model predicts.

Tensors: B batch, T text tokens, C channels, h and w sides of the latent. Images are -1..1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..data.caption_folder import PICTURES, Buckets, CaptionedImage, Medium, bucket_size, load_pixels
from ..drawing.requests import ImageRequest, save_png
from .noise import Flow, Noise, NoiseOptions

if TYPE_CHECKING:
    from PIL.Image import Image

Condition = dict[str, Tensor]
"""What the text encoders tell the denoiser about one sample, without a batch axis."""


@dataclass(frozen=True)
class DataOptions:
    """How large training data become.

    Attributes:
        size: height and width in pixels; with buckets their product is the area of every size.
        buckets: sizes follow the shapes of the images, see data.caption_folder.bucket_size; None = all have `size`.
        max_seconds: of a piece of music.
    """

    size: tuple[int, int]
    buckets: Buckets | None = None
    max_seconds: float = 240.0


class Family:
    """One loaded model. A subclass is the record of a family; this one serves latent image models with flow matching.

    Class attributes:
        title: for people.
        pipeline_class: what model_index.json says.
        version: metadata key ss_base_model_version.
        encoders: the pipeline's attributes that hold text encoders, in the order in which networks take them.
        trains_text: whether text encoders may be trained; if not, their outputs are computed once.
        one_call: whether a batch is one call of the denoiser, whatever the captions.
        flow_shift, flow_mean: of the training's noise levels (see noise.Flow), unless the user says otherwise.
        medium: what it learns from and makes.
        suffix: of the files that the generator writes.
        absent_parts: what its pipeline is opened without, as arguments of from_pretrained.

    Args:
        dtype: what the denoiser computes in; its weights may be stored in less.
    """

    title: ClassVar[str]
    pipeline_class: ClassVar[str]
    version: ClassVar[str]
    denoiser_name: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trains_text: ClassVar[bool] = False
    one_call: ClassVar[bool] = True
    flow_shift: ClassVar[float] = 1.0
    flow_mean: ClassVar[float] = 0.0
    suffix: ClassVar[str] = ".png"
    medium: ClassVar[Medium] = PICTURES
    absent_parts: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipeline: Any, dtype: torch.dtype) -> None:
        self.pipeline, self.dtype = pipeline, dtype
        self.training_guidance = 1.0  # none
        self.place: torch.device | None = None  # where the denoiser computes, if its weights may lie elsewhere

    # -- parts

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[Any]:
        """One for each of `encoders`; a folder may leave out the largest (None)."""
        return [getattr(self.pipeline, name) for name in self.encoders]

    @property
    def base_model_version(self) -> str:
        return self.version

    @property
    def text_encoder_argument(self) -> Any:
        """What a trainer hands to a network."""
        return self.text_encoders

    @property
    def helpers(self) -> list[Any]:
        """Models that are of no use once latents and text outputs are cached."""
        return [model for model in (*self.text_encoders, self.vae) if model is not None]

    @property
    def device(self) -> torch.device:
        return self.place or self.denoiser.device

    @property
    def is_v2(self) -> bool:
        """Stable Diffusion 2.x; metadata key ss_v2."""
        return False

    def use_plain_attention(self) -> None:
        """On the CPU: another attention where the fused one is slower at a few hundred tokens."""

    # -- sizes

    @property
    def native_size(self) -> int:
        """Side of the images that the model was made for, in pixels."""
        return 1024

    @property
    def size_step(self) -> int:
        """Image sides must be multiples of this: the autoencoder's factor times the patch of the transformer."""
        return int(self.pipeline.vae_scale_factor) * 2

    def check_size(self, height: int, width: int, option: str) -> None:
        """Raise ValueError when the model cannot work at this image size (pixels)."""
        step = self.size_step
        if min(height, width) < step or height % step or width % step:
            near = " x ".join(str(max(step, round(side / step) * step)) for side in (width, height))
            raise ValueError(f"{option}: {width} x {height} pixels; both must be multiples of {step}. Try {near}.")

    # -- data

    def sizes(self, items: Sequence[CaptionedImage], options: DataOptions) -> list[tuple[int, int]]:
        """Height and width of each image in training; equal ones can share a batch."""
        if options.buckets is None:
            return [options.size] * len(items)
        return [bucket_size(item.path, options.size, options.buckets, self.size_step) for item in items]

    @property
    def read_item(self) -> Callable[[Path, tuple[int, int]], dict[str, Tensor]]:
        """What reads an example of a size from disk, `data` (3, H, W) and `time_ids` (6,): a function of a module, as
        processes which load data get a copy of it, and none of the models."""
        return _read_picture

    def encode(self, data: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Images (B, 3, H, W) -> latents (B, C, h, w); each takes its own noise, so none depends on its neighbours."""
        vae = self.vae
        with torch.no_grad():
            posterior = vae.encode(self.to_vae(data.to(vae.device, vae.dtype))).latent_dist
            noise = [torch.randn(posterior.mean.shape[1:], generator=g) for g in generators]
            return self.scale(posterior.mean + posterior.std * torch.stack(noise).to(posterior.mean))

    def to_vae(self, data: Tensor) -> Tensor:
        return data

    def scale(self, latents: Tensor) -> Tensor:
        """The autoencoder's numbers -> the denoiser's."""
        config = self.vae.config
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def decode(self, latents: Tensor) -> list[Image]:
        """Latents (B, C, h, w) -> B images."""
        vae = self.vae
        with torch.no_grad():
            pixels = vae.decode(self.unscale(latents.to(vae.device, vae.dtype))).sample
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    # -- text

    def prompt_of(self, item: CaptionedImage, size: tuple[int, int]) -> str:
        """What `encode_prompts` gets for one sample."""
        return item.caption

    def encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        """Run the text encoders; gradients flow where they are enabled."""
        raise NotImplementedError

    # -- training

    def make_noise(self, options: NoiseOptions) -> Noise:
        return Flow.of(options, self.flow_shift, self.flow_mean)

    def train_at_guidance(self, scale: float | None) -> None:
        """The guidance that the model is told while it learns, where it is told one.

        Raises:
            ValueError: this one is not.
        """
        if scale is not None:
            if not getattr(self.denoiser.config, "guidance_embeds", False):
                raise ValueError(f"--guidance_scale: this {self.title} model takes no guidance as an input. Remove it.")
            self.training_guidance = scale

    def predict(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], batch: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's answer in the shape of `noisy`, to be compared with the noise's target.

        Args:
            noisy: latents with noise (B, C, h, w), fp32; of sounds (B, C, frames).
            times: of their noise (B,), as make_noise's rule counts them.
            conditions: of each sample, from encode_prompts.
            batch: what else read_item gave, collated: `time_ids` (B, 6) of pictures.
        """
        raise NotImplementedError

    # -- generation

    def draw(self, requests: Sequence[ImageRequest]) -> list[Any]:
        """Draw one batch of equal settings. Each image has its own noise, so it does not depend on its neighbours."""
        first = requests[0]
        with torch.no_grad():
            latents = self.pipeline(
                prompt=[request.prompt for request in requests],
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                num_inference_steps=first.steps,
                output_type="latent",
                **self.call_arguments(requests),
            )[0]
        return self.decode(self.unpack(latents, first.height, first.width))

    def call_arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Arguments of the pipeline's call which not every family has."""
        first = requests[0]
        negative = [request.negative for request in requests]
        sides = {"height": first.height, "width": first.width}
        return {"negative_prompt": negative, "guidance_scale": first.scale, **sides}

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline calls latents -> (B, C, h, w)."""
        return latents

    # -- files

    def save(self, drawn: Any, path: Path, request: ImageRequest, more: dict[str, str] | None = None) -> None:
        """Write one of what `draw` made, atomically.

        Args:
            drawn: a picture; a sound (2, S).
            path: where to.
            request: what was asked for.
            more: further texts for the file, by their keys, where its format takes them.
        """
        save_png(drawn, path, request, more)


def pad(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (T_i, C) -> (B, T, C), zeros behind the shorter ones, and which tokens are real (B, T)."""
    length = max(len(tensor) for tensor in tensors)
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, length - len(t))) for t in tensors])
    counts = torch.tensor([len(tensor) for tensor in tensors], device=padded.device)
    return padded, torch.arange(length, device=padded.device) < counts[:, None]


def stack(conditions: Sequence[Condition], key: str) -> Tensor:
    """One tensor of each sample, which has the same shape in all."""
    return torch.stack([condition[key] for condition in conditions])


def split(**batched: Tensor) -> list[Condition]:
    """Tensors (B, ...) -> one condition for each sample."""
    size = len(next(iter(batched.values())))
    return [{key: value[row] for key, value in batched.items()} for row in range(size)]


def _read_picture(path: Path, size: tuple[int, int]) -> dict[str, Tensor]:
    pixels, time_ids = load_pixels(path, size)
    return {"data": pixels, "time_ids": time_ids}
