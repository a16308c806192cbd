"""What an update is written as: a LoRA, a LoKr, a LoHa or the whole difference, and how far that is from the update.

One `Form` is made from what a user asks for; `layer` makes a layer of it, in the dtype which the file will have, so
that the error which is told is the one of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algos.full import Full
from ..algos.lora import LoRA
from ..files.codec import SavedLayer
from ..files.joining import update_of
from ..tensors.updates import Update
from .ranks import RankRule
from .report import Row

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What updates become.

    Attributes:
        algo: one of FORMS.
        rule: of the rank; None = as many as the update has, so that nothing is lost.
        factor: of a LoKr, as in training; -1 = the most even one.
        dtype: of the tensors; magnitudes and alpha stay in fp32.
    """

    algo: str
    rule: RankRule | None = None
    factor: int = -1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.algo not in FORMS:
            raise ValueError(f"there is no form {self.algo}: one of {', '.join(FORMS)}")

    def layer(self, name: str, update: Update, shape: Shape) -> SavedLayer:
        """The nearest layer of this form.

        Args:
            name: of it.
            update: at strength 1.
            shape: of the weight, [O, I, *kernel], or [C] of a normalisation layer, whose form is its own.
        """
        made = FORMS[self.algo](self, name, update, shape)
        return replace(made, tensors={key: t.to(self.dtype).contiguous() for key, t in made.tensors.items()})


def row_of(saved: SavedLayer, shape: Shape, update: Update, became: str = "") -> Row:
    """What a layer became, with its error as it stands in the file.

    Args:
        saved: the new layer, in the dtype of the file.
        shape: of the weight.
        update: what it was to be.
        became: in words; "" = its algorithm and rank.
    """
    size, rank = update.norm(), saved.algorithm.spec.shown_rank(saved.tensors)
    error = update_of(saved, shape).to(update.left.device).minus(update).norm()
    return Row(saved.name, became or saved.algorithm.spec.name, rank, error / size if size else error, size)


def _lora(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """Balanced factors, so that half precision holds both, and alpha = rank."""
    u, s, vh = _kept(form, update, shape)
    root = s.sqrt()
    down = (root[:, None] * vh).reshape(-1, *shape[1:])
    up = (u * root).reshape(len(u), -1, *[1] * (len(shape) - 2))
    tensors = {LoRA.spec.keys["down"]: down, LoRA.spec.keys["up"]: up}
    return SavedLayer(name, LoRA, tensors, float(len(s)))


def _kept(form: Form, update: Update, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples that stay; without a rule all that are more than rounding."""
    rule, kernel = form.rule, math.prod(shape[2:]) > 1
    u, s, vh = update.decomposed(None if rule is None or rule.rule else rule.most(kernel))
    if rule is None:
        limit = float(s[0]) * torch.finfo(s.dtype).eps * max(update.shape) if len(s) else 0.0
        count = max(1, int((s > limit).sum()))
    else:
        count = rule.count(s, kernel)
    return u[:, :count], s[:count], vh[:count]


def _diff(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    return SavedLayer(name, Full, {Full.spec.keys["diff"]: update.matrix().reshape(shape)}, None)


FORMS: Mapping[str, Callable[[Form, str, Update, Shape], SavedLayer]] = {"lora": _lora, "diff": _diff}
