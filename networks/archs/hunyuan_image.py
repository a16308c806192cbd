"""HunyuanImage 2.1, under the trainers' classes and diffusers'. Its text encoders are never trained."""

from __future__ import annotations

from .flux import IMAGE_QKV, NORMS, SINGLE_QKV_MLP, TEXT_QKV
from .releases import Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, Swap, below, fused

DOUBLE_BLOCKS = 20

# Normalisation of queries and keys in a double block.
QK_NORMS = (
    Rename("attn.norm_q", "img_attn_q_norm"),
    Rename("attn.norm_k", "img_attn_k_norm"),
    Rename("attn.norm_added_q", "txt_attn_q_norm"),
    Rename("attn.norm_added_k", "txt_attn_k_norm"),
)

# What stands outside the blocks: the refiner of the text, and what is the same in all models with these classes.
TEXT_IN = (
    *below(
        r"context_embedder\.",
        "txt_in.",
        Rename("proj_in", "input_embedder"),
        Rename("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        Rename("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        Rename("time_text_embed.text_embedder.linear_1", "c_embedder.linear_1"),
        Rename("time_text_embed.text_embedder.linear_2", "c_embedder.linear_2"),
    ),
    *below(
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
        r"txt_in.individual_token_refiner.blocks.\1.",
        *fused(IMAGE_QKV, "self_attn_qkv"),
        Rename("attn.to_out.0", "self_attn_proj"),
        Rename("ff.net.0.proj", "mlp.fc1"),
        Rename("ff.net.2", "mlp.fc2"),
        Rename("norm_out.linear", "adaLN_modulation.1"),
        Rename("norm1", "norm1"),
        Rename("norm2", "norm2"),
    ),
)
OUTSIDE = below(
    "",
    "",
    Rename("x_embedder.proj", "img_in.proj"),
    Rename("context_embedder_2.norm", "byt5_in.layernorm"),
    Rename("context_embedder_2.linear_1", "byt5_in.fc1"),
    Rename("context_embedder_2.linear_2", "byt5_in.fc2"),
    Rename("context_embedder_2.linear_3", "byt5_in.fc3"),
    Rename("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=Swap.ALWAYS),
    Rename("proj_out", "final_layer.linear"),
)

BLOCKS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *fused(IMAGE_QKV, "img_attn_qkv"),
        *fused(TEXT_QKV, "txt_attn_qkv"),
        Rename("attn.to_out.0", "img_attn_proj"),
        Rename("attn.to_add_out", "txt_attn_proj"),
        Rename("ff.net.0.proj", "img_mlp.fc1"),
        Rename("ff.net.2", "img_mlp.fc2"),
        Rename("ff_context.net.0.proj", "txt_mlp.fc1"),
        Rename("ff_context.net.2", "txt_mlp.fc2"),
        Rename("norm1.linear", "img_mod.linear"),
        Rename("norm1_context.linear", "txt_mod.linear"),
        *NORMS,
        *QK_NORMS,
    ),
    *below(
        r"single_transformer_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        *fused(SINGLE_QKV_MLP, "linear1"),
        Rename("proj_out", "linear2"),
        Rename("norm.linear", "modulation.linear"),
        Rename("norm.norm", "pre_norm"),
        Rename("attn.norm_q", "q_norm"),
        Rename("attn.norm_k", "k_norm"),
    ),
)
DIFFUSERS = (
    *BLOCKS,
    *TEXT_IN,
    *OUTSIDE,
    *below(
        "",
        "",
        *(
            Rename(f"time_guidance_embed.{theirs}.linear_{number}", f"{ours}.mlp.{place}")
            for theirs, ours in (
                ("timestep_embedder", "time_in"),
                ("timestep_embedder_r", "time_r_in"),
                ("guidance_embedder", "guidance_in"),
            )
            for number, place in ((1, 0), (2, 2))
        ),
    ),
)

# ComfyUI's names in a double block, but for those of the fused projections; and of everything else.
COMFYUI_DOUBLE = tuple(
    one
    for stream in ("img", "txt")
    for one in (
        Rename(f"{stream}_attn.proj", f"{stream}_attn_proj"),
        Rename(f"{stream}_attn.norm.query_norm", f"{stream}_attn_q_norm"),
        Rename(f"{stream}_attn.norm.key_norm", f"{stream}_attn_k_norm"),
        Rename(f"{stream}_mlp.0", f"{stream}_mlp.fc1"),
        Rename(f"{stream}_mlp.2", f"{stream}_mlp.fc2"),
        Rename(f"{stream}_mod.lin", f"{stream}_mod.linear"),
    )
)
COMFYUI_REST = (
    *below(
        r"single_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        Rename("modulation.lin", "modulation.linear"),
        Rename("norm.query_norm", "q_norm"),
        Rename("norm.key_norm", "k_norm"),
    ),
    *below(
        r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.",
        r"txt_in.individual_token_refiner.blocks.\1.",
        Rename("self_attn.qkv", "self_attn_qkv"),
        Rename("self_attn.proj", "self_attn_proj"),
        Rename("mlp.0", "mlp.fc1"),
        Rename("mlp.2", "mlp.fc2"),
    ),
    *below(
        r"txt_in\.",
        "txt_in.",
        Rename("t_embedder.in_layer", "t_embedder.mlp.0"),
        Rename("t_embedder.out_layer", "t_embedder.mlp.2"),
        Rename("c_embedder.in_layer", "c_embedder.linear_1"),
        Rename("c_embedder.out_layer", "c_embedder.linear_2"),
    ),
    *(
        one
        for name in ("time_in", "time_r_in", "guidance_in")
        for one in below(rf"{name}\.", f"{name}.", Rename("in_layer", "mlp.0"), Rename("out_layer", "mlp.2"))
    ),
)
COMFYUI = (
    *below(
        r"double_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        Rename("img_attn.qkv", "img_attn_qkv"),
        Rename("txt_attn.qkv", "txt_attn_qkv"),
        *COMFYUI_DOUBLE,
    ),
    *COMFYUI_REST,
)

HUNYUAN_IMAGE = ArchSpec(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    entry="lora_hunyuan_image",
    signatures=(Signature("HYImageDiffusionTransformer"), Signature("HunyuanImageTransformer2DModel")),
    timestep=Timestep(("timestep",)),
    denoiser=Part(
        "dit",
        "lora_unet",
        (
            "MMDoubleStreamBlock",
            "MMSingleStreamBlock",
            "HunyuanImageTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
        ),
        layouts=DIFFUSERS,
        comfyui=COMFYUI,
    ),
    axes=(BlockAxis("double_blocks."), BlockAxis("single_blocks.", DOUBLE_BLOCKS)),
    switches=(Switch("exclude_mod", r".*\.(img_mod|txt_mod|modulation)\..*", trained_if=False, default=True),),
    block_sets=(("double", r"double_blocks\..*"), ("single", r"single_blocks\..*")),
    fused_rows=(FusedRows(r"(double_blocks|txt_in)\..*_qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({320}),
    kinds=frozenset({10}),
    releases=(
        Release("hunyuan_image", "HunyuanImage 2.1", "HunyuanImageTransformer2DModel", {"guidance_embeds": True}),
    ),
    start=Start(
        "--network_dim 16 --network_alpha 1 --learning_rate 1e-4 --network_train_unet_only "
        "--discrete_flow_shift 5.0 --model_prediction_type raw",
        "docs/hunyuan_image_train_network.md",
    ),
)
