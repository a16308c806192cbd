"""`--network_module networks.lora_hv_1_5`: HunyuanVideo 1.5; `algo=` takes another algorithm than LoRA."""

from .hosts.entry import Entry
from .hosts.sd_compat import LoRAInfModule, LoRAModule, network_class

(
    create_network,
    create_network_from_weights,
    create_arch_network,
    create_arch_network_from_weights,
    prepare_network,
    plan,
) = Entry(__name__, "lora", ("hv_1_5",)).functions
LoRANetwork = network_class(__name__)

__all__ = [
    "LoRAInfModule",
    "LoRAModule",
    "LoRANetwork",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
    "plan",
    "prepare_network",
]
