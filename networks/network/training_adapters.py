"""Training adapters: frozen networks beside the one that is trained, which act in its training alone.

    in training    y = base(x) + each adapter's change of the base layer + the trained network's change of it
    in samples     y = base(x) + the trained network's change of it

Each change, also one that depends on the base weight (DoRA, OFT, PiSSA, ..), is that of the bare base layer: what is
trained is what the file does to the model that it is for.

They are no children of the trained network: not among its parameters, in its state or its files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..layers.runtime import Runtime

if TYPE_CHECKING:
    from .network import Network

log = logging.getLogger(__name__)

KEY = "networks_training_adapter"  # in metadata
_GIVEN = "ss_network_args"


@dataclass(frozen=True)
class TrainingAdapter:
    """One of them.

    Attributes:
        network: with its values, not attached.
        name: of its file, without the folder.
        strength: at which it acts.
        sha256: of the file.
        denoiser: the part that is called in training whether or not it is trained.
    """

    network: Network
    name: str
    strength: float
    sha256: str
    denoiser: str

    def attach(self, parts: Sequence[str] | None) -> None:
        """Take over the forwards of these parts' layers, and of the denoiser's; no other is called with gradients."""
        network = self.network
        kept = None if parts is None else {*parts, self.denoiser}
        away = [row.part for row, _ in network.layers if kept is not None and row.part not in kept]
        if away:
            log.warning(
                "training adapter %s: %d of its %d layers never act, since %s is not trained",
                self.name, len(away), len(network.layers), " and ".join(dict.fromkeys(away)),
            )  # fmt: skip
        if len(away) == len(network.layers):
            return
        network.attach(None if kept is None else sorted(kept))
        for layer in network.adapted_layers:
            weight = getattr(layer.base, "weight", None)
            if isinstance(weight, Tensor) and not weight.is_meta:
                layer.to(weight.device)


class TrainingAdapters:
    """All of a network.

    Args:
        trained: what the network's layers share.
        adapters: the first is the lowest.
    """

    def __init__(self, trained: Runtime, adapters: Sequence[TrainingAdapter] = ()) -> None:
        self.adapters = tuple(adapters)
        trained.accompanied = bool(adapters)
        for one in self.adapters:
            one.network.runtime.trained, one.network.runtime.accompanied = trained, True

    def __bool__(self) -> bool:
        return bool(self.adapters)

    @property
    def parts(self) -> set[str]:
        """Of the models, those where one of them has a layer."""
        return {row.part for one in self.adapters for row, _ in one.network.layers}

    def attach(self, parts: Sequence[str] | None) -> None:
        """Before the network that is trained, and so below it.

        Args:
            parts: that are trained; None = all.
        """
        for one in self.adapters:
            one.attach(parts)

    def detach(self) -> None:
        for one in self.adapters:
            one.network.detach()

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where `fn`, of `nn.Module._apply`, moves the trained network, and keep the dtype of the files."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        for one in self.adapters:
            one.network._apply(moved)

    def metadata(self, given: Mapping[str, str]) -> dict[str, str]:
        """What a file says of them: by name and checksum, and by no folder.

        Args:
            given: metadata of the host, among them the network arguments.
        """
        if not self:
            return {}
        told = [{"file": one.name, "strength": one.strength, "sha256": one.sha256} for one in self.adapters]
        return {KEY: json.dumps(told), **self._arguments(given)}

    def _arguments(self, given: Mapping[str, str]) -> dict[str, Any]:
        try:
            arguments = json.loads(given.get(_GIVEN) or "{}")
        except (ValueError, RecursionError):  # a host's own words
            return {}
        if not isinstance(arguments, dict) or "training_adapter" not in arguments:
            return {}
        named = ",".join(f"{one.name}:{one.strength:g}" for one in self.adapters)
        return {_GIVEN: json.dumps({**arguments, "training_adapter": named})}
