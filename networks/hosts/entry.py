"""The names that users type, bound to what every host calls in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..core.plan import Plan
from .musubi import MusubiCalls, MusubiNetwork
from .sd_compat import network_class
from .sd_scripts import LoRANetwork, SdScriptsCalls

Functions = tuple[
    Callable[..., LoRANetwork],
    Callable[..., tuple[LoRANetwork, Mapping[str, Tensor]]],
    Callable[..., MusubiNetwork],
    Callable[..., MusubiNetwork],
    Callable[..., None],
    Callable[..., Plan],
]


class Entry(SdScriptsCalls, MusubiCalls):
    """A name that users type, `networks.lokr`. Which of its functions is called tells the host."""

    @property
    def kind(self) -> type[LoRANetwork]:
        return network_class(self.name)

    @property
    def functions(self) -> Functions:
        """create_network, create_network_from_weights (sd-scripts); create_arch_network,
        create_arch_network_from_weights, prepare_network (musubi-tuner); plan."""
        return (
            self.create_network,
            self.create_network_from_weights,
            self.create_arch_network,
            self.create_arch_network_from_weights,
            self.prepare_network,
            self.plan,
        )


__all__ = ["Entry", "LoRANetwork"]
