"""What all layers of one network share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .region import Region


@dataclass
class Runtime:
    """What all layers of one network share; plain values, so that a change reaches every layer at once.

    multiplier: the user's strength; one number, or a tensor [N] with one value per sample.
    enabled: False lets the base model through untouched.
    sampling: the model's own forward was entered without gradients (hosts draw sample images in train mode).
    for_inference: made for generation; such networks are never put into eval mode by some hosts.
    factored: whether updates take their factored form, or the weight change is built; None = the cheaper one.
    keeps_fp32: values stay in fp32 or wider whatever a host casts the network to.
    region: this network's place in a picture of several prompts, or None.
    """

    multiplier: float | Tensor = 1.0
    enabled: bool = True
    sampling: bool = False
    for_inference: bool = False
    factored: bool | None = None
    keeps_fp32: bool = False
    region: Region | None = None
