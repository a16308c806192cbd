"""`--network_module networks.lora_ltx2`: LTX-2 and LTX-2.3; `algo=` takes another algorithm than LoRA."""

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
) = Entry(__name__, "lora", ("ltx2",)).names
