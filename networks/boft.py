"""`--network_module networks.boft`: BOFT on the input side, as PEFT and sd-scripts have it, with their files."""

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
) = Entry(__name__, "boft-input", style="boft").names
