"""Models without weights, on the meta device: from a name, a diffusers folder, or a checkpoint's header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..args.coerce import nearest
from ..files import codec, reader

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_SD_UNET: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
_SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Blueprint:
    """Sizes of a released model.

    Attributes:
        context: width of its text embeddings, which tells the releases apart.
        text_encoders: (transformers class, sizes).
    """

    title: str
    context: int
    unet: dict[str, Any]
    text_encoders: tuple[tuple[str, dict[str, Any]], ...]


BLUEPRINTS = {
    "sd15": Blueprint(
        "Stable Diffusion 1.5", 768, {**_SD_UNET, "attention_head_dim": 8}, (("CLIPTextModel", _CLIP_L),)
    ),
    "sd21": Blueprint(
        "Stable Diffusion 2.1",
        1024,
        {**_SD_UNET, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        (("CLIPTextModel", _CLIP_H),),
    ),
    "sdxl": Blueprint(
        "Stable Diffusion XL",
        2048,
        _SDXL_UNET,
        (("CLIPTextModel", _CLIP_L), ("CLIPTextModelWithProjection", _CLIP_G)),
    ),
}


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, as a host would hand it over."""

    title: str
    unet: nn.Module
    text_encoders: list[nn.Module]


def skeleton(model: str) -> Skeleton:
    """A model without weights.

    Args:
        model: `sd15`, `sd21`, `sdxl`, a diffusers folder, or a checkpoint, of which only the header is read.

    Raises:
        ValueError: it is none of these.
    """
    if model in BLUEPRINTS:
        return _from_blueprint(BLUEPRINTS[model], with_text_encoders=True)
    path = Path(model)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _from_header(path)
    names = ", ".join(BLUEPRINTS)
    raise ValueError(
        f"{model} is neither a built-in model ({names}), nor a diffusers folder, nor a checkpoint"
        f"{nearest(model, BLUEPRINTS)}"
    )


def _from_blueprint(blueprint: Blueprint, with_text_encoders: bool) -> Skeleton:
    import transformers
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=blueprint.context, **blueprint.unet)
        encoders = []
        for name, sizes in blueprint.text_encoders if with_text_encoders else ():
            config = transformers.CLIPTextConfig(projection_dim=sizes["hidden_size"], **sizes)
            encoders.append(getattr(transformers, name)(config))
    return Skeleton(blueprint.title, unet, encoders)


def _from_folder(folder: Path) -> Skeleton:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers folder: it has no model_index.json")
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if "unet" not in index or not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"{folder} ({index.get('_class_name')}) has no UNet; we know Stable Diffusion 1.x, 2.x and XL")
    with torch.device("meta"):
        unet_class = getattr(diffusers, index["unet"][1])
        unet = unet_class.from_config(unet_class.load_config(folder / "unet"))
        encoders = []
        for name in ("text_encoder", "text_encoder_2"):
            if (index.get(name) or [None])[0] is not None:
                config = transformers.CLIPTextConfig.from_pretrained(str(folder / name))
                encoders.append(getattr(transformers, index[name][1])(config))
    return Skeleton(str(folder), unet, encoders)


def _from_header(path: Path) -> Skeleton:
    """The release that a checkpoint's attention layers fit; a variant with other layers is refused."""
    shapes = reader.read_header(path).shapes
    if codec.is_adapter(shapes):
        raise ValueError(f"{path} is an adapter, not a model; give the model that it was trained for")
    wanted = sorted(shape for key, shape in shapes.items() if _is_cross_attention(key))
    for blueprint in BLUEPRINTS.values():
        whole = any(key.startswith(("cond_stage_model.", "conditioner.")) for key in shapes)
        if wanted and wanted[0][1] == blueprint.context:
            built = _from_blueprint(blueprint, with_text_encoders=whole)
            own = sorted(tuple(p.shape) for key, p in built.unet.named_parameters() if _is_cross_attention(key))
            if own == wanted:
                return Skeleton(f"{path} ({blueprint.title})", built.unet, built.text_encoders)
    raise ValueError(
        f"{path} has not the layers of Stable Diffusion 1.5, 2.1 or XL: for another model or a variant, give its "
        "diffusers folder"
    )


def _is_cross_attention(key: str) -> bool:
    return key.endswith(".attn2.to_k.weight") and not key.startswith(("first_stage_model.", "control_model."))
