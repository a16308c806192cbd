"""`--network_module networks.lora_anima`: Anima; `algo=` takes another algorithm than LoRA."""

from .hosts.entry import Entry, LoRANetwork

create_network, create_network_from_weights, create_arch_network, create_arch_network_from_weights, plan = Entry(
    __name__, "lora", ("anima",)
).functions

__all__ = [
    "LoRANetwork",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
    "plan",
]
