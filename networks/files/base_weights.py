"""The weights of checkpoints by the saved names of layers, for what depends on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..tensors import base_weight
from . import stored, weight_names
from .checkpoint import Checkpoint
from .weight_names import Target


class BaseWeights:
    """Reads one weight at a time.

    Args:
        paths: of safetensors files, or of the folders of diffusers components; `lora_te1=PATH` says which text encoder
            one is, where its keys fit several.
        names: saved names of layers.

    Raises:
        ValueError: one is no checkpoint, or has none of these layers.
    """

    def __init__(self, paths: Sequence[Path | str], names: Collection[str]) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.targets: dict[str, tuple[Checkpoint, Target]] = {}
        for given in paths:
            prefix, path = divided(given)
            checkpoint = Checkpoint(path)
            found = weight_names.find(checkpoint.shapes, names, prefix)
            if not found:
                raise ValueError(f"{path} has none of the layers: give the model that the file is for")
            self.checkpoints.append(checkpoint)
            self.targets |= {name: (checkpoint, target) for name, target in found.items()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a layer's weight; None for what is in none of the checkpoints."""
        found = self.targets.get(name)
        return None if found is None else found[1].shape(found[0].shapes)

    def __call__(self, name: str) -> Tensor:
        """W [O, I, *kernel], in fp32 or wider.

        Raises:
            ValueError: no checkpoint has such a layer, or in a form that is not read.
        """
        if name not in self.targets:
            where = ", ".join(str(one.path) for one in self.checkpoints)
            raise ValueError(f"{where} has no layer {name}: give the model that the file is for")
        checkpoint, target = self.targets[name]
        pieces = [piece.of(checkpoint.shapes) for piece in target.pieces]
        device = torch.device("cpu")
        read = (base_weight.read(stored.load(checkpoint, piece.key), device) for piece in pieces)
        return torch.cat([piece.cut(weight) for piece, weight in zip(pieces, read, strict=True)])


def divided(given: Path | str) -> tuple[str, Path]:
    """The prefix of saved names and the path of `lora_te1=PATH`; "" where only a path is given."""
    prefix, equals, path = str(given).partition("=")
    return (prefix, Path(path)) if equals and prefix in weight_names.PREFIXES else ("", Path(given))
