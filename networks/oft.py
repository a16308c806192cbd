"""`--network_module networks.oft`: OFT with sd-scripts' meaning of dim and alpha, its targets and its files."""

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
) = Entry(__name__, "diag-oft", style="oft", alpha=1e-3).names
