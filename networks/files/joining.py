"""Layers of a file that are a part of one of the model's, or several of them: joined or divided row by row.

One formula for all directions: the trainer's files under diffusers' names and back, ComfyUI's fused projections, files
with some of the projections only. A layer keeps its algorithm where that has such a layer; else it becomes a LoRA, and
where that would take more than half of the weight's room, or there is none, the whole difference. All are exact, and
bit for bit where algorithm and scale stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._errors import located
from ..algos.base import Adapter
from ..algos.full import Full
from ..algos.lora import LoRA
from ..algos.saved import concatenated, wide_dtype
from ..tensors.norms import weight_geometry
from ..tensors.updates import Update
from . import dotted
from .codec import SavedLayer
from .merged import merged_weight

Shape = tuple[int, ...]
LARGE = 0.5  # of the weight's values: a LoRA of more is a whole difference instead


class NeedsBase(ValueError):
    """What is asked for depends on the base weight, which is not known."""


def joined(
    name: str, pieces: Sequence[SavedLayer | None], sizes: Sequence[int], columns: Shape, base: Tensor | None
) -> tuple[SavedLayer, str]:
    """The one layer of which these are the rows.

    Args:
        name: of the layer that results.
        pieces: in the order of the rows; None = nothing changes there, but not in all.
        sizes: output rows of each.
        columns: the rest of the weight's shape, [I, *kernel]; () of a normalisation layer.
        base: weight of the whole layer, for conversions which need it; None = they are refused.

    Returns:
        The layer, and in words what it was converted to; "" = the same algorithm, exact at equal scale.

    Raises:
        ValueError: a piece does not fit its rows, or nothing is this layer without the base weight.
    """
    weights: list[Tensor | None] = [None] * len(sizes) if base is None else [*base.split([*sizes])]
    parts = [
        None if piece is None else _Part(_plain(piece), (size, *columns), weight)
        for piece, size, weight in zip(pieces, sizes, weights, strict=True)
    ]
    biases = [None if part is None else part.bias for part in parts]
    rows = _Rows(name, [*sizes], columns, weights)
    found, words = rows.joined(parts)
    if any(bias is not None for bias in biases):
        found = _with_bias(found, concatenated(biases, sizes))
    return found, words


def rows_of(
    saved: SavedLayer, name: str, start: int, stop: int, base: Tensor | None, shape: Shape | None = None
) -> tuple[SavedLayer, str]:
    """Some output rows of a layer, as a layer of its own.

    Args:
        name: of the layer that results.
        start, stop: the rows.
        base: weight of the whole layer [O, I, *kernel], for conversions which need it; None = they are refused.
        shape: of that weight; None = that of base, or what the tensors show (not the kernel of a convolution's LoKr).

    Returns:
        As `joined`.

    Raises:
        ValueError: as `joined`.
    """
    shape = shape or (None if base is None else tuple(base.shape)) or saved.algorithm.shown_shape(saved.tensors)
    part = _Part(_plain(saved), shape or (), base)
    found, words = part.rows(start, stop)
    found = replace(found, name=name)
    return (found if part.bias is None else _with_bias(found, part.bias[start:stop])), words


def as_lora(saved: SavedLayer, shape: Shape, base: Tensor | None = None) -> SavedLayer | None:
    """A layer as a LoRA without a core: exact, with the same magnitude and change of the bias.

    Args:
        shape: of the layer's weight, [O, I, *kernel].
        base: this weight, for algorithms whose change depends on it.

    Returns:
        The LoRA, which is the layer itself where it is one; None where no LoRA has fewer values than the weight.

    Raises:
        ValueError: it depends on the base weight, which is not given.
    """
    part = _Part(saved, shape, base)
    found = part.as_lora()
    return found if found is None or part.bias is None else _with_bias(found, part.bias)


def as_diff(saved: SavedLayer, shape: Shape, base: Tensor | None = None) -> SavedLayer:
    """A layer as the whole difference that it makes: exact at every strength.

    Args:
        shape: of the layer's weight, [O, I, *kernel].
        base: this weight, for algorithms whose change depends on it, and for magnitudes.

    Raises:
        ValueError: it depends on the base weight, which is not given.
    """
    part = _Part(saved, shape, base)
    return part.as_diff() if part.bias is None else _with_bias(part.as_diff(), part.bias)


def update_of(saved: SavedLayer, shape: Shape, base: Tensor | None = None) -> Update:
    """What a layer adds to its weight at strength 1, in float64 on the device of its tensors: as factors where its
    algorithm has some.

    Args:
        shape: of the layer's weight, [O, I, *kernel]; () = as the tensors show it.
        base: this weight, for algorithms whose change depends on it, and for magnitudes.

    Raises:
        ValueError: its tensors do not fit.
        NeedsBase: it depends on the base weight, which is not given.
    """
    wide = {key: t.double() if t.is_floating_point() else t for key, t in saved.tensors.items()}
    shape = shape or saved.algorithm.shown_shape(saved.tensors) or ()
    return _Part(replace(saved, tensors=wide), shape, None if base is None else base.double()).update()


def _trimmed(tensor: Tensor, axes: int) -> Tensor:
    """Without axes of length 1 behind so many: some programs have those of a 1x1 convolution in a Linear's factors."""
    behind = tensor.shape[axes:]
    return tensor.reshape(tensor.shape[:axes]) if behind and set(behind) == {1} else tensor


class _Part:
    """A layer without the change of its bias.

    Args:
        saved: the layer.
        shape: of its weight.
        weight: this weight; None = not known.

    Raises:
        ValueError: its tensors do not fit the shape.
    """

    def __init__(self, saved: SavedLayer, shape: Shape, weight: Tensor | None) -> None:
        if shape:
            with located(dotted.shown(saved.name)):
                saved.describe(weight_geometry(shape))
        key = saved.algorithm.spec.bias_key
        self.bias = saved.tensors.get(key)
        axes = {
            suffix: max(len(letters.rstrip("*")), len(shape))
            for form in saved.algorithm.spec.axes
            for suffix, letters in form.items()
        }
        tensors = {
            name: _trimmed(t, axes.get(name, t.dim()) if shape else t.dim())
            for name, t in saved.tensors.items()
            if name != key
        }
        self.saved = replace(saved, tensors=tensors)
        self.device = next(iter(self.saved.tensors.values())).device
        self.shape, self.weight = shape, None if weight is None else weight.to(self.device)

    @property
    def folded(self) -> bool:
        return self.saved.magnitude is not None and self.saved.folded

    def as_lora(self) -> SavedLayer | None:
        saved = self.saved
        if saved.algorithm is LoRA and "lora_mid.weight" not in saved.tensors:
            return saved
        pair = self._built().product(self.weight) if self.shape else None
        if pair is None or _values(*pair) >= math.prod(self.shape):
            return None
        left, right = (factor.detach().contiguous() for factor in pair)
        up = left.reshape(*left.shape, *[1] * (len(self.shape) - 2))
        tensors = {LoRA.spec.keys["down"]: right, LoRA.spec.keys["up"]: up}
        return replace(saved, algorithm=LoRA, tensors=tensors, alpha=saved.scale * left.shape[1])

    def as_diff(self) -> SavedLayer:
        saved = self.saved
        if saved.algorithm is Full and saved.magnitude is None:
            return saved
        tensors = {Full.spec.keys["diff"]: self.update().matrix().reshape(self.shape).to(self._dtype)}
        return replace(saved, algorithm=Full, tensors=tensors, alpha=None, magnitude=None, folded=False)

    @torch.no_grad()
    def update(self) -> Update:
        """The change of its weight, at strength 1, in the dtype of its tensors or a wider one."""
        saved = self.saved
        if saved.magnitude is not None:
            weight = self._known_weight().double()
            return Update((merged_weight(saved, weight) - weight).flatten(1))
        adapter = self._built()
        strength = adapter.strength(1.0, saved.scale)
        pair = adapter.product(self.weight) if len(self.shape) > 1 else None
        if pair is not None and pair[0].shape[1] < min(len(pair[0]), pair[1][0].numel()):
            return Update(pair[0].detach() * strength, pair[1].detach().flatten(1))
        zeros = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        weight = self._known_weight().double() if adapter.spec.relative else zeros
        return Update(adapter.weight_change(weight, strength).detach().reshape(len(weight), -1))

    def rows(self, start: int, stop: int) -> tuple[SavedLayer, str]:
        """Some of them, as a layer, and in words what that is."""
        saved = self.saved
        found = self._taken(saved, start, stop)
        if found is not None:
            return found, ""
        with located(dotted.shown(saved.name)):
            lora = self.lora()
            found = None if lora is None else self._taken(lora, start, stop)
            if found is not None and not (self.ends_in_diff and _is_large(found)):
                return found, _words_of(found)
            found = self._taken(self.as_diff(), start, stop)
        assert found is not None
        return found, _words_of(found)

    @staticmethod
    def _taken(saved: SavedLayer, start: int, stop: int) -> SavedLayer | None:
        """None where that is no layer of this algorithm: lengths of columns are those of all rows together."""
        magnitude = saved.magnitude
        if magnitude is not None and magnitude.numel() != magnitude.shape[0]:
            return None
        taken = saved.algorithm.take(saved.tensors, saved.alpha, start, stop)
        rows = None if magnitude is None else magnitude[start:stop]
        return None if taken is None else replace(saved, tensors=taken[0], alpha=taken[1], magnitude=rows)

    def lora(self) -> SavedLayer | None:
        """As a LoRA, where it is known to be one."""
        try:
            return self.as_lora()
        except ValueError:
            return None

    @property
    def ends_in_diff(self) -> bool:
        """Whether there is a way to the whole difference."""
        return self.weight is not None or (self.saved.magnitude is None and not self.saved.algorithm.spec.relative)

    def lengths(self) -> Tensor | None:
        """[O, 1..], of the rows of W' as DoRA has them; None where it acts on columns, or W' is not known."""
        ones = [1] * (len(self.shape) - 1)
        if self.saved.magnitude is not None:
            on_rows = self.saved.side(weight_geometry(self.shape)) == "output"
            return self.saved.magnitude.reshape(-1, *ones) if on_rows else None
        if self.weight is None:
            return None
        return _lengths(merged_weight(self.saved, self.weight.double()))

    def _built(self) -> Adapter:
        """Its adapter, which knows all that it needs."""
        if not self.shape:
            self._known_weight()
        adapter = self.saved.build(weight_geometry(self.shape))
        if adapter.needs_base:
            weight = self._known_weight()
            with torch.no_grad():
                adapter.init_from_base(weight.to(wide_dtype(weight)))
        if adapter.spec.relative:
            self._known_weight()
        return adapter

    def _known_weight(self) -> Tensor:
        if self.weight is None:
            kind = self.saved.algorithm.spec.name + (
                " with DoRA magnitudes" if self.saved.magnitude is not None else ""
            )
            raise NeedsBase(
                f"its {kind} would have to be converted, which takes the base weight, and that is not known here: take "
                "a file under the trainer's names, or merge this one into its checkpoint with the program that wrote it"
            )
        return self.weight

    @property
    def _dtype(self) -> torch.dtype:
        floats = [t for t in self.saved.tensors.values() if t.is_floating_point()]
        return min((wide_dtype(t) for t in floats), key=lambda dtype: dtype.itemsize)


class _Rows:
    """A layer to be made of parts.

    Args:
        name: of it.
        sizes: output rows of the parts.
        columns: the rest of its weight's shape.
        weights: of the parts; None = not known.
    """

    def __init__(self, name: str, sizes: Sequence[int], columns: Shape, weights: Sequence[Tensor | None]) -> None:
        self.name, self.sizes, self.columns, self.weights = name, sizes, columns, weights

    def joined(self, parts: Sequence[_Part | None]) -> tuple[SavedLayer, str]:
        found = self._alike(parts)
        if found is not None:
            return found, ""
        with located(self.name):
            loras = [None if part is None else part.lora() for part in parts]
            whole = all((part is None) == (lora is None) for part, lora in zip(parts, loras, strict=True))
            found = self._alike(self._as_parts(loras)) if whole else None
            ends_in_diff = all(part is None or part.ends_in_diff for part in parts)
            if found is not None and not (ends_in_diff and _is_large(found)):
                return found, _words_of(found)
            found = self._alike(self._as_parts([None if part is None else part.as_diff() for part in parts]))
        assert found is not None
        return found, _words_of(found)

    def _as_parts(self, layers: Sequence[SavedLayer | None]) -> list[_Part | None]:
        rows = zip(layers, self.sizes, self.weights, strict=True)
        return [None if one is None else _Part(one, (size, *self.columns), weight) for one, size, weight in rows]

    def _alike(self, parts: Sequence[_Part | None]) -> SavedLayer | None:
        """The layer of parts of one algorithm; None where that has no such layer."""
        present = [part.saved for part in parts if part is not None]
        settled = _at_one_scale(present) if len({saved.algorithm for saved in present}) == 1 else None
        if settled is None:
            return None
        packs = iter(settled)
        found = self._tensors([None if part is None else next(packs) for part in parts])
        if found is not None and any(saved.magnitude is not None for saved in present):
            return self._with_lengths(found, parts)
        return None if found is None else replace(found, name=self.name)

    def _tensors(self, layers: Sequence[SavedLayer | None]) -> SavedLayer | None:
        """The same of layers at one scale, without magnitudes."""
        present = [layer for layer in layers if layer is not None]
        first = next((layer for layer in present if layer.alpha is not None), present[0])
        packs = [None if layer is None else layer.tensors for layer in layers]
        tensors, alpha = first.algorithm.join(packs, self.sizes, first.alpha), first.alpha
        if tensors is None:
            return None
        own, rank = (first.algorithm.spec.shown_rank(each) for each in (first.tensors, tensors))
        if alpha is not None and own and rank:
            alpha *= rank / own
        return replace(first, tensors=tensors, alpha=alpha)

    def _with_lengths(self, joined: SavedLayer, parts: Sequence[_Part | None]) -> SavedLayer | None:
        """With magnitudes of DoRA of all rows; parts without any keep the lengths of their rows. None where that cannot
        be, or a weight is not known."""
        having = [part for part in parts if part is not None and part.saved.magnitude is not None]
        folded = {part.folded for part in having}
        if len(folded) > 1:
            return None
        found: list[Tensor] = []
        for part, weight in zip(parts, self.weights, strict=True):
            if part is not None and (part in having or True not in folded):
                lengths = part.lengths()
            else:  # nothing is changed, or a folded magnitude, which leaves the length of such rows as it was
                lengths = None if weight is None else _lengths(weight.to(having[0].device))
            if lengths is None:
                return None
            found.append(lengths)
        return replace(joined, name=self.name, magnitude=torch.cat(found), folded=True in folded)


def _at_one_scale(layers: Sequence[SavedLayer]) -> list[SavedLayer] | None:
    """Layers of one algorithm as they are if they have one scale, or else with it in their tensors; None where those
    cannot hold it."""
    option = layers[0].algorithm.spec.alpha_option
    if len({(layer.alpha or 0.0) if option else layer.scale for layer in layers}) == 1:
        return [*layers]
    found = []
    for layer in layers:
        tensors = layer.algorithm.settled(layer.tensors, layer.alpha)
        if tensors is None:
            return None
        rank = layer.algorithm.spec.shown_rank(tensors)
        found.append(replace(layer, tensors=tensors, alpha=float(rank) if rank and not option else 0.0))
    return found


def _lengths(weight: Tensor) -> Tensor:
    """[O, 1..], of its rows; in fp32 at least, as files have them."""
    lengths = weight.double().flatten(1).norm(dim=1).to(wide_dtype(weight))
    return lengths.reshape(-1, *[1] * (weight.dim() - 1))


def _plain(saved: SavedLayer) -> SavedLayer:
    """With float8, which has few operations, as bf16, which holds all of its values."""
    tensors = {
        key: t.to(torch.bfloat16) if t.is_floating_point() and t.itemsize == 1 else t
        for key, t in saved.tensors.items()
    }
    return replace(saved, tensors=tensors)


def _with_bias(saved: SavedLayer, bias: Tensor) -> SavedLayer:
    return replace(saved, tensors={**saved.tensors, saved.algorithm.spec.bias_key: bias})


def _values(left: Tensor, right: Tensor) -> int:
    """How many a product of these factors has."""
    return left.shape[1] * (left.shape[0] + right[0].numel()) if left.shape[1] else 0


def _is_large(saved: SavedLayer) -> bool:
    up, down = (saved.tensors[LoRA.spec.keys[name]] for name in ("up", "down"))
    return down.numel() + up.numel() > LARGE * len(up) * math.prod(down.shape[1:])


def _words_of(saved: SavedLayer) -> str:
    rank = saved.algorithm.spec.shown_rank(saved.tensors)
    return f"a LoRA of rank {rank}" if rank else "the whole difference"
