"""Stable Diffusion 1.x / 2.x and SDXL, under the trainers' classes and under diffusers'.

Saved names are the trainers': for SD the diffusers names of the layers, for SDXL those of the original release
(input_blocks, middle_block, output_blocks). The block numbers are the trainers' too: 25 for SD, 23 for SDXL.
"""

from __future__ import annotations

import re

from .releases import Encoder, Release
from .spec import ArchSpec, BlockLevels, Part, Signature, Start, Switch, Timestep, Unread
from .spellings import Pairs, Rename, below, divided, subtrees

TRANSFORMER = ("Transformer2DModel",)
CONVOLUTIONAL = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
# The same classes under the names which they have had over the versions of their library.
CLIP = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
# transformers 5 dropped the text_model level of CLIPTextModel; no reader knows the shorter names.
CLIP_VERSIONS: Pairs = tuple((top, f"text_model.{top}") for top in ("encoder.", "embeddings.", "final_layer_norm"))
# OpenCLIP's: SD 2.x's text encoder and SDXL's second, as they were released and as ComfyUI and sd-scripts save them.
OPEN_CLIP = (
    *below(
        r"transformer\.resblocks\.(\d+)\.",
        r"text_model.encoder.layers.\1.",
        *divided("attn.in_proj_weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), bare=True),
        Rename("attn.out_proj", "self_attn.out_proj"),
        Rename("mlp.c_fc", "mlp.fc1"),
        Rename("mlp.c_proj", "mlp.fc2"),
        Rename("ln_1", "layer_norm1"),
        Rename("ln_2", "layer_norm2"),
    ),
    Rename("ln_final", "text_model.final_layer_norm"),
    Rename("text_projection", "text_projection", bare=True, transposed=True),
)
# What stands before the names of text encoders' layers in checkpoints, by their number; None = the only one of SD.
CLIP_ROOTS: dict[int | None, tuple[str, ...]] = {
    None: ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.model.", ""),
    1: ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", ""),
    2: ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.", ""),
}

# The same in adapter files: of OneTrainer, with dots, and by the names that ComfyUI has for its encoders.
CLIP_FILE_ROOTS: dict[int | None, tuple[str, ...]] = {
    None: (
        "lora_te.", "lora_te1_", "lora_te1.", "clip_l.", "clip_h.", "clip_l.transformer.", "clip_h.transformer.",
        "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer.",
    ),
    1: ("lora_te1.", "clip_l.", "clip_l.transformer."),
    2: ("lora_te2.", "clip_g.", "clip_g.transformer."),
}  # fmt: skip


def of_processors(attentions: Pairs) -> tuple[Rename, ...]:
    """Names in older files of diffusers, whose factors belong to a processor of attention; `to_q_lora` is one of them.

    Args:
        attentions: what stands before the blocks of transformers, and before those of the trainer's.
    """
    return tuple(
        Rename(
            rf"{re.escape(own)}(.*)transformer_blocks\.(\d+)\.attn(\d)\.processor\.to_{theirs}{end}",
            rf"{trainer}\1transformer_blocks.\2.attn\3.to_{ours}",
        )
        for own, trainer in attentions
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out.0"))
        for end in ("_lora", "")
    )


# What sd-scripts' image generation does with cross attention when a prompt has several parts.
REGIONS: Pairs = (
    ("text", r".*\.attn2\.to_[kv]"),
    ("query", r".*\.attn2\.to_q"),
    ("out", r".*\.attn2\.to_out\.0"),
    ("plain", r"(.*\.)?time_emb.*"),
)


# What sd-scripts' networks.oft trains beside the attention on request.
NO_ATTENTION = Switch("enable_all_linear", r".*\.(proj_in|proj_out|ff\.net\.(0\.proj|2))", True, default=True)


def clip(number: int | None, unread: tuple[Unread, ...] = ()) -> Part:
    """A CLIP text encoder: `lora_te`, or `lora_te1`, `lora_te2` where there are several.

    Args:
        number: None = the only one.
        unread: what of it this architecture does not use.
    """
    suffix = "" if number is None else str(number)
    component = "text_encoder_2" if number == 2 else "text_encoder"
    return Part(
        f"text_encoder{suffix}",
        f"lora_te{suffix}",
        CLIP,
        versions=CLIP_VERSIONS,
        release=OPEN_CLIP,
        roots=CLIP_ROOTS[number],
        diffusers=component,
        file_roots=CLIP_FILE_ROOTS[number],
        unread=unread,
    )


_LAYERS = r"text_model\.encoder\.layers\.(\d+)\..*"


def _sd_blocks() -> tuple[tuple[str, int], ...]:
    """0 conv_in and the time embedding; 1-11 down, 12 the middle, 13-24 up; resampling counts with its block."""
    table = [("conv_in", 0), ("time_embedding.", 0), ("mid_block.", 12)]
    for i in range(4):
        table += [(f"down_blocks.{i}.{kind}.{j}.", 1 + 3 * i + j) for kind in ("resnets", "attentions") for j in (0, 1)]
        table += [(f"down_blocks.{i}.downsamplers.", 3 + 3 * i), (f"up_blocks.{i}.upsamplers.", 15 + 3 * i)]
        table += [
            (f"up_blocks.{i}.{kind}.{j}.", 13 + 3 * i + j) for kind in ("resnets", "attentions") for j in (0, 1, 2)
        ]
    return tuple(table)


def _resnet(old: str, new: str) -> list[tuple[str, str]]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return [(f"{old}.{a}", f"{new}.{b}") for a, b in names.items()]


def _release_names(levels: int) -> Pairs:
    """diffusers' names -> the original release's, of a UNet with so many levels."""
    pairs = [
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        *_resnet("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0.", "middle_block.1."),
        *_resnet("mid_block.resnets.1", "middle_block.2"),
    ]
    for i in range(levels):
        for j in range(2):
            n = 3 * i + j + 1
            pairs += _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            pairs.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{n}.1."))
        pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"))
        for j in range(3):
            n = 3 * i + j
            pairs += _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            pairs.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{n}.1."))
        # The first level of a UNet with four has no attention, so its upsampler comes one place earlier.
        place = 1 if levels == 4 and i == 0 else 2
        pairs.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{3 * i + 2}.{place}.conv"))
    return tuple(pairs)


def _sdxl_blocks() -> tuple[tuple[str, int], ...]:
    """0 the embeddings, 1-9 input, 10-12 middle, 13-21 output, 22 the last convolution."""
    table = [("time_embed.", 0), ("label_emb.", 0), ("out.", 22)]
    table += [(f"input_blocks.{i}.", 1 + i) for i in range(9)]
    table += [(f"middle_block.{i}.", 10 + i) for i in range(3)]
    table += [(f"output_blocks.{i}.", 13 + i) for i in range(9)]
    return tuple(table)


def _clip_sizes(name: str, width: int, layers: int, heads: int, cls: str = "CLIPTextModel") -> Encoder:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return Encoder(name, cls, "CLIPTextConfig", sizes | {"num_hidden_layers": layers, "num_attention_heads": heads})


CLIP_L = _clip_sizes("clip_l", 768, 12, 12)
CLIP_L_PROJECTED = _clip_sizes("clip_l_projected", 768, 12, 12, "CLIPTextModelWithProjection")
CLIP_G = _clip_sizes("clip_g", 1280, 32, 20, "CLIPTextModelWithProjection")
_CLIP_H = _clip_sizes("clip_h", 1024, 23, 16)
_UNET = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
_UNET_XL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# The longer ones first: an upsampler stands where other levels have attention.
_SD_RELEASE = subtrees(tuple(sorted(((new, old) for old, new in _release_names(4)), key=lambda p: -len(p[0]))))
_OLDER_DIFFUSERS = "diffusers, older"

SD = ArchSpec(
    name="sd",
    title="Stable Diffusion 1.x / 2.x",
    entry="lora",
    signatures=(Signature("UNet2DConditionModel", lacks=("add_embedding", "label_emb")),),
    timestep=Timestep(("timestep",)),
    denoiser=Part(
        "unet",
        "lora_unet",
        TRANSFORMER,
        CONVOLUTIONAL,
        release=_SD_RELEASE,
        comfyui=_SD_RELEASE,
        comfyui_saved=True,
        diffusers="unet",
        others=((_OLDER_DIFFUSERS, of_processors((("", ""),))),),
    ),
    text_encoders=(clip(None, (Unread(_LAYERS, last=0, option="clip_skip"),)),),
    blocks=_sd_blocks(),
    switches=(NO_ATTENTION,),
    levels=BlockLevels(first=0, down=12, mid=1, up=12),
    usual=frozenset({192}),
    kinds=frozenset({24}),
    releases=(
        Release(
            "sd15",
            "Stable Diffusion 1.5",
            "UNet2DConditionModel",
            {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
            (CLIP_L,),
            also=("sd1", "stable-diffusion-v1-5", "stable-diffusion-v1-4"),
        ),
        Release(
            "sd21",
            "Stable Diffusion 2.1",
            "UNet2DConditionModel",
            {
                **_UNET,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            (_CLIP_H,),
            also=("sd2", "stable-diffusion-2-1", "stable-diffusion-2"),
        ),
    ),
    regions=REGIONS,
    start=Start("--network_dim 16 --network_alpha 1 --learning_rate 1e-4", "docs/train_network.md"),
)

SDXL = ArchSpec(
    name="sdxl",
    title="Stable Diffusion XL",
    entry="lora",
    signatures=(
        Signature("SdxlUNet2DConditionModel"),
        Signature("UNet2DConditionModel", has=("add_embedding",)),
    ),
    timestep=Timestep(("timesteps", "timestep")),
    denoiser=Part(
        "unet",
        "lora_unet",
        TRANSFORMER,
        CONVOLUTIONAL,
        rename=_release_names(3),
        diffusers="unet",
        others=((_OLDER_DIFFUSERS, of_processors(tuple(p for p in _release_names(3) if ".attentions." in p[0]))),),
    ),
    # Of the first one what enters the last layer is read; of the second one the end, too, for the pooled vector.
    text_encoders=(clip(1, (Unread(_LAYERS), Unread(r"text_model\.final_layer_norm"))), clip(2)),
    blocks=_sdxl_blocks(),
    switches=(NO_ATTENTION,),
    levels=BlockLevels(first=1, down=9, mid=3, up=9),
    usual=frozenset({722}),
    kinds=frozenset({24}),
    releases=(
        Release(
            "sdxl",
            "Stable Diffusion XL",
            "UNet2DConditionModel",
            _UNET_XL,
            (CLIP_L, CLIP_G),
            also=("stable-diffusion-xl-base-1.0", "illustrious-xl", "noobai-xl", "pony-diffusion-v6-xl"),
        ),
    ),
    regions=REGIONS,
    start=Start(
        "--network_dim 32 --network_alpha 16 --learning_rate 1e-4 --unet_lr 1e-4 --text_encoder_lr 1e-5",
        "docs/sdxl_train_network.md",
    ),
)
