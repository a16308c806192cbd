"""The keys of a file, kept: layers that have changed are written under the names and in the way which it has."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dialects, dotted, twins
from .adapter_file import AdapterFile
from .codec import SavedLayer


class FileKeys:
    """How one file writes its layers.

    Args:
        file: opened without an architecture, so that layers have its own names.
        whole: layers stay as they are or lose their magnitudes.

    Raises:
        ValueError: its magnitudes hold for the whole update alone, of which something may change.
    """

    def __init__(self, file: AdapterFile, whole: bool = False) -> None:
        if file.flags.dialect.fold_flag and not whole:
            raise ValueError(
                f"{file.source}: its DoRA magnitudes hold for the whole update alone (save_format=comfyui): convert it "
                "to portable first"
            )
        self._format = dialects.FileFormat(file.flags.dialect, bool(file.flags.rs_lora))
        self._keys = dict[tuple[str, str], str]()
        self._paths = dict[str, list[str]]()
        for key, path, suffix in dotted.divided(file.tensors):
            self._keys[path, dotted.own_suffix(path, suffix)] = key
            self._paths.setdefault(path, []).append(key)
        self._tensors = file.tensors
        # PEFT's own form has none; everywhere else some reader takes a missing one for 1
        self._alphas = not file.dotted or any(suffix == dotted.ALPHA for _, suffix in self._keys)
        # Layers that have each other's names in the file keep them there.
        self._layers = {self._path(name): layer for name, layer in file.layers.items()}

    def _path(self, name: str) -> str:
        """What the file calls a layer."""
        return dotted.shown(twins.name_in(self._tensors, name))

    def rest(self) -> dict[str, Tensor]:
        """The tensors of what is no layer: flags of the whole, and keys of what is no adapter."""
        return {
            key: self._tensors[key] for path, keys in self._paths.items() if path not in self._layers for key in keys
        }

    def of(self, layer: SavedLayer) -> dict[str, Tensor]:
        """The tensors of a layer. One that stayed as it was has its very tensors.

        Args:
            layer: by the name that the opened file has for it.
        """
        path, dialect = self._path(layer.name), self._format.dialect
        if layer is self._layers.get(path) and self._holds(path, layer.alpha):
            return {key: self._tensors[key] for key in self._paths[path]}
        tensors, alpha = dict(layer.tensors), layer.alpha
        if not self._alphas and alpha is not None:
            settled = layer.algorithm.settled(tensors, alpha)
            tensors, alpha = (settled, None) if settled is not None else (tensors, alpha)
        written = {self._key(path, dialect.written_suffix(suffix), suffix): t for suffix, t in tensors.items()}
        if layer.magnitude is not None:
            old = self._keys.get((path, dialect.magnitude))
            magnitude = layer.magnitude if old is None else layer.magnitude.reshape(self._tensors[old].shape)
            written[old or f"{path}.{dialect.magnitude}"] = magnitude
        if alpha is not None:
            value = self._format.alpha(alpha, layer.algorithm.spec.shown_rank(tensors))
            written[self._key(path, dotted.ALPHA, dotted.ALPHA)] = torch.tensor(value, dtype=torch.float32)
        return {key: tensor.contiguous() for key, tensor in written.items()}

    def _holds(self, path: str, alpha: float | None) -> bool:
        """Whether the strength of a layer stands among the tensors, not beside them."""
        return alpha is None or (path, dotted.ALPHA) in self._keys

    def _key(self, path: str, suffix: str, own: str) -> str:
        """Where the layer has had such a tensor; else as the file's other layers have it."""
        old = self._keys.get((path, own))
        if old is not None:
            return old
        peft = dotted.as_in(", ".join(key.removeprefix(f"{path}.") for key in self._paths.get(path, ())), suffix)
        return f"{path}.{peft}"
