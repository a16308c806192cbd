"""HunyuanVideo, HunyuanVideo 1.5 and FramePack, under the trainer's classes and diffusers'."""

from __future__ import annotations

from .flux import NORMS
from .hunyuan_image import BLOCKS, COMFYUI, COMFYUI_DOUBLE, COMFYUI_REST, OUTSIDE, QK_NORMS, TEXT_IN
from .releases import Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep, Unread
from .spellings import Rename, below, divided, exchanged, numbered

DOUBLE_BLOCKS = 20
# FramePack's trainer has diffusers' classes; those of the second line stand in diffusers' image-to-video models.
CONTAINERS = (
    "HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock",
    "HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock",
)  # fmt: skip

DIFFUSERS = (
    *BLOCKS,
    *TEXT_IN,
    *OUTSIDE,
    *below(
        "",
        "",
        Rename("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
        Rename("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
        Rename("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        Rename("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        Rename("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
        Rename("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
    ),
)

# The Open Model Initiative's standard, which OneTrainer writes: projections by number, and two names by mistake.
OMI = (
    *below(
        r"double_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *numbered("img_attn_qkv", 3),
        *numbered("txt_attn_qkv", 3),
        Rename("img_mlp.fc0", "img_mlp.fc1"),
        Rename("txt_mlp.fc0", "txt_mlp.fc1"),
    ),
    *below(r"single_blocks\.(\d+)\.", r"single_blocks.\1.", *numbered("linear1", 4)),
    *below(
        r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.",
        r"txt_in.individual_token_refiner.blocks.\1.",
        *numbered("self_attn_qkv", 3),
        Rename("mlp.fc0", "mlp.fc1"),
    ),
    *below(
        r"txt_in\.t_embedder\.",
        "txt_in.t_embedder.",
        Rename("linear_1", "mlp.0"),
        Rename("linear_2", "mlp.2"),
    ),
)

HUNYUAN_VIDEO = ArchSpec(
    name="hunyuan_video",
    title="HunyuanVideo",
    entry="lora",
    signatures=(Signature("HYVideoDiffusionTransformer"), Signature("HunyuanVideoTransformer3DModel")),
    timestep=Timestep(("t", "timestep")),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("MMDoubleStreamBlock", "MMSingleStreamBlock", *CONTAINERS),
        layouts=DIFFUSERS,
        comfyui=COMFYUI,
        others=(("OMI", OMI),),
        file_roots=("Hunyuan_video_I2V_lora_",),  # of the trainer that came with the image-to-video model
    ),
    axes=(BlockAxis("double_blocks."), BlockAxis("single_blocks.", DOUBLE_BLOCKS)),
    switches=(Switch("exclude_mod", r".*\.(img_mod|txt_mod|modulation)\..*", trained_if=False),),
    fused_rows=(FusedRows(r"(double_blocks|txt_in)\..*_qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({240}),
    kinds=frozenset({7}),
    releases=(
        Release("hunyuan_video", "HunyuanVideo", "HunyuanVideoTransformer3DModel"),
        Release(
            "hunyuan_video_i2v",
            "HunyuanVideo image to video",
            "HunyuanVideoTransformer3DModel",
            {"image_condition_type": "token_replace"},
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 2e-4 --timestep_sampling shift --discrete_flow_shift 7.0",
        "docs/hunyuan_video.md",
    ),
)

HV_1_5_DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        Rename("attn.to_q", "img_attn_q"),
        Rename("attn.to_k", "img_attn_k"),
        Rename("attn.to_v", "img_attn_v"),
        Rename("attn.to_out.0", "img_attn_proj"),
        Rename("attn.add_q_proj", "txt_attn_q"),
        Rename("attn.add_k_proj", "txt_attn_k"),
        Rename("attn.add_v_proj", "txt_attn_v"),
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
    *TEXT_IN,
    *OUTSIDE,
    *below(
        "",
        "",
        Rename("time_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
        Rename("time_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
        Rename("time_embed.timestep_embedder_r.linear_1", "time_r_in.mlp.0"),
        Rename("time_embed.timestep_embedder_r.linear_2", "time_r_in.mlp.2"),
        Rename("image_embedder.norm_in", "vision_in.proj.0"),
        Rename("image_embedder.linear_1", "vision_in.proj.1"),
        Rename("image_embedder.linear_2", "vision_in.proj.3"),
        Rename("image_embedder.norm_out", "vision_in.proj.4"),
        Rename("cond_type_embed", "cond_type_embedding"),
    ),
)
# The projections are fused under two names: in ComfyUI's classes, and in the files that it loads.
HV_1_5_COMFYUI = below(
    r"double_blocks\.(\d+)\.",
    r"double_blocks.\1.",
    *(
        one
        for stream in ("img", "txt")
        for fused in (f"{stream}_attn.qkv", f"{stream}_attn_qkv")
        for one in divided(fused, tuple(f"{stream}_attn_{letter}" for letter in "qkv"))
    ),
    *COMFYUI_DOUBLE,
)

HV_1_5 = ArchSpec(
    name="hv_1_5",
    title="HunyuanVideo 1.5",
    entry="lora_hv_1_5",
    signatures=(Signature("HunyuanVideo_1_5_DiffusionTransformer"), Signature("HunyuanVideo15Transformer3DModel")),
    timestep=Timestep(("timestep",)),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("MMDoubleStreamBlock", "HunyuanVideo15TransformerBlock"),
        layouts=HV_1_5_DIFFUSERS,
        comfyui=(*HV_1_5_COMFYUI, *COMFYUI_REST),
        # Behind the last block the video goes on alone: the text of that block ends as keys and values.
        unread=(Unread(r"double_blocks\.(\d+)\.txt_(attn_q|attn_q_norm|attn_proj|norm2|mlp\..*)"),),
    ),
    axes=(BlockAxis("double_blocks."),),
    # The trainer's default pattern, .*(_in).*, matches no layer of a block: it trains the modulation, too.
    switches=(Switch("exclude_mod", r".*\.(img_mod|txt_mod)\..*", trained_if=False, default=True),),
    usual=frozenset({756}),
    kinds=frozenset({12}),
    releases=(Release("hv_1_5", "HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel"),),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 1e-4 --task t2v --timestep_sampling shift "
        "--discrete_flow_shift 2.0 --weighting_scheme none",
        "docs/hunyuan_video_1_5.md",
    ),
)

# Of the fused layer of a single block: queries, keys, values, MLP.
FRAMEPACK_SHARES = {4: (1, 1, 1, 4)}

FRAMEPACK = ArchSpec(
    name="framepack",
    title="FramePack",
    entry="lora_framepack",
    signatures=(
        Signature("HunyuanVideoTransformer3DModelPacked"),
        Signature("HunyuanVideoFramepackTransformer3DModel"),
    ),
    timestep=Timestep(("timestep",)),
    # ComfyUI has HunyuanVideo's classes for it, and files of HunyuanVideo are used with it.
    denoiser=Part(
        "dit",
        "lora_unet",
        CONTAINERS,
        comfyui=(*exchanged(DIFFUSERS, COMFYUI, FRAMEPACK_SHARES), *exchanged(DIFFUSERS, shares=FRAMEPACK_SHARES)),
    ),
    axes=(BlockAxis("transformer_blocks."), BlockAxis("single_transformer_blocks.", DOUBLE_BLOCKS)),
    switches=(Switch("exclude_mod", r".*\.(norm|norm1|norm1_context)\.linear", trained_if=False),),
    usual=frozenset({440}),
    kinds=frozenset({17}),
    releases=(
        Release(
            "framepack",
            "FramePack",
            "HunyuanVideoFramepackTransformer3DModel",
            {"has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True},
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 2e-4 --timestep_sampling shift "
        "--discrete_flow_shift 3.0 --weighting_scheme none",
        "docs/framepack.md",
    ),
)
