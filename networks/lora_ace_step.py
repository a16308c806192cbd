"""`--network_module networks.lora_ace_step`: ACE-Step 1.5 (music); `algo=` takes another algorithm than LoRA."""

from .hosts.entry import Entry
from .hosts.sd_compat import LoRAInfModule, LoRAModule, network_class

(
    create_network,
    create_network_from_weights,
    create_arch_network,
    create_arch_network_from_weights,
    prepare_network,
    plan,
) = Entry(__name__, "lora", ("ace_step",)).functions
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
