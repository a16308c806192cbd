"""Which arguments the documents of the hosts, and of LyCORIS, list for which module: names as the table has them.

Working command lines have them, also on models where they act on nothing: there they are told, and are no mistakes.
"""

from __future__ import annotations

from ..args.table import BY_NAME

# LyCORIS' document of network arguments, for `lycoris.kohya`.
_LYCORIS = (
    "algo preset conv_dim conv_alpha dropout rank_dropout rank_dropout_scale module_dropout factor decompose_both "
    "block_size use_tucker use_cp use_scalar dora_wd wd_on_output bypass_mode train_norm rescaled constraint sig_type "
    "use_data_init mask_group_id full_matrix unbalanced_factorization train_on_input"
)
# What every module of a host reads, and what some modules read beside: by their names without the package.
_EVERY = {
    "sd_scripts": "conv_dim conv_alpha dropout rank_dropout module_dropout",
    "musubi": "use_rslora use_dora loraplus_lr_ratio rank_dropout module_dropout conv_dim conv_alpha verbose",
}
_MODULES: dict[tuple[str, str], str] = {}
# By architecture: of documents of trainers for one model.
_ARCHS: dict[str, str] = {"ace_step": "factor decompose_both use_tucker use_scalar weight_decompose"}
_STYLES = {"lycoris": _LYCORIS}


def documented(host: str, module: str, algo: str, style: str, arch: str) -> frozenset[str]:
    """Names of the arguments that a document lists.

    Args:
        host: a column of the argument table, `sd_scripts`.
        module: the entry's name without the package, `lora_flux`.
        algo: the algorithm, whose own module may be in question.
        style: of the entry, `lycoris`.
        arch: name of the architecture.
    """
    found = [_EVERY.get(host, ""), _STYLES.get(style, ""), _ARCHS.get(arch, "")]
    found += [_MODULES.get((host, name), "") for name in (module, algo)]
    return frozenset(BY_NAME[name].name for name in " ".join(found).split())
