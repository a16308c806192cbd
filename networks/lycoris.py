"""`--network_module networks.lycoris`: in place of `lycoris.kohya`, with its arguments and defaults."""

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
) = Entry(__name__, "lora", style="lycoris").names
