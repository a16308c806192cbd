"""`--network_module networks.lora_anima`: Anima; `algo=` takes another algorithm than LoRA."""

from .hosts.sd_scripts import Entry, LoRANetwork

_ENTRY = Entry(name=__name__, algo="lora", archs=("anima",))
create_network = _ENTRY.create_network
create_network_from_weights = _ENTRY.create_network_from_weights
plan = _ENTRY.plan

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights", "plan"]
