"""A training adapter, shown on the embedded model: what it has, a network trained beside it does not learn.

    python scripts/emoji/beside.py

The demo's adapter turns the model's coloured emoji into outlines. Two networks then learn from pictures of outlines:
one as ever, which takes the colours out of what the model draws, and one with that adapter as `training_adapter`,
beside which there is nothing to learn of the outlines, so that the model draws in colour as before. `beside.png` beside
this file has their samples, and the program prints the losses.

Ten minutes on two free cores. What is in the output folder already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from demo import EMOJI, NAME, SEED, run, train_arguments  # noqa: E402

from kohya_trainer.drawing.picture_grid import make_grid  # noqa: E402
from networks.cli.command_line import add_overwrite, check_outputs, run_program  # noqa: E402

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT = HERE.parents[1] / "output" / "beside"
PICTURE = HERE / "beside.png"
CAPTIONS = ("burger", "cactus", "crown", "fish", "rocket", "strawberry")
DEMO_STEPS = 250


def trained(folder: Path, steps: int, more: Sequence[str]) -> tuple[list[float], dict[str, list[Image]]]:
    """A network on the outlines.

    Args:
        folder: of its file and its samples.
        steps: of training.
        more: network arguments.

    Returns:
        The loss on held-out outlines before and after, and the samples of "first" and "last".

    Raises:
        ValueError: the trainer failed.
    """
    from PIL import Image

    if not (folder / "last.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"{one} --s 16 --l 3 --d {SEED}\n" for one in CAPTIONS), encoding="utf-8")
        run(
            "train_network.py",
            [
                f"--pretrained_model_name_or_path={EMOJI / 'model'}", f"--train_data_dir={EMOJI / 'style'}",
                f"--validation_data_dir={EMOJI / 'heldout'}", "--network_module=networks.lora", "--network_dim=16",
                "--network_alpha=16", "--network_train_unet_only", "--learning_rate=1e-3", "--lr_scheduler=cosine",
                "--lr_warmup_steps=5", "--train_batch_size=16", "--cache_latents", "--no_gradient_checkpointing",
                f"--seed={SEED}", f"--max_train_steps={steps}", f"--output_dir={folder}", f"--sample_prompts={prompts}",
                "--sample_at_first", f"--sample_every_n_steps={steps}", "--overwrite",
                "--network_args", "conv_dim=16", "conv_alpha=16", *more,
            ],
        )  # fmt: skip
    with (folder / "last-loss.csv").open(encoding="utf-8", newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    drawn = [Image.open(path).convert("RGB") for path in sorted((folder / "sample").glob("*.png"))]
    return [losses[0], losses[-1]], {"first": drawn[: len(CAPTIONS)], "last": drawn[-len(CAPTIONS) :]}


def beside(args: argparse.Namespace) -> int:
    output, picture = Path(args.output), Path(args.picture)
    check_outputs([picture], [], args.overwrite or picture == PICTURE)
    adapter = Path(args.adapter) if args.adapter else output / "adapter" / f"{NAME}.safetensors"
    if not args.adapter and not adapter.exists():
        run("train_network.py", train_arguments(EMOJI / "model", adapter.parent, DEMO_STEPS))
    found: dict[str, list[float]] = {}
    rows: list[tuple[str, list[Image]]] = []
    for name, title, more in (
        ("plain", "trained on outlines", []),
        ("beside", "trained beside an adapter for outlines", [f"training_adapter={adapter}"]),
    ):
        found[name], drawn = trained(output / name, args.steps, more)
        rows = rows or [("the model", drawn["first"])]
        rows.append((title, drawn["last"]))
    make_grid(rows, CAPTIONS, picture)
    for name, (before, after) in found.items():
        print(f"{name}: loss on held-out outlines {before:.4f} before, {after:.4f} after")
    print(f"wrote {picture}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="beside.py", description="Train beside an adapter.", allow_abbrev=False)
    parser.add_argument("--adapter", metavar="FILE", help="for outlines, such as the demo's; default: it is trained")
    parser.add_argument("--steps", type=int, default=60, help="of each training; default: 60")
    parser.add_argument("--output", metavar="FOLDER", default=str(OUTPUT), help="default: output/beside")
    parser.add_argument("--picture", metavar="FILE", default=str(PICTURE), help="default: beside this file")
    add_overwrite(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(beside, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
