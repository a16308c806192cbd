"""Tiny random denoisers of diffusers' real classes, or of stand-ins where it has none, one of every architecture, and a
call of each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_hunyuan_video_framepack import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR
from tiny_parts import inputs, sd_unet, sdxl_unet
from tiny_two_streams import LensTransformer2DModel, MageFlow
from torch import Tensor, nn

W = 16  # of texts
SEVERAL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
TIME = torch.tensor([500.0])


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask(tokens: int) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.bool)


def hunyuan(cls: type, **sizes: Any) -> nn.Module:
    more = {"num_refiner_layers": 1, "text_embed_dim": W, "mlp_ratio": 2.0, "in_channels": 4, "out_channels": 4}
    return cls(**{**SEVERAL, **more, **sizes})


def _flux(model: nn.Module, **more: Any) -> Any:
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
    return model(
        hidden_states=rand(1, 4, 8), encoder_hidden_states=rand(1, 5, W), timestep=torch.tensor([0.5]), **ids, **more
    )


def _framepack(model: nn.Module) -> Any:
    frames: dict[str, Any] = {"indices_latents": torch.arange(1)}
    for name, shape in (("_clean", (1, 8, 8)), ("_history_2x", (2, 8, 8)), ("_history_4x", (4, 8, 8))):
        frames[f"latents{name}"] = rand(1, 4, *shape)
        frames[f"indices_latents{name}"] = torch.arange(shape[0])
    text = {"encoder_attention_mask": mask(5), "pooled_projections": rand(1, W), "image_embeds": rand(1, 3, W)}
    guidance = torch.tensor([1000.0])
    return model(
        hidden_states=rand(1, 4, 1, 8, 8), timestep=TIME, encoder_hidden_states=rand(1, 5, W), guidance=guidance,
        **text, **frames,
    )  # fmt: skip


def _hv_1_5(model: nn.Module) -> Any:
    second = {"encoder_hidden_states_2": rand(1, 4, W), "encoder_attention_mask_2": mask(4)}
    return model(rand(1, 4, 1, 4, 4), TIME, rand(1, 5, W), mask(5), image_embeds=rand(1, 3, W), **second)


# Architecture -> a model, and a call of it.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "sd": (sd_unet, lambda m: m(*inputs())),
    "sdxl": (
        sdxl_unet,
        lambda m: m(*inputs(), added_cond_kwargs={"text_embeds": rand(2, 16), "time_ids": torch.ones(2, 6)}),
    ),
    "flux": (
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=8, num_single_layers=2, joint_attention_dim=W, pooled_projection_dim=W, guidance_embeds=True,
            axes_dims_rope=(2, 2, 4), **SEVERAL,
        ),
        lambda m: _flux(m, pooled_projections=rand(1, W), guidance=torch.ones(1)),
    ),
    "chroma": (
        lambda: diffusers.ChromaTransformer2DModel(
            in_channels=8, num_single_layers=2, joint_attention_dim=W, axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1, **SEVERAL,
        ),
        _flux,
    ),
    "flux_2": (
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=8, num_single_layers=2, joint_attention_dim=W, timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2), **SEVERAL,
        ),
        lambda m: m(
            rand(1, 4, 8), rand(1, 5, W), torch.tensor([0.5]), torch.zeros(1, 4, 4), torch.zeros(1, 5, 4), torch.ones(1)
        ),
    ),
    "sd3": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, joint_attention_dim=W, caption_projection_dim=16,
            pooled_projection_dim=W, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm", **SEVERAL,
        ),
        lambda m: m(rand(1, 4, 8, 8), rand(1, 5, W), rand(1, W), TIME),
    ),
    "lumina": (
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, axes_dim_rope=(4, 6, 6), axes_lens=(30, 32, 32), cap_feat_dim=W,
        ),
        lambda m: m(rand(1, 4, 8, 8), torch.tensor([0.5]), rand(1, 5, W), mask(5)),
    ),
    "anima": (
        lambda: diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2.0,
            text_embed_dim=W, adaln_lora_dim=4, max_size=(4, 16, 16), extra_pos_embed_type=None,
            concat_padding_mask=False,
        ),
        lambda m: m(rand(1, 4, 1, 8, 8), torch.tensor([0.5]), rand(1, 5, W)),
    ),
    "hunyuan_image": (
        lambda: hunyuan(
            diffusers.HunyuanImageTransformer2DModel, num_single_layers=2, rope_axes_dim=(4, 4), text_embed_2_dim=W,
            guidance_embeds=True,
        ),
        lambda m: m(
            rand(1, 4, 4, 4), TIME, rand(1, 5, W), mask(5), encoder_hidden_states_2=rand(1, 4, W),
            encoder_attention_mask_2=mask(4), guidance=torch.tensor([1000.0]),
        ),
    ),
    "hunyuan_video": (
        lambda: hunyuan(
            diffusers.HunyuanVideoTransformer3DModel, num_single_layers=2, rope_axes_dim=(2, 2, 4),
            pooled_projection_dim=W,
        ),
        lambda m: m(rand(1, 4, 1, 8, 8), TIME, rand(1, 5, W), mask(5), rand(1, W), torch.tensor([1000.0])),
    ),
    "hv_1_5": (
        lambda: hunyuan(
            diffusers.HunyuanVideo15Transformer3DModel, rope_axes_dim=(2, 2, 4), text_embed_2_dim=W, image_embed_dim=W
        ),
        _hv_1_5,
    ),
    "framepack": (
        lambda: hunyuan(
            HunyuanVideoFramepackTransformer3DModel, num_single_layers=2, rope_axes_dim=(2, 2, 4),
            pooled_projection_dim=W, has_image_proj=True, image_proj_dim=W, has_clean_x_embedder=True,
        ),
        _framepack,
    ),
    "ernie_image": (
        lambda: diffusers.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=16, in_channels=4, out_channels=4,
            text_in_dim=W, rope_axes_dim=(4, 6, 6),
        ),
        lambda m: m(rand(1, 4, 4, 4), TIME, rand(1, 5, W), torch.tensor([5])),
    ),
    "ideogram4": (
        lambda: diffusers.Ideogram4Transformer2DModel(
            in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, intermediate_size=16,
            adaln_dim=8, llm_features_dim=W, mrope_section=(2, 1, 1),
        ),
        lambda m: m(
            rand(1, 9, 8), torch.tensor([0.5]), rand(1, 9, W), torch.zeros(1, 9, 3, dtype=torch.long),
            torch.zeros(1, 9, dtype=torch.long),
            torch.tensor([[LLM_TOKEN_INDICATOR] * 5 + [OUTPUT_IMAGE_INDICATOR] * 4]),
        ),
    ),
    "mage_flow": (
        lambda: MageFlow(width=16, heads=2, depth=2, text_width=W),
        lambda m: m(
            SimpleNamespace(image_tokens=rand(1, 4, 128), text_tokens=rand(1, 5, W), timesteps=torch.tensor([0.5]))
        ),
    ),
    "lens": (
        lambda: LensTransformer2DModel(width=24, heads=2, depth=2, text_width=W),
        lambda m: m(rand(1, 4, 128), [rand(1, 5, W)] * 4, torch.tensor([0.5])),
    ),
    "kandinsky": (
        lambda: diffusers.Kandinsky5Transformer3DModel(
            in_text_dim=W, in_text_dim2=W, time_dim=8, model_dim=16, ff_dim=16, num_text_blocks=2,
            num_visual_blocks=2, axes_dims=(2, 2, 4),
        ),
        lambda m: m(
            rand(1, 1, 4, 4, 4), rand(1, 5, W), TIME, rand(1, W), [torch.arange(n) for n in (1, 2, 2)], torch.arange(5)
        ),
    ),
    "krea2": (
        lambda: diffusers.Krea2Transformer2DModel(
            in_channels=8, num_key_value_heads=1, intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=W,
            num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4), **SEVERAL,
        ),
        lambda m: m(rand(1, 4, 8), rand(1, 5, 2, W), torch.tensor([0.5]), torch.zeros(9, 3)),
    ),
    "qwen_image": (
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=8, out_channels=2, joint_attention_dim=W, axes_dims_rope=(2, 2, 4), **SEVERAL
        ),
        lambda m: m(
            hidden_states=rand(1, 4, 8), encoder_hidden_states=rand(1, 5, W), encoder_hidden_states_mask=mask(5),
            timestep=torch.tensor([0.5]), img_shapes=[(1, 2, 2)],
        ),
    ),
    "qwen_image_21": (
        lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, context_in_dim=W, mlp_ratio=2, axes_dims_rope=(2, 2, 4), **SEVERAL
        ),
        lambda m: m(
            hidden_states=rand(1, 16, 8), encoder_hidden_states=rand(1, 5, W), timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4)]], img_mask=torch.arange(9)[None] > 4,
        ),
    ),
    "minimax_h3": (
        lambda: diffusers.MiniMaxH3Transformer3DModel(
            hidden_size=12, num_refiner_layers=1, ffn_dim=16, in_channels=4, audio_in_channels=4, text_dim=W,
            freq_dim=8, time_embed_hidden_dim=12, time_embed_dim=8, rope_freq_dim=1, **SEVERAL,
        ),
        lambda m: m(
            rand(1, 4, 16), rand(1, 2, 4), rand(1, 5, W), torch.tensor([0.5, 0.75]),
            timestep_indices=torch.arange(11) // 7, token_tags=torch.tensor([1] * 5 + [0] * 4 + [2] * 2),
            position_ids=rand(11, 3), text_indices=torch.arange(5), video_indices=torch.arange(5, 9),
            audio_indices=torch.arange(9, 11),
        ),
    ),
    "wan": (
        lambda: diffusers.WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=W, freq_dim=8, ffn_dim=16, image_dim=W, added_kv_proj_dim=16,
            rope_max_seq_len=16, **SEVERAL,
        ),
        lambda m: m(rand(1, 4, 1, 4, 4), TIME, rand(1, 5, W), rand(1, 257, W)),
    ),
    "ltx2": (
        lambda: diffusers.LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, gated_attn=True,
            audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True, use_prompt_embeddings=False,
            **SEVERAL,
        ),
        lambda m: m(
            rand(1, 4, 4), rand(1, 3, 4), rand(1, 5, 16), rand(1, 5, 8), TIME, sigma=TIME, num_frames=1, height=2,
            width=2, audio_num_frames=3,
        ),
    ),
    "ltx_video": (
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=W, **SEVERAL
        ),
        lambda m: m(rand(1, 4, 4), rand(1, 5, W), TIME, mask(5), num_frames=1, height=2, width=2),
    ),
    "zimage": (
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=W,
            axes_dims=[4, 6, 6], axes_lens=[512, 32, 32],
        ),
        lambda m: m([rand(4, 1, 8, 8)], torch.tensor([0.5]), [rand(5, W)]),
    ),
    "ace_step": (
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=16, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=4,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=32,
        ),
        lambda m: m(rand(1, 8, 8), torch.tensor([0.5]), torch.tensor([0.5]), rand(1, 5, 16), rand(1, 8, 16)),
    ),
}  # fmt: skip
