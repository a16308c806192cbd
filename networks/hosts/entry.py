"""The names that users type, bound to what every host calls in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..plan.plan import Plan
from . import musubi, sd_scripts
from .contract import HostNetwork
from .key_merge import merge_weights_to_tensor
from .musubi import MusubiCalls, MusubiNetwork
from .sd_compat import LoRAInfModule, LoRAModule, network_class
from .sd_scripts import LoRANetwork, SdScriptsCalls

Names = tuple[
    Callable[..., LoRANetwork],
    Callable[..., tuple[LoRANetwork, Mapping[str, Tensor]]],
    Callable[..., MusubiNetwork],
    Callable[..., MusubiNetwork],
    Callable[..., None],
    Callable[..., Plan],
    Callable[..., Tensor],
    type[LoRANetwork],
    type[LoRAModule],
    type[LoRAInfModule],
]


class Entry(SdScriptsCalls, MusubiCalls):
    """A name that users type, `networks.lokr`. Which of its functions is called tells the host."""

    @property
    def kind(self) -> type[LoRANetwork]:
        return network_class(self.name)

    @property
    def kinds(self) -> Mapping[str, type[HostNetwork]]:
        return {sd_scripts.HOST: self.kind, musubi.HOST: MusubiNetwork}

    @property
    def names(self) -> Names:
        """What hosts find in an entry.

        create_network, create_network_from_weights (sd-scripts); create_arch_network,
        create_arch_network_from_weights, prepare_network (musubi-tuner); plan; merge_weights_to_tensor (generators of
        both); the classes that files of sd-scripts import.
        """
        return (
            self.create_network,
            self.create_network_from_weights,
            self.create_arch_network,
            self.create_arch_network_from_weights,
            self.prepare_network,
            self.plan,
            merge_weights_to_tensor,
            self.kind,
            LoRAModule,
            LoRAInfModule,
        )


__all__ = ["Entry", "LoRANetwork"]
