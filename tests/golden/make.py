"""Makes golden files: adapters, live states and training states as one version of the package wrote them.

    python tests/golden/make.py CHECKOUT FOLDER

CHECKOUT is a checkout of the version whose files are wanted; its code makes them, this file has only what is asked of
it. FOLDER, `tests/golden/<commit>`, gets

    models.json         the toy models; their weights follow from their names (replay.numbers)
    NAME.json           the cases of an algorithm, architecture or matter: the call, and all that is no tensor
    NAME.zip            of each case CASE/
                            adapter.safetensors      what save_weights wrote (and adapter-0001..., with save_dims)
                            update.safetensors       W' - W of every layer at multiplier 1
                            live.safetensors         network.state_dict() after two steps of training, at the same time
                            optimizer.safetensors    of AdamW then, `number of the parameter.name`
                            next.safetensors         W' - W after the next step; the loss before it is in the json
    states.json, .zip   whole folders of scripts/train_network.py --save_state, and what the run saved two steps later

| folder | version (`networks_version` in its files) | commit | what |
| --- | --- | --- | --- |
| 5cb7757 | 0.1.0 | 5cb7757b10b842667bb739c7873222ca5463c59c | all |

tests/test_golden.py holds every later version to all folders. Files that have been made stay as they are: what a new
version adds (an algorithm, a form of the live state, a dialect) goes into a folder of its own, with cases for that
alone and a row in the table above. For a version that writes the same thing differently: make the cases of that thing
again in a new folder, as its users will have both kinds. To make a folder again gives the same cases, and the same
values but for the last bits, which follow the machine's BLAS and LAPACK.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from golden import replay  # noqa: E402
from golden.replay import PRESET, Case  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# -- toy models: the trainers' class and layer names


def linear(inputs: int, outputs: int, bias: bool = True) -> list[Any]:
    return ["Linear", {"in_features": inputs, "out_features": outputs, "bias": bias}, ""]


def conv(kind: str, inputs: int, outputs: int, kernel: int, **more: Any) -> list[Any]:
    return [kind, {"in_channels": inputs, "out_channels": outputs, "kernel_size": kernel, **more}, ""]


def layer_norm(size: int, affine: bool = True, name: str = "") -> list[Any]:
    return ["LayerNorm", {"normalized_shape": size, "elementwise_affine": affine}, name]


_ATTENTION = "down_blocks.0.attentions.0"
_BLOCK = f"{_ATTENTION}.transformer_blocks.0"
UNET: dict[str, Any] = {
    "": "UNet2DConditionModel",
    _ATTENTION: "Transformer2DModel",
    f"{_ATTENTION}.proj_in": conv("Conv2d", 12, 8, 1),
    f"{_BLOCK}.attn1.to_q": linear(12, 8, bias=False),
    f"{_BLOCK}.ff.net.2": linear(12, 16),
    "down_blocks.0.resnets.0": "ResnetBlock2D",
    "down_blocks.0.resnets.0.conv1": conv("Conv2d", 4, 8, 3, padding=1),
}
UNET_NORMS: dict[str, Any] = {
    **UNET,
    f"{_BLOCK}.norm1": layer_norm(12),
    "down_blocks.0.resnets.0.norm1": ["GroupNorm", {"num_groups": 2, "num_channels": 8}, ""],
}
CLIP: dict[str, Any] = {
    "": "CLIPTextModel",
    "text_model.encoder.layers.0.self_attn": "CLIPAttention",
    "text_model.encoder.layers.0.self_attn.q_proj": linear(8, 8),
    "text_model.encoder.layers.0.mlp": "CLIPMLP",
    "text_model.encoder.layers.0.mlp.fc1": linear(8, 12),
}
FLUX: dict[str, Any] = {
    "": "Flux",
    "double_blocks.0": "DoubleStreamBlock",
    "double_blocks.0.img_attn.qkv": linear(8, 24),
    "double_blocks.0.img_mlp.0": linear(8, 16),
    "single_blocks.0": "SingleStreamBlock",
    "single_blocks.0.linear1": linear(8, 40),
    "single_blocks.0.linear2": linear(16, 8),
}
_RMS = ["_Rms", {"size": 8, "weight": "scale", "says_size": False}, "RMSNorm"]
FLUX_NORMS: dict[str, Any] = {
    **FLUX,
    "double_blocks.0.img_attn.norm.query_norm": _RMS,
    "double_blocks.0.img_norm1": layer_norm(8, affine=False),
}
FLUX_DIFFUSERS: dict[str, Any] = {
    "": "FluxTransformer2DModel",
    "transformer_blocks.0": "FluxTransformerBlock",
    **{f"transformer_blocks.0.attn.to_{name}": linear(8, 8) for name in "qkv"},
    "transformer_blocks.0.ff.net.0.proj": linear(8, 16),
    "single_transformer_blocks.0": "FluxSingleTransformerBlock",
    **{f"single_transformer_blocks.0.attn.to_{name}": linear(8, 8) for name in "qkv"},
    "single_transformer_blocks.0.proj_mlp": linear(8, 16),
}
WIDE: dict[str, Any] = {  # factors of LoKr with a rank below half of theirs
    "": "UNet2DConditionModel",
    _ATTENTION: "Transformer2DModel",
    f"{_BLOCK}.attn1.to_q": linear(36, 20, bias=False),
    "down_blocks.0.resnets.0": "ResnetBlock2D",
    "down_blocks.0.resnets.0.conv1": conv("Conv2d", 12, 4, 3, padding=1),
}
WAN: dict[str, Any] = {
    "": "WanModel",
    "blocks.0": "WanAttentionBlock",
    "blocks.0.norm1": layer_norm(8, affine=False, name="WanLayerNorm"),
    "blocks.0.norm2": layer_norm(8, affine=False, name="WanLayerNorm"),
    "blocks.0.norm3": layer_norm(8, name="WanLayerNorm"),
    "blocks.0.self_attn.q": linear(8, 8),
    "blocks.0.self_attn.norm_q": ["_Rms", {"size": 8}, "WanRMSNorm"],
    "blocks.0.cross_attn.norm_k": ["_Rms", {"size": 8}, "WanRMSNorm"],
}
WAN_DIFFUSERS: dict[str, Any] = {
    "": "WanTransformer3DModel",
    "blocks.0": "WanTransformerBlock",
    "blocks.0.norm1": layer_norm(8, affine=False, name="FP32LayerNorm"),
    "blocks.0.norm2": layer_norm(8, name="FP32LayerNorm"),
    "blocks.0.norm3": layer_norm(8, affine=False, name="FP32LayerNorm"),
    "blocks.0.attn1.to_q": linear(8, 8),
    "blocks.0.attn1.norm_q": ["RMSNorm", {"normalized_shape": 8, "eps": 1e-6}, ""],
    "blocks.0.attn2.norm_k": ["RMSNorm", {"normalized_shape": 8, "eps": 1e-6}, ""],
}


# -- architectures: some layers of each, under the trainers' classes


def model(cls: str, containers: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A model of Linears; sizes are (inputs, outputs)."""
    return {"": cls, **containers, **{name: linear(*size) for name, size in sizes.items()}}


def _qwen3(layer: str) -> dict[str, Any]:
    return model("Qwen3Model", {"layers.0.self_attn": "Qwen3Attention"}, {f"layers.0.self_attn.{layer}": (4, 8)})


_DOUBLE = {"double_blocks.0": "DoubleStreamBlock", "single_blocks.0": "SingleStreamBlock"}
_HUNYUAN = {"double_blocks.0": "MMDoubleStreamBlock", "single_blocks.0": "MMSingleStreamBlock"}
# architecture -> (entry, host, part -> model)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "sdxl": (
        "lora",
        "sd_scripts",
        {
            "text_encoder1": CLIP,
            "text_encoder2": {**CLIP, "": "CLIPTextModelWithProjection"},
            "unet": model(
                "SdxlUNet2DConditionModel",
                {"input_blocks.4.1": "Transformer2DModel"},
                {
                    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (12, 8),
                    "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj": (8, 16),
                },
            ),
        },
    ),
    "flux": (
        "lora_flux",
        "sd_scripts",
        {"text_encoder1": CLIP, "dit": model("Flux", _DOUBLE, {"double_blocks.0.txt_attn.qkv": (8, 24)})},
    ),
    "chroma": (
        "lora_flux",
        "sd_scripts",
        {
            "dit": model(
                "Chroma", _DOUBLE, {"double_blocks.0.img_attn.qkv": (8, 24), "single_blocks.0.linear1": (8, 40)}
            )
        },
    ),
    "sd3": (
        "lora_sd3",
        "sd_scripts",
        {
            "text_encoder1": {**CLIP, "": "CLIPTextModelWithProjection"},
            "text_encoder2": {**CLIP, "": "CLIPTextModelWithProjection"},
            "dit": model(
                "MMDiT",
                {"joint_blocks.0.context_block": "SingleDiTBlock", "joint_blocks.0.x_block": "SingleDiTBlock"},
                {"joint_blocks.0.context_block.attn.qkv": (6, 18), "joint_blocks.0.x_block.mlp.fc1": (6, 12)},
            ),
        },
    ),
    "lumina": (
        "lora_lumina",
        "sd_scripts",
        {
            "text_encoder": model(
                "Gemma2Model", {"layers.0.self_attn": "Gemma2Attention"}, {"layers.0.self_attn.q_proj": (4, 8)}
            ),
            "dit": model(
                "NextDiT",
                {"layers.0": "JointTransformerBlock"},
                {"layers.0.attention.qkv": (6, 10), "layers.0.feed_forward.w1": (6, 12)},
            ),
        },
    ),
    "hunyuan_image": (
        "lora_hunyuan_image",
        "sd_scripts",
        {
            "dit": model(
                "HYImageDiffusionTransformer",
                _HUNYUAN,
                {"double_blocks.0.img_attn_qkv": (8, 24), "single_blocks.0.linear1": (8, 40)},
            )
        },
    ),
    "anima": (
        "lora_anima",
        "sd_scripts",
        {
            "text_encoder": _qwen3("q_proj"),
            "dit": model(
                "Anima",
                {"blocks.0": "Block"},
                {"blocks.0.self_attn.q_proj": (8, 8), "blocks.0.mlp.layer1": (8, 16)},
            ),
        },
    ),
    "ace_step": (
        "lora_ace_step",
        "sd_scripts",
        {
            "dit": model(
                "AceStepDiTModel",
                {"layers.0": "AceStepDiTLayer"},
                {"layers.0.self_attn.q_proj": (8, 8), "layers.0.cross_attn.k_proj": (8, 4)},
            )
        },
    ),
    "wan": (
        "lora_wan",
        "musubi",
        {
            "dit": model(
                "WanModel",
                {"blocks.0": "WanAttentionBlock"},
                {"blocks.0.cross_attn.k": (8, 8), "blocks.0.ffn.0": (8, 16)},
            )
        },
    ),
    "qwen_image": (
        "lora_qwen_image",
        "musubi",
        {
            "dit": model(
                "QwenImageTransformer2DModel",
                {"transformer_blocks.0": "QwenImageTransformerBlock"},
                {
                    "transformer_blocks.0.attn.to_q": (8, 8),
                    "transformer_blocks.0.txt_mlp.net.0.proj": (8, 16),
                    "transformer_blocks.0.img_mod.1": (8, 24),
                },
            )
        },
    ),
    "hunyuan_video": (
        "lora",
        "musubi",
        {
            "dit": model(
                "HYVideoDiffusionTransformer",
                _HUNYUAN,
                {"double_blocks.0.txt_attn_qkv": (8, 24), "single_blocks.0.linear1": (8, 40)},
            )
        },
    ),
    "hv_1_5": (
        "lora_hv_1_5",
        "musubi",
        {
            "dit": model(
                "HunyuanVideo_1_5_DiffusionTransformer",
                _HUNYUAN,
                {"double_blocks.0.img_attn_q": (8, 8), "double_blocks.0.img_mlp.fc1": (8, 16)},
            )
        },
    ),
    "framepack": (
        "lora_framepack",
        "musubi",
        {
            "dit": model(
                "HunyuanVideoTransformer3DModelPacked",
                {
                    "transformer_blocks.0": "HunyuanVideoTransformerBlock",
                    "single_transformer_blocks.0": "HunyuanVideoSingleTransformerBlock",
                },
                {"transformer_blocks.0.attn.to_q": (8, 8), "single_transformer_blocks.0.proj_mlp": (8, 16)},
            )
        },
    ),
    "flux_kontext": ("lora_flux", "musubi", {"dit": model("Flux", _DOUBLE, {"double_blocks.0.img_attn.qkv": (8, 24)})}),
    "flux_2": (
        "lora_flux_2",
        "musubi",
        {"dit": model("Flux2", _DOUBLE, {"double_blocks.0.img_attn.qkv": (8, 24), "single_blocks.0.linear1": (8, 72)})},
    ),
    "zimage": (
        "lora_zimage",
        "musubi",
        {
            "dit": model(
                "ZImageTransformer2DModel",
                {"layers.0": "ZImageTransformerBlock"},
                {"layers.0.attention.to_q": (8, 8), "layers.0.feed_forward.w1": (8, 16)},
            )
        },
    ),
    "kandinsky": (
        "lora_kandinsky",
        "musubi",
        {
            "dit": model(
                "DiffusionTransformer3D",
                {
                    "text_transformer_blocks.0": "TransformerEncoderBlock",
                    "visual_transformer_blocks.0": "TransformerDecoderBlock",
                },
                {
                    "text_transformer_blocks.0.self_attention.to_query": (8, 8),
                    "visual_transformer_blocks.0.cross_attention.to_key": (8, 8),
                },
            )
        },
    ),
    "krea2": (
        "lora_krea2",
        "musubi",
        {
            "dit": model(
                "SingleStreamDiT",
                {"blocks.0": "SingleStreamBlock"},
                {"blocks.0.attn.wq": (8, 8), "blocks.0.mlp.gate": (8, 16)},
            )
        },
    ),
    "ideogram4": (
        "lora_ideogram4",
        "musubi",
        {
            "dit": model(
                "Ideogram4Transformer",
                {"layers.0": "Ideogram4TransformerBlock"},
                {"layers.0.attention.qkv": (8, 24), "layers.0.feed_forward.w1": (8, 16)},
            )
        },
    ),
    "hidream_o1": (
        "lora_hidream_o1",
        "musubi",
        {
            "dit": model(
                "Qwen3VLForConditionalGeneration",
                {
                    "model.language_model.layers.0": "Qwen3VLTextDecoderLayer",
                    "model.x_embedder": "BottleneckPatchEmbed",
                },
                {"model.language_model.layers.0.self_attn.q_proj": (8, 8), "model.x_embedder.proj1": (12, 8)},
            )
        },
    ),
}
NOT_IN_DIFFUSERS = ("hidream_o1",)
ALONE_IN_DIFFUSERS = ("lumina", "anima")  # it reads no adapters of their text encoders

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "unet": {"unet": UNET},
    "unet_norms": {"unet": UNET_NORMS},
    "unet_text": {"text_encoder": CLIP, "unet": UNET},
    "wide": {"unet": WIDE},
    "flux": {"dit": FLUX},
    "flux_norms": {"dit": FLUX_NORMS},
    "flux_diffusers": {"dit": FLUX_DIFFUSERS},
    "wan": {"dit": WAN},
    "wan_diffusers": {"dit": WAN_DIFFUSERS},
    **{f"arch_{name}": parts for name, (_, _, parts) in ARCHITECTURES.items()},
    **{f"arch_{name}_dit": {"dit": ARCHITECTURES[name][2]["dit"]} for name in ALONE_IN_DIFFUSERS},
}

# -- cases

CONV = {"conv_dim": "2", "conv_alpha": "1"}
DORA = {"use_dora": "True", **CONV}
INPUT = {**DORA, "wd_on_output": "False"}
REPARAM = {"loraplus_lr_ratio": "8", "loraplus_mode": "reparam"}
PREFIX = '[unknown]\nlora_prefix = "style"\n'
PREFIX = 'lora_prefix = "style"\n'
MIXED = 'lora_prefix = "style"\n[name_algo_map]\n".*to_q" = {algo = "lokr", factor = 2}\n".*conv1" = {algo = "full"}\n'

# algorithm -> what its cases have in common
PLAIN: dict[str, Case] = {
    "lora": Case("LoRA", "unet"),
    "loha": Case("LoHa", "unet", entry="networks.loha"),
    "lokr": Case("LoKr", "wide", {"factor": "2"}, entry="networks.lokr"),
    "dylora": Case("DyLoRA", "unet", {"unit": "1"}, entry="networks.dylora", dim=3, block=1),
    "lora_fa": Case("LoRA-FA", "unet", entry="networks.lora_fa"),
    "glora": Case("GLoRA", "unet", {"algo": "glora"}),
    "tlora": Case("T-LoRA", "unet", {"algo": "tlora"}, dim=3, time=400.0, computed=("lora_up.weight",)),
    "full": Case("full difference, with biases", "unet", {"algo": "full"}, exact=True),
    "diag-oft": Case("diagonal OFT", "unet", {"algo": "diag-oft"}, dim=4),
    "boft": Case("BOFT", "unet", {"algo": "boft"}, dim=4),
    "ia3": Case("IA3", "unet", {"algo": "ia3"}),
}
ADDITIVE = "lora loha lokr dylora lora_fa glora tlora".split()
LORA_FILES = "lora dylora lora_fa tlora".split()
ROTATIONS = ["diag-oft", "boft"]
EVERY = [*PLAIN]


def _dora(**args: str) -> dict[str, Any]:
    return {"args": {**DORA, **args}, "decay": 0.0}


# form -> (what it adds, to which algorithms, the call)
FORMS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "plain": ("", EVERY, {}),
    "conv": ("convolutions, too", EVERY, {"args": CONV}),
    "dora": ("DoRA on the output side", ADDITIVE, _dora()),
    "dora_input": ("DoRA on the input side", ADDITIVE, _dora(wd_on_output="False")),
    "tucker": ("Tucker form", ["lora", "loha", "lokr", "lora_fa"], {"args": {**CONV, "use_tucker": "True"}}),
    "tucker_dora": ("Tucker form, DoRA", ["lora", "loha", "lokr", "lora_fa"], _dora(use_tucker="True")),
    "scalar": ("use_scalar", ["lora", "loha", "lokr", "lora_fa", "glora"], {"args": {**CONV, "use_scalar": "True"}}),
    "scalar_dora": ("use_scalar, DoRA", ["lora", "lokr", "glora"], _dora(use_scalar="True")),
    "split": (
        "split_qkv",
        ["lora", "loha", "dylora", "lora_fa", "diag-oft"],
        {"args": {"split_qkv": "True"}, "model": "flux"},
    ),
    "rs_lora": ("RS-LoRA", ADDITIVE, {"args": {**CONV, "rs_lora": "True"}}),
    "rs_dora": ("RS-LoRA, DoRA", ["lora", "loha", "lokr"], _dora(rs_lora="True")),
    "reparam": ("LoRA+ in the parametrisation", ADDITIVE, {"args": {**CONV, **REPARAM}}),
    "reparam_dora": ("LoRA+ in the parametrisation, DoRA", ADDITIVE, _dora(**REPARAM)),
    "plus": ("LoRA+ by learning rates", ["lora", "glora", "tlora"], {"args": {"loraplus_lr_ratio": "8"}}),
    "orthogonal": (
        "orthogonal start",
        ["lora", "lokr", "dylora", "lora_fa", "glora"],
        {"args": {**CONV, "init": "orthogonal"}},
    ),
    "prefix": ("a preset's lora_prefix", EVERY, {"args": {"preset": PRESET}, "preset": PREFIX}),
    "comfyui": ("save_format=comfyui, DoRA", ADDITIVE, _dora(save_format="comfyui")),
    "blissful": ("save_format=blissful", LORA_FILES, {"args": {"save_format": "blissful"}}),
    "blissful_rs": (
        "save_format=blissful, RS-LoRA",
        LORA_FILES,
        {"args": {"save_format": "blissful", "rs_lora": "True"}},
    ),
    "diffusers": ("save_format=diffusers", LORA_FILES, {"args": {**CONV, "save_format": "diffusers"}}),
    "diffusers_dora": ("save_format=diffusers, DoRA", LORA_FILES, _dora(save_format="diffusers")),
    "diffusers_flux": (
        "save_format=diffusers, fused layers of FLUX.1",
        LORA_FILES,
        {"args": {"save_format": "diffusers"}, "model": "flux"},
    ),
    "constraint": ("constraint", ROTATIONS, {"args": {**CONV, "constraint": "0.02"}}),
    "rescaled": ("rescaled", ROTATIONS, {"args": {**CONV, "rescaled": "True"}, "decay": 0.0}),
    "rescaled_constraint": (
        "rescaled, constraint",
        ROTATIONS,
        {"args": {**CONV, "rescaled": "True", "constraint": "0.02"}, "decay": 0.0},
    ),
    "input": ("on the input side", ["diag-oft", "ia3"], {"args": {**CONV, "train_on_input": "True"}}),
}
_BLISSFUL_DORA = {"use_dora": "True", "save_format": "blissful"}
# QR and SVD in fp32 are good to 1e-6 of the largest value of their product (measured: up to 1.0e-6 from the exact one,
# up to 8.9e-7 between two sets of CPU instructions), and two of them are compared.
REFACTORED = {"product": 2, "saved": 2e-6, "decay": 0.0}
PISSA = {"init": "pissa", "enable_conv": "True", "conv_alpha": "1"}  # whose files have another dim
# file of cases -> case -> (the algorithm's plain case, what it is, the call)
OWN: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "lora": {
        "text": ("lora", "text encoder, too", {"model": "unet_text"}),
        "fused_sites": ("lora", "FLUX.1 under diffusers' class", {"model": "flux_diffusers"}),
        "fused_sites_dora": (
            "lora",
            "DoRA, FLUX.1 under diffusers' class",
            {"model": "flux_diffusers", "args": {"use_dora": "True"}, "decay": 0.0},
        ),
        "split_sites": (
            "lora",
            "split_qkv, FLUX.1 under diffusers' class",
            {"model": "flux_diffusers", "args": {"split_qkv": "True"}},
        ),
        "split_reparam": ("lora", "split_qkv, LoRA+", {"model": "flux", "args": {"split_qkv": "True", **REPARAM}}),
        "split_scalar": (
            "lora",
            "split_qkv, use_scalar",
            {"model": "flux", "args": {"split_qkv": "True", "use_scalar": "True"}},
        ),
        "split_rs_lora": (
            "lora",
            "split_qkv, RS-LoRA",
            {"model": "flux", "args": {"split_qkv": "True", "rs_lora": "True"}},
        ),
        "split_diffusers": (
            "lora",
            "split_qkv, save_format=diffusers",
            {"model": "flux", "args": {"split_qkv": "True", "save_format": "diffusers"}},
        ),
        "blissful_dora": (
            "lora",
            "save_format=blissful, DoRA",
            {"args": _BLISSFUL_DORA, "decay": 0.0, "model": "flux"},
        ),
        "blissful_rs_dora": (
            "lora",
            "save_format=blissful, RS-LoRA, DoRA",
            {"args": {**_BLISSFUL_DORA, "rs_lora": "True"}, "decay": 0.0, "model": "flux"},
        ),
        "pissa": ("lora", "PiSSA", {"args": PISSA, **REFACTORED}),
        "pissa_dora": ("lora", "PiSSA, DoRA", {"args": {**PISSA, "use_dora": "True"}, **REFACTORED}),
        "pissa_rs_lora": ("lora", "PiSSA, RS-LoRA", {"args": {**PISSA, "rs_lora": "True"}, **REFACTORED}),
        "pissa_reparam": ("lora", "PiSSA, LoRA+", {"args": {**PISSA, **REPARAM}, **REFACTORED}),
        "pissa_split": (
            "lora",
            "PiSSA, split_qkv",
            {"model": "flux", "args": {"init": "pissa", "split_qkv": "True"}, **REFACTORED},
        ),
        "mixed": (
            "lora",
            "LoRA, LoKr and full difference by a preset",
            {"model": "unet_norms", "args": {"preset": PRESET, "train_norm": "affine"}, "preset": MIXED},
        ),
    },
    "loha": {
        "split_rs_lora": (
            "loha",
            "split_qkv, RS-LoRA",
            {"model": "flux", "args": {"split_qkv": "True", "rs_lora": "True"}},
        )
    },
    "lokr": {
        "whole": ("lokr", "both factors whole", {"args": {"full_matrix": "True", **CONV}}),
        "whole_dora": ("lokr", "both factors whole, DoRA", _dora(full_matrix="True")),
        "small": ("lokr", "whole because its dim is large", {"dim": 32, "alpha": 4.0}),
        "decompose_both": ("lokr", "decompose_both", {"args": {"factor": "-1", "decompose_both": "True"}}),
        "unbalanced": ("lokr", "unbalanced_factorization", {"args": {"unbalanced_factorization": "True", **CONV}}),
    },
    "dylora": {
        "one_block": ("dylora", "one block of all ranks", {"args": {"unit": "3"}, "block": -1}),
        "cut_block": ("dylora", "the last of two blocks, which is smaller", {"args": {"unit": "2"}}),
        "save_dims": ("dylora", "save_dims", {"args": {**CONV, "save_dims": "1,2"}}),
        "save_dims_split": (
            "dylora",
            "save_dims, split_qkv, RS-LoRA",
            {"model": "flux", "args": {"split_qkv": "True", "save_dims": "2", "rs_lora": "True"}},
        ),
    },
    "lora_fa": {"pissa": ("lora_fa", "PiSSA", {"args": PISSA})},
    "tlora": {
        "last": ("tlora", "from the last singular vectors", {"args": {"sig_type": "last", **CONV}}),
        "middle": ("tlora", "from the middle", {"args": {"sig_type": "middle", **CONV}}),
        "random": ("tlora", "from a random matrix", {"args": {"use_data_init": "False", **CONV}}),
        "schedule": (
            "tlora",
            "another schedule",
            {"args": {"min_rank": "2", "alpha_rank_scale": "0.5"}, "time": 900.0},
        ),
    },
    "full": {"no_bias": ("full", "of a layer without a bias", {"args": {"only_patterns": ".*to_q"}})},
    "norm": {
        "alone": ("lora", "norm layers alone", {"model": "unet_norms", "args": {"algo": "norm"}, "exact": True}),
        "beside": (
            "lora",
            "norm layers beside LoRA",
            {"model": "unet_norms", "args": {"train_norm": "True", **CONV}},
        ),
        "beside_dora": (
            "lora",
            "norm layers beside DoRA",
            {"model": "unet_norms", "args": {"train_norm": "affine", **DORA}, "decay": 0.0},
        ),
        "prefix": (
            "lora",
            "norm layers, a preset's lora_prefix",
            {"model": "unet_norms", "args": {"train_norm": "True", "preset": PRESET}, "preset": PREFIX},
        ),
        "rms": ("lora", "norms without a bias", {"model": "flux_norms", "args": {"train_norm": "affine"}}),
        "no_affine": (
            "lora",
            "norms without a weight, too",
            {"model": "flux_norms", "args": {"train_norm": "True"}, "unmerged": True},
        ),
    },
    "diag-oft": {
        "input_constraint": (
            "diag-oft",
            "on the input side, constraint",
            {"args": {**CONV, "train_on_input": "True", "constraint": "0.02"}, "computed": ("oft_R.weight",)},
        ),
        "count": ("diag-oft", "dim_is_count", {"args": {"dim_is_count": "True"}}),
        "split_rescaled": (
            "diag-oft",
            "split_qkv, rescaled",
            {"model": "flux", "args": {"split_qkv": "True", "rescaled": "True"}, "decay": 0.0},
        ),
        "oft": ("diag-oft", "networks.oft", {"entry": "networks.oft", "alpha": 0.02, "args": {}}),
        "oft_all": (
            "diag-oft",
            "networks.oft, all layers",
            {"entry": "networks.oft", "alpha": 0.02, "args": {"enable_all_linear": "True", "enable_conv": "True"}},
        ),
        "save_format_oft": ("diag-oft", "save_format=oft", {"args": {"save_format": "oft", "constraint": "0.5"}}),
        "oft_flux": (
            "diag-oft",
            "networks.oft_flux",
            {"entry": "networks.oft_flux", "alpha": 0.02, "args": {}, "model": "flux"},
        ),
        "oft_flux_all": (
            "diag-oft",
            "networks.oft_flux, all layers",
            {
                "entry": "networks.oft_flux",
                "alpha": 0.02,
                "args": {"enable_all_linear": "True", "split_qkv": "False"},
                "model": "flux",
            },
        ),
        "save_format_oft_flux": (
            "diag-oft",
            "save_format=oft_flux",
            {"args": {"save_format": "oft_flux", "constraint": "0.5", "split_qkv": "True"}, "model": "flux"},
        ),
    },
    "wan": {
        name: (
            "lora",
            what,
            {
                "entry": "networks.lora_wan",
                "host": "musubi",
                "model": model,
                "args": {"train_norm": train_norm},
                "unmerged": train_norm == "True",
            },
        )
        for name, what, model, train_norm in (
            ("affine", "norms with a weight, the trainer's class", "wan", "affine"),
            ("all", "all norms, the trainer's class", "wan", "True"),
            ("diffusers_affine", "norms with a weight, diffusers' class", "wan_diffusers", "affine"),
            ("diffusers_all", "all norms, diffusers' class", "wan_diffusers", "True"),
        )
    },
}


def _case(algo: str, what: str, call: Mapping[str, Any]) -> Case:
    """A plain case with another call: its arguments join those of the plain one, unless the entry is another."""
    plain = PLAIN[algo]
    args = {**({} if call.get("entry", plain.entry) != plain.entry else plain.args), **call.get("args", {})}
    return replace(plain, **{**call, "args": args, "what": f"{plain.what}{': ' if what else ''}{what}"})


def cases() -> dict[str, dict[str, Case]]:
    """Name of a file -> name of a case -> case."""
    found: dict[str, dict[str, Case]] = {algo: {} for algo in EVERY}
    for form, (what, algos, call) in FORMS.items():
        for algo in algos:
            found[algo][form] = _case(algo, what, call)
    for file, own in OWN.items():
        found.setdefault(file, {}).update({name: _case(*parts) for name, parts in own.items()})
    found["archs"] = {}
    for name, (entry, host, _) in ARCHITECTURES.items():
        case = Case("LoRA", f"arch_{name}", entry=f"networks.{entry}", host=host)
        found["archs"][name] = case
        if name not in NOT_IN_DIFFUSERS:
            found["archs"][f"{name}_diffusers"] = replace(
                case,
                what="LoRA, save_format=diffusers",
                model=f"{case.model}_dit" if name in ALONE_IN_DIFFUSERS else case.model,
                args={"save_format": "diffusers"},
            )
    args = {"save_format": "blissful", "use_dora": "True", "rs_lora": "True"}
    case = replace(found["archs"]["qwen_image"], args=args, decay=0.0, what="LoRA, save_format=blissful, RS-LoRA, DoRA")
    found["archs"]["qwen_image_blissful"] = case
    return found


# -- training states

# what all runs have in common: the third of five steps is kept, in the middle of a schedule
RUN = [
    "--max_train_steps=5", "--save_every_n_steps=3", "--save_state", "--output_name=adapter", "--seed=1",
    "--train_batch_size=2", "--learning_rate=1e-2",
]  # fmt: skip
ONE_LAYER = r"only_patterns=.*mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\.to_q"
# name -> options; without weight decay where values start far from 0, as in replay.Case
STATES: dict[str, list[str]] = {
    "lora": [
        "--network_module=networks.lora", "--network_dim=2", "--network_train_unet_only", "--lr_scheduler=cosine",
        "--lr_warmup_steps=2", "--network_args", ONE_LAYER,
    ],
    "dora": [
        "--network_module=networks.lora", "--network_dim=2", "--network_train_unet_only",
        "--lr_scheduler=linear", "--lr_warmup_steps=1", "--optimizer_args", "weight_decay=0",
        "--network_args", "use_dora=True", ONE_LAYER,
    ],
    "boft": [
        "--network_module=networks.lora", "--network_dim=4", "--network_train_unet_only",
        "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=8", "--optimizer_args", "weight_decay=0",
        "--network_args", "algo=boft", "rescaled=True", ONE_LAYER,
    ],
    "lokr_text": [
        "--network_module=networks.lokr", "--network_dim=2", "--lr_scheduler=cosine_with_restarts",
        "--text_encoder_lr=5e-3", "--gradient_accumulation_steps=2", "--network_args", "factor=8",
        r"only_patterns=['.*mid_block.*attn2\.to_q', '.*layers\.0\.self_attn\.q_proj']",
    ],
}  # fmt: skip


# -- making


FACTORS = "up down mid w1 w2 w1_a w1_b w2_a w2_b t1 t2 t a1 a2 b1 b2".split()  # of which products are made


def set_values(case: Case, network: nn.Module) -> None:
    """Every parameter away from its start, to numbers that follow from its name; those which start from the base
    weight, by such numbers. Updates become about as large as the base weights."""
    from_base = case.args.get("init") == "pissa"
    factor = 0.25 if from_base or case.args.get("loraplus_mode") == "reparam" else 1.0
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value, last = replay.numbers(name, *parameter.shape), name.rpartition(".")[2]
            if last in ("magnitude", "rescale"):
                parameter.mul_(1 + value / 4)
            elif last == "scalar":
                parameter.copy_(0.75 + value / 4)
            elif last in FACTORS:
                parameter.copy_(value * factor + (parameter if from_base else 0.0))
            else:
                parameter.copy_(value / 4)


def make_case(
    case: Case, models: replay.Models, folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor] | bytes]]:
    """What is said of it, and the members of its archive."""
    said: dict[str, Any] = {"call": case.to_json(), "base": replay.digest(models)}
    torch.manual_seed(0)  # of the one start that is random and kept: T-LoRA's from a random matrix
    network = replay.create(case, models, folder)
    set_values(case, network)
    optimizer = replay.make_optimizer(case, network)
    for _ in range(2):
        replay.step(case, models, network, optimizer)
    files = replay.save(case, network, folder / "saved")
    members: dict[str, Any] = {name: path.read_bytes() for name, path in files.items()}
    said["keys"] = {name: sorted(load_file(path)) for name, path in files.items()}
    live = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    members["update.safetensors"] = replay.updates(case, models, network)
    moments, said["groups"] = replay.optimizer_tensors(optimizer)
    members["optimizer.safetensors"] = {key: tensor.clone() for key, tensor in moments.items()}
    assert all(torch.equal(tensor, live[key]) for key, tensor in network.state_dict().items()), "measuring changed it"
    members["live.safetensors"] = live
    said["loss"] = replay.step(case, models, network, optimizer)
    members["next.safetensors"] = replay.updates(case, models, network)
    for name in sorted(files.keys() - {"adapter.safetensors"}):  # what the smaller files are
        twin = replay.build(MODELS[case.model])
        before = replay.weights({part: model.double() for part, model in twin.items()})
        replay.merge_file(case, twin, files[name], folder)
        members[name.replace("adapter", "update")] = replay.changes(before, replay.weights(twin))
    return said, members


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    """The same bytes whenever it is written."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


def text_of(value: Any, indent: int = 0) -> str:
    """JSON in which what fits into a line of some length stays on one, and keys of a file get a line each."""
    whole = json.dumps(value)
    if len(whole) < 480 or not isinstance(value, (dict, list)):
        return whole
    named = value.items() if isinstance(value, dict) else (("", item) for item in value)
    rows = [
        " " * (indent + 1) + (f"{json.dumps(name)}: " if isinstance(value, dict) else "") + text_of(item, indent + 1)
        for name, item in named
    ]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(rows) + f"\n{' ' * indent}{closing}"


def write_json(path: Path, content: Any) -> None:
    path.write_text(text_of(content) + "\n", encoding="utf-8", newline="\n")


def make_adapters(folder: Path, made_by: Mapping[str, str]) -> None:
    write_json(folder / "models.json", MODELS)
    for file, own in cases().items():
        said, members = {}, {}
        for name, case in own.items():
            with tempfile.TemporaryDirectory() as scratch:
                said[name], tensors = make_case(case, replay.build(MODELS[case.model]), Path(scratch))
            for member, content in tensors.items():
                members[f"{name}/{member}"] = content if isinstance(content, bytes) else save(content)
        write_json(folder / f"{file}.json", {"made_by": made_by, "cases": said})
        write_archive(folder / f"{file}.zip", members)
        print(f"{file}: {len(own)} cases, {(folder / f'{file}.zip').stat().st_size:,} bytes")


def make_states(folder: Path, made_by: Mapping[str, str], checkout: Path) -> None:
    said, members = {}, {}
    for name, options in STATES.items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            replay.draw_images(Path(scratch) / "images")
            arguments = [*replay.run_arguments(checkout, Path(scratch)), *RUN, *options]
            subprocess.run([sys.executable, str(checkout / "scripts" / "train_network.py"), *arguments], check=True)
            for path in sorted((out / "adapter-step00000003-state").iterdir()):
                members[f"{name}/state/{path.name}"] = path.read_bytes()
            members[f"{name}/adapter.safetensors"] = (out / "adapter.safetensors").read_bytes()
            rows = (out / "adapter-loss.csv").read_text(encoding="utf-8").splitlines()[-2:]
            said[name] = {
                "options": [*RUN, *options],
                "rows": rows,
                "keys": {"adapter.safetensors": sorted(load_file(out / "adapter.safetensors"))},
            }
    write_json(folder / "states.json", {"made_by": made_by, "cases": said})
    write_archive(folder / "states.zip", members)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make golden files by the code of a checkout.", allow_abbrev=False)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    sys.path.insert(0, str(checkout))
    import networks
    from networks._version import __version__

    assert checkout in Path(networks.__path__[0]).parents, f"another package `networks` came first: {networks.__path__}"
    commit = subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True).strip()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    made_by = {"version": __version__, "commit": commit}
    make_adapters(args.folder, made_by)
    make_states(args.folder, made_by, checkout)


if __name__ == "__main__":
    main()
