"""Keys and shapes of saved files, written by hand from the trainers' names and sizes: one layer per architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_models import toy

import networks.lora
from networks.archs import ARCHS
from networks.files import codec

SPECS = {spec.name: spec for spec in ARCHS}
# architecture -> (dotted name, saved name, O, I)
LAYERS = {
    "sd": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768,
    ),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640, 640,
    ),
    "flux": ("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
    "chroma": ("double_blocks.0.txt_mlp.0", "lora_unet_double_blocks_0_txt_mlp_0", 12288, 3072),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536),
    "lumina": ("layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv", 3840, 2304),
    "hunyuan_image": ("single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1", 25088, 3584),
    "wan": ("blocks.0.ffn.0", "lora_unet_blocks_0_ffn_0", 13824, 5120),
    "qwen_image": ("transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q", 3072, 3072),
    "hunyuan_video": ("double_blocks.0.img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
    "hv_1_5": ("double_blocks.0.img_attn_q", "lora_unet_double_blocks_0_img_attn_q", 2048, 2048),
    "framepack": ("transformer_blocks.0.ff.net.2", "lora_unet_transformer_blocks_0_ff_net_2", 3072, 12288),
    "flux_2": ("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv", 18432, 6144),
    "zimage": ("layers.0.feed_forward.w1", "lora_unet_layers_0_feed_forward_w1", 10240, 3840),
    "kandinsky": (
        "visual_transformer_blocks.0.cross_attention.to_key",
        "lora_unet_visual_transformer_blocks_0_cross_attention_to_key", 4096, 4096,
    ),
    "krea2": ("blocks.0.attn.wk", "lora_unet_blocks_0_attn_wk", 1536, 6144),
    "ideogram4": ("layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv", 13824, 4608),
    "hidream_o1": (
        "model.language_model.layers.0.self_attn.q_proj",
        "lora_unet_model_language_model_layers_0_self_attn_q_proj", 4096, 4096,
    ),
    "ace_step": ("layers.0.self_attn.k_proj", "lycoris_layers_0_self_attn_k_proj", 1024, 2048),
    "anima": ("blocks.0.cross_attn.k_proj", "lora_unet_blocks_0_cross_attn_k_proj", 2048, 1024),
}  # fmt: skip
# arguments -> suffix -> shape, with every layer's O and I; dim 4, LoKr with factor 8
FORMS: dict[str, tuple[dict[str, str], dict[str, tuple[Any, ...]]]] = {
    "lora": ({}, {"lora_down.weight": (4, "I"), "lora_up.weight": ("O", 4)}),
    "tlora": ({"algo": "tlora"}, {"lora_down.weight": (8, "I"), "lora_up.weight": ("O", 8)}),
    "loha": (
        {"algo": "loha"},
        {"hada_w1_a": ("O", 4), "hada_w1_b": (4, "I"), "hada_w2_a": ("O", 4), "hada_w2_b": (4, "I")},
    ),
    "lokr": (
        {"algo": "lokr", "factor": "8"},
        {"lokr_w1": (8, 8), "lokr_w2_a": ("O/8", 4), "lokr_w2_b": (4, "I/8")},
    ),
    "lokr, full": (
        {"algo": "lokr", "factor": "8", "full_matrix": "True"},
        {"lokr_w1": (8, 8), "lokr_w2": ("O/8", "I/8")},
    ),
    "glora": (
        {"algo": "glora"}, {"a1.weight": ("I", 4), "a2.weight": (4, "I"), "b1.weight": ("O", 4), "b2.weight": (4, "I")}
    ),
    "diag-oft": ({"algo": "diag-oft"}, {"oft_blocks": ("O/4", 4, 4)}),
    "oft with a number of blocks": ({"algo": "diag-oft", "dim_is_count": "True"}, {"oft_blocks": (4, "O/4", "O/4")}),
    "ia3": ({"algo": "ia3"}, {"weight": ("O",), "on_input": ()}),
    "oft on the input side": (
        {"algo": "diag-oft", "dim_is_count": "True", "train_on_input": "True"},
        {"oft_R.weight": (4, "above the diagonal")},
    ),
    "ia3 on the input side": ({"algo": "ia3", "train_on_input": "True"}, {"weight": ("I",), "on_input": ()}),
    "lora, DoRA": (
        {"use_dora": "True"},
        {"lora_down.weight": (4, "I"), "lora_up.weight": ("O", 4), "dora_scale": ("O", 1)},
    ),
    "lokr, DoRA on the input side": (
        {"algo": "lokr", "factor": "8", "use_dora": "True", "wd_on_output": "False"},
        {"lokr_w1": (8, 8), "lokr_w2_a": ("O/8", 4), "lokr_w2_b": (4, "I/8"), "dora_scale": (1, "I")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", [name for name in LAYERS if name in SPECS])
def test_keys_and_shapes_of_a_file(arch: str, form: str) -> None:
    (dotted, saved, O, I), (kwargs, wanted) = LAYERS[arch], FORMS[form]
    spec = SPECS[arch]
    with torch.device("meta"):
        model = toy(arch, blocks=7 if arch == "sdxl" else 1, shrink=1)[spec.denoiser.name]
    pattern = dotted.replace(".", r"\.")
    network = networks.lora.create_network(1.0, 4, 3, None, None, model, only_patterns=pattern, **kwargs)
    sizes = {"O": O, "I": I, "O/8": O // 8, "I/8": I // 8, "O/4": O // 4}
    sizes["above the diagonal"] = (I // 4) * (I // 4 - 1) // 2
    expected = {f"{saved}.{k}": tuple(sizes.get(n, n) for n in shape) for k, shape in wanted.items()}
    tensors = codec.encode(network.adapted_layers)
    if form == "oft on the input side":  # sd-scripts' networks.oft_v2 has no alpha
        assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
        return
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {**expected, f"{saved}.alpha": ()}
    alphas = {"lokr, full": 4, "ia3": 4, "ia3 on the input side": 4, "tlora": 6}
    alpha = tensors[f"{saved}.alpha"]
    assert float(alpha) == (0 if "oft" in form else alphas.get(form, 3)) and alpha.dtype == torch.float32


def test_every_architecture_with_a_list_has_an_anchor() -> None:
    assert {spec.name for spec in ARCHS} <= LAYERS.keys(), "write the keys of one of its layers by hand"


SPLIT = {
    "flux": ("single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1", 21504, 3072, 4),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536, 3),
}


@pytest.mark.parametrize("arch", SPLIT)
def test_split_projections_are_saved_as_one(arch: str) -> None:
    dotted, saved, O, I, parts = SPLIT[arch]
    with torch.device("meta"):
        model = toy(arch, blocks=1, shrink=1)[SPECS[arch].denoiser.name]
    pattern = dotted.replace(".", r"\.")
    network = networks.lora.create_network(1.0, 4, 3, None, None, model, only_patterns=pattern, split_qkv="True")
    tensors = codec.encode(network.adapted_layers)
    assert {key.removeprefix(saved): tuple(t.shape) for key, t in tensors.items()} == {
        ".lora_down.weight": (4 * parts, I), ".lora_up.weight": (O, 4 * parts), ".alpha": ()
    }  # fmt: skip
    assert float(tensors[f"{saved}.alpha"]) == 3 * parts
