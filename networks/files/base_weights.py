"""The weights of a checkpoint by the saved names of layers, for what depends on them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ..tensors import base_weight
from . import stored, weight_names
from .checkpoint import Checkpoint


class BaseWeights:
    """Reads one weight at a time.

    Args:
        path: of a safetensors file, or of the folder of a diffusers component.
        names: saved names of layers.

    Raises:
        ValueError: it is no checkpoint, or has none of these layers.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self.checkpoint = Checkpoint(path)
        self.targets = weight_names.find(self.checkpoint.shapes, names)
        if not self.targets:
            raise ValueError(f"{path} has none of the layers: give the model that the file is for")

    def __call__(self, name: str) -> Tensor:
        """W [O, I, *kernel], in fp32 or wider.

        Raises:
            ValueError: the checkpoint has no such layer, or in a form that is not read.
        """
        if name not in self.targets:
            raise ValueError(f"{self.checkpoint.path} has no layer {name}: give the model that the file is for")
        pieces = [piece.of(self.checkpoint.shapes) for piece in self.targets[name].pieces]
        device = torch.device("cpu")
        read = (base_weight.read(stored.load(self.checkpoint, piece.key), device) for piece in pieces)
        return torch.cat([piece.cut(weight) for piece, weight in zip(pieces, read, strict=True)])
