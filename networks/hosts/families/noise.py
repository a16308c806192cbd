"""The two ways in which models are trained to remove noise, as functions of a number u in [0, 1) per sample.

u is where a sample lies in the distribution of noise levels; times grow with it. Training draws u at random, the
validation takes fixed values, so that one rule says which levels a model sees.

    Discrete   x_t = sqrt(a_t) x + sqrt(1 - a_t) n,   target n or sqrt(a_t) n - sqrt(1 - a_t) x   (2006.11239)
    Flow       x_s = (1 - s) x + s n,                 target n - x                                (2403.03206)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Discrete:
    """A numbered noise schedule with the model's own betas and prediction type. Times are integers (B,)."""

    def __init__(self, config: Any) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(config)
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the model predicts {kind!r}; this trainer knows epsilon and v_prediction models.")
        self.is_v = kind == "v_prediction"

    def times(self, u: Tensor) -> Tensor:
        return (u * self.scheduler.config.num_train_timesteps).long()

    def add(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.get_velocity(latents, noise, times) if self.is_v else noise

    def snr_weights(self, times: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights (B,): signal-to-noise ratios above `gamma` count no more than `gamma` (2303.09556)."""
        alphas = self.scheduler.alphas_cumprod.to(times.device)[times]
        snr = alphas / (1 - alphas)
        return snr.clamp(max=gamma) / (snr + 1 if self.is_v else snr)


class Flow:
    """Straight lines between data (time 0) and noise (time 1). Times are fractions (B,).

    Args:
        shift: above 1, times move towards the noise: s' = shift s / (1 + (shift - 1) s).
        mean: times are sigmoid(normal with this mean and deviation 1) before the shift; None = uniform.
    """

    def __init__(self, shift: float = 1.0, mean: float | None = 0.0) -> None:
        self.shift, self.mean = shift, mean

    def times(self, u: Tensor) -> Tensor:
        u = u.double().clamp(1e-6, 1 - 1e-6)  # never quite the end, where nothing is left to predict
        s = u if self.mean is None else torch.sigmoid(torch.special.ndtri(u) + self.mean)
        return (self.shift * s / (1 + (self.shift - 1) * s)).float()

    def add(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        s = times.view(-1, *[1] * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def snr_weights(self, times: Tensor, gamma: float) -> Tensor:
        raise ValueError("--min_snr_gamma is for models with a noise schedule; this one is a flow model. Remove it.")


Noise = Discrete | Flow
