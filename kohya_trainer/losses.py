"""The loss of a sample: how far the model's answer is from its target, and how much that counts. (B,) in fp32.

    l2          d^2
    l1          |d|
    huber       2 c (sqrt(d^2 + c^2) - c)
    smooth_l1   2 (sqrt(d^2 + c^2) - c)

c is constant or falls with the noise. Weights of models with a numbered schedule follow from the signal-to-noise ratio
r = a / (1 - a) of the sample's time, those of flow models from the time itself. Names and formulas are sd-scripts'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .families.noise import Discrete, Noise

DISTANCES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("snr", "exponential", "constant")
SCHEMES = ("none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap")
# options that decide it: in the file's metadata, and the same when a run goes on
DECIDES_LOSS = tuple(
    "loss_type huber_schedule huber_c huber_scale noise_offset ip_noise_gamma min_snr_gamma debiased_estimation_loss "
    "zero_terminal_snr scale_v_pred_loss_like_noise_pred v_pred_like_loss timestep_sampling discrete_flow_shift "
    "sigmoid_scale weighting_scheme logit_mean logit_std mode_scale guidance_scale "
    "prior_prompt prior_loss_weight".split()
)
LARGEST_RATIO = 1000.0  # at time 0 it would be next to infinite


@dataclass(frozen=True)
class LossOptions:
    """Options of the trainer that decide the loss; the defaults are sd-scripts'."""

    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    weighting_scheme: str | None = None

    @property
    def of_schedule(self) -> list[str]:
        """Those given that need a numbered noise schedule."""
        names = "min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss".split()
        return [name for name in names if getattr(self, name)]


class Loss:
    """The options, applied to a model's way of removing noise.

    Raises:
        ValueError: an option is for another kind of model.
    """

    def __init__(self, options: LossOptions, noise: Noise) -> None:
        self.options, self.noise, o = options, noise, options
        self.robust = o.loss_type in ("huber", "smooth_l1")
        if not isinstance(noise, Discrete):
            if o.of_schedule:
                names = ", ".join(f"--{name}" for name in o.of_schedule)
                raise ValueError(f"{names}: for models with a numbered noise schedule, not flow models. Remove it.")
            if self.robust and o.huber_schedule == "snr":
                raise ValueError(f"--loss_type {o.loss_type}: flow models have no --huber_schedule snr. Give another.")
        elif noise.is_v and o.v_pred_like_loss:
            raise ValueError("--v_pred_like_loss: this model predicts v itself. Remove it.")
        elif not noise.is_v and o.scale_v_pred_loss_like_noise_pred:
            raise ValueError("--scale_v_pred_loss_like_noise_pred: for models that predict v. Remove it.")

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean squared error."""
        weighted = self.options.weighting_scheme in ("sigma_sqrt", "cosmap")
        return not weighted and replace(self.options, weighting_scheme=None) == LossOptions()

    def __call__(self, answer: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """Loss (B,) of answers (B, C, ...) to targets of the same shape, at times (B,) as the noise counts them."""
        d = answer.float() - target.float()
        if self.options.loss_type == "l2":
            distance = d.square()
        elif self.options.loss_type == "l1":
            distance = d.abs()
        else:
            c = self.threshold(times).to(d).view(-1, *[1] * (d.ndim - 1))
            distance = 2 * ((d.square() + c.square()).sqrt() - c)
            if self.options.loss_type == "huber":
                distance = distance * c
        return distance.flatten(1).mean(1) * self.weights(times).to(d)

    def threshold(self, times: Tensor) -> Tensor:
        """c of the robust losses, (B,)."""
        o = self.options
        if o.huber_schedule == "constant":
            return torch.full(times.shape, o.huber_c * o.huber_scale, device=times.device)
        if isinstance(self.noise, Discrete):
            if o.huber_schedule == "snr":
                a = self.noise.signal(times)
                return (1 - o.huber_c) / (1 + ((1 - a) / a).sqrt()) ** 2 + o.huber_c
            times = times / self.noise.count
        return o.huber_scale * torch.exp(math.log(o.huber_c) * times)

    def weights(self, times: Tensor) -> Tensor:
        """How much each sample counts, (B,)."""
        o = self.options
        if not isinstance(self.noise, Discrete):
            if o.weighting_scheme == "sigma_sqrt":
                return times**-2.0
            if o.weighting_scheme == "cosmap":
                return 2 / (math.pi * (1 - 2 * times + 2 * times.square()))
            return torch.ones_like(times, dtype=torch.float32)
        a = self.noise.signal(times)
        is_v, ratio = self.noise.is_v, a / (1 - a)
        weights = torch.ones_like(ratio)
        if o.min_snr_gamma:  # 2303.09556
            weights = ratio.clamp(max=o.min_snr_gamma) / (ratio + 1 if is_v else ratio)
        ratio = ratio.clamp(max=LARGEST_RATIO)
        like_noise = ratio / (ratio + 1)  # a v loss times this is one of noise
        if o.scale_v_pred_loss_like_noise_pred:
            weights = weights * like_noise
        if o.v_pred_like_loss:
            weights = weights * (1 + o.v_pred_like_loss / like_noise)
        if o.debiased_estimation_loss:  # 2310.08442
            weights = weights / (ratio + 1 if is_v else ratio.sqrt())
        return weights
