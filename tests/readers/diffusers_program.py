"""diffusers' own loaders on shrunken models of its own classes."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from common import Made, Trained, made
from diffusers import loaders
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from peft.tuners.tuners_utils import BaseTunerLayer
from registry_archs import SPECS, data_of
from test_diffusers_reads import whole_sdxl_unet
from tiny_parts import sd_unet, text_encoder
from torch import Tensor, nn

from networks.models.libraries import on_meta

# Architecture -> the pipeline that loads its adapters.
PIPELINES = {
    "ace_step": "AceStepPipeline",
    "anima": "AnimaLoraLoaderMixin",  # its pipeline is put together from blocks
    "flux": "FluxPipeline",
    "chroma": "ChromaPipeline",
    "flux_2": "Flux2Pipeline",
    "hunyuan_image": "HunyuanImagePipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "hv_1_5": "HunyuanVideo15Pipeline",
    "ernie_image": "ErnieImagePipeline",
    "framepack": "HunyuanVideoFramepackPipeline",
    "ideogram4": "Ideogram4Pipeline",
    "kandinsky": "Kandinsky5T2VPipeline",
    "krea2": "Krea2Pipeline",
    "ltx2": "LTX2Pipeline",
    "ltx_video": "LTXPipeline",
    "lumina": "Lumina2Pipeline",
    "minimax_h3": "MiniMaxH3LoraLoaderMixin",  # as Anima's
    "qwen_image": "QwenImagePipeline",
    "qwen_image_21": "QwenImage21Pipeline",
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "wan": "WanPipeline",
    "zimage": "ZImagePipeline",
}
# Layers of which converters know the number of rows by heart.
KEPT_ROWS = {
    "hunyuan_video": r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)",
    "lumina": r".*\.to_[qkv]",
    "flux": r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)",
    "chroma": r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)",
}
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_COUNTS = re.compile(r"(num|n)_\w*(layers|blocks)")  # arguments
_ROWS = ("num_layers", "n_layers", "num_hidden_layers", "num_visual_blocks")


def denoiser(arch: str, full_rows: bool) -> nn.Module:
    """Two blocks of the kind of which there are most, one of each other, every layer smaller.

    Args:
        full_rows: those of KEPT_ROWS have as many as in the released model.
    """
    if SPECS[arch].denoiser.diffusers == "unet":
        return sd_unet() if arch == "sd" else whole_sdxl_unet()
    release = SPECS[arch].releases[0]
    cls = getattr(diffusers, release.denoiser)
    names = [name for name in inspect.signature(cls.__init__).parameters if _COUNTS.fullmatch(name)]
    few = {name: 2 if name in _ROWS else 1 for name in names if name != "num_text_layers"}
    with on_meta():
        model = cls(**release.sizes | few)
        if arch == "ltx2":
            model.connectors = connectors()
    torch.manual_seed(0)
    kept = re.compile(KEPT_ROWS.get(arch, "") if full_rows else "")
    for name, module in [*model.named_modules()]:
        _shrink(module, data_of(arch).shrink, bool(kept.fullmatch(name)))
    return model.eval().requires_grad_(False)


def connectors() -> nn.Module:
    """Of LTX-2.3: a component of its own in the pipeline, here below the denoiser, whose network is for both."""
    sizes = {"num_attention_heads": 32, "num_layers": 1, "num_learnable_registers": 4}
    sizes = {f"{stream}_connector_{name}": size for stream in ("video", "audio") for name, size in sizes.items()}
    return LTX2TextConnectors(
        caption_channels=64, text_proj_in_factor=1, video_connector_attention_head_dim=128, video_gated_attn=True,
        audio_connector_attention_head_dim=64, audio_gated_attn=True, **sizes,
    )  # fmt: skip


def _shrink(module: nn.Module, by: int, keep_rows: bool) -> None:
    if isinstance(module, nn.Linear):
        rows = module.out_features if keep_rows else max(4, module.out_features // by)
        module.out_features, module.in_features = rows, max(4, module.in_features // by)
        module.weight = nn.Parameter(torch.randn(rows, module.in_features) / module.in_features**0.5)
        module.bias = None if module.bias is None else nn.Parameter(torch.zeros(rows))
        return
    for name, parameter in [*module.named_parameters(recurse=False)]:
        setattr(module, name, nn.Parameter(torch.ones(parameter.shape)))
    for name, buffer in [*module.named_buffers(recurse=False)]:
        module.register_buffer(name, torch.zeros(buffer.shape))


@functools.cache
def models(arch: str, full_rows: bool = True) -> dict[str, nn.Module]:
    """Part name -> model."""
    parts = {SPECS[arch].denoiser.name: denoiser(arch, full_rows)}
    for part in SPECS[arch].text_encoders:
        if part.diffusers:
            parts[part.name] = text_encoder(part.diffusers == "text_encoder_2").requires_grad_(False)
    return parts


_another_encoder = functools.cache(text_encoder)  # for which no file has layers


class _Pipeline(SimpleNamespace):
    """What the loaders want of a pipeline."""

    hf_device_map = None
    lora_scale = 1.0


def load(arch: str, models: Mapping[str, nn.Module], trained: Trained) -> Made:
    """What `Pipeline.load_lora_weights` makes of a file."""
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    pipeline = getattr(diffusers, PIPELINES[arch], None) or getattr(loaders.lora_pipeline, PIPELINES[arch])
    if not hasattr(pipeline, "load_lora_weights"):
        with pytest.raises(AttributeError) as missing:
            pipeline.__new__(pipeline).load_lora_weights()
        return Made(str(missing.value))
    components = {part.diffusers: models[part.name] for part in SPECS[arch].parts if part.name in models}
    apart = {name: components["transformer"]._modules.pop(name) for name in ("connectors",) if arch == "ltx2"}
    components |= apart
    mixin = next(cls for cls in pipeline.__mro__ if cls.__name__.endswith("LoraLoaderMixin"))
    host: Any = type("Host", (_Pipeline, mixin), {})(components=components, **components)
    for encoder in ("text_encoder", "text_encoder_2"):
        if encoder not in components and not hasattr(host, encoder):
            setattr(host, encoder, _another_encoder())
    try:
        host.load_lora_weights(str(trained.file), adapter_name="read")
        layers = {
            id(layer.base_layer): (layer, slice(None)) for model in components.values() for layer in tuners(model)
        }
        for module in (module for model in components.values() for module in model.modules()):
            layers |= _fused(module)
        return made(trained, functools.partial(weight_at, layers))
    except Exception as error:
        return Made(f"{type(error).__name__}: {error}")
    finally:
        for model in components.values():
            remove(model)
        for name, model in apart.items():
            components["transformer"].add_module(name, model)


def load_into(model: nn.Module, trained: Trained) -> Made:
    """What the model's own `load_lora_adapter` makes of one."""
    try:
        model.load_lora_adapter(str(trained.file), adapter_name="read")
        return found([model], trained)
    finally:
        remove(model)


def found(models: Iterable[nn.Module], trained: Trained) -> Made:
    """What adapters of PEFT, called `read`, do in these models."""
    layers: dict[int, tuple[Any, slice]] = {}
    for model in models:
        layers |= {id(layer.base_layer): (layer, slice(None)) for layer in tuners(model)}
        for module in model.modules():
            layers |= _fused(module)
    return made(trained, functools.partial(weight_at, layers))


def tuners(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _fused(attention: nn.Module) -> dict[int, tuple[Any, slice]]:
    """Projections of an attention of which the model made one for this file."""
    layers: dict[int, tuple[Any, slice]] = {}
    for one, names in {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": _ADDED}.items():
        layer, at = getattr(attention, one, None), 0
        for projection in (getattr(attention, name) for name in names if isinstance(layer, BaseTunerLayer)):
            layers[id(projection)] = layer, slice(at, at := at + projection.out_features)
    return layers


def weight_at(layers: Mapping[int, tuple[Any, slice]], target: nn.Module, strength: float) -> Tensor:
    """W' of a module of which there may be an adapter of PEFT.

    Args:
        layers: id of the base module -> PEFT's module around it, or around what it is some rows of.
    """
    if id(target) not in layers:
        return target.weight.detach()
    layer, rows = layers[id(target)]
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    layer.set_scale("read", strength)
    layer.merge(adapter_names=["read"])
    after = weight.detach().clone()
    layer.merged_adapters.clear()
    weight.data.copy_(before)
    return after[rows]


def remove(model: nn.Module) -> None:
    for name, module in [*model.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            *parents, last = name.split(".")
            setattr(model.get_submodule(".".join(parents)), last, module.base_layer)
    if getattr(model, "original_attn_processors", None) is not None:  # it made one layer of three for the file
        model.unfuse_qkv_projections()
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)
