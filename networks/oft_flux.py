"""`--network_module networks.oft_flux`: the same for FLUX.1 and Chroma, with rotations for each projection."""

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
) = Entry(__name__, "diag-oft", ("flux", "chroma"), style="oft_flux", alpha=1e-3).names
