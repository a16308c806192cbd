"""`--network_module networks.lora`: LoRA / LoCon on every architecture we know; `algo=` takes another algorithm."""

from .hosts.entry import Entry, LoRANetwork

create_network, create_network_from_weights, create_arch_network, create_arch_network_from_weights, plan = Entry(
    __name__, "lora"
).functions

__all__ = [
    "LoRANetwork",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
    "plan",
]
