"""Reference generator: draw with a diffusers folder of any family we know and any number of network modules.

    python scripts/gen_img.py --ckpt MODEL --prompt "a cat" --outdir out --seed 1 \\
        --network_module networks.lora --network_weights my-lora.safetensors --network_mul 0.8

Writes im_000000.png, im_000001.png, ..., after those that are there; each PNG carries its prompt, seed and settings as
text. An image depends on its prompt, seed and settings only, not on the batch in which it is drawn. --strengths,
--compare and --seeds also make a sheet of each prompt, grid_000000.png: a row for each strength, a column for each
seed. Music is written as WAV.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from networks.cli.command_line import (
    check_output_folder,
    check_weights_file,
    finite_number,
    import_network_module,
    parse_network_args,
    run_program,
)

from . import DRAWING, check_libraries, model_folder
from .drawing.picture_grid import make_grid
from .drawing.requests import ImageRequest, batches, parse_prompt_line, read_prompt_file
from .families import Family

# sd-scripts' sampler names -> class in diffusers and what differs from the model's own scheduler configuration
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def set_sampler(family: Family, name: str | None) -> None:
    """Give the pipeline another sampler with the model's own noise schedule; None leaves it as it is."""
    if name is None:
        return
    import diffusers

    class_name, changes = SAMPLERS[name]
    config = family.pipeline.scheduler.config
    if "FlowMatch" in config.get("_class_name", type(family.pipeline.scheduler).__name__):
        raise ValueError(
            f"--sampler {name} is for models with a noise schedule, {family.title} has its own. Remove it."
        )
    family.pipeline.scheduler = getattr(diffusers, class_name).from_config(config, **changes)


def build_parser() -> argparse.ArgumentParser:
    """sd-scripts' names wherever its gen_img has the option."""
    parser = argparse.ArgumentParser(description="Draw images with network modules applied.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", metavar="FOLDER", help="model in diffusers' layout")
    add("--outdir", metavar="FOLDER", default="outputs", help="default: outputs")
    add("--prompt", help="options inside it: --n negative --w --h --d seed --s steps --l scale --am multipliers")
    add("--from_file", metavar="FILE", help="one prompt a line, with the same options")
    add("--negative_prompt", default="", help="what the image should not have")
    add("--W", type=int, help="width in pixels; default: the model's own")
    add("--H", type=int, help="height in pixels; default: the model's own")
    add("--steps", type=int, default=50, help="default: 50")
    add("--scale", type=finite_number, default=7.5, help="guidance; default: 7.5")
    add(
        "--sampler",
        choices=sorted(SAMPLERS),
        metavar="NAME",
        help=f"{', '.join(sorted(SAMPLERS))}; default: the model's own",
    )
    add("--seed", type=int, help="of each prompt's first image, the next ones count up; default: random, printed")
    add("--images_per_prompt", type=int, default=1)
    add("--batch_size", type=int, default=1, help="images drawn together; more needs more memory")
    add("--fp16", action="store_true", help="compute in fp16")
    add("--bf16", action="store_true", help="compute in bf16")
    add("--sdpa", action="store_true", help="torch's fused attention also on the CPU")
    add("--network_module", nargs="*", default=[], metavar="MODULE", help="one or more")
    add("--network_weights", nargs="*", default=[], metavar="FILE", help="one for each module")
    add("--network_mul", nargs="*", type=finite_number, default=[], metavar="X", help="their strengths; default: 1.0")
    add(
        "--network_args",
        nargs="*",
        default=[],
        metavar="ARGS",
        help='one string for each module: "key=value;key=value"',
    )
    add(
        "--strengths",
        nargs="+",
        type=finite_number,
        metavar="X",
        help="draw each prompt at these strengths, times --network_mul",
    )
    add("--compare", action="store_true", help="with and without the networks: --strengths 0 1")
    add("--seeds", nargs="+", type=int, metavar="N", help="draw each prompt with these seeds")
    add("--network_merge", action="store_true", help="merge the networks into the model's weights first")
    add("--network_pre_calc", action="store_true", help="merge before each change of strength, restore afterwards")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


# options that do not go together -> what to do about it
MISFITS: tuple[tuple[Callable[[argparse.Namespace], Any], str], ...] = (
    (
        lambda a: (a.prompt is None) == (a.from_file is None),
        "give either --prompt TEXT or --from_file FILE.",
    ),
    (
        lambda a: a.network_merge and a.network_pre_calc,
        "--network_merge and --network_pre_calc exclude each other. Remove one.",
    ),
    (
        lambda a: a.compare and a.strengths,
        "--compare is --strengths 0 1. Give one of them.",
    ),
    (
        lambda a: (a.compare or a.strengths) and not a.network_module,
        "--strengths and --compare are those of networks. Add --network_module and --network_weights.",
    ),
    (
        lambda a: (a.compare or a.strengths) and a.network_merge,
        "--strengths and --compare cannot change merged networks. Leave out --network_merge.",
    ),
    (
        lambda a: a.seeds and (a.seed is not None or a.images_per_prompt > 1),
        "--seeds takes the place of --seed and --images_per_prompt. Remove them.",
    ),
)


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be seen wrong before the model is loaded; --compare becomes --strengths."""
    if not args.ckpt:
        raise ValueError("--ckpt is missing. Give a model folder in diffusers' layout.")
    model_folder.check_model_folder(Path(args.ckpt), "--ckpt")
    for name in ("steps", "images_per_prompt", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: it must be at least 1.")
    for is_misfit, message in MISFITS:
        if is_misfit(args):
            raise ValueError(message)
    if args.compare:
        args.strengths = [0.0, 1.0]
    _check_networks(args)
    check_output_folder(Path(args.outdir), "--outdir")


def _check_networks(args: argparse.Namespace) -> None:
    count = len(args.network_module)
    if len(args.network_weights) != count:
        raise ValueError(
            f"{count} --network_module but {len(args.network_weights)} --network_weights. Give one file for each."
        )
    for name in ("network_mul", "network_args"):
        given = len(getattr(args, name))
        if given > count:
            raise ValueError(f"--{name} has {given} values for {count} --network_module. Remove some.")
    for path in args.network_weights:
        check_weights_file(path, "--network_weights")


class Networks:
    """The networks applied to a model, and their strengths."""

    def __init__(self, args: argparse.Namespace, family: Family, dtype: torch.dtype) -> None:
        count = len(args.network_module)
        self.defaults = tuple(args.network_mul) + (1.0,) * (count - len(args.network_mul))
        strings = [*args.network_args, *[""] * (count - len(args.network_args))]
        self.merged, self.pre_calculated = args.network_merge, args.network_pre_calc
        self.current: tuple[float, ...] | None = None
        self.active: list[Any] = []
        device = family.device
        rows = zip(args.network_module, args.network_weights, self.defaults, strings, strict=True)
        for name, path, multiplier, text in rows:
            keywords = parse_network_args([item for item in text.split(";") if item.strip()])
            module = import_network_module(name)
            network, weights = module.create_network_from_weights(
                multiplier,
                path,
                family.vae,
                family.text_encoder_argument,
                family.denoiser,
                for_inference=True,
                **keywords,
            )
            if network is None:
                raise ValueError(f"--network_module {name} made no network from {path}. Look at what it printed.")
            if self.merged:
                network.merge_to(family.text_encoder_argument, family.denoiser, weights, dtype, device)
            else:
                network.apply_to(family.text_encoder_argument, family.denoiser)
                print(f"{path}: {network.load_state_dict(weights, False)}")
                network.to(dtype).to(device)
                self.active.append(network)
            print(f"{'merged' if self.merged else 'applied'} {path} at strength {multiplier}")
        if self.pre_calculated:
            for network in self.active:
                network.backup_weights()

    def set_strengths(self, multipliers: tuple[float, ...] | None) -> None:
        """Set the strength of every network; None = those of --network_mul. Raises ValueError for a wrong count."""
        wanted = self.defaults if multipliers is None else multipliers
        if len(wanted) != len(self.defaults):
            raise ValueError(f"--am has {len(wanted)} values for {len(self.defaults)} networks. Give one for each.")
        if self.merged and wanted != self.defaults:
            raise ValueError("--am cannot change merged networks. Leave out --network_merge.")
        if wanted == self.current:
            return
        if self.pre_calculated and self.current is not None:
            for network in reversed(self.active):
                network.restore_weights()
        for network, multiplier in zip(self.active, wanted, strict=False):
            network.set_multiplier(multiplier)
        if self.pre_calculated:
            for network in self.active:
                network.pre_calculation()
        self.current = wanted


def read_requests(args: argparse.Namespace, family: Family) -> list[ImageRequest]:
    """What to draw, in order."""
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}")
    size = family.native_size
    defaults = ImageRequest(
        "", args.negative_prompt, seed, args.H or size, args.W or size, args.steps, args.scale, multipliers=None
    )
    if args.from_file:
        requests = read_prompt_file(Path(args.from_file), defaults, "--from_file")
    else:
        requests = [parse_prompt_line(args.prompt, defaults)]
    for request in requests:
        family.check_size(request.height, request.width, "--W, --H")
    return [item for request in requests for item in variants(args, request)]


def variants(args: argparse.Namespace, request: ImageRequest) -> list[ImageRequest]:
    """One prompt at every strength and with every seed, strength by strength."""
    seeds = args.seeds or [request.seed + number for number in range(args.images_per_prompt)]
    own = request.multipliers or (*args.network_mul, *[1.0] * (len(args.network_module) - len(args.network_mul)))
    strengths: list[tuple[float, ...] | None] = [request.multipliers]
    if args.strengths:
        strengths = [tuple(x * strength for x in own) for strength in args.strengths]
    return [replace(request, seed=seed, multipliers=strength) for strength in strengths for seed in seeds]


def next_number(folder: Path, name: str) -> int:
    """The first number that no file of this name has."""
    stems = [path.stem.removeprefix(name) for path in folder.glob(f"{name}*")]
    return 1 + max((int(stem) for stem in stems if stem.isdigit()), default=-1)


def _unused(folder: Path, name: str, number: int, suffix: str) -> tuple[int, Path]:
    """The first number from this one on that no file has by now: another run may draw into the same folder."""
    while os.path.lexists(path := folder / f"{name}{number:06d}{suffix}"):
        number += 1
    return number, path


def draw_sheets(args: argparse.Namespace, folder: Path, images: Sequence[tuple[ImageRequest, Any]]) -> None:
    """One sheet for each prompt, from its images in the order of `variants`."""
    rows, number = len(args.strengths or [1]), next_number(folder, "grid_")
    columns = len(args.seeds or range(args.images_per_prompt))
    names = [f"strength {strength:g}" for strength in args.strengths or ()] or [""]
    for start in range(0, len(images), rows * columns):
        part = images[start : start + rows * columns]
        table = [
            (name, [image for _, image in part[row * columns : (row + 1) * columns]]) for row, name in enumerate(names)
        ]
        number, path = _unused(folder, "grid_", number, ".png")
        make_grid(table, [f"seed {request.seed}" for request, _ in part[:columns]], path)
        number += 1


def generate(args: argparse.Namespace) -> int:
    """Load, apply, draw and write."""
    check_libraries(DRAWING)
    check_options(args)
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    family = model_folder.load_model(Path(args.ckpt), device, dtype, "--ckpt", args.sdpa)
    set_sampler(family, args.sampler)
    requests = read_requests(args, family)
    networks = Networks(args, family, dtype)
    folder = Path(args.outdir)
    number, count = next_number(folder, "im_"), 0
    drawn: list[tuple[ImageRequest, Any]] = []
    more = {f"network-{index}": Path(path).name for index, path in enumerate(args.network_weights)}
    if args.sampler:
        more["sampler"] = args.sampler
    with tqdm(total=len(requests), desc="images") as bar:
        for batch in batches(requests, args.batch_size):
            networks.set_strengths(batch[0].multipliers)
            for image, request in zip(family.draw(batch), batch, strict=True):
                shown = replace(request, multipliers=networks.current or None)
                number, path = _unused(folder, "im_", number, family.suffix)
                family.save(image, path, shown, more)
                drawn += [(shown, image)] if args.strengths or args.seeds else []
                number, count = number + 1, count + 1
                bar.update()
    if drawn and family.medium.visible:
        draw_sheets(args, folder, drawn)
    print(f"{count} images in {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the generator; returns the exit code (2 = a mistake in what was asked for)."""
    return run_program(generate, build_parser(), sys.argv[1:] if argv is None else argv)
