"""The two ways in which models are trained to remove noise, as functions of a number u in [0, 1) per sample.

u is where a sample lies in the distribution of noise levels; times grow with it. Training draws u at random, the
validation takes fixed values, so that one rule says which levels a model sees.

    Discrete   x_t = sqrt(a_t) x + sqrt(1 - a_t) n,   target n or sqrt(a_t) n - sqrt(1 - a_t) x   (2006.11239)
    Flow       x_s = (1 - s) x + s n,                 target n - x                                (2403.03206)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
DENSITIES = ("logit_normal", "mode")  # weighting schemes that say how often a noise level is drawn


@dataclass(frozen=True)
class NoiseOptions:
    """What the user says about noise levels, by sd-scripts' names; None = not said.

    Attributes:
        timestep_sampling: of flow models; None = the normal distribution and the shift of the family.
        discrete_flow_shift: above 1, times move towards the noise.
        weighting_scheme: density of the levels (with timestep_sampling sigma) or weight of the loss, see losses.
        sigmoid_scale: deviation of the normal distribution of the sampling sigmoid, shift and flux_shift.
        logit_mean, logit_std, mode_scale: of the densities logit_normal and mode.
        zero_terminal_snr: of models with a numbered schedule: its last level is noise alone (2305.08891).
    """

    timestep_sampling: str | None = None
    discrete_flow_shift: float | None = None
    weighting_scheme: str | None = None
    sigmoid_scale: float | None = None
    logit_mean: float | None = None
    logit_std: float | None = None
    mode_scale: float | None = None
    zero_terminal_snr: bool = False

    @property
    def given(self) -> list[str]:
        """Names of the options that say something."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if value is not None and value is not False]


class Discrete:
    """A numbered noise schedule with the model's own betas and prediction type. Times are integers (B,)."""

    def __init__(self, config: Any, options: NoiseOptions, title: str) -> None:
        from diffusers import DDPMScheduler

        others = [name for name in options.given if name != "zero_terminal_snr"]
        if others:
            names = ", ".join(f"--{name}" for name in others)
            raise ValueError(f"{names}: for flow models, which {title} is not. Remove it.")
        more = {"rescale_betas_zero_snr": True} if options.zero_terminal_snr else {}
        self.scheduler = DDPMScheduler.from_config(config, **more)
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the model predicts {kind!r}; this trainer knows epsilon and v_prediction models.")
        self.is_v = kind == "v_prediction"
        self.count = int(self.scheduler.config.num_train_timesteps)
        if options.zero_terminal_snr and not self.is_v:
            raise ValueError(
                "--zero_terminal_snr needs a model that predicts v: noise alone is no task for others. Remove it."
            )

    def times(self, u: Tensor, size: Sequence[int] = ()) -> Tensor:
        return (u * self.count).long()

    def add(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.get_velocity(latents, noise, times) if self.is_v else noise

    def signal(self, times: Tensor) -> Tensor:
        """a_t (B,), the part of the picture's variance that is left at each time."""
        return self.scheduler.alphas_cumprod.to(times.device)[times]


class Flow:
    """Straight lines between data (time 0) and noise (time 1). Times are fractions (B,).

    Args:
        shift: above 1, times move towards the noise: s' = shift s / (1 + (shift - 1) s); None = by the size of the
            picture, as FLUX.1 draws it.
        mean: times are sigmoid(normal with this mean and deviation `std`) before the shift; None = uniform.
        mode: instead, the density with heavy ends of this scale (2403.03206, appendix).
    """

    def __init__(
        self, shift: float | None = 1.0, mean: float | None = 0.0, std: float = 1.0, mode: float | None = None
    ) -> None:
        self.shift, self.mean, self.std, self.mode = shift, mean, std, mode

    @classmethod
    def of(cls, options: NoiseOptions, shift: float, mean: float) -> Flow:
        """The levels that the options ask for; `shift` and `mean` are the family's own.

        Raises:
            ValueError: an option has no effect beside the others.
        """
        o, scheme, sampling = options, options.weighting_scheme, options.timestep_sampling
        if sampling is None and scheme in DENSITIES:
            sampling = "sigma"
        _check_effects(o, sampling)
        moved, std = _or(o.discrete_flow_shift, shift), _or(o.sigmoid_scale, 1.0)
        levels = {
            (None, None): cls(moved, mean),
            ("uniform", None): cls(1.0, None),
            ("sigmoid", None): cls(1.0, 0.0, std),
            ("shift", None): cls(moved, 0.0, std),
            ("flux_shift", None): cls(None, 0.0, std),
            ("sigma", None): cls(moved, None),
            # its u counts from the noise
            ("sigma", "logit_normal"): cls(moved, -_or(o.logit_mean, 0.0), _or(o.logit_std, 1.0)),
            ("sigma", "mode"): cls(moved, None, mode=_or(o.mode_scale, 1.29)),
        }
        return levels[sampling, scheme if scheme in DENSITIES else None]

    def times(self, u: Tensor, size: Sequence[int] = ()) -> Tensor:
        """(B,) in fp32, for latents of this size (h, w)."""
        u = u.double().clamp(1e-6, 1 - 1e-6)  # never quite the end, where nothing is left to predict
        s = u if self.mean is None else torch.sigmoid(self.std * torch.special.ndtri(u) + self.mean)
        if self.mode is not None:
            s = u + self.mode * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        shift = flux_shift(size) if self.shift is None else self.shift
        return (shift * s / (1 + (shift - 1) * s)).float()

    def add(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        s = times.view(-1, *[1] * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_effects(options: NoiseOptions, sampling: str | None) -> None:
    """Raise ValueError when one of them has no effect beside the others, or with this sampling."""
    scheme = options.weighting_scheme
    needs = {
        "weighting_scheme": scheme not in DENSITIES or sampling == "sigma",
        "discrete_flow_shift": sampling in (None, "sigma", "shift"),
        "sigmoid_scale": sampling in ("sigmoid", "shift", "flux_shift"),
        "logit_mean": scheme == "logit_normal",
        "logit_std": scheme == "logit_normal",
        "mode_scale": scheme == "mode",
    }
    idle = [name for name in options.given if not needs.get(name, True)]
    if options.zero_terminal_snr:
        raise ValueError("--zero_terminal_snr: for models with a numbered noise schedule, not flow models. Remove it.")
    if idle:
        here = f"--timestep_sampling {sampling or 'not given'}, --weighting_scheme {scheme or 'not given'}"
        raise ValueError(f"--{idle[0]} has no effect with {here}. Remove it, or choose another of these.")


def flux_shift(size: Sequence[int]) -> float:
    """FLUX.1's shift for latents of this size: its logarithm grows from 0.5 at 256 patches to 1.15 at 4096."""
    patches = (size[0] // 2) * (size[1] // 2)
    return math.exp(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256))


Noise = Discrete | Flow
