"""`--network_module networks.loha`: LoHa on every architecture we know; `algo=` takes another algorithm."""

from .hosts.entry import Entry, LoRANetwork
from .hosts.key_merge import merge_weights_to_tensor

create_network, create_network_from_weights, create_arch_network, create_arch_network_from_weights, plan = Entry(
    __name__, "loha"
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
