"""Mage-Flow, Mage-Flow-Edit; `algo=` takes another algorithm than LoRA. Its trainer takes the name of its own module
alone, which under the launcher stands for this one."""

from .hosts.entry import Entry

(
    create_network,
    create_network_from_weights,
    create_arch_network,
    create_arch_network_from_weights,
    prepare_network,
    plan,
    merge_weights_to_tensor,
    LoRANetwork,
    LoRAModule,
    LoRAInfModule,
) = Entry(__name__, "lora", ("mage_flow",)).names
