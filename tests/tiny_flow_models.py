"""Tiny folders of the flow-matching families with random weights, made of diffusers' real classes."""

from __future__ import annotations

import wave
from pathlib import Path

from tiny_models import make_text_encoder, make_tokenizer

TEXT_WIDTH = 16


def letters_tokenizer(length: int = 512):
    """One token for each letter, with a chat template; for T5's and Qwen's places alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=300, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def qwen3(width: int):
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3Model(config)


def scheduler(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def image_vae(channels: int = 4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_flux(folder: Path) -> Path:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip = make_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    FluxPipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=make_text_encoder(24, projection=False, tokenizer=clip),
        tokenizer=clip,
        text_encoder_2=t5(TEXT_WIDTH),
        tokenizer_2=letters_tokenizer(32),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_sd3(folder: Path) -> Path:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip = make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        scheduler=scheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=make_text_encoder(16, projection=True, tokenizer=clip),
        tokenizer=clip,
        text_encoder_2=make_text_encoder(24, projection=True, tokenizer=clip),
        tokenizer_2=clip,
        text_encoder_3=t5(48),
        tokenizer_3=letters_tokenizer(32),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_qwen_image(folder: Path) -> Path:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=1)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,  # 64 in all, as bitsandbytes' 4 bits need it
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[0.5] * 4,
    )
    QwenImagePipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=letters_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_z_image(folder: Path) -> Path:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    ZImagePipeline(
        scheduler=scheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=qwen3(TEXT_WIDTH),
        tokenizer=letters_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_ace_step(folder: Path) -> Path:
    from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
    encoder = AceStepConditionEncoder(
        hidden_size=16,
        text_hidden_dim=TEXT_WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **heads,
    )
    transformer = AceStepTransformer1DModel(
        hidden_size=16, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=4, **heads
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=16,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=8,
        sampling_rate=400,
    )
    AceStepPipeline(
        vae=vae,
        text_encoder=qwen3(TEXT_WIDTH),
        tokenizer=letters_tokenizer(),
        transformer=transformer,
        condition_encoder=encoder,
        scheduler=scheduler(num_train_timesteps=1, shift=1.0),
    ).save_pretrained(folder)
    return folder


def make_sounds(folder: Path, lengths: tuple[int, ...] = (160, 160, 100), rate: int = 400) -> Path:
    """Write tones with captions; the first has lyrics."""
    import math
    import struct

    folder.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(lengths):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(rate)
            for i in range(length):
                value = round(12000 * math.sin(i * (0.1 + 0.05 * number)))
                file.writeframes(struct.pack("<hh", value, -value))
        (folder / f"{number}.txt").write_text(f"a tone, number {number}\n", encoding="utf-8")
    (folder / "0.lyrics").write_text("[verse]\nla la\n", encoding="utf-8")
    return folder


MAKERS = {
    "FluxPipeline": make_flux,
    "StableDiffusion3Pipeline": make_sd3,
    "QwenImagePipeline": make_qwen_image,
    "ZImagePipeline": make_z_image,
    "AceStepPipeline": make_ace_step,
}
