"""`--network_module networks.lora_sd3`: Stable Diffusion 3 and 3.5; `algo=` takes another algorithm than LoRA."""

from .hosts.sd_scripts import Entry, LoRANetwork

_ENTRY = Entry(name=__name__, algo="lora", archs=("sd3",))
create_network = _ENTRY.create_network
create_network_from_weights = _ENTRY.create_network_from_weights
plan = _ENTRY.plan

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights", "plan"]
