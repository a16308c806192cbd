"""`--network_module networks.lycoris`: in place of `lycoris.kohya`, with its arguments and defaults."""

from .hosts.entry import Entry
from .hosts.key_merge import merge_weights_to_tensor
from .hosts.sd_compat import LoRAInfModule, LoRAModule, network_class

(
    create_network,
    create_network_from_weights,
    create_arch_network,
    create_arch_network_from_weights,
    prepare_network,
    plan,
) = Entry(__name__, "lora", style="lycoris").functions
LoRANetwork = network_class(__name__)

__all__ = [
    "LoRAInfModule",
    "LoRAModule",
    "LoRANetwork",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
    "merge_weights_to_tensor",
    "plan",
    "prepare_network",
]
