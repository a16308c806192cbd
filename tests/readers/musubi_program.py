"""Files read by musubi-tuner itself. Ways: `modules`, its network modules' merge; `strict`, those loaded as one of its
scripts does; `loading`, the merge while a checkpoint loads."""

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

stub("torchvision", "cv2", "toml", "voluptuous", "av", "easydict", "ftfy")
MODULES = {
    "hunyuan_video": "lora", "hv_1_5": "lora_hv_1_5", "framepack": "lora_framepack", "wan": "lora_wan",
    "flux": "lora_flux", "flux_2": "lora_flux_2", "qwen_image": "lora_qwen_image", "zimage": "lora_zimage",
    "kandinsky": "lora_kandinsky", "krea2": "lora_krea2", "ideogram4": "lora_ideogram4",
    "hidream_o1": "lora_hidream_o1", "qwen_image_21": "lora_qwen_image_21", "minimax_h3": "lora_minimax_h3",
}  # fmt: skip


def _module(name: str) -> Any:
    return importlib.import_module(f"musubi_tuner.{name}")


def _hunyuan_video() -> nn.Module:
    models = _module("hunyuan_model.models")
    sizes = models.HUNYUAN_VIDEO_CONFIG["HYVideo-T/2-cfgdistill"]
    return models.HYVideoDiffusionTransformer(4096, 768, in_channels=16, out_channels=16, attn_mode="torch", **sizes)


def _wan() -> nn.Module:
    torch.cuda.current_device = lambda: 0  # it asks while it is imported
    sizes = {"dim": 5120, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36, "num_heads": 40, "num_layers": 40}
    return _module("wan.modules.model").WanModel(model_type="i2v", **sizes)


def _flux() -> nn.Module:
    models = _module("flux.flux_models")
    return models.Flux(models.configs_flux_dev_context.params)


def _flux_2() -> nn.Module:
    models = _module("flux_2.flux2_models")
    return models.Flux2(models.Flux2Params(), attn_mode="torch")


def _kandinsky() -> nn.Module:
    sizes = {
        "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 3584, "in_text_dim2": 768, "time_dim": 1024,
        "patch_size": (1, 2, 2), "model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60,
        "axes_dims": (16, 24, 24), "visual_cond": True,
    }  # fmt: skip
    return _module("kandinsky5.models.dit").DiffusionTransformer3D(**sizes)


def _krea2() -> nn.Module:
    return _module("krea2.krea2_mmdit").SingleStreamDiT(_module("krea2.krea2_utils").single_mmdit_large_wide)


def _ideogram4() -> nn.Module:
    models = _module("ideogram4.ideogram4_model")
    return models.Ideogram4Transformer(models.Ideogram4Config())


def _hidream_o1() -> nn.Module:
    from transformers import Qwen3VLConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Of the version of transformers which it asks for; nothing here is computed with it.
    ROPE_INIT_FUNCTIONS.setdefault("default", lambda *args, **kwargs: (torch.ones(64), 1.0))
    sizes = Qwen3VLConfig()
    found = _module("hidream_o1.qwen3_vl_transformers").Qwen3VLForConditionalGeneration(sizes)
    found.hidream_o1_task = "i2i"
    return found


def _minimax_h3() -> nn.Module:
    models = _module("minimax_h3.model")
    return models.MiniMaxH3Model(models.MiniMaxH3Config())


DENOISERS = {
    "hunyuan_video": _hunyuan_video,
    "hv_1_5": lambda: _module("hunyuan_video_1_5.hunyuan_video_1_5_models").HunyuanVideo_1_5_DiffusionTransformer(),
    "framepack": lambda: _module("frame_pack.hunyuan_video_packed").HunyuanVideoTransformer3DModelPacked(
        has_image_proj=True, has_clean_x_embedder=True
    ),
    "wan": _wan,
    "flux": _flux,
    "flux_2": _flux_2,
    "qwen_image": lambda: _module("qwen_image.qwen_image_model").QwenImageTransformer2DModel(),
    "qwen_image_21": lambda: _module("qwen_image_21.qwen_image_21_model").QwenImage21Transformer2DModel(),
    "minimax_h3": _minimax_h3,
    "zimage": lambda: _module("zimage.zimage_model").ZImageTransformer2DModel(),
    "kandinsky": _kandinsky,
    "krea2": _krea2,
    "ideogram4": _ideogram4,
    "hidream_o1": _hidream_o1,
}


def build(arch: str) -> Models:
    with torch.device("meta"):
        return {"dit": DENOISERS[arch]()}


def _by_modules(job: dict[str, Any], models: Models, strength: float) -> None:
    module = _module(f"networks.{MODULES[job['arch']]}")
    tensors, denoiser = load_file(job["file"]), models["dit"]
    network = module.create_arch_network_from_weights(strength, tensors, unet=denoiser, for_inference=True)
    if job["way"] == "strict":
        other = copy.deepcopy(denoiser)
        whole = module.create_arch_network_from_weights(strength, tensors, unet=other, for_inference=True)
        whole.apply_to(None, other, apply_text_encoder=False, apply_unet=True)
        whole.load_state_dict(tensors, strict=True)
    network.merge_to(None, denoiser, tensors, torch.float32, torch.device("cpu"))


def _by_loading(job: dict[str, Any], models: Models, strength: float) -> None:
    """The denoiser's small weights go through a checkpoint that is merged into as it loads."""
    small = {name: p for name, p in models["dit"].named_parameters() if not p.is_meta}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file({name: p.detach().contiguous() for name, p in small.items()}, path)
        merge = _module("utils.lora_utils").load_safetensors_with_lora_and_fp8
        merged = merge([path], [load_file(job["file"])], [strength], False, torch.device("cpu"))
        for name, p in small.items():
            p.data = merged[name].clone()


def read(job: dict[str, Any], models: Models, strength: float) -> None:
    (_by_loading if job["way"] == "loading" else _by_modules)(job, models, strength)


if __name__ == "__main__":
    main(build, read)
