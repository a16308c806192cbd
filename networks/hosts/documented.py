"""Which arguments the documents of the hosts, and of LyCORIS, list for which module, and which its code reads.

Working command lines have them, also on models where they act on nothing: there they are told, and are no mistakes.
Under an algorithm for which a host has no module, no line of that host works, and what has no effect is a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..args.table import BY_NAME

# LyCORIS' document of network arguments, for `lycoris.kohya`.
_LYCORIS = (
    "algo preset conv_dim conv_alpha dropout rank_dropout rank_dropout_scale module_dropout factor decompose_both "
    "block_size use_tucker use_cp use_scalar dora_wd wd_on_output bypass_mode train_norm rescaled constraint sig_type "
    "use_data_init mask_group_id full_matrix unbalanced_factorization train_on_input"
)
_STYLES = {"lycoris": _LYCORIS}


@dataclass(frozen=True)
class _Documents:
    """Of one host.

    Attributes:
        every: what they list for all modules.
        modules: name of a module -> what they list for it, or it reads, beside.
    """

    every: str
    modules: Mapping[str, str]

    def of(self, module: str) -> str:
        return f"{self.every} {self.modules[module]}"


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
_HOSTS = {
    "sd_scripts": _Documents(
        "conv_dim conv_alpha dropout rank_dropout module_dropout loraplus_lr_ratio loraplus_unet_lr_ratio "
        "loraplus_text_encoder_lr_ratio use_tucker use_scalar train_norm use_dora verbose",
        {
            "lora": _BLOCKS,
            "lora_fa": _BLOCKS,
            "dylora": "unit",
            "loha": "",
            "lokr": "factor",
            "oft": "enable_all_linear enable_conv",
            "oft_flux": "enable_all_linear",
            "lora_flux": _FLUX,
            "lora_sd3": _SD3,
            "lora_lumina": "attn_dim mlp_dim mod_dim refiner_dim embedder_dims train_blocks split_qkv",
            "lora_hunyuan_image": "split_qkv ggpo_sigma ggpo_beta",
            "lora_anima": "train_llm_adapter",
        },
    ),
    # With what its forks list: one document for all modules.
    "musubi": _Documents(
        "conv_dim conv_alpha dropout rank_dropout module_dropout loraplus_lr_ratio use_rslora use_dora verbose",
        {
            "lora": "",
            "loha": "",
            "lokr": "factor",
            "lora_flux": "",
            "lora_flux_2": "",
            "lora_framepack": "",
            "lora_hidream_o1": "",
            "lora_hv_1_5": "",
            "lora_ideogram4": "",
            "lora_kandinsky": "",
            "lora_krea2": "",
            "lora_qwen_image": "exclude_mod",
            "lora_wan": "",
            "lora_zimage": "",
        },
    ),
}
# (Architecture, algorithm): of the documents of a trainer for one model.
_OF_ONE_MODEL = {("ace_step", "lokr"): "factor decompose_both use_tucker use_scalar weight_decompose"}


def documented(host: str, module: str, own_algo: str, algo: str, style: str, arch: str) -> frozenset[str]:
    """Names of the arguments that a document lists, as the table has them.

    Args:
        host: a column of the argument table, `sd_scripts`. The other one's documents count for modules which it lacks.
        module: the entry's name without the package, `lora_flux`.
        own_algo: the algorithm that the entry stands for.
        algo: the algorithm of the call; another one than its own stands for the host's module of that name.
        style: of the entry, `lycoris`.
        arch: name of the architecture.
    """
    name = module if algo == own_algo else algo
    homes = [one for key, one in sorted(_HOSTS.items(), key=lambda item: item[0] != host) if name in one.modules]
    found = [_STYLES.get(style, ""), _OF_ONE_MODEL.get((arch, algo), ""), *(one.of(name) for one in homes[:1])]
    return frozenset(BY_NAME[name].name for name in " ".join(found).split())
