"""`--network_module networks.lokr`: LoKr on every architecture we know; `algo=` takes another algorithm."""

from .hosts.entry import Entry, LoRANetwork
from .hosts.key_merge import merge_weights_to_tensor

create_network, create_network_from_weights, create_arch_network, create_arch_network_from_weights, plan = Entry(
    __name__, "lokr"
).functions

__all__ = [
    "LoRANetwork",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
    "merge_weights_to_tensor",
    "plan",
]
