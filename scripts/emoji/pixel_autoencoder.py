"""A lossless stand-in for Stable Diffusion's VAE, for models small enough to work on pixels.

    z[b, c*f*f + i*f + j, h, w] = x[b, c, h*f + i, w*f + j]          (pixel_unshuffle; f = factor)

It has AutoencoderKL's interface and no parameters, so a stock StableDiffusionPipeline, and any trainer which only
calls `encode(...).latent_dist.sample()` and `decode`, uses it unchanged. The model's model_index.json names this
module, as diffusers has it for classes of others: who opens the model has this folder on the path for imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin, StableDiffusionPipeline
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

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> PixelUnshuffleAutoencoder:
        """Open a folder with config.json: there are no weights."""
        return cls.from_config(cls.load_config(folder)).eval().to(torch_dtype)

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


def load_pipeline(folder: str | Path) -> StableDiffusionPipeline:
    """Open a diffusers folder whose autoencoder is this one, in fp32."""
    vae = PixelUnshuffleAutoencoder.from_pretrained(Path(folder) / "vae")
    return vae.fit_pipeline(StableDiffusionPipeline.from_pretrained(str(folder), vae=vae, safety_checker=None))
