"""Pre-train the embedded model: a small text-to-image latent diffusion model of OpenMoji artwork.

It has Stable Diffusion's parts (UNet2DConditionModel, CLIPTextModel, DDIM, v-prediction) and trains from random weights
in about an hour on two CPU cores. The demo uses the result in `model/`; nobody needs to run this.

    OMP_NUM_THREADS=1 python scripts/emoji/pretrain.py --out runs/emoji --overwrite

--resume continues, also for other --steps; --overwrite replaces the model in `model/`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from emoji_model import (  # noqa: E402
    EXPORTED,
    Networks,
    build_models,
    build_pipeline,
    build_scheduler,
    build_tokenizer,
    export,
    tokenize,
)
from render import BACKGROUNDS, Emoji, background_caption, composite, rasterise, read_svg, read_table  # noqa: E402

from networks.cli.command_line import add_overwrite, check_outputs, finite_number, run_program, write_atomically  # noqa: E402

HELD_OUT_EVERY = 7  # one in seven (emoji, background) pairs is never shown, so that composing can be tested
BACKGROUND_SHARE = 0.2
CAPTION_DROPOUT = 0.1


# ---- data -----------------------------------------------------------------------------------------------------------


def is_held_out_pair(emoji_index: int, background_index: int) -> bool:
    """Whether this emoji never appears on this background in training."""
    return (emoji_index + 3 * background_index) % HELD_OUT_EVERY == 0


class EmojiImages:
    """All training images in memory, as pairs (image, caption ids)."""

    def __init__(self, rows: Sequence[Emoji], tokenizer: PreTrainedTokenizerFast) -> None:
        plain, on_colour, plain_captions, colour_captions = [], [], [], []
        for index, row in enumerate(rows):
            rgba = rasterise(read_svg(row.code_point))
            plain.append(composite(rgba))
            plain_captions.append(row.caption)
            for number, (name, rgb) in enumerate(BACKGROUNDS.items()):
                if not is_held_out_pair(index, number):
                    on_colour.append(composite(rgba, rgb))
                    colour_captions.append(background_caption(row.caption, name))
        self.plain = to_tensor(plain)  # [N, 3, 48, 48] uint8
        self.on_colour = to_tensor(on_colour)  # [N', 3, 48, 48] uint8
        self.plain_ids = tokenize(tokenizer, plain_captions)
        self.colour_ids = tokenize(tokenizer, colour_captions)
        self.empty_ids = tokenize(tokenizer, [""])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images [B, 3, 48, 48] in -1..1 and caption ids [B, 12], some captions replaced by the empty one."""
        coloured = torch.rand(size, generator=generator) < BACKGROUND_SHARE
        first = torch.randint(len(self.plain), (size,), generator=generator)
        second = torch.randint(len(self.on_colour), (size,), generator=generator)
        images = torch.where(coloured[:, None, None, None], self.on_colour[second], self.plain[first])
        ids = torch.where(coloured[:, None], self.colour_ids[second], self.plain_ids[first])
        dropped = torch.rand(size, generator=generator) < CAPTION_DROPOUT
        return images.float() / 127.5 - 1, torch.where(dropped[:, None], self.empty_ids, ids)


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images [H, W, 3] -> uint8 tensor [N, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@dataclass
class Batch:
    """One noisy batch, ready for the networks."""

    noisy: Tensor  # [B, 27, 16, 16]
    target: Tensor  # v, [B, 27, 16, 16]
    timesteps: Tensor  # [B]
    ids: Tensor  # [B, 12]

    def split(self, parts: int) -> list[Batch]:
        """Equal parts."""
        return [Batch(*part) for part in zip(*(getattr(self, f.name).chunk(parts) for f in fields(self)), strict=True)]


def make_batch(images: Tensor, ids: Tensor, scheduler: DDIMScheduler, generator: torch.Generator) -> Batch:
    """Add noise at random timesteps.

    Args:
        images: [B, 3, 48, 48], -1 to 1.
        ids: of their captions, [B, 12].
        scheduler: the model's noise schedule.
        generator: of noise and timesteps.
    """
    latents = nn.functional.pixel_unshuffle(images, 3)
    noise = torch.randn(latents.shape, generator=generator)
    # Shape and colour are decided at middle and high noise; the ends of the schedule need few steps.
    position = torch.sigmoid(0.3 + 1.2 * torch.randn(len(images), generator=generator))
    last = scheduler.config.num_train_timesteps - 1
    timesteps = (position * (last + 1)).long().clamp(max=last)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return Batch(noisy, scheduler.get_velocity(latents, noise, timesteps), timesteps, ids)


def gradients(nets: Networks, batch: Batch, bf16: bool) -> tuple[float, Sequence[Tensor]]:
    """Mean squared error of v, and its gradient for every parameter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        states = nets.text_encoder(batch.ids).last_hidden_state
        prediction = nets.unet(batch.noisy, batch.timesteps, states).sample
    loss = nn.functional.mse_loss(prediction.float(), batch.target)
    return loss.item(), torch.autograd.grad(loss, list(nets.parameters()))


def parallel_step(pool: ThreadPoolExecutor, nets: Networks, batch: Batch, parts: int, bf16: bool) -> float:
    """Fill every .grad with the batch's gradient; the loss.

    Each part runs in its own thread, with no threads below it (OMP_NUM_THREADS=1). They meet once per step and not at
    every operation, so a busy machine slows training by its share only; with two threads per operation it was tenfold.

    Args:
        pool: of as many threads.
        nets: whose gradients are filled.
        batch: the whole of it.
        parts: into how many it is divided.
        bf16: compute in bf16.
    """
    futures = [pool.submit(gradients, nets, part, bf16) for part in batch.split(parts)]
    losses, lists = zip(*(future.result() for future in futures), strict=True)
    total = list(lists[0])
    for other in lists[1:]:
        torch._foreach_add_(total, list(other))
    torch._foreach_div_(total, parts)
    for parameter, gradient in zip(nets.parameters(), total, strict=True):
        parameter.grad = gradient
    return sum(losses) / parts


# ---- sampling and measuring ------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, captions: Sequence[str], steps: int = 24, guidance: float = 3.0, seed: int = 0
) -> np.ndarray:
    """One image per caption: uint8 [N, 48, 48, 3].

    Args:
        pipe: the model.
        captions: what to draw.
        steps: of each image.
        guidance: 1 = none.
        seed: of the first image; the next ones count up.
    """
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(captions))]
    images = pipe(
        list(captions), num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    ).images
    return np.rint(images * 255).astype(np.uint8)


def nearest(images: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Index of the candidate with the smallest squared pixel distance: [N, H, W, 3], [M, H, W, 3] -> [N]."""
    flat, rows = (torch.from_numpy(array.reshape(len(array), -1)).double() for array in (images, candidates))
    return torch.cdist(flat, rows).argmin(1).numpy()


def spread(rows: Sequence[Emoji], count: int) -> list[int]:
    """Evenly spaced row numbers: every category of the table takes part."""
    return [round(index * (len(rows) - 1) / (count - 1)) for index in range(count)]


def retrieval(pipe: StableDiffusionPipeline, rows: Sequence[Emoji], images: EmojiImages, count: int = 60) -> float:
    """Share of captions whose drawing is nearer to the true image than to any other of the training set.

    Args:
        pipe: the model.
        rows: the table of emoji.
        images: the training set.
        count: of captions, spread over the table.
    """
    chosen = spread(rows, count)
    drawn = draw(pipe, [rows[index].caption for index in chosen])
    candidates = images.plain.permute(0, 2, 3, 1).numpy()
    return float((nearest(drawn, candidates) == np.array(chosen)).mean())


def composing(pipe: StableDiffusionPipeline, rows: Sequence[Emoji], count: int = 60) -> float:
    """The same for (emoji, background) pairs that were never shown, among every emoji on every background."""
    names = list(BACKGROUNDS)
    layers = [rasterise(read_svg(row.code_point)) for row in rows]
    candidates = np.stack([composite(rgba, BACKGROUNDS[name]) for rgba in layers for name in names])
    every = range(len(rows) * len(names))
    unseen = [number for number in every if is_held_out_pair(number // len(names), number % len(names))]
    chosen = [unseen[index] for index in np.linspace(0, len(unseen) - 1, count).round().astype(int)]
    captions = [background_caption(rows[number // len(names)].caption, names[number % len(names)]) for number in chosen]
    return float((nearest(draw(pipe, captions), candidates) == np.array(chosen)).mean())


def save_grid(images: np.ndarray, path: Path, columns: int = 12, gap: int = 8, zoom: int = 1) -> None:
    """Tile images into one PNG.

    Args:
        images: uint8 [N, H, W, 3].
        path: of the PNG.
        columns: images side by side.
        gap: between them, in pixels.
        zoom: whole number by which all is enlarged.
    """
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1:3]
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    tiled = Image.fromarray(sheet)
    large = tiled.resize((tiled.width * zoom, tiled.height * zoom), Image.Resampling.NEAREST)
    write_atomically(path, lambda part: large.save(part, optimize=True))


# ---- training -------------------------------------------------------------------------------------------------------


def lr_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Warm-up, constant for the first half, cosine to 1% in the second: the decay brings most of the sharpness."""
    if step < warmup:
        return (step + 1) / warmup
    if step < steps / 2:
        return 1.0
    progress = min(1.0, (step - steps / 2) / (steps / 2))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Run:
    """What a checkpoint holds."""

    nets: Networks
    ema: Networks
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        decay = min(decay, (1 + self.step) / (10 + self.step))  # the average soon forgets the random start
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.nets.parameters()), 1 - decay)

    def save(self, path: Path) -> None:
        """Write atomically: a run that is killed while it writes keeps its last checkpoint."""
        state = {name: getattr(self, name).state_dict() for name in ("nets", "ema", "optimizer")}
        state.update(step=self.step, generator=self.generator.get_state())
        write_atomically(path, lambda part: torch.save(state, part))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("nets", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def train(args: argparse.Namespace) -> int:
    check(args)
    torch.set_num_threads(1)  # parallel_step does better
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = read_table()
    tokenizer = build_tokenizer([row.caption for row in rows])
    images = EmojiImages(rows, tokenizer)
    nets = build_models(tokenizer)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = copy.deepcopy(nets).requires_grad_(False).eval()
    run = Run(nets, ema, optimizer, torch.Generator().manual_seed(args.seed))
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        run.load(checkpoint)
    scheduler = build_scheduler()
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.named_children()}
    print(f"{len(images.plain)} emoji, {len(images.on_colour)} on a background, {len(tokenizer)} tokens, {sizes}")

    nets.train()
    started = saved = sampled = time.monotonic()
    average = 0.0
    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, mininterval=10, desc="pretrain")
    with open(args.out / "loss.tsv", "a" if args.resume else "w", encoding="utf-8") as log:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(step, args.steps)
            batch = make_batch(*images.batch(args.batch_size, run.generator), scheduler, run.generator)
            value = parallel_step(pool, nets, batch, args.threads, args.bf16)
            torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
            optimizer.step()
            run.step = step + 1
            run.update_ema(args.ema)
            average = value if not average else 0.99 * average + 0.01 * value
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{average:.4f}", refresh=False)
                log.write(f"{run.step}\t{time.monotonic() - started:.0f}\t{average:.5f}\n")
                log.flush()
            now = time.monotonic()
            if now - saved > args.save_minutes * 60:
                run.save(checkpoint)
                saved = now
            if now - sampled > args.sample_minutes * 60:
                chosen = [rows[index].caption for index in spread(rows, 24)]
                save_grid(draw(build_pipeline(run.ema, tokenizer), chosen), args.out / f"sample_{run.step:06d}.png")
                sampled = time.monotonic()
    run.save(checkpoint)
    finish(run, rows, tokenizer, images, args)
    return 0


def check(args: argparse.Namespace) -> None:
    """Whether all may be written, also what comes at the end. Raises ValueError."""
    if args.export_only:
        args.resume, args.steps = True, 0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.is_file():
        raise ValueError(f"--resume: there is no file {checkpoint}. Give the --out of the run.")
    written = [*(args.model / name for name in EXPORTED), grid_of(args.model)]
    if not args.resume:
        written += [checkpoint, args.out / "loss.tsv", *sorted(args.out.glob("sample_*.png"))]
    check_outputs(written, [checkpoint] if args.resume else [], args.overwrite)


def grid_of(model: Path) -> Path:
    """Drawn at the end."""
    return model.parent / "grid.png"


def finish(
    run: Run, rows: Sequence[Emoji], tokenizer: PreTrainedTokenizerFast, images: EmojiImages, args: argparse.Namespace
) -> None:
    """Export the averaged weights, draw the grid and print the retrieval score.

    Args:
        run: what was trained.
        rows: the table of emoji.
        tokenizer: of the captions.
        images: the training set.
        args: the command line's.
    """
    torch.set_num_threads(args.threads)
    export(run.ema, tokenizer, args.model)
    pipe = build_pipeline(run.ema, tokenizer)
    save_grid(draw(pipe, [rows[index].caption for index in spread(rows, 60)]), grid_of(args.model))
    print(f"step {run.step}: nearest-image top-1 on 60 captions {retrieval(pipe, rows, images):.2f}", end=", ")
    print(f"on 60 unseen pairs of emoji and background {composing(pipe, rows):.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=finite_number, default=1e-3)
    parser.add_argument("--ema", type=finite_number, default=0.999, help="decay of the weight average that is exported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="parts of a batch that run side by side")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="checkpoint, loss log and sample grids")
    parser.add_argument(
        "--model",
        type=Path,
        default=HERE / "model",
        help="folder of the exported diffusers model; grid.png goes beside it",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--export_only", action="store_true", help="export the checkpoint in --out and stop")
    parser.add_argument("--save_minutes", type=finite_number, default=5)
    parser.add_argument("--sample_minutes", type=finite_number, default=10)
    add_overwrite(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(train, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
