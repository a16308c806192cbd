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
from ..algos.loha import LoHa
from ..algos.lokr import LoKr
from ..algos.lora import LoRA
from ..algos.norm import Norm
from ..args.coerce import nearest
from ..files import dotted
from ..files.codec import SavedLayer
from ..files.joining import update_of
from ..tensors.factor import factorization
from ..tensors.hadamard import nearest_hadamard
from ..tensors.kronecker import nearest_kronecker
from ..tensors.updates import Update, distance
from .ranks import RankRule
from .report import Row

Shape = tuple[int, ...]
FORM_OF = {"full": "diff"}  # algorithms that have another name among FORMS


@dataclass(frozen=True)
class Form:
    """What updates become.

    Attributes:
        algo: one of FORMS.
        rule: of the rank; None = as many as the update has, so that nothing is lost.
        factor: of a LoKr, as in training; -1 = the most even one.
        dtype: of the tensors; magnitudes and alpha stay in fp32.
        clamp: of a LoRA: elements beyond this quantile of all are cut, as the trainers' extraction does; None = none.

    Raises:
        ValueError: there is no such form, or something is given that it has not.
    """

    algo: str
    rule: RankRule | None = None
    factor: int = -1
    dtype: torch.dtype = torch.float32
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.algo not in FORMS:
            raise ValueError(f"there is no form {self.algo}{nearest(self.algo, FORMS)}: one of {', '.join(FORMS)}")
        if self.factor != -1 and (self.factor < 1 or self.algo != "lokr"):
            raise ValueError(f"factor={self.factor} is for lokr alone, from 1 on, or -1 for the most even one")
        if self.clamp is not None and (self.algo != "lora" or not 0 < self.clamp <= 1):
            raise ValueError(f"clamp_quantile={self.clamp:g} is for lora alone, above 0 and up to 1, such as 0.99")
        if self.rule is not None and self.algo == "diff":
            raise ValueError(f"{self.rule}: the whole difference has no rank; leave it out")

    @property
    def by_values(self) -> bool:
        """Whether the rank follows from the singular values."""
        return self.rule is not None and bool(self.rule.rule)

    def kept(self, update: Update, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """The singular triples of a matrix that stay; without a rule all that are more than rounding."""
        rule, kernel = self.rule, _has_kernel(shape)
        u, s, vh = update.decomposed(None if rule is None or rule.rule else rule.most(kernel))
        if rule is None:
            limit = float(s[0]) * torch.finfo(s.dtype).eps * max(update.shape) if len(s) else 0.0
            count = max(1, int((s > limit).sum()))
        else:
            count = rule.count(s, kernel)
        return u[:, :count], s[:count], vh[:count]

    def layer(self, name: str, update: Update, shape: Shape) -> SavedLayer:
        """The nearest layer of this form.

        Args:
            name: of it.
            update: at strength 1.
            shape: of the weight, [O, I, *kernel], or [C] of a normalisation layer, whose form is its own.
        """
        made = FORMS["diff" if len(shape) == 1 else self.algo](self, name, update, shape)
        return replace(made, tensors={key: t.to(self.dtype).contiguous() for key, t in made.tensors.items()})


def row_of(saved: SavedLayer, shape: Shape, update: Update, exact: bool = False, weight: Tensor | None = None) -> Row:
    """What a layer became, with its error as it stands in the file.

    Args:
        saved: the new layer, in the dtype of the file.
        shape: of the weight.
        update: what it was to be.
        exact: the algebra is.
        weight: the base weight, where what it adds depends on that.
    """
    size, rank = update.norm(), saved.algorithm.spec.shown_rank(saved.tensors)
    error = distance(update_of(saved, shape, weight).to(update.left.device), update)
    became = FORM_OF.get(saved.algorithm.spec.file_algo, saved.algorithm.spec.file_algo)
    return Row(dotted.shown(saved.name), became, rank, error / size if size else error, size, exact)


def _lora(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """Balanced factors, so that half precision holds both, and alpha = rank."""
    u, s, vh = form.kept(update, shape)
    _check_size(form, update, len(s))
    if form.clamp is None:
        root = s.sqrt()
        left, right = u * root, root[:, None] * vh
    else:
        left, right = _clamped(u * s, vh, form.clamp)
    down, up = right.reshape(-1, *shape[1:]), left.reshape(*left.shape, *[1] * (len(shape) - 2))
    return SavedLayer(name, LoRA, {LoRA.spec.keys["down"]: down, LoRA.spec.keys["up"]: up}, float(len(s)))


_SMALL = 16  # ranks, which are never too many


def _check_size(form: Form, update: Update, ranks: int) -> None:
    """
    Raises:
        ValueError: no rank was asked for, and with all of them it would be larger than the weight.
    """
    if form.rule is None and ranks > _SMALL and ranks * sum(update.shape) > math.prod(update.shape):
        raise ValueError(
            f"as {form.algo} of all its {ranks} ranks it has more values than its weight: give a rank (--dim, "
            "--energy), or write the difference (--to diff)"
        )


def _clamped(left: Tensor, right: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Within the value which this share of all their elements stays below: torch's own has a limit of elements."""
    every = torch.cat([left.flatten(), right.flatten()]).sort().values
    at = quantile * (len(every) - 1)
    low, high = every[math.floor(at)], every[math.ceil(at)]
    limit = float(low + (high - low) * (at - math.floor(at)))
    return left.clamp(-limit, limit), right.clamp(-limit, limit)


def _lokr(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """The factors of length alike; the second one whole where its rank would not make it smaller."""
    rows, columns = factorization(shape[0], form.factor), factorization(shape[1], form.factor)
    second_shape = (rows[1], columns[1], *shape[2:])
    whole = form.rule is None or (form.rule.most(_has_kernel(shape)) or 1) * 2 >= max(second_shape[:2])

    def limit(second: Tensor) -> Tensor:
        u, s, vh = form.kept(Update(second), shape)
        return u * s @ vh

    first, second = nearest_kronecker(update.matrix(), rows, columns, None if whole and not form.by_values else limit)
    balance = float(second.norm()) ** 0.5 or 1.0
    keys, first, second = LoKr.spec.keys, first * balance, second / balance
    if whole and not form.by_values:
        return SavedLayer(name, LoKr, {keys["w1"]: first, keys["w2"]: second.reshape(second_shape)}, 1.0)
    u, s, vh = form.kept(Update(second), shape)
    root = s.sqrt()
    tensors = {keys["w1"]: first, keys["w2_a"]: u * root, keys["w2_b"]: root[:, None] * vh}
    return SavedLayer(name, LoKr, tensors, float(len(s)))


def _loha(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    u, s, vh = form.kept(update, shape)
    _check_size(form, update, 2 * len(s))
    factors = nearest_hadamard(update.matrix(), u, s, vh)
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = {LoHa.spec.keys[key]: factor for key, factor in zip(names, factors, strict=True)}
    return SavedLayer(name, LoHa, tensors, float(len(s)))


def _has_kernel(shape: Shape) -> bool:
    return math.prod(shape[2:]) > 1


def _diff(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    if len(shape) == 1:
        return SavedLayer(name, Norm, {Norm.spec.keys["w_norm"]: update.matrix().reshape(shape)}, None)
    return SavedLayer(name, Full, {Full.spec.keys["diff"]: update.matrix().reshape(shape)}, None)


FORMS: Mapping[str, Callable[[Form, str, Update, Shape], SavedLayer]] = {
    "lora": _lora,
    "lokr": _lokr,
    "loha": _loha,
    "diff": _diff,
}
