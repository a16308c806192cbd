"""Which arguments the documents of the hosts, and of LyCORIS, list for which module, or its code reads.

Working command lines have them, also on models where they act on nothing: there they are told, and are no mistakes.
Under an algorithm for which a host has no module none of its lines works, so what most modules list is one there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ..args.table import BY_NAME

# LyCORIS' document of network arguments, what `lycoris.kohya` reads beside, and what GUIs write for it.
_LYCORIS = (
    "algo preset conv_dim conv_alpha dropout rank_dropout module_dropout factor decompose_both block_size use_tucker "
    "use_scalar dora_wd bypass_mode train_norm rescaled constraint sig_type use_data_init mask_group_id "
    "wd_on_output full_matrix unbalanced_factorization rs_lora train_t5xxl train_llm_adapter "
    "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio "
    "rank_dropout_scale train_on_input"
)
_STYLES = {"lycoris": _LYCORIS}


@dataclass(frozen=True)
class Documents:
    """Of one host.

    Attributes:
        common: what they list for its modules.
        modules: name of a module -> what they list for it, or it reads, beside.
    """

    common: str
    modules: Mapping[str, str]

    def of(self, module: str) -> str:
        return f"{self.common} {self.modules[module]}"


# Of both hosts, whatever the module and the algorithm: options that users give in every run.
_ALWAYS = "conv_dim conv_alpha dropout rank_dropout module_dropout"
_BLOCKS = (
    "block_dims block_alphas conv_block_dims conv_block_alphas "
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold"
)
_FLUX = (
    "img_attn_dim txt_attn_dim img_mlp_dim txt_mlp_dim img_mod_dim txt_mod_dim single_dim single_mod_dim in_dims "
    "train_blocks train_double_block_indices train_single_block_indices train_t5xxl split_qkv ggpo_sigma ggpo_beta"
)
_SD3 = (
    "context_attn_dim context_mlp_dim context_mod_dim x_attn_dim x_mlp_dim x_mod_dim emb_dims train_block_indices "
    "train_t5xxl split_qkv"
)
_LTX2 = "lora_target_preset connector_lora audio_dim audio_alpha cross_modal_dim cross_modal_alpha"
HOSTS = {
    "sd_scripts": Documents(
        "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio use_dora verbose",
        {
            "lora": "use_tucker use_scalar",
            "lora_fa": "",
            "dylora": "unit",
            "loha": "use_tucker",
            "lokr": "use_tucker factor",
            "oft": "enable_all_linear enable_conv",
            "oft_flux": "enable_all_linear",
            "oft_v2": "block_share enable_conv",
            "boft": "butterflies enable_conv",
            "lora_flux": _FLUX,
            "lora_sd3": _SD3,
            "lora_lumina": "attn_dim mlp_dim mod_dim refiner_dim embedder_dims train_blocks split_qkv",
            "lora_hunyuan_image": "split_qkv ggpo_sigma ggpo_beta",
            "lora_anima": "",
        },
    ),
    # With what its forks list: one document for all modules.
    "musubi": Documents(
        "loraplus_lr_ratio use_rslora use_dora verbose",
        {
            "lora": "",
            "loha": "",
            "lokr": "factor",
            "lora_ernie_image": "",
            "lora_flux": "",
            "lora_flux_2": "",
            "lora_framepack": "",
            "lora_hidream_o1": "",
            "lora_hv_1_5": "",
            "lora_ideogram4": "",
            "lora_kandinsky": "",
            "lora_krea2": "",
            "lora_minimax_h3": "",
            "lora_lens": "",
            "lora_mage_flow": "",
            "lora_ltx2": _LTX2,
            "lora_qwen_image": "exclude_mod",
            "lora_qwen_image_21": "",
            "lora_wan": "",
            "lora_zimage": "",
        },
    ),
}
# (Module, architecture): what they list beside for one model alone; the last is of a trainer for that model.
_OF_ONE_MODEL = {
    ("lora", "sd"): f"{_BLOCKS} train_norm",
    ("lora", "sdxl"): f"{_BLOCKS} train_norm",
    ("lora_fa", "sd"): _BLOCKS,
    ("lora_fa", "sdxl"): _BLOCKS,
    ("lokr", "ace_step"): "factor decompose_both use_tucker use_scalar weight_decompose",
}


def documented(host: str, module: str, own_algo: str, algo: str, style: str, arch: str) -> frozenset[str]:
    """Names of the arguments that a document lists, as the table has them.

    Args:
        host: a column of the argument table, `sd_scripts`. The other one's documents count for modules that it lacks;
            who calls by no host's functions has no line of one.
        module: the entry's name without the package, `lora_flux`.
        own_algo: the algorithm that the entry stands for.
        algo: the algorithm of the call; another one than its own stands for the host's module of that name.
        style: of the entry, `lycoris`.
        arch: name of the architecture.
    """
    if host not in HOSTS:
        return frozenset()
    name = module if algo == own_algo else algo
    homes = (one for one in (HOSTS[host], *HOSTS.values()) if name in one.modules)
    found = [_ALWAYS, _STYLES.get(style, ""), _OF_ONE_MODEL.get((name, arch), "")]
    found += [one.of(name) for one in itertools.islice(homes, 1)]
    return frozenset(BY_NAME[one].name for one in " ".join(found).split())
