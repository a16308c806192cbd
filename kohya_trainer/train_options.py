"""The options of train_network.py: sd-scripts' names wherever it has the option, with its defaults unless noted."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from networks.cli.command_line import OnOff, check_output_folder, check_weights_file, finite_number, parse_network_args

from .data.caption_folder import Buckets, CaptionedImage, read_caption_folder
from .families import FAMILIES, DataOptions, NoiseOptions
from .families.noise import SAMPLINGS
from .losses import DISTANCES, HUBER_SCHEDULES, SCHEMES, LossOptions
from .model_folder import check_model_folder
from .small_weights import QUANTIZED
from .state.state_files import STATE_FILE

# the names of diffusers.optimization
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def build_parser() -> argparse.ArgumentParser:
    """All options; flags default to False, so that a config file can set them."""
    parser = argparse.ArgumentParser(
        description="Train a network module (LoRA, LoHa, LoKr, ...) on a diffusers folder: "
        + ", ".join(family.title for family in FAMILIES)
        + ".",
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
    add(
        "--prior_data_dir",
        metavar="FOLDER",
        help="images with captions on which the model shall go on as it is: one beside each training image, its target "
        "the model's own answer with the network off. Costs two more passes, one of them without gradient",
    )
    add(
        "--prior_prompt",
        metavar="TEXT",
        help='the same with the training images themselves under this caption: "a person", or ""',
    )
    add(
        "--prior_loss_weight",
        type=finite_number,
        metavar="W",
        help="what --prior_data_dir or --prior_prompt count beside the training images; default: 1",
    )
    add("--caption_extension", default=".txt", help="default: .txt")
    add("--resolution", metavar="SIZE", help="pixels, or WIDTH,HEIGHT; default: the model's own")
    add(
        "--enable_bucket", action="store_true", help="keep the images' shapes, at about --resolution's number of pixels"
    )
    add("--min_bucket_reso", type=int, default=256, metavar="PIXELS", help="shortest side; default: 256")
    add("--max_bucket_reso", type=int, default=1024, metavar="PIXELS", help="longest side; default: 1024")
    add("--bucket_reso_steps", type=int, default=64, metavar="PIXELS", help="sides are multiples of it; default: 64")
    add(
        "--max_audio_seconds",
        type=finite_number,
        default=240,
        metavar="S",
        help="music is cut to this length; default: 240",
    )
    add("--train_batch_size", type=int, default=1, help="examples a step in each process")
    add(
        "--max_data_loader_n_workers",
        type=int,
        metavar="N",
        default=0,
        help="default 0: images are read by the main process",
    )
    add(
        "--persistent_data_loader_workers",
        action=OnOff,
        default=sys.platform != "win32",
        help="keep workers between epochs: faster, more memory; default: on, but off under Windows and without workers",
    )
    add("--pin_memory", action=OnOff, help="lock loaded data in memory, for faster copies to CUDA; default: with CUDA")
    add("--cache_latents", action="store_true", help="encode every image once, before training")
    add("--cache_latents_to_disk", action="store_true", help="the same, kept in files beside the images")
    add(
        "--cache_text_encoder_outputs_to_disk",
        action="store_true",
        help="keep text outputs beside the images; they are always computed once when no text encoder is trained",
    )
    add(
        "--offload_encoders",
        action=OnOff,
        default=True,
        help="move text encoders and VAE off the GPU once their outputs are cached: frees 2 GB and more at no cost; "
        "default: on",
    )

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--network_module", default="networks.lora", metavar="MODULE", help="default: networks.lora")
    add("--network_args", nargs="*", metavar="KEY=VALUE", help="arguments of the network module")
    add("--network_dim", type=int, help="rank; default: the module's")
    add("--network_alpha", type=finite_number, default=1, help="the scale is alpha/dim; default: 1")
    add("--network_dropout", type=finite_number, help="probability of dropping a rank activation")
    add("--network_weights", metavar="FILE", help="continue from this saved network")
    add("--dim_from_weights", action="store_true", help="take ranks and alphas from --network_weights")
    add("--base_weights", nargs="*", metavar="FILE", help="networks merged into the model before training")
    add(
        "--base_weights_multiplier",
        nargs="*",
        type=finite_number,
        metavar="X",
        help="their strengths; default: 1.0 each",
    )
    add("--network_train_unet_only", action="store_true")
    add("--network_train_text_encoder_only", action="store_true")
    add(
        "--scale_weight_norms",
        type=finite_number,
        metavar="MAX",
        help="keep every layer's update at or below this norm",
    )

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--learning_rate", type=finite_number, default=1e-4, help="default: 1e-4")
    add("--unet_lr", type=finite_number)
    add("--text_encoder_lr", type=finite_number, nargs="*", metavar="LR", help="one for all text encoders, or one each")
    add("--optimizer_type", default="AdamW", help="AdamW, AdamW8bit, SGD or package.module.Class")
    add("--optimizer_args", nargs="*", metavar="KEY=VALUE", help='for example "betas=0.9,0.99"')
    add(
        "--lr_scheduler",
        default="constant",
        choices=SCHEDULERS,
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}; default: constant",
    )
    add("--lr_warmup_steps", type=int, default=0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add(
        "--gradient_checkpointing",
        action=OnOff,
        default=True,
        help="keep few intermediate results and compute the others again: 40 to 60 %% less memory for 10 to 30 %% more "
        "time, same result; default: on",
    )
    add("--full_bf16", action="store_true", help="the network itself in bf16, with --mixed_precision bf16")
    add("--quantize", choices=QUANTIZED, help="store the frozen model's Linear layers in 4 or 8 bits (bitsandbytes)")
    add("--fp8_base", action="store_true", help="store the frozen model's weights in 8 bits: half the memory of bf16")
    add("--gradient_accumulation_steps", type=int, metavar="N", default=1)
    add("--max_grad_norm", type=finite_number, default=1.0, help="0 = do not clip; default: 1.0")
    add("--max_train_steps", type=int, default=1600, help="optimizer steps; default: 1600")
    add("--seed", type=int, help="same seed, same result; default: a random one, printed")
    add("--sdpa", action="store_true", help="torch's fused attention also on the CPU, where the plain one is faster")

    _add_noise_and_loss(parser)
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", metavar="FOLDER")
    add("--output_name", default="last", help="file name without ending; default: last")
    add("--overwrite", action="store_true", help="write over files of another run with this name")
    add("--save_precision", choices=("float", "fp16", "bf16"), help="default: as trained")
    add("--save_every_n_steps", type=int, metavar="N")
    add("--save_state", action="store_true", help="with each file, all that --resume needs")
    add("--resume", metavar="FOLDER", help="continue from a state, as if the run had not been interrupted")
    add("--logging_dir", metavar="FOLDER", help="losses and learning rates for TensorBoard")
    add("--training_comment", help="goes into the file's metadata")
    add("--sample_prompts", metavar="FILE", help="one prompt a line, with --n --w --h --d --s --l as in gen_img")
    add("--sample_every_n_steps", type=int, metavar="N")
    add("--sample_at_first", action="store_true", help="draw the samples before training, too")
    return parser


def _add_noise_and_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("noise and loss")
    add = group.add_argument
    add("--loss_type", choices=DISTANCES, default="l2", help="distance of answer and target; default: l2")
    add("--huber_schedule", choices=HUBER_SCHEDULES, default="snr", help="how c falls with the noise; default: snr")
    add("--huber_c", type=finite_number, default=0.1, help="c of huber and smooth_l1, at the most noise; default: 0.1")
    add(
        "--huber_scale",
        type=finite_number,
        default=1.0,
        help="factor on c in exponential and constant schedules; default: 1",
    )
    add(
        "--noise_offset",
        type=finite_number,
        default=0.0,
        help="size of noise that a channel has in common; 0.1 is usual",
    )
    add(
        "--ip_noise_gamma",
        type=finite_number,
        default=0.0,
        help="more noise in the input than in the target; 0.1 is usual",
    )

    group = parser.add_argument_group("noise and loss of Stable Diffusion 1, 2 and XL")
    add = group.add_argument
    add("--min_snr_gamma", type=finite_number, help="signal-to-noise ratios above it count no more than it; 5 is usual")
    add("--debiased_estimation_loss", action="store_true", help="weight the loss by 1 / sqrt(signal-to-noise ratio)")
    add("--zero_terminal_snr", action="store_true", help="v models: the last level is noise alone")
    add("--scale_v_pred_loss_like_noise_pred", action="store_true", help="v models: weights of a model of noise")
    add(
        "--v_pred_like_loss", type=finite_number, metavar="X", help="models of noise: add X times the loss of a v model"
    )

    group = parser.add_argument_group("noise and loss of flow models")
    add = group.add_argument
    add(
        "--timestep_sampling",
        choices=SAMPLINGS,
        metavar="NAME",
        help=f"{', '.join(SAMPLINGS)}: how noise levels are drawn; default: as the family was trained",
    )
    add(
        "--discrete_flow_shift",
        type=finite_number,
        help="above 1, more noise; for sigma and shift; default: the family's",
    )
    add("--sigmoid_scale", type=finite_number, help="spread of sigmoid, shift and flux_shift; default: 1")
    add(
        "--weighting_scheme",
        choices=SCHEMES,
        metavar="NAME",
        help=f"{', '.join(SCHEMES)}: density of sigma (logit_normal, mode), or weight of the loss",
    )
    add("--logit_mean", type=finite_number, help="of logit_normal; above 0, less noise; default: 0")
    add("--logit_std", type=finite_number, help="of logit_normal; default: 1")
    add("--mode_scale", type=finite_number, help="of mode; default: 1.29")
    add(
        "--guidance_scale",
        type=finite_number,
        help="what a distilled model is told while it learns; default: 1, no guidance",
    )


MODEL = "--pretrained_model_name_or_path"
NEEDED = ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
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
    "v_pred_like_loss": 0,
    "huber_c": 1e-6,
    "huber_scale": 1e-6,
    "ip_noise_gamma": 0,
    "sigmoid_scale": 0.01,
    "logit_std": 0.01,
    "guidance_scale": 0,
    "noise_offset": 0,
    "scale_weight_norms": 0,
    "prior_loss_weight": 1e-6,
    "network_dim": 1,
    "validate_every_n_steps": 1,
    "save_every_n_steps": 1,
    "sample_every_n_steps": 1,
    "discrete_flow_shift": 0.01,
    "max_audio_seconds": 0.1,
    "bucket_reso_steps": 1,
    "min_bucket_reso": 1,
    "max_bucket_reso": 1,
}


def keeps_prior(args: argparse.Namespace) -> bool:
    """Whether the model shall go on as it is where the options say."""
    return bool(args.prior_data_dir) or args.prior_prompt is not None


# options that do not go together -> what to do about it
MISFITS: tuple[tuple[Callable[[argparse.Namespace], Any], str], ...] = (
    (
        lambda a: a.network_train_unet_only and a.network_train_text_encoder_only,
        "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train. Remove one.",
    ),
    (
        lambda a: a.full_bf16 and a.mixed_precision != "bf16",
        "--full_bf16 needs --mixed_precision bf16. Add it.",
    ),
    (
        lambda a: a.fp8_base and a.mixed_precision == "no",
        "--fp8_base needs --mixed_precision bf16 or fp16, in which it is computed. Add it.",
    ),
    (
        lambda a: a.quantize and a.fp8_base,
        "--quantize and --fp8_base exclude each other. Remove one.",
    ),
    (
        lambda a: a.dim_from_weights and not a.network_weights,
        "--dim_from_weights needs --network_weights FILE. Add it.",
    ),
    (
        lambda a: a.sample_every_n_steps and not a.sample_prompts,
        "--sample_every_n_steps draws nothing without --sample_prompts FILE. Add it.",
    ),
    (
        lambda a: a.prior_data_dir and a.prior_prompt is not None,
        "--prior_data_dir and --prior_prompt both say what the model shall keep. Remove one.",
    ),
    (
        lambda a: a.prior_loss_weight is not None and not keeps_prior(a),
        "--prior_loss_weight counts nothing without --prior_data_dir FOLDER or --prior_prompt TEXT. Add one.",
    ),
    (
        lambda a: a.validate_every_n_steps and not a.validation_data_dir,
        "--validate_every_n_steps needs --validation_data_dir FOLDER. Add it.",
    ),
)


Examples = list[CaptionedImage]


def check_options(args: argparse.Namespace) -> tuple[Examples, Examples, Examples, dict[str, str]]:
    """Find what is wrong before anything is loaded.

    Returns:
        The training examples, the held-out ones, those on which the model shall go on as it is, and the network
        arguments.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    for name in NEEDED:
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing. Give it on the command line or in the config file.")
    family = check_model_folder(Path(args.pretrained_model_name_or_path), MODEL)
    _check_numbers(args)
    for is_misfit, message in MISFITS:
        if is_misfit(args):
            raise ValueError(message)
    parse_resolution(args.resolution, 1)
    network_args = parse_network_args(args.network_args)
    _check_files(args)
    args.output_name = args.output_name.removesuffix(".safetensors")
    _check_output_name(args.output_name, Path(args.output_dir))
    images, held_out, kept = (
        read_caption_folder(Path(folder), args.caption_extension, option, family.medium) if folder else []
        for option, folder in (
            ("--train_data_dir", args.train_data_dir),
            ("--validation_data_dir", args.validation_data_dir),
            ("--prior_data_dir", args.prior_data_dir),
        )
    )
    if args.prior_prompt is not None:
        kept = [replace(image, caption=args.prior_prompt) for image in images]
    check_output_folder(Path(args.output_dir))
    return images, held_out, kept, network_args


def _check_numbers(args: argparse.Namespace) -> None:
    given = [(name, getattr(args, name), least) for name, least in AT_LEAST.items()]
    given += [("text_encoder_lr", rate, 0) for rate in args.text_encoder_lr or ()]
    for name, value, least in given:
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ValueError(f"--{name} {value}: it must be a number of at least {least}.")


def _check_files(args: argparse.Namespace) -> None:
    if args.network_weights:
        check_weights_file(args.network_weights, "--network_weights")
    for path in args.base_weights or ():
        check_weights_file(path, "--base_weights")
    given, wanted = len(args.base_weights_multiplier or ()), len(args.base_weights or ())
    if given > wanted:
        raise ValueError(f"--base_weights_multiplier has {given} values for {wanted} --base_weights. Remove some.")
    if args.resume and not (Path(args.resume) / STATE_FILE).is_file():
        raise ValueError(f"--resume {args.resume} holds no saved state ({STATE_FILE}). Give a folder NAME-...-state.")


def _check_output_name(name: str, folder: Path) -> None:
    if not name.strip("."):
        raise ValueError("--output_name is empty. Give the file a name.")
    if (folder / f"{name}.safetensors").is_dir():
        raise ValueError(f"--output_name {name}: a folder of that name stands in --output_dir. Choose another.")
    if Path(name).name != name:
        raise ValueError(f"--output_name {name} is a path. Give the folder with --output_dir.")


def data_options(args: argparse.Namespace, native: int) -> DataOptions:
    """How large training data become."""
    buckets = Buckets(args.min_bucket_reso, args.max_bucket_reso, args.bucket_reso_steps)
    return DataOptions(
        parse_resolution(args.resolution, native), buckets if args.enable_bucket else None, args.max_audio_seconds
    )


def noise_options(args: argparse.Namespace) -> NoiseOptions:
    """Which noise levels the model is trained at."""
    return NoiseOptions(**{field.name: getattr(args, field.name) for field in fields(NoiseOptions)})


def loss_options(args: argparse.Namespace) -> LossOptions:
    """What is minimised."""
    return LossOptions(**{field.name: getattr(args, field.name) for field in fields(LossOptions)})


def memory_advice(args: argparse.Namespace) -> str:
    """What to switch on when memory ran out: the options that are not in use yet, the cheapest first."""
    advice = []
    if not args.gradient_checkpointing:
        advice.append("leave out --no_gradient_checkpointing")
    if not (args.cache_latents or args.cache_latents_to_disk):
        advice.append("--cache_latents, after which the VAE leaves the GPU")
    if not args.network_train_unet_only:
        advice.append("--network_train_unet_only, after which the text encoders leave it too")
    if args.mixed_precision == "no":
        advice.append("--mixed_precision bf16")
    if args.train_batch_size > 1:
        advice.append(f"--train_batch_size 1 --gradient_accumulation_steps {args.train_batch_size}")
    if not (args.fp8_base or args.quantize):
        advice.append("--fp8_base, or --quantize nf4 for a quarter of the model's bf16 size")
    advice.append("a lower --resolution or --network_dim")
    return "out of memory. Switch on, in this order, until it fits: " + "; ".join(advice) + "."


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
