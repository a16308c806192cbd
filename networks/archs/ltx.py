"""LTX-2 and LTX-2.3, video with sound, and LTX-Video: in the trainers' classes, the releases', ComfyUI's, diffusers'.

The trainer of LTX-2 wraps the release's model: all names but those of the connectors begin with `model`. Trainers of
LTX-Video have diffusers' class.
"""

from __future__ import annotations

from .releases import Module, Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Timestep
from .spellings import Rename, below, subtrees

# What stands at the top of the release's model; ComfyUI's has the connectors there, too.
_TOPS = (
    "transformer_blocks.", "patchify_proj", "adaln_single.", "prompt_adaln_single.", "caption_projection.",
    "proj_out", "norm_out", "audio_patchify_proj", "audio_adaln_single.", "audio_prompt_adaln_single.",
    "audio_caption_projection.", "audio_proj_out", "audio_norm_out", "av_ca_",
)  # fmt: skip
RELEASE = (*((top, f"model.{top}") for top in _TOPS), ("video_embeddings_connector.", "embeddings_connector."))

_NORMS = (Rename("norm_q", "q_norm"), Rename("norm_k", "k_norm"))
_TIMES = {
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
DIFFUSERS = (
    *below(r"transformer_blocks\.(\d+)\.(\w+)\.", r"model.transformer_blocks.\1.\2.", *_NORMS),
    *below("", "model.", Rename("proj_in", "patchify_proj"), Rename("audio_proj_in", "audio_patchify_proj")),
    *(Rename(rf"{own}\.(emb\..*|linear)", rf"model.{theirs}.\1") for own, theirs in _TIMES.items()),
    *(
        one
        for own, theirs in (("video", "embeddings_connector"), ("audio", "audio_embeddings_connector"))
        for one in (
            *below(
                rf"connectors\.{own}_connector\.transformer_blocks\.(\d+)\.attn1\.",
                rf"{theirs}.transformer_1d_blocks.\1.attn1.",
                *_NORMS,
            ),
            *subtrees(((f"connectors.{own}_connector.transformer_blocks.", f"{theirs}.transformer_1d_blocks."),)),
        )
    ),
)

_ATTENTION = r"to_(q|k|v|out\.0)"
_FEED_FORWARD = r"net\.(0\.proj|2)"
_AUDIO = rf".*\.audio_(attn[12]\.{_ATTENTION}|ff\.{_FEED_FORWARD})"
PRESETS = (
    ("t2v", rf".*\.{_ATTENTION}"),
    ("v2v", rf".*\.({_ATTENTION}|(audio_)?ff\.{_FEED_FORWARD})"),
    ("video_sa", rf".*\.attn1\.{_ATTENTION}"),
    ("video_sa_ff", rf".*\.(attn1\.{_ATTENTION}|ff\.{_FEED_FORWARD})"),
    ("video_sa_ca_ff", rf".*\.(attn[12]\.{_ATTENTION}|ff\.{_FEED_FORWARD})"),
    ("audio", _AUDIO),
    ("audio_v2a", rf"{_AUDIO}|.*\.video_to_audio_attn\.{_ATTENTION}"),
    ("audio_ref_ic", rf"{_AUDIO}|.*\.(video_to_audio|audio_to_video)_attn\.{_ATTENTION}"),
    ("full", ".*"),
)
_KINDS = (("cross_modal", r".*(audio_to_video|video_to_audio|av_ca_).*"), ("audio", r".*audio_.*"))


def _connectors(blocks: int, video: int, audio: int, gates: int = 0) -> dict[str, Module]:
    """Between the text encoder and the denoiser; in diffusers a model of its own.

    Args:
        blocks: of each.
        video, audio: features.
        gates: heads whose output a layer weighs; 0 = there is no such layer.
    """
    modules: dict[str, Module] = {}
    for name, width in (("video", video), ("audio", audio)):
        layers: dict[str, Module] = {f"attn1.to_{letter}": ("Linear", (width, width)) for letter in "qkv"}
        layers |= {"attn1.to_out.0": ("Linear", (width, width)), "ff.net.0.proj": ("Linear", (width, 4 * width))}
        layers |= {"ff.net.2": ("Linear", (4 * width, width))}
        layers |= {f"attn1.norm_{letter}": ("RMSNorm", (width,)) for letter in "qk"}
        if gates:
            layers["attn1.to_gate_logits"] = "Linear", (width, gates)
        for i in range(blocks):
            block = f"connectors.{name}_connector.transformer_blocks.{i}"
            modules[block] = "LTX2TransformerBlock1d", ()
            modules |= {f"{block}.{layer}": module for layer, module in layers.items()}
    return modules


LTX2 = ArchSpec(
    name="ltx2",
    title="LTX-2",
    entry="lora_ltx2",
    signatures=(
        Signature("LTX2Wrapper", has=("model.transformer_blocks",)),
        Signature("LTXModel", has=("transformer_blocks",)),
        Signature("LTXAVModel"),
        Signature("LTX2VideoTransformer3DModel"),
    ),
    timestep=Timestep(("timestep",), noise=1.0, noise_of=(("LTX2VideoTransformer3DModel", 1000.0),)),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("BasicAVTransformerBlock", "LTX2VideoTransformerBlock"),
        rename=RELEASE,
        layouts=DIFFUSERS,
        comfyui=subtrees(RELEASE),
        components=("connectors.",),
        optional=(
            (
                "connector_lora",
                ("_BasicTransformerBlock1D", "BasicTransformerBlock1D", "LTX2TransformerBlock1d"),
            ),
        ),
    ),
    axes=(BlockAxis("model.transformer_blocks."),),
    layer_dims=tuple((f"{name}_dim", regex) for name, regex in _KINDS),
    layer_alphas=tuple((f"{name}_alpha", regex) for name, regex in _KINDS),
    target_presets=PRESETS,
    usual=frozenset({1152, 384}),
    kinds=frozenset({16, 4}),
    releases=(
        Release(
            "ltx23",
            "LTX-2.3",
            "LTX2VideoTransformer3DModel",
            {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
            | {"use_prompt_embeddings": False},
            added=_connectors(8, 4096, 2048, 32),
            also=("ltx-2.3", "ltx-2.3-22b"),
        ),
        Release(
            "ltx2",
            "LTX-2",
            "LTX2VideoTransformer3DModel",
            added=_connectors(2, 3840, 3840),
            also=("ltx-2", "ltx-2-19b", "ltxv2"),
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 32 --learning_rate 1e-4 --timestep_sampling shifted_logit_normal",
        "the document of the fork of musubi-tuner that trains it",
    ),
)

_FILE = (
    *below(
        r"transformer_blocks\.(\d+)\.(attn\d)\.",
        r"transformer_blocks.\1.\2.",
        Rename("q_norm", "norm_q"),
        Rename("k_norm", "norm_k"),
    ),
    *subtrees((("patchify_proj", "proj_in"), ("adaln_single.", "time_embed."))),
)

LTX_VIDEO = ArchSpec(
    name="ltx_video",
    title="LTX-Video",
    entry="lora",
    signatures=(Signature("LTXVideoTransformer3DModel"),),
    timestep=Timestep(("timestep",)),
    denoiser=Part("dit", "lora_unet", ("LTXVideoTransformerBlock",), release=_FILE, comfyui=_FILE),
    axes=(BlockAxis("transformer_blocks."),),
    usual=frozenset({280, 480}),
    kinds=frozenset({6}),
    releases=(
        Release("ltx_video", "LTX-Video, 2B", "LTXVideoTransformer3DModel", also=("ltxv", "ltx-video-2b", "ltxv-2b")),
        Release(
            "ltx_video_13b",
            "LTX-Video, 13B",
            "LTXVideoTransformer3DModel",
            {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
            also=("ltxv-13b", "ltx-video-0.9.7", "ltx-video-0.9.8"),
        ),
    ),
)
