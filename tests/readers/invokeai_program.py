"""Files read by InvokeAI itself. Ways: `identify`, what it takes a file for (keys and shapes, as JSON); else the base
model is given, and the file is loaded and applied."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from inside import Models, main, stub
from torch import nn

stub("torchvision", "cv2", "onnx", "onnxruntime", "mediapipe", "compel", "spandrel", "kernels")
BASES = {
    "sd": "sd-1", "sdxl": "sdxl", "flux": "flux", "flux_2": "flux2", "zimage": "z-image", "qwen_image": "qwen-image",
    "wan": "wan", "krea2": "krea-2", "anima": "anima",
}  # fmt: skip
# Part -> what stands before its layers in the program's own names.
PREFIXES = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder1": "lora_te1_", "text_encoder2": "lora_te2_"},
    "flux": {"dit": "lora_transformer-", "text_encoder1": "lora_clip-", "text_encoder3": "lora_t5-"},
    "anima": {"dit": "lora_transformer-", "text_encoder": "lora_qwen3-"},
}


def _module(name: str) -> Any:
    return importlib.import_module(f"invokeai.backend.{name}")


def _denoiser(arch: str) -> nn.Module:
    import diffusers as d

    if arch == "flux":
        sizes = (64, 768, 4096, 3072, 4.0, 24, 19, 38, [16, 56, 56], 10_000, True, True)
        models = _module("flux.model")
        return models.Flux(models.FluxParams(*sizes))
    if arch == "anima":
        sizes = _module("model_manager.load.model_loaders.anima").ANIMA_TRANSFORMER_CONFIG
        return _module("anima.anima_transformer").AnimaTransformer(**sizes)
    xl = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "use_linear_projection": True,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    built: dict[str, Any] = {
        "sd": lambda: d.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
        "sdxl": lambda: d.UNet2DConditionModel(**xl),
        "flux_2": lambda: d.Flux2Transformer2DModel(),
        "zimage": lambda: d.ZImageTransformer2DModel(),
        "qwen_image": lambda: d.QwenImageTransformer2DModel(),
        "wan": lambda: d.WanTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120),
        "krea2": lambda: d.Krea2Transformer2DModel(),
    }
    return built[arch]()


def _encoders(arch: str) -> dict[str, Any]:
    import transformers as t

    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    small: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    t5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    if arch == "sd":
        return {"text_encoder": t.CLIPTextModel(t.CLIPTextConfig(**small))}
    if arch == "sdxl":
        second = t.CLIPTextModelWithProjection(t.CLIPTextConfig(**big))
        return {"text_encoder1": t.CLIPTextModel(t.CLIPTextConfig(**small)), "text_encoder2": second}
    if arch == "flux":
        third = t.T5EncoderModel(t.T5Config(**t5, feed_forward_proj="gated-gelu"))
        return {"text_encoder1": t.CLIPTextModel(t.CLIPTextConfig(**small)), "text_encoder3": third}
    if arch == "anima":
        return {"text_encoder": t.Qwen3ForCausalLM(t.Qwen3Config(hidden_size=1024, num_hidden_layers=28))}
    return {}


def build(arch: str) -> Models:
    with torch.device("meta"):
        return {**_encoders(arch), ("unet" if arch in ("sd", "sdxl") else "dit"): _denoiser(arch)}


def identified(path: Path, metadata: dict[str, str]) -> list[str]:
    """The base models for which some class of its model records takes a file, of which keys and shapes are given."""
    shapes = json.loads(path.read_text(encoding="utf-8"))
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    _module("patches.layer_patcher")  # first: what follows imports it in a circle
    factory = _module("model_manager.configs.factory").ModelConfigFactory
    on_disk, found = _module("model_manager.model_on_disk").ModelOnDisk(path), []
    on_disk._state_dict_cache |= {None: tensors, path: tensors}
    on_disk._metadata_cache[path] = metadata
    for config in _module("model_manager.configs.base").Config_Base.CONFIG_CLASSES:
        if not config.__name__.startswith(("LoRA_", "ControlLoRA_")):
            continue
        try:
            fields = factory.build_common_fields(on_disk, {"hash": "-"})
            found.append(config.from_model_on_disk(on_disk, fields).base.value)
        except _module("model_manager.configs.identification_utils").NotAMatchError:
            continue
    return sorted(set(found))


def _loaded(job: dict[str, Any]) -> Any:
    taxonomy = _module("model_manager.taxonomy")
    loader_class = _module("model_manager.load.model_loaders.lora").LoRALoader
    loader = loader_class.__new__(loader_class)
    loader._model_base = taxonomy.BaseModelType(BASES[job["arch"]])
    loader._torch_dtype = torch.float32
    config = SimpleNamespace(path=job["file"], base=loader._model_base, format=taxonomy.ModelFormat.LyCORIS)
    patch = loader._load_model(config)
    if job["arch"] == "flux_2":
        convert = _module("patches.lora_conversions.flux_bfl_peft_lora_conversion_utils")
        patch = convert.convert_bfl_lora_patch_to_diffusers(patch)
    return patch


def read(job: dict[str, Any], models: Models, strength: float) -> None:
    if job["way"] == "identify":
        raise RuntimeError(f"identified as {identified(Path(job['file']), {'ss_x': '1'})}")
    patcher, patch = _module("patches.layer_patcher").LayerPatcher, _loaded(job)
    storage = _module("util.original_weights_storage").OriginalWeightsStorage
    for part, prefix in PREFIXES.get(job["arch"], {"dit": "lora_transformer-"}).items():
        patcher.apply_smart_model_patch(
            model=models[part], prefix=prefix, patch=patch, patch_weight=strength, original_weights=storage(None),
            original_modules={}, dtype=torch.float32, force_direct_patching=True, force_sidecar_patching=False,
        )  # fmt: skip


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main(build, read)
