"""What a training run is made of: the data, the network and its optimizer, called as sd-scripts calls them."""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .caption_folder import CaptionedImage, load_pixels
from .command_line import import_network_module, nearest, parse_network_args
from .diffusers import ModelParts, encode_images


class ImageData(Dataset[dict[str, Any]]):
    """Captioned images as pixels (3, H, W), or as cached latents (C, h, w)."""

    def __init__(self, images: Sequence[CaptionedImage], size: tuple[int, int]) -> None:
        self.images = images
        self.size = size
        self.cache: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.cache:
            return self.cache[index]
        pixels, time_ids = load_pixels(self.images[index].path, self.size)
        return {"index": index, "pixels": pixels, "time_ids": time_ids}

    def cache_latents(self, parts: ModelParts, seed: int) -> None:
        """Encode every image once; each gets its own VAE noise from the seed and its position."""
        items = []
        for index in range(len(self)):
            item = self[index]
            generator = torch.Generator().manual_seed(seed + index)
            latents = encode_images(parts, item.pop("pixels")[None], generator)
            items.append({**item, "latents": latents[0].float().cpu()})
        self.cache = items


def build_network(args: argparse.Namespace, parts: ModelParts, network_args: dict[str, str], dtype: torch.dtype) -> Any:
    """Import the module, merge base networks, create the network and attach it: sd-scripts' calls in its order."""
    module = import_network_module(args.network_module)
    vae, text_encoder, unet = parts.vae, parts.text_encoder_argument, parts.unet
    multipliers = itertools.chain(args.base_weights_multiplier or (), itertools.repeat(1.0))
    for path, multiplier in zip(args.base_weights or (), multipliers, strict=False):
        base, weights = module.create_network_from_weights(
            multiplier, path, vae, text_encoder, unet, for_inference=True
        )
        base.merge_to(text_encoder, unet, weights, dtype, unet.device)
        print(f"merged {path} at strength {multiplier}")

    keywords: dict[str, Any] = dict(network_args)
    if args.network_dropout is not None:
        keywords.setdefault("dropout", args.network_dropout)
    if args.dim_from_weights:
        if args.network_dim is not None:
            print("--network_dim is not used: --dim_from_weights takes ranks and alphas from the file")
        args.network_dim = args.network_alpha = None  # and the metadata must not say otherwise
        network, _ = module.create_network_from_weights(1, args.network_weights, vae, text_encoder, unet, **keywords)
    else:
        network = module.create_network(
            1.0,
            args.network_dim,
            args.network_alpha,
            vae,
            text_encoder,
            unet,
            neuron_dropout=args.network_dropout,
            **keywords,
        )
    if network is None:
        raise ValueError(f"--network_module {args.network_module} made no network. Look at what it printed.")
    if hasattr(network, "prepare_network"):
        network.prepare_network(args)
    if args.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        raise ValueError(f"{args.network_module} cannot do --scale_weight_norms. Remove the option.")
    network.apply_to(text_encoder, unet, not args.network_train_unet_only, not args.network_train_text_encoder_only)
    if args.network_weights:
        print(network.load_weights(args.network_weights))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for encoder in parts.text_encoders:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for model in (unet, *parts.text_encoders):
            model.train()  # the libraries checkpoint in train mode only; these models have no dropout
        network.enable_gradient_checkpointing()
    return network


def build_optimizer(args: argparse.Namespace, network: Any) -> torch.optim.Optimizer:
    """Ask the network for its parameter groups and make the optimizer that --optimizer_type names."""
    rates = args.text_encoder_lr
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        groups = network.prepare_optimizer_params_with_multiple_te_lrs(rates, args.unet_lr, args.learning_rate)
    else:
        groups = network.prepare_optimizer_params(rates[0] if rates else None, args.unet_lr, args.learning_rate)
    names = None
    if type(groups) is tuple:
        groups, names = groups
    groups = [{**group, "params": list(group["params"])} for group in groups]
    for number, group in enumerate(groups):
        count = sum(parameter.numel() for parameter in group["params"])
        print(f"  {names[number] if names else number}: {count:,} parameters, lr {group.get('lr', args.learning_rate)}")
    options = parse_optimizer_args(args.optimizer_args)
    try:
        return optimizer_class(args.optimizer_type)(groups, lr=args.learning_rate, **options)
    except TypeError as error:
        raise ValueError(f"--optimizer_type {args.optimizer_type}: {error}. Check --optimizer_args.") from error


def optimizer_class(name: str) -> Any:
    """`AdamW`, `AdamW8bit`, `SGD` in any case, or a dotted class path. Raises ValueError for anything else."""
    known = {"adamw": "torch.optim.AdamW", "adamw8bit": "bitsandbytes.optim.AdamW8bit", "sgd": "torch.optim.SGD"}
    path = known.get(name.lower(), name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError(f"--optimizer_type {name}: unknown. Use AdamW, AdamW8bit, SGD or package.module.Class.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--optimizer_type {name}: {error}. Install the package that has it, or use AdamW.") from error


def parse_optimizer_args(items: list[str] | None) -> dict[str, object]:
    """`key=value` items with Python values: `betas=0.9,0.99`, `weight_decay=0.01`, `fused=True`."""
    result: dict[str, object] = {}
    for key, text in parse_network_args(items, "--optimizer_args").items():
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            hint = nearest(text, ("True", "False", "None"))
            raise ValueError(f'--optimizer_args {key}="{text}" is not a Python value.{hint}') from error
    return result


COPIED = (
    "network_module network_dim network_alpha network_dropout learning_rate unet_lr text_encoder_lr seed lr_scheduler "
    "lr_warmup_steps max_train_steps mixed_precision gradient_checkpointing gradient_accumulation_steps min_snr_gamma "
    "max_grad_norm scale_weight_norms noise_offset training_comment output_name cache_latents"
).split()


def run_metadata(
    args: argparse.Namespace, parts: ModelParts, network_args: dict[str, str], more: dict[str, Any]
) -> dict[str, str]:
    """sd-scripts' metadata keys that apply here. No clock and no machine, so that equal runs give equal files."""
    values: dict[str, Any] = {f"ss_{name}": getattr(args, name) for name in COPIED}
    values.update(
        more,
        ss_base_model_version=parts.base_model_version,
        ss_v2=parts.is_v2,
        ss_optimizer=f"{args.optimizer_type}({','.join(args.optimizer_args or ())})",
        ss_batch_size_per_device=args.train_batch_size,
        ss_sd_model_name=Path(args.pretrained_model_name_or_path).name,
    )
    if network_args:
        values["ss_network_args"] = json.dumps(network_args)
    return {key: str(value) for key, value in values.items()}
