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
from ..files.joining import as_diff, as_lora, update_of
from ..tensors.factor import factorization
from ..tensors.hadamard import nearest_hadamard
from ..tensors.kronecker import nearest_kronecker, with_low_rank
from ..tensors.leading import length
from ..tensors.low_rank import EXACT_BELOW
from ..tensors.updates import Triples, Update, distance
from .ranks import RankRule
from .report import Row

Shape = tuple[int, ...]
FORM_OF = {"full": "diff"}  # algorithms that have another name among FORMS
_FEW = 16  # ranks, which are never too many


@dataclass(frozen=True)
class Form:
    """What updates become.

    Attributes:
        algo: one of FORMS.
        rule: of the rank, of a LoKr that of its second factor: shares are those of the nearest LoKr without limit;
            None = as many as the update has.
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
            raise ValueError(f"there is no form {self.algo} ({', '.join(FORMS)}){nearest(self.algo, FORMS)}")
        kind = FORMS[self.algo]
        if self.factor != -1 and (self.factor < 1 or not kind.splits):
            raise ValueError(f"factor={self.factor} is for lokr alone, from 1 on, or -1 for the most even one")
        if self.clamp is not None and not (kind.clamps and 0 < self.clamp <= 1):
            raise ValueError(f"clamp_quantile={self.clamp:g} is for lora alone, above 0 and up to 1, such as 0.99")
        if self.rule is not None and not kind.ranked:
            raise ValueError(f"{self.rule}: the whole difference has no rank; leave it out")

    @property
    def exact(self) -> bool:
        """Whether what it makes is what was there, but for rounding."""
        return self.rule is None and not FORMS[self.algo].near

    @property
    def by_values(self) -> bool:
        """Whether the rank follows from the singular values."""
        return self.rule is not None and bool(self.rule.rule)

    def kept(self, update: Update, shape: Shape) -> Triples:
        """The singular triples of a matrix that stay; without a rule all that are more than rounding."""
        if self.rule is None:
            return update.decomposed()
        kernel = math.prod(shape[2:]) > 1
        rule, most = self.rule, self.rule.most(kernel)
        if not rule.rule:
            return update.decomposed(most)
        energy = update.norm() ** 2
        u, s, vh = update.decomposed(None if rule.needs_all else most, lambda s: rule.settled(s, energy))
        count = rule.count(s, kernel, energy)
        return u[:, :count], s[:count], vh[:count]

    def layer(self, name: str, update: Update, shape: Shape) -> SavedLayer:
        """The nearest layer of this form.

        Args:
            name: of it.
            update: at strength 1.
            shape: of the weight, [O, I, *kernel], or [C] of a normalisation layer, whose form is its own.

        Raises:
            ValueError: its values are not finite, in itself or in this dtype, or no rank was asked for and it has so
                many that the weight is smaller.
        """
        if not all(bool(t.isfinite().all()) for t in (update.left, update.right) if t is not None):
            raise ValueError(f"{dotted.shown(name)}: its values are not finite, the file it comes from is damaged")
        made = FORMS["diff" if len(shape) == 1 else self.algo].make(self, name, update, shape)
        tensors = {key: t.to(self.dtype).contiguous() for key, t in made.tensors.items()}
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            where = f"{dotted.shown(name)}: its values are above the largest one of {str(self.dtype)[6:]}"
            raise ValueError(f"{where}, give --dtype bfloat16 or float32")
        return replace(made, tensors=tensors)


_NOISE = 1e-14  # of float64, in which errors are computed


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
    error = 0.0 if error < _NOISE * size else error / size if size else error
    return Row(dotted.shown(saved.name), became, rank, error, size, exact)


def _lora(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """Balanced factors, so that half precision holds both, and alpha = rank."""
    u, s, vh = form.kept(update, shape)
    _check_size(form, shape, len(s), 1)
    root = s.sqrt()
    left, right = (u * root, root[:, None] * vh) if form.clamp is None else _clamped(u * s, vh, form.clamp)
    down, up = right.reshape(-1, *shape[1:]), left.reshape(*left.shape, *[1] * (len(shape) - 2))
    return SavedLayer(name, LoRA, {LoRA.spec.keys["down"]: down, LoRA.spec.keys["up"]: up}, float(len(s)))


def _loha(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """Of as many ranks as a LoRA, and at least as near."""
    triples = form.kept(update, shape)
    rank = len(triples[1])
    _check_size(form, shape, rank, 2)
    found = nearest_hadamard(update.matrix(), *triples)
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = {LoHa.spec.keys[key]: factor for key, factor in zip(names, found, strict=True)}
    return SavedLayer(name, LoHa, tensors, float(rank))


def _lokr(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    """Elements of both factors alike in size. The second one is whole where its ranks would have more values; its
    scale is then 1 for all readers."""
    rows, columns = factorization(shape[0], form.factor), factorization(shape[1], form.factor)
    w1, w2 = nearest_kronecker(update, rows, columns)
    keys, ranks = LoKr.spec.keys, min(w2.shape)
    if form.rule is not None or ranks <= EXACT_BELOW:  # or else it is not worth the time to look for few ranks
        triples = form.kept(Update(w2), shape)
        ranks = len(triples[1])
    if ranks * sum(w2.shape) >= w2.numel():
        balance = _balance(w1, w2, length(w2))
        tensors = {keys["w1"]: w1 * balance, keys["w2"]: (w2 / balance).reshape(rows[1], columns[1], *shape[2:])}
        return SavedLayer(name, LoKr, tensors, 1.0)
    if ranks < min(w2.shape) and form.rule is not None:
        w1, triples = with_low_rank(update, rows, columns, triples)
    u, s, vh = triples
    balance, root = _balance(w1, w2, length(s)), s.sqrt()
    tensors = {keys["w1"]: w1 * balance, keys["w2_a"]: u * root / balance, keys["w2_b"]: root[:, None] * vh}
    return SavedLayer(name, LoKr, tensors, float(len(s)))


def _balance(w1: Tensor, w2: Tensor, size: float) -> float:
    """What w1, of length 1, is multiplied with and w2, of this length, is divided by."""
    return math.sqrt(size) * (w1.numel() / w2.numel()) ** 0.25 or 1.0


def _diff(form: Form, name: str, update: Update, shape: Shape) -> SavedLayer:
    found = update.matrix().reshape(shape)
    if len(shape) == 1:
        return SavedLayer(name, Norm, {Norm.spec.keys["w_norm"]: found}, None)
    return SavedLayer(name, Full, {Full.spec.keys["diff"]: found}, None)


def _check_size(form: Form, shape: Shape, ranks: int, pairs: int) -> None:
    """
    Raises:
        ValueError: no rank was asked for, and with all of them there would be more values than in the weight.
    """
    values, size = pairs * ranks * (shape[0] + math.prod(shape[1:])), math.prod(shape)
    if form.rule is None and ranks > _FEW and values > size:
        raise ValueError(
            f"as {form.algo} of all its {ranks} ranks it has more values than its weight: give a rank (--dim, "
            "--energy), or write the difference (--to diff)"
        )


def _clamped(left: Tensor, right: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Within the value which this share of all their elements is below, linearly between two of them."""
    values = torch.cat([left.flatten(), right.flatten()]).sort().values
    at = quantile * (len(values) - 1)
    limit = float(torch.lerp(values[math.floor(at)].double(), values[math.ceil(at)].double(), at - math.floor(at)))
    return left.clamp(-abs(limit), abs(limit)), right.clamp(-abs(limit), abs(limit))


@dataclass(frozen=True)
class Kind:
    """What there is to know of one of FORMS.

    Attributes:
        make: the nearest layer of it.
        exact: a layer of a file in it, without loss, or None where there is no such layer; None = not for every layer.
        ranked: it has a rank; with `whole`, it may go without.
        near: with all ranks, too, it is near alone.
        splits: it takes a factor.
        clamps: its values can be cut at a quantile.
        by_factors: the factors of an update are a layer of it as they stand.
    """

    make: Callable[[Form, str, Update, Shape], SavedLayer]
    exact: Callable[[SavedLayer, Shape, Tensor | None], SavedLayer | None] | None = None
    ranked: bool = True
    whole: bool = False
    near: bool = False
    splits: bool = False
    clamps: bool = False
    by_factors: bool = False


FORMS: Mapping[str, Kind] = {
    "lora": Kind(_lora, as_lora, clamps=True, by_factors=True),
    "lokr": Kind(_lokr, whole=True, near=True, splits=True),
    "loha": Kind(_loha),
    "diff": Kind(_diff, as_diff, ranked=False, whole=True),
}
