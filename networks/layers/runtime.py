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
    trained: of the network in whose training alone this one acts, beside it; None = this one always acts.
    accompanied: there may be such networks on the same layers.
    validating: passes without gradients are the trainer's validation, whose loss is compared with that of training.
    """

    multiplier: float | Tensor = 1.0
    enabled: bool = True
    for_inference: bool = False
    factored: bool | None = None
    keeps_fp32: bool = False
    region: Region | None = None
    trained: Runtime | None = None
    accompanied: bool = False
    validating: bool = False
    _pass: PerThread[_Pass] = field(default_factory=lambda: PerThread(_Pass), repr=False, compare=False)

    @property
    def acts(self) -> bool:
        """Whether the pass of this thread is to have the updates."""
        return self.enabled and (self.trained is None or self.trained.in_training)

    @property
    def alone(self) -> bool:
        """Whether updates act, at one strength that is not 0, and nothing outside a layer has a say in them."""
        m = self.multiplier
        acts = self.enabled and self.region is None and self.trained is None and not self.accompanied
        return acts and not isinstance(m, Tensor) and m != 0

    @property
    def in_training(self) -> bool:
        """Whether this pass belongs to training: it has gradients, is one of validation, or is a teacher's, for which
        trainers turn the network off; they draw no picture without it."""
        off = not self.enabled or (not isinstance(self.multiplier, Tensor) and self.multiplier == 0)
        return not self.sampling or self.validating or off

    @property
    def sampling(self) -> bool:
        """In this thread, the model's own forward was entered without gradients (hosts draw sample images in train
        mode); another may train meanwhile."""
        return self._pass.mine.sampling

    @sampling.setter
    def sampling(self, value: bool) -> None:
        self._pass.mine.sampling = value
