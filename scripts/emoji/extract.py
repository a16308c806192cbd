"""Extraction and growth, shown on the embedded model with the demo's task.

    python scripts/emoji/extract.py

1. The whole UNet learns the outlines (every weight and bias, by the trainer with algo=full, and `merge`). LoRAs and a
   LoKr are extracted from that checkpoint and the base, and all of them draw the same captions from the same noise:
   `extracted.png` beside this file, with the loss on held-out outlines.
2. A LoRA of dim 4 of the attention is trained; then it goes on as long once as it is, and once grown to dim 16.

Ten to fifteen minutes on two free cores. `extracted.png` and the default output folder are
this program's own; elsewhere it replaces something only with --overwrite.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from demo import EMOJI, SEED, run, true_images  # noqa: E402

from kohya_trainer.drawing.picture_grid import make_grid  # noqa: E402
from networks import api  # noqa: E402
from networks.cli.command_line import add_overwrite, check_outputs, run_program  # noqa: E402
from networks.tools.forms import FORMS  # noqa: E402
from networks.tools.ranks import RankRule  # noqa: E402

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

OUTPUT = HERE.parents[1] / "output" / "extract"
PICTURE = HERE / "extracted.png"
DIMS, FACTOR = (4, 16, 64), 2
CAPTIONS = ("burger", "cactus", "car", "cat", "fish")
LOW, HIGH, LORA_BATCH, SEEDS = 4, 16, 8, (1, 2)
WHOLE_RATE, LORA_RATE, WHOLE_BATCH = 5e-4, 2e-3, 16


def train(
    folder: Path, name: str, steps: int, seed: int, rate: float, batch: int, arguments: Sequence[str]
) -> list[float]:
    """Train an adapter of the UNet.

    Args:
        folder, name: of its file.
        steps: of training.
        seed: of the weights, the noise and the order of the pictures.
        rate: learning rate at its highest.
        batch: pictures of a step.
        arguments: of the network.

    Returns:
        The loss on the held-out pictures, from before the first step to after the last.

    Raises:
        ValueError: the trainer failed.
    """
    run(
        "train_network.py",
        [
            f"--pretrained_model_name_or_path={EMOJI / 'model'}", f"--train_data_dir={EMOJI / 'style'}",
            f"--validation_data_dir={EMOJI / 'heldout'}", f"--validate_every_n_steps={max(1, steps // 4)}",
            "--network_module=networks.lora", *arguments, "--network_train_unet_only", f"--learning_rate={rate}",
            "--lr_scheduler=cosine", "--lr_warmup_steps=10", f"--max_train_steps={steps}",
            f"--train_batch_size={batch}", "--cache_latents", "--no_gradient_checkpointing", f"--seed={seed}",
            f"--output_dir={folder}", f"--output_name={name}", "--overwrite",
        ],
    )  # fmt: skip
    with (folder / f"{name}-loss.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


# -- extraction


def tuned_unet(output: Path, steps: int) -> Path:
    """Folder of the UNet after it was trained whole."""
    train(
        output, "whole", steps, SEED, WHOLE_RATE, WHOLE_BATCH,
        ["--network_dim=1", "--network_alpha=1", "--network_args", "algo=full", "preset=full", "train_norm=True"],
    )  # fmt: skip
    tuned = output / "tuned"
    adapter = output / "whole.safetensors"
    run("merge.py", [str(EMOJI / "model" / "unet"), str(adapter), f"--out={tuned}", "--overwrite"])
    return tuned


def extracted(tuned: Path, output: Path) -> dict[str, Path]:
    """Adapters of the difference between a UNet and the base, by the name of their row."""
    forms = {f"LoRA {dim}": ("lora", RankRule(dim)) for dim in DIMS} | {f"LoKr factor {FACTOR}": ("lokr", None)}
    files = {}
    for name, (to, rule) in forms.items():
        files[name] = output / f"{name.replace(' ', '-').lower()}.safetensors"
        report = api.extract(
            tuned,
            EMOJI / "model" / "unet",
            files[name],
            to=to,
            rule=rule,
            factor=FACTOR if FORMS[to].splits else -1,
            overwrite=True,
        )
        print(*report.lines(), sep="\n")
    return files


def draw(pipe: StableDiffusionPipeline, steps: int) -> list[Any]:
    """The captions' pictures, each from noise of its own that is the same for every model."""
    import torch

    generators = [torch.Generator().manual_seed(SEED + number) for number in range(len(CAPTIONS))]
    pictures: list[Any] = pipe(
        list(CAPTIONS), num_inference_steps=steps, guidance_scale=3.0, generator=generators
    ).images
    return pictures


def held_out_loss(pipe: StableDiffusionPipeline) -> float:
    """Of all held-out outlines at the trainer's fixed noise and levels, as the trainer measures it."""
    import numpy as np
    import torch
    from PIL import Image

    from kohya_trainer.training_data import MEASURED_LEVELS, generator

    paths = sorted((EMOJI / "heldout").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        latents = pipe.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        text, _ = pipe.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
        losses = []
        for level in MEASURED_LEVELS:
            noise = torch.stack(
                [torch.randn(latents.shape[1:], generator=generator("measure", i, level)) for i in range(len(paths))]
            )
            times = torch.full((len(paths),), int(level * pipe.scheduler.config.num_train_timesteps))
            noisy = pipe.scheduler.add_noise(latents, noise, times)
            error = pipe.unet(noisy, times, text).sample - pipe.scheduler.get_velocity(latents, noise, times)
            losses.append(float(error.square().mean()))
    return statistics.fmean(losses)


def show_extraction(output: Path, steps: int, draw_steps: int, picture: Path) -> None:
    """The first part, with its picture and a table."""
    from diffusers import UNet2DConditionModel
    from pixel_autoencoder import load_pipeline

    tuned = tuned_unet(output, steps)
    files = extracted(tuned, output)
    pipe = load_pipeline(EMOJI / "model")
    pipe.set_progress_bar_config(disable=True)
    rows, losses, sizes = {"base": draw(pipe, draw_steps)}, {"base": held_out_loss(pipe)}, {}
    for name, file in files.items():
        network = api.load(pipe, file)
        rows[name], losses[name], sizes[name] = draw(pipe, draw_steps), held_out_loss(pipe), file.stat().st_size
        network.detach()
    pipe.unet = UNet2DConditionModel.from_pretrained(tuned)
    order = ["base", "tuned", *files]
    rows["tuned"], losses["tuned"] = draw(pipe, draw_steps), held_out_loss(pipe)
    labelled = [(f"{name} loss {losses[name]:.4f}", rows[name]) for name in order]
    make_grid([*labelled, ("true outlines", true_images(CAPTIONS))], CAPTIONS, picture)
    print(f"\n{'':16}{'file':>10}{'held-out loss':>15}")
    for name in order:
        size = f"{sizes[name] / 1e6:7.2f} MB" if name in sizes else ""
        print(f"{name:16}{size:>10}{losses[name]:15.4f}")
    print(f"picture {picture}")


# -- growth


def show_growth(output: Path, steps: int) -> None:
    """The second part, with a table: the loss before, between and after the two trainings of each kind."""
    low, high = ([f"--network_dim={dim}", f"--network_alpha={dim}"] for dim in (LOW, HIGH))
    rows = []
    for seed in SEEDS:
        folder = output / f"seed{seed}"
        first = train(folder, "first", steps, seed, LORA_RATE, LORA_BATCH, low)
        file, grown = folder / "first.safetensors", folder / "grown.safetensors"
        api.resize(file, grown, rule=RankRule(HIGH), seed=seed, overwrite=True)
        stays = train(folder, "stays", steps, seed, LORA_RATE, LORA_BATCH, [*low, f"--network_weights={file}"])
        grows = train(folder, "grows", steps, seed, LORA_RATE, LORA_BATCH, [*high, f"--network_weights={grown}"])
        rows.append((first[0], first[-1], grows[0], stays[-1], grows[-1]))
    heads = ("base", f"dim {LOW}", f"grown to {HIGH}", f"dim {LOW} after", f"dim {HIGH} after")
    print("\n" + f"{'seed':6}" + "".join(f"{head:>14}" for head in heads))
    for seed, row in zip(SEEDS, rows, strict=True):
        print(f"{seed:<6}" + "".join(f"{value:14.5f}" for value in row))


def extract(args: argparse.Namespace) -> int:
    """Both parts."""
    output, picture = Path(args.output), Path(args.picture)
    replaced = [] if picture.resolve() == PICTURE.resolve() else [picture]
    if output.resolve() != OUTPUT.resolve():
        replaced += sorted(path for path in output.rglob("*") if path.is_file())
    check_outputs(replaced, [EMOJI / "model", EMOJI / "style", EMOJI / "heldout"], args.overwrite)
    show_extraction(output, args.whole_steps, args.draw_steps, picture)
    show_growth(output, args.steps)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="extract.py", description="Extract and grow adapters.", allow_abbrev=False)
    parser.add_argument("--whole_steps", type=int, default=150, help="training steps of the whole UNet; default: 150")
    parser.add_argument("--steps", type=int, default=60, help="of each training of a LoRA; default: 60")
    parser.add_argument("--draw_steps", type=int, default=24, help="steps of drawing one image; default: 24")
    parser.add_argument("--output", metavar="FOLDER", default=str(OUTPUT), help="default: output/extract")
    parser.add_argument("--picture", metavar="FILE", default=str(PICTURE), help="default: beside this file")
    add_overwrite(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(extract, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
