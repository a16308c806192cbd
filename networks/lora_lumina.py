"""`--network_module networks.lora_lumina`: Lumina Image 2.0; `algo=` takes another algorithm than LoRA."""

from .hosts.sd_scripts import Entry, LoRANetwork

_ENTRY = Entry(name=__name__, algo="lora", archs=("lumina",))
create_network = _ENTRY.create_network
create_network_from_weights = _ENTRY.create_network_from_weights
plan = _ENTRY.plan

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights", "plan"]
