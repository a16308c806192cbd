"""What all layers of one network share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..tensors.per_thread import PerThread
from .region import Region


class _Pass:
    """The pass of a model that a thread is in, or was in last."""

    def __init__(self) -> None:
        self.sampling = False


@dataclass
class Runtime:
    """What all layers of one network share; plain values, so that a change reaches every layer at once.

    multiplier: the user's strength; one number, or a tensor [N] with one value per sample.
    enabled: False lets the base model through untouched.
    for_inference: made for generation; such networks are never put into eval mode by some hosts.
    factored: whether updates take their factored form, or the weight change is built; None = the cheaper one.
    keeps_fp32: values stay in fp32 or wider whatever a host casts the network to.
    region: this network's place in a picture of several prompts, or None.
    """

    multiplier: float | Tensor = 1.0
    enabled: bool = True
    for_inference: bool = False
    factored: bool | None = None
    keeps_fp32: bool = False
    region: Region | None = None
    _pass: PerThread[_Pass] = field(default_factory=lambda: PerThread(_Pass), repr=False, compare=False)

    @property
    def sampling(self) -> bool:
        """In this thread, the model's own forward was entered without gradients (hosts draw sample images in train
        mode); another may train meanwhile."""
        return self._pass.mine.sampling

    @sampling.setter
    def sampling(self, value: bool) -> None:
        self._pass.mine.sampling = value
