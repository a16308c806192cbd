"""Files read by sd-scripts itself. Ways: `modules`, its network modules' merge; `strict`, those loaded as its inference
scripts do; `loha`, `lokr`, those of its branch; `loading`, the merge while a checkpoint loads."""

from __future__ import annotations

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from inside import Models, main, stub
from safetensors.torch import load_file, save_file
from torch import nn

stub("torchvision", "cv2", "toml", "voluptuous", "imagesize", "library.ipex", "pytorch_lightning")
MODULES = {
    "sd": "lora", "sdxl": "lora", "flux": "lora_flux", "chroma": "lora_flux", "sd3": "lora_sd3",
    "lumina": "lora_lumina", "hunyuan_image": "lora_hunyuan_image", "anima": "lora_anima",
}  # fmt: skip


def _denoiser(arch: str) -> nn.Module:
    def library(name: str) -> Any:
        return importlib.import_module(f"library.{name}")

    if arch == "sd":
        sizes = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
        return library("original_unet").UNet2DConditionModel(**sizes)
    if arch == "sdxl":
        return library("sdxl_original_unet").SdxlUNet2DConditionModel()
    if arch == "flux":
        models = library("flux_models")
        return models.Flux(models.configs["dev"].params)
    if arch == "chroma":
        models = library("chroma_models")
        return models.Chroma(models.chroma_params)
    if arch == "sd3":
        models = library("sd3_models")
        medium = (2, 24, 36864, 384, 2048, "rms", list(range(13)), 4096, 1536, "3-5-medium")
        return models.create_sd3_mmdit(models.SD3Params(*medium))
    if arch == "lumina":
        return library("lumina_models").NextDiT_2B_GQA_patch2_Adaln_Refiner()
    if arch == "hunyuan_image":
        return library("hunyuan_image_models").HYImageDiffusionTransformer()
    sizes = {
        "max_img_h": 512, "max_img_w": 512, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "concat_padding_mask": True,
        "crossattn_emb_channels": 1024, "use_adaln_lora": True, "adaln_lora_dim": 256, "num_blocks": 28,
        "num_heads": 16, "use_llm_adapter": True, "pos_emb_cls": "rope3d",
    }  # fmt: skip
    return library("anima_models").Anima(**sizes)


def _encoders(arch: str) -> dict[str, nn.Module]:
    import transformers as t

    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    clip_l: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    t5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    first = {"text_encoder1": lambda: t.CLIPTextModel(t.CLIPTextConfig(**clip_l))}
    xl = {"text_encoder2": lambda: t.CLIPTextModelWithProjection(t.CLIPTextConfig(**big))}
    third = {"text_encoder3": lambda: t.T5EncoderModel(t.T5Config(**t5, feed_forward_proj="gated-gelu"))}
    found: dict[str, dict[str, Any]] = {
        "sd": {"text_encoder": first["text_encoder1"]},
        "sdxl": first | xl,
        "flux": first | third,
        "chroma": third,
        "sd3": {"text_encoder1": lambda: t.CLIPTextModelWithProjection(t.CLIPTextConfig(**clip_l))} | xl | third,
        "lumina": {"text_encoder": lambda: t.Gemma2Model(t.Gemma2Config())},
        "anima": {"text_encoder": lambda: t.Qwen3Model(t.Qwen3Config(hidden_size=1024, num_hidden_layers=28))},
    }
    return {part: build() for part, build in found.get(arch, {}).items()}


def build(arch: str) -> Models:
    with torch.device("meta"):
        denoiser = _denoiser(arch)
        return {**_encoders(arch), ("unet" if arch in ("sd", "sdxl") else "dit"): denoiser}


def _by_modules(job: dict[str, Any], models: Models, strength: float) -> None:
    name = MODULES[job["arch"]] if job["way"] in ("modules", "strict") else job["way"]
    module = importlib.import_module(f"networks.{name}")
    tensors = load_file(job["file"])
    denoiser = models.get("unet", models.get("dit"))
    encoders: list[Any] = [models[part] for part in models if part.startswith("text_encoder")]
    if job["arch"] == "chroma":
        encoders = [None, *encoders]
    network, _ = module.create_network_from_weights(strength, None, None, encoders, denoiser, tensors, True)
    if job["way"] == "strict":
        copies = [copy.deepcopy(one) for one in encoders], copy.deepcopy(denoiser)
        whole, _ = module.create_network_from_weights(strength, None, None, *copies, tensors, True)
        whole.apply_to(*copies)
        whole.load_state_dict(tensors, strict=True)
    network.merge_to(encoders, denoiser, tensors, torch.float32, "cpu")


def _by_loading(job: dict[str, Any], models: Models, strength: float) -> None:
    """The small weights go through checkpoints that are merged into as they load."""
    merge: Any = importlib.import_module("library.lora_utils").load_safetensors_with_lora_and_fp8
    tensors = load_file(job["file"])
    parts = {
        "dit": ("", {key: t for key, t in tensors.items() if key.startswith("lora_unet_")}),
        "text_encoder": (
            "model.",
            {f"model_{key[8:]}": t for key, t in tensors.items() if key.startswith("lora_te_")},
        ),
    }
    for part, model in models.items():
        root, own = parts[part]
        small = {root + name: p for name, p in model.named_parameters() if not p.is_meta}
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.safetensors")
            save_file({name: p.detach().contiguous() for name, p in small.items()}, path)
            merged = merge([path], [own], [strength], False, torch.device("cpu"), False, None)
            for name, p in small.items():
                p.data = merged[name].clone()


def read(job: dict[str, Any], models: Models, strength: float) -> None:
    (_by_loading if job["way"] == "loading" else _by_modules)(job, models, strength)


if __name__ == "__main__":
    main(build, read)
