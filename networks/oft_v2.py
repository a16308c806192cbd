"""`--network_module networks.oft_v2`: OFT on the input side (2506.19847), with dim and files as sd-scripts has them."""

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
) = Entry(__name__, "diag-oft", style="oft_v2", dim=32).names
