"""A lossless stand-in for Stable Diffusion's VAE, for models small enough to work on pixels.

    z[b, c*f*f + i*f + j, h, w] = x[b, c, h*f + i, w*f + j]          (pixel_unshuffle; f = factor)

It has AutoencoderKL's interface and no parameters, so a stock StableDiffusionPipeline, and any trainer which only
calls `encode(...).latent_dist.sample()` and `decode`, uses it unchanged. `load_pipeline` opens a diffusers folder that
names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PixelUnshuffleAutoencoder(ModelMixin, ConfigMixin):
    """Moves each factor x factor square of pixels into channels, and back.

    Like AutoencoderKL it neither scales nor shifts: its user multiplies by `config.scaling_factor` after `encode` and
    divides before `decode`. The default 1.0 keeps latents in [-1, 1], so a scheduler may clip its prediction exactly.

    Args:
        factor: side of a square, and so the ratio of image size to latent size (any integer, also no power of two).
        in_channels: channels of the image.
        latent_channels: must be in_channels * factor**2.
        scaling_factor: see above.
        shift_factor: None, as in Stable Diffusion 1 and 2, whose pipeline does not read it.
        block_out_channels: pipelines take their scale as 2 ** (len - 1), which cannot say 3: see `fit_pipeline`.
        force_upcast: read by pipelines; nothing here can overflow.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        factor: int = 3,
        in_channels: int = 3,
        latent_channels: int = 27,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        block_out_channels: Sequence[int] = (27,),
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        if latent_channels != in_channels * factor**2:
            raise ValueError(
                f"PixelUnshuffleAutoencoder: latent_channels={latent_channels}, expected in_channels * factor**2 = "
                f"{in_channels * factor**2}"
            )
        # Nothing else here remembers what `.to(device, dtype)` asked for, and hosts read both.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        return self._anchor.device

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Image [B, in_channels, H, W] in -1..1 -> distribution of one point [B, latent_channels, H/f, W/f]."""
        latent = pixel_unshuffle(x, self.config.factor)
        moments = torch.cat([latent, torch.zeros_like(latent)], dim=1)
        # deterministic: standard deviation 0, so that sample() is mode().
        distribution = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latent [B, latent_channels, h, w] -> image [B, in_channels, h*f, w*f]; nothing random, so no `generator`."""
        image = pixel_shuffle(z, self.config.factor)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: the identity."""
        return self.decode(self.encode(sample, return_dict=False)[0].mode(), return_dict=return_dict)

    def fit_pipeline(self, pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
        """Correct the image scale of a pipeline with this autoencoder: its own formula knows powers of two only."""
        pipe.vae_scale_factor = self.config.factor
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=self.config.factor)
        return pipe


def load_pipeline(folder: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Open a diffusers model: StableDiffusionPipeline for a folder of ours, DiffusionPipeline's choice for any other.

    Args:
        folder: a folder with model_index.json, or the name of a model on the hub.
        kwargs: for `from_pretrained`, e.g. torch_dtype.
    """
    index = Path(folder) / "model_index.json"
    vae_entry = json.loads(index.read_text(encoding="utf-8")).get("vae") if index.is_file() else None
    if not vae_entry or vae_entry[-1] != PixelUnshuffleAutoencoder.__name__:
        return DiffusionPipeline.from_pretrained(folder, **kwargs)

    # There are no weights to load, and our import name depends on the installation: diffusers is not left to find us.
    config = json.loads((Path(folder) / "vae" / "config.json").read_text(encoding="utf-8"))
    vae = PixelUnshuffleAutoencoder.from_config(config).eval()
    kwargs = {"vae": vae, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **kwargs}
    loader_log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    loader_log.addFilter(_is_not_about_vae_class)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(str(folder), **kwargs)
    finally:
        loader_log.removeFilter(_is_not_about_vae_class)
    if vae.dtype != pipe.unet.dtype:  # a component that is passed in takes no part in torch_dtype
        vae.to(pipe.unet.dtype)
    return vae.fit_pipeline(pipe)


def _is_not_about_vae_class(record: logging.LogRecord) -> bool:
    """Drop the one warning that is expected: our class is not AutoencoderKL."""
    return not record.getMessage().startswith("Expected types for vae")
