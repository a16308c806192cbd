"""ComfyUI itself, where COMFYUI_PATH names a folder with its `comfy` package: its classes, key maps and patches.

Classes are built on the meta device, of the sizes of released models; what it makes of a file is run on weights that
are given, under its own names. Of what it imports only torch is needed: everything else that is not installed is a
stand-in which can be imported and does nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = os.environ.get("COMFYUI_PATH", "")
Target = tuple[str, int, int, bool]  # weight, first row, number of rows, whether the halves of an update change places

# Packages which it imports and which these tests have no use for.
ABSENT = (
    "comfy_aimdo", "comfy_kitchen", "torchsde", "kornia", "av", "torchvision", "torchaudio", "spandrel", "scipy",
    "sentencepiece", "blake3", "aiohttp", "torchdiffeq", "alembic", "sqlalchemy", "cv2", "einops", "gguf",
    "huggingface_guess",
)  # fmt: skip

_UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True}
_UNET |= {"use_checkpoint": False, "legacy": False, "use_temporal_attention": False}
_FLUX = {
    "image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000,
    "in_channels": 16, "out_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "hidden_size": 3072,
    "context_in_dim": 4096, "patch_size": 2, "vec_in_dim": 768, "depth": 19, "depth_single_blocks": 38,
}  # fmt: skip
_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 768,
    "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 20, "depth_single_blocks": 40, "theta": 256, "qkv_bias": True, "byt5": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
_LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}

# What it finds out from the checkpoints of the models whose layers tests/names records.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": _UNET
    | {
        "adm_in_channels": None, "num_res_blocks": [2] * 4, "transformer_depth": [1] * 6 + [0] * 2, "num_heads": 8,
        "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": False,
        "context_dim": 768, "transformer_depth_output": [1] * 9 + [0] * 3,
    },
    "sdxl": _UNET
    | {
        "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "use_linear_in_transformer": True,
        "context_dim": 2048, "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    "flux": _FLUX | {"guidance_embed": True},
    "chroma": _FLUX
    | {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072,
        "hidden_dim": 5120, "n_layers": 5, "vec_in_dim": None,
    },
    "flux_2": _FLUX
    | {
        "image_model": "flux2", "axes_dim": [32] * 4, "num_heads": 48, "mlp_ratio": 3.0, "theta": 2000,
        "in_channels": 128, "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False,
        "ops_bias": False, "txt_ids_dims": [3], "patch_size": 1, "hidden_size": 6144, "context_in_dim": 15360,
        "vec_in_dim": None, "depth": 8, "depth_single_blocks": 48, "guidance_embed": True,
    },
    "sd3": {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
        "adm_in_channels": 2048, "num_patches": 384 * 384, "pos_embed_max_size": 384, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
        "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(13)),
    },
    "qwen_image": {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
    "qwen_image_21": {"image_model": "qwen_image21", "num_layers": 32},
    "minimax_h3": {"image_model": "minimax_h3"},
    "wan": {
        "image_model": "wan2.1", "dim": 5120, "out_dim": 16, "num_heads": 40, "ffn_dim": 13824, "num_layers": 40,
        "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
        "eps": 1e-6, "in_dim": 36, "model_type": "i2v",
    },
    "hunyuan_video": _HUNYUAN,
    "framepack": _HUNYUAN,
    "hunyuan_image": _HUNYUAN
    | {
        "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [64, 64], "vec_in_dim": None,
        "context_in_dim": 3584, "hidden_size": 3584, "num_heads": 28, "byt5": True,
    },
    "hv_1_5": _HUNYUAN
    | {
        "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "context_in_dim": 3584,
        "hidden_size": 2048, "num_heads": 16, "depth": 54, "depth_single_blocks": 0, "byt5": True,
        "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
    },
    "lumina": _LUMINA
    | {
        "dim": 2304, "cap_feat_dim": 2304, "n_layers": 26, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32] * 3,
        "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
    },
    "zimage": _LUMINA
    | {
        "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32,
    },
    "anima": {
        "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "num_blocks": 28,
        "num_heads": 16, "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
        "use_adaln_lora": True, "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
        "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False,
    },
    "ace_step": {
        "audio_model": "ace1.5", "hidden_size": 2048, "intermediate_size": 6144, "num_heads": 16,
        "encoder_hidden_size": 2048, "encoder_num_heads": 16, "encoder_intermediate_size": 6144, "num_dit_layers": 24,
    },
    "hidream_o1": {"image_model": "hidream_o1"},
    "ideogram4": {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34},
    "krea2": {
        "image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28, "heads": 48, "kvheads": 12,
        "txtlayers": 12, "txtdim": 2560,
    },
    "ernie_image": {"image_model": "ernie"},
    "mage_flow": {"image_model": "mage_flow", "in_channels": 128, "num_layers": 12},
    "lens": {"image_model": "lens"},
    "kandinsky": {
        "image_model": "kandinsky5", "model_dim": 4096, "axes_dims": (32, 48, 48), "time_dim": 1024, "ff_dim": 16384,
        "visual_embed_dim": 132, "num_text_blocks": 4, "num_visual_blocks": 60,
    },
    "ltx_video": {
        "image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048,
    },
    "ltx2": {
        "image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096,
        "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
        "caption_projection_first_linear": False, "caption_projection_second_linear": False,
        "connector_num_layers": 8, "connector_num_attention_heads": 32, "connector_attention_head_dim": 128,
        "connector_apply_gated_attention": True, "audio_connector_num_attention_heads": 32,
        "audio_connector_attention_head_dim": 64,
    },
}  # fmt: skip

# Its name of each text encoder that trainers train -> (its class, the file of its sizes).
ENCODERS = {
    "clip_l": ("clip_model:CLIPTextModel", "sd1_clip_config.json"),
    "clip_g": ("clip_model:CLIPTextModel", "clip_config_bigg.json"),
    "t5xxl": ("text_encoders.t5:T5", "text_encoders/t5_config_xxl.json"),
    "qwen3_06b": ("text_encoders.llama:Qwen3_06B", ""),
    "gemma2_2b": ("text_encoders.llama:Gemma2_2B", ""),
}
ENCODERS_OF = {
    "sd": ("clip_l",),
    "sdxl": ("clip_l", "clip_g"),
    "flux": ("clip_l", "t5xxl"),
    "chroma": ("", "t5xxl"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "anima": ("qwen3_06b",),
    "lumina": ("gemma2_2b",),
}
# What stands in the source of its key map since it has all names of a model.
SINCE = {"qwen_image_21": ".gate_up", "minimax_h3": "MiniMaxH3"}


@cache
def has(arch: str) -> bool:
    """Whether this version has an architecture."""
    return SINCE.get(arch, "") in (Path(ROOT) / "comfy" / "lora.py").read_text(encoding="utf-8")


class _Permissive(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class _Nothing(metaclass=_Permissive):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _Nothing if cls is _Nothing else object.__new__(cls)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if top in ABSENT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module, made = types.ModuleType(spec.name), {}

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return made.setdefault(name, _Permissive(name, (_Nothing,), {})) if name[0].isupper() else _Nothing

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@cache
def program(name: str) -> Any:
    """A module of it, `lora` for comfy.lora."""
    if ROOT not in sys.path:
        sys.path.append(ROOT)
        sys.meta_path.append(StandIns())  # behind all others: only for what is not installed
        importlib.import_module("comfy.cli_args").args.cpu = True
        ace = importlib.import_module("comfy.ldm.ace.ace_step15")
        ace.FSQ = lambda *args, **kwargs: nn.Identity()  # counts its codes, which the meta device cannot
    return importlib.import_module(f"comfy.{name}")


@cache
def model(arch: str) -> Any:
    """The denoiser in the class which it chooses for these settings."""
    config = program("model_detection").model_config_from_unet_config(dict(CONFIGS[arch]), {})
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device=torch.device("meta"))


@cache
def encoder(name: str) -> dict[str, Tensor]:
    """Weights of a text encoder, on the meta device."""
    place, sizes = ENCODERS[name]
    module, _, cls = place.partition(":")
    config = json.loads((Path(ROOT) / "comfy" / sizes).read_text(encoding="utf-8")) if sizes else {}
    ops = program("ops").disable_weight_init
    made = getattr(program(module), cls)(config, torch.bfloat16, torch.device("meta"), ops)
    return {f"{name}.transformer.{key}": tensor for key, tensor in made.state_dict().items()}


class _Given:
    """What its key maps ask of a model: these tensors, in the class of that architecture."""

    def __new__(cls, arch: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Any:
        made = object.__new__(type("Given", (type(model(arch)),), {"state_dict": lambda self: tensors}))
        made.__dict__["model_config"] = types.SimpleNamespace(unet_config=config)
        return made


def weights(arch: str) -> dict[str, Tensor]:
    """All of its own names, as in its state dicts, of the denoiser and the text encoders; on the meta device."""
    found = {key: t for key, t in model(arch).state_dict().items() if key.startswith("diffusion_model.")}
    for name in filter(None, ENCODERS_OF.get(arch, ())):
        found |= encoder(name)
    return found


def raw_map(arch: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Names in files -> what it makes of them, for a model of these weights."""
    lora = program("lora")
    denoiser = {key: t for key, t in tensors.items() if key.startswith("diffusion_model.")}
    others = {key: t for key, t in tensors.items() if key not in denoiser}
    keys: dict[str, Any] = lora.model_lora_keys_unet(_Given(arch, denoiser, config), {})
    return lora.model_lora_keys_clip(_Given(arch, others, config), keys) if others else keys


def key_map(arch: str) -> dict[str, Target]:
    """Names in files -> the rows of which weight they mean, without `diffusion_model.` and `.weight`."""
    tensors, found = weights(arch), {}
    for name, value in raw_map(arch, tensors, model(arch).model_config.unet_config).items():
        key, offset, function = (value, None, None) if isinstance(value, str) else (*value, None, None)[:3]
        if key in tensors and key.endswith(".weight"):
            start, rows = (0, tensors[key].shape[0]) if offset is None else offset[1:]
            found[name] = plain(key), start, rows, function is not None
    return found


def plain(key: str) -> str:
    return key.removeprefix("diffusion_model.").removesuffix(".weight")


# -- patches

_HUNYUAN_NAMES = (
    (r"((?:img|txt)_attn)_(q|k|v)$", r"\1.qkv"),
    (r"((?:img|txt|self)_attn)_(qkv|proj)$", r"\1.\2"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_mod|modulation)\.linear$", r"\1.lin"),
    (r"(time_in|time_r_in|guidance_in|txt_in\.t_embedder)\.mlp\.0$", r"\1.in_layer"),
    (r"(time_in|time_r_in|guidance_in|txt_in\.t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
    (r"((?:img|txt)_attn)_q_norm$", r"\1.norm.query_norm"),
    (r"((?:img|txt)_attn)_k_norm$", r"\1.norm.key_norm"),
    (r"(single_blocks\.\d+)\.q_norm$", r"\1.norm.query_norm"),
    (r"(single_blocks\.\d+)\.k_norm$", r"\1.norm.key_norm"),
)
# Names of the trainers' layers in its classes, where they differ: by hand, beside the records of the package.
OWN_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "framepack": (
        (r"^transformer_blocks", "double_blocks"),
        (r"^single_transformer_blocks(\.\d+)\.(attn\.to_[qkv]|proj_mlp)$", r"single_blocks\1.linear1"),
        (r"^single_transformer_blocks(\.\d+)\.proj_out$", r"single_blocks\1.linear2"),
        (r"^single_transformer_blocks(\.\d+)\.norm\.linear$", r"single_blocks\1.modulation.lin"),
        (r"\.attn\.to_[qkv]$", ".img_attn.qkv"),
        (r"\.attn\.add_[qkv]_proj$", ".txt_attn.qkv"),
        (r"\.attn\.to_out\.0$", ".img_attn.proj"),
        (r"\.attn\.to_add_out$", ".txt_attn.proj"),
        (r"\.ff\.net\.0\.proj$", ".img_mlp.0"),
        (r"\.ff\.net\.2$", ".img_mlp.2"),
        (r"\.ff_context\.net\.0\.proj$", ".txt_mlp.0"),
        (r"\.ff_context\.net\.2$", ".txt_mlp.2"),
        (r"\.norm1\.linear$", ".img_mod.lin"),
        (r"\.norm1_context\.linear$", ".txt_mod.lin"),
    ),
    "hunyuan_video": _HUNYUAN_NAMES,
    "hunyuan_image": _HUNYUAN_NAMES,
    "hv_1_5": _HUNYUAN_NAMES,
    "zimage": (
        (r"attention\.to_[qkv]$", "attention.qkv"),
        (r"attention\.to_out\.0$", "attention.out"),
        (r"attention\.norm_q$", "attention.q_norm"),
        (r"attention\.norm_k$", "attention.k_norm"),
        (r"^all_(\w+)\.2-1", r"\1"),
    ),
    "qwen_image_21": ((r"img_mlp\.(gate_layer|proj)$", "img_mlp.gate_up"),),
    "ace_step": ((r"^", "decoder."),),
    "hidream_o1": ((r"^model\.", ""),),
    "ltx_video": (
        (r"norm_q$", "q_norm"),
        (r"norm_k$", "k_norm"),
        (r"^proj_in$", "patchify_proj"),
        (r"^time_embed", "adaln_single"),
    ),
    "ltx2": ((r"^model\.", ""), (r"^embeddings_connector", "video_embeddings_connector")),
}


def own_name(arch: str, trainer_name: str) -> str:
    """The name of the weight which a trainer's layer is in its class, or a part of which."""
    if arch == "sd":
        names = program("utils").unet_to_diffusers(CONFIGS["sd"])
        return str(names[f"{trainer_name}.weight"]).removesuffix(".weight")
    for old, new in OWN_NAMES.get(arch, ()):
        trainer_name = re.sub(old, new, trainer_name)
    return trainer_name


class Log(logging.Handler):
    """What it says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Log:
        self.before = logging.getLogger().handlers[:]
        logging.getLogger().handlers[:] = [self]
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().handlers[:] = self.before


def of_trainer(arch: str, part: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[nn.Module, tuple[str, slice]]]:
    """Weights of a trainer's model under its own names, and where each module of the model is among them.

    Args:
        part: "" = the denoiser, otherwise its name of a text encoder.
    """
    pieces: dict[str, list[tuple[int, nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            place = re.search(r"_([qkvm])(?:lp(?:\.proj)?|_proj)?$", name)
            own = f"{part}.{name}" if part else f"diffusion_model.{own_name(arch, name)}"
            pieces.setdefault(f"{own}.weight", []).append(("qkvm".index(place[1]) if place else 0, module))
    base, where = {}, {}
    for key, found in pieces.items():
        start, rows = 0, []
        for _, module in sorted(found, key=lambda pair: pair[0]):
            rows.append(module.weight.detach().float())
            where[module] = key, slice(start, start + len(rows[-1]))
            start += len(rows[-1])
        base[key] = torch.cat(rows)
    return base, where


def patched(
    arch: str, file: Mapping[str, Tensor], base: Mapping[str, Tensor], config: dict[str, Any], strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    """What it makes of a model with a file.

    Args:
        arch: of the model.
        file: tensors under the keys of the file.
        base: weights under its own names, in fp32.
        config: as CONFIGS, with the sizes of these weights.
        strength: of the file.

    Returns:
        Weights that it changes, and what it logs.
    """
    return _patched(raw_map(arch, base, config), file, base, strength)


def patched_class(
    name: str, file: Mapping[str, Tensor], base: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    """The same for a denoiser of an architecture that is not among CONFIGS, by the name of its class of models."""
    given = object.__new__(type("Given", (getattr(program("model_base"), name),), {"state_dict": lambda self: base}))
    given.__dict__["model_config"] = types.SimpleNamespace(unet_config={})
    return _patched(program("lora").model_lora_keys_unet(given, {}), file, base, strength)


def _patched(
    names: Mapping[str, Any], file: Mapping[str, Tensor], base: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    lora = program("lora")
    with Log() as log:
        patches = lora.load_lora(program("lora_convert").convert_lora(dict(file)), names)
        changed: dict[str, Tensor] = {}
        for target, patch in patches.items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
            if key in base:
                weight = changed.get(key, base[key].clone())
                one = [(strength, patch, 1.0, offset, function)]
                changed[key] = lora.calculate_weight(one, weight, key, intermediate_dtype=weight.dtype)
    return changed, log.lines
