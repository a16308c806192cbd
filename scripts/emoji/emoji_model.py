"""The embedded model's parts, built and written: tokenizer, UNet, text encoder, noise schedule, diffusers folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from pixel_autoencoder import PixelUnshuffleAutoencoder  # noqa: E402
from render import BACKGROUNDS, background_caption  # noqa: E402

from networks.cli.command_line import write_atomically  # noqa: E402

EXPORTED = (
    "model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors text_encoder/config.json "
    "text_encoder/model.safetensors tokenizer/tokenizer.json tokenizer/special_tokens_map.json "
    "tokenizer/tokenizer_config.json scheduler/scheduler_config.json vae/config.json"
).split()
MAX_LENGTH = 12  # tokens: BOS, at most 7 words of caption, EOS, padding


def build_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word of the captions and background phrases; other words become <unk>."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    phrases = [*captions, *(background_caption("", name) for name in BACKGROUNDS)]
    words = sorted({word for phrase in phrases for word in re.findall(r"\w+|[^\w\s]+", phrase.lower())})
    vocabulary = {token: index for index, token in enumerate([*specials, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=MAX_LENGTH,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Caption ids [N, 12], padded the way StableDiffusionPipeline pads them."""
    return tokenizer(
        list(captions), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


class Networks(nn.Module):
    """The two networks that are trained."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def build_models(tokenizer: PreTrainedTokenizerFast) -> Networks:
    """UNet and text encoder with random weights."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=27,
        out_channels=27,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),  # diffusers reads this as the number of heads: each is 32 wide
        norm_num_groups=16,
        cross_attention_dim=128,
    )
    unet.set_attn_processor(AttnProcessor())  # 1.5 times faster than SDPA for sequences of 64 on a CPU
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=128,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return Networks(unet, text_encoder)


def build_scheduler() -> DDIMScheduler:
    """Cosine schedule and v-prediction; sampling starts at the last timestep."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",  # signal at timestep 999 is 5e-5: pure noise, as sampling starts
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,  # StableDiffusionPipeline insists on these two
        steps_offset=1,
        set_alpha_to_one=True,
    )


def build_pipeline(nets: Networks, tokenizer: PreTrainedTokenizerFast) -> StableDiffusionPipeline:
    """A stock pipeline around the given networks."""
    vae = PixelUnshuffleAutoencoder()
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=nets.text_encoder,
        tokenizer=tokenizer,
        unet=nets.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return vae.fit_pipeline(pipe)


def export(nets: Networks, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a diffusers folder in fp16 which the library versions that trainers pin and today's both open."""
    for name in ("unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    unet, text_encoder = nets.unet, nets.text_encoder
    save_half(dict(unet.state_dict()), folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_json(folder / "unet" / "config.json", public_config(unet))
    # transformers 5 dropped the prefix in memory; files of Stable Diffusion have it and every version reads it.
    text_state = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_half(text_state, folder / "text_encoder" / "model.safetensors")
    text_config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "float32",  # what to compute in: without it transformers 5 keeps the file's fp16
        **{
            key: getattr(text_encoder.config, key)
            for key in (
                "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "max_position_embeddings projection_dim hidden_act layer_norm_eps "
                "pad_token_id bos_token_id eos_token_id"
            ).split()
        },
    }
    write_json(folder / "text_encoder" / "config.json", text_config)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    write_atomically(folder / "tokenizer" / "tokenizer.json", lambda part: tokenizer.backend_tokenizer.save(str(part)))
    specials = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    write_json(folder / "tokenizer" / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_LENGTH,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **specials,
        },
    )
    write_json(folder / "scheduler" / "scheduler_config.json", public_config(build_scheduler()))
    write_json(folder / "vae" / "config.json", public_config(PixelUnshuffleAutoencoder()))
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.32.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": [PixelUnshuffleAutoencoder.__module__, PixelUnshuffleAutoencoder.__name__],
        },
    )


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as fp16 safetensors, atomically."""
    half = {name: tensor.detach().half().contiguous() for name, tensor in state.items()}
    if not all(torch.isfinite(tensor).all() for tensor in half.values()):
        raise ValueError(f"{path}: not finite in fp16")
    write_atomically(path, lambda part: save_file(half, part, metadata={"format": "pt"}))


def public_config(part: ConfigMixin) -> dict[str, object]:
    """The config of a diffusers object, with its class and without this machine's traces."""
    own = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return {"_class_name": type(part).__name__, "_diffusers_version": "0.32.0", **own}


def write_json(path: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))
