"""The options of train_network.py: sd-scripts' names wherever it has the option, with its defaults unless noted."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from networks.hosts.caption_folder import CaptionedImage, read_caption_folder
from networks.hosts.command_line import check_output_folder, check_weights_file, parse_network_args

# the names of diffusers.optimization
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def build_parser() -> argparse.ArgumentParser:
    """All options; flags default to False, so that a config file can set them."""
    parser = argparse.ArgumentParser(
        prog="train_network.py",
        description="Train a network module (LoRA, LoHa, LoKr, ...) on a diffusers folder of SD 1.x, 2.x or SDXL.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config_file", metavar="TOML", help="options from a file, sections flattened; the command line wins")
    add("--debug", action="store_true", help="show the traceback of an error")

    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--pretrained_model_name_or_path", metavar="FOLDER", help="model in diffusers' layout")
    add("--train_data_dir", metavar="FOLDER", help="images with a caption file each")
    add("--validation_data_dir", metavar="FOLDER", help="held-out images with captions; the loss on them is reported")
    add("--validate_every_n_steps", type=int, metavar="N", help="default: before training and at its end")
    add("--caption_extension", default=".txt", help="default: .txt")
    add("--resolution", metavar="SIZE", help="pixels, or WIDTH,HEIGHT; default: the model's own")
    add("--train_batch_size", type=int, default=1)
    add("--max_data_loader_n_workers", type=int, default=0, help="default 0: images are read by the main process")
    add("--cache_latents", action="store_true", help="encode every image once, before training")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--network_module", default="networks.lora", metavar="MODULE", help="default: networks.lora")
    add("--network_args", nargs="*", metavar="KEY=VALUE", help="arguments of the network module")
    add("--network_dim", type=int, help="rank; default: the module's")
    add("--network_alpha", type=float, default=1, help="the scale is alpha/dim; default: 1")
    add("--network_dropout", type=float, help="probability of dropping a rank activation")
    add("--network_weights", metavar="FILE", help="continue from this saved network")
    add("--dim_from_weights", action="store_true", help="take ranks and alphas from --network_weights")
    add("--base_weights", nargs="*", metavar="FILE", help="networks merged into the model before training")
    add("--base_weights_multiplier", nargs="*", type=float, metavar="X", help="their strengths; default: 1.0 each")
    add("--network_train_unet_only", action="store_true")
    add("--network_train_text_encoder_only", action="store_true")
    add("--scale_weight_norms", type=float, metavar="MAX", help="keep every layer's update at or below this norm")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--learning_rate", type=float, default=1e-4, help="default: 1e-4")
    add("--unet_lr", type=float)
    add("--text_encoder_lr", type=float, nargs="*", metavar="LR", help="one for all text encoders, or one each")
    add("--optimizer_type", default="AdamW", help="AdamW, AdamW8bit, SGD or package.module.Class")
    add("--optimizer_args", nargs="*", metavar="KEY=VALUE", help='for example "betas=0.9,0.99"')
    add("--lr_scheduler", default="constant", choices=SCHEDULERS, help="default: constant")
    add("--lr_warmup_steps", type=int, default=0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_grad_norm", type=float, default=1.0, help="0 = do not clip; default: 1.0")
    add("--max_train_steps", type=int, default=1600, help="optimizer steps; default: 1600")
    add("--min_snr_gamma", type=float, help="weight the loss by signal-to-noise ratio; 5 is usual")
    add("--noise_offset", type=float, default=0.0, help="constant noise per channel")
    add("--seed", type=int, help="same seed, same result; default: a random one, printed")
    add("--sdpa", action="store_true", help="torch's fused attention also on the CPU, where the plain one is faster")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", metavar="FOLDER")
    add("--output_name", default="last", help="file name without ending; default: last")
    add("--save_precision", choices=("float", "fp16", "bf16"), help="default: as trained")
    add("--save_every_n_steps", type=int, metavar="N")
    add("--training_comment", help="goes into the file's metadata")
    add("--sample_prompts", metavar="FILE", help="one prompt a line, with --n --w --h --d --s --l as in gen_img")
    add("--sample_every_n_steps", type=int, metavar="N")
    add("--sample_at_first", action="store_true", help="draw the samples before training, too")
    return parser


AT_LEAST = {
    "train_batch_size": 1,
    "max_train_steps": 1,
    "gradient_accumulation_steps": 1,
    "max_data_loader_n_workers": 0,
    "lr_warmup_steps": 0,
    "max_grad_norm": 0,
    "learning_rate": 0,
    "unet_lr": 0,
    "min_snr_gamma": 0,
    "noise_offset": 0,
    "scale_weight_norms": 0,
    "network_dim": 1,
    "validate_every_n_steps": 1,
    "save_every_n_steps": 1,
    "sample_every_n_steps": 1,
}


def check_options(args: argparse.Namespace) -> tuple[list[CaptionedImage], list[CaptionedImage], dict[str, str]]:
    """Find what is wrong before anything is loaded.

    Returns the training images, the held-out images and the network arguments. Raises ValueError.
    """
    for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing. Give it on the command line or in the config file.")
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ValueError(f"--{name} {value}: it must be a number of at least {least}.")
    for value in args.text_encoder_lr or ():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"--text_encoder_lr {value}: it must be a number of at least 0.")
    if args.network_train_unet_only and args.network_train_text_encoder_only:
        raise ValueError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train.")
    network_args = parse_network_args(args.network_args)
    _check_weights(args)
    if args.sample_every_n_steps and not args.sample_prompts:
        raise ValueError("--sample_every_n_steps draws nothing without --sample_prompts FILE. Add it.")
    if args.validate_every_n_steps and not args.validation_data_dir:
        raise ValueError("--validate_every_n_steps needs --validation_data_dir FOLDER. Add it.")
    args.output_name = args.output_name.removesuffix(".safetensors")
    if not args.output_name.strip("."):
        raise ValueError("--output_name is empty. Give the file a name.")
    if (Path(args.output_dir) / f"{args.output_name}.safetensors").is_dir():
        raise ValueError(
            f"--output_name {args.output_name}: a folder of that name stands in --output_dir. Choose another."
        )
    if Path(args.output_name).name != args.output_name:
        raise ValueError(f"--output_name {args.output_name} is a path. Give the folder with --output_dir.")
    images = read_caption_folder(Path(args.train_data_dir), args.caption_extension, "--train_data_dir")
    held_out: list[CaptionedImage] = []
    if args.validation_data_dir:
        held_out = read_caption_folder(Path(args.validation_data_dir), args.caption_extension, "--validation_data_dir")
    check_output_folder(Path(args.output_dir))
    return images, held_out, network_args


def _check_weights(args: argparse.Namespace) -> None:
    if args.network_weights:
        check_weights_file(args.network_weights, "--network_weights")
    elif args.dim_from_weights:
        raise ValueError("--dim_from_weights needs --network_weights FILE. Add it.")
    for path in args.base_weights or ():
        check_weights_file(path, "--base_weights")
    given, wanted = len(args.base_weights_multiplier or ()), len(args.base_weights or ())
    if given > wanted:
        raise ValueError(f"--base_weights_multiplier has {given} values for {wanted} --base_weights. Remove some.")


def parse_resolution(text: str | None, native: int) -> tuple[int, int]:
    """`512` or `512,768` (width, height) -> (height, width) in pixels; nothing given -> the model's own size."""
    if not text:
        return native, native
    try:
        sides = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"--resolution {text} is not a size. Write 512 or WIDTH,HEIGHT.")
    return sides[-1], sides[0]
