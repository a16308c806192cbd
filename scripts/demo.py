"""The demo: teach the embedded emoji model a style that it has never seen, and show it.

It runs the trainer and the generator as a user would (their command lines are printed), makes one picture of what they
wrote, and checks the result: the loss on captions kept out of the training must fall well below the base model's, the
colours must go, and strength 0 must be the base model to the last bit. Then others look at the file: diffusers loads
it and must draw the same pictures, the model of ComfyUI's loader says what ComfyUI would load, and `show` draws its
updates. Written to output/demo/: emoji-outline.safetensors (the adapter), loss.png, before_after.png, plan.txt,
updates.png. That folder is the demo's own and made anew; in another, what is there already is replaced only with
--overwrite.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kohya_trainer.drawing.picture_grid import make_grid  # noqa: E402
from networks.cli.command_line import (  # noqa: E402
    INTERRUPTED,
    Terminated,
    add_overwrite,
    check_outputs,
    run_program,
    told_time,
    write_atomically,
)

EMOJI = ROOT / "scripts" / "emoji"
OUTPUT = ROOT / "output" / "demo"
NAME = "emoji-outline"
STRENGTHS = (0.0, 0.5, 1.0)
SHOWN = (
    "burger",
    "butterfly",
    "cactus",
    "car",
    "cat",
    "crown",
    "donut",
    "fish",
    "house",
    "ice cream",
    "rocket",
    "strawberry",
)
SEED = 1
MAX_LOSS_RATIO = 0.5  # held-out loss after training / before
MAX_COLOUR_RATIO = 0.4  # colour at strength 1 / at strength 0
MAX_DIFFERENCE = 1.0  # between pictures, of 255: rounding on the way of some dozens of steps


def train_arguments(model: Path, output: Path, steps: int) -> list[str]:
    """The trainer's command line."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={EMOJI / 'style'}",
        f"--validation_data_dir={EMOJI / 'heldout'}",
        f"--validate_every_n_steps={max(25, steps // 5)}",
        "--network_module=networks.lora",
        "--network_dim=16",
        "--network_alpha=16",
        "--network_args",
        "conv_dim=16",
        "conv_alpha=16",
        "--network_train_unet_only",
        "--learning_rate=1e-3",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=10",
        f"--max_train_steps={steps}",
        "--train_batch_size=32",
        "--cache_latents",
        "--no_gradient_checkpointing",
        f"--seed={SEED}",
        f"--output_dir={output}",
        f"--output_name={NAME}",
        "--overwrite",
    ]


def draw_arguments(model: Path, output: Path, prompts: Path, steps: int, adapter: Path | None) -> list[str]:
    """The generator's command line.

    Args:
        model: folder of the embedded model.
        output: folder of the images.
        prompts: file with one prompt a line.
        steps: of drawing one image.
        adapter: file of the network; None = the model alone.
    """
    arguments = [
        f"--ckpt={model}",
        f"--from_file={prompts}",
        f"--outdir={output}",
        f"--steps={steps}",
        "--scale=3",
        f"--seed={SEED}",
        f"--batch_size={len(SHOWN)}",
    ]
    return arguments + (["--network_module=networks.lora", f"--network_weights={adapter}"] if adapter else [])


def run(script: str, arguments: Sequence[str]) -> None:
    """Run one of our scripts, visibly. Raises ValueError when it fails."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    print(f"\n$ {subprocess.list2cmdline(['python', f'scripts/{script}', *arguments])}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):  # Ctrl-C has reached it already
            process.terminate()
        process.wait()  # it cleans up, too
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"scripts/{script} failed with exit code {code}; its own message stands above.")


def read_images(folder: Path, count: int) -> list[Any]:
    """The generator's images, in order."""
    from PIL import Image

    return [Image.open(folder / f"im_{number:06d}.png").convert("RGB") for number in range(count)]


def true_images(captions: Sequence[str]) -> list[Any]:
    """The held-out images in the true style, by caption. Raises ValueError when one is missing."""
    from PIL import Image

    paths = {
        path.read_text(encoding="utf-8").strip(): path.with_suffix(".png") for path in (EMOJI / "heldout").glob("*.txt")
    }
    missing = [caption for caption in captions if caption not in paths]
    if missing:
        raise ValueError(f"{EMOJI / 'heldout'} has no image of {', '.join(missing)}. Restore it from version control.")
    return [Image.open(paths[caption]).convert("RGB") for caption in captions]


def colour(images: Sequence[Any]) -> float:
    """Mean over all pixels of (largest - smallest channel) / 255: 0 for black, white and grey."""
    import numpy as np

    stack = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    return float((stack.max(-1) - stack.min(-1)).mean() / 255)


def recognised(images: Sequence[Any], truth: Sequence[Any]) -> float:
    """Share of images whose nearest true picture (squared pixel distance) is the one of their own caption."""
    import numpy as np

    drawn, true = (np.stack([np.asarray(image, dtype=np.float64).ravel() for image in row]) for row in (images, truth))
    distances = ((drawn[:, None] - true[None]) ** 2).sum(-1)
    return float((distances.argmin(1) == np.arange(len(true))).mean())


def held_out_losses(path: Path) -> tuple[float, float]:
    """The loss on the held-out images before the first step and after the last one."""
    with path.open(encoding="utf-8", newline="") as file:
        values = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    return values[0], values[-1]


def drawn_before(output: Path) -> list[Path]:
    """Pictures of an earlier demo."""
    return [path for name in ("base", "adapter") for path in sorted((output / "images" / name).glob("im_*.png"))]


def draw_rows(model: Path, output: Path, steps: int) -> tuple[list[Any], dict[float, list[Any]]]:
    """Draw the shown captions with the base model alone, and with the adapter at each strength."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    for earlier in drawn_before(output):  # the generator goes on after them
        earlier.unlink()
    plain, with_strength = images / "base-prompts.txt", images / "prompts.txt"
    plain.write_text("".join(f"{caption}\n" for caption in SHOWN), encoding="utf-8")
    lines = [f"{caption} --am {strength}\n" for strength in STRENGTHS for caption in SHOWN]
    with_strength.write_text("".join(lines), encoding="utf-8")
    run("gen_img.py", draw_arguments(model, images / "base", plain, steps, None))
    run("gen_img.py", draw_arguments(model, images / "adapter", with_strength, steps, output / f"{NAME}.safetensors"))
    drawn = read_images(images / "adapter", len(SHOWN) * len(STRENGTHS))
    rows = {strength: drawn[i * len(SHOWN) : (i + 1) * len(SHOWN)] for i, strength in enumerate(STRENGTHS)}
    return read_images(images / "base", len(SHOWN)), rows


def answer(script: str, *arguments: str) -> str:
    """What one of our scripts prints, without what libraries say meanwhile. Raises ValueError when it fails."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise ValueError(f"scripts/{script} failed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def read_by_diffusers(model: Path, adapter: Path, steps: int) -> float:
    """Draw the shown captions with the file as diffusers loads it, and as we do: the largest difference, of 255.

    Args:
        model: folder of the embedded model.
        adapter: the file.
        steps: of drawing one image.
    """
    options = ("--steps", str(steps), "--seed", str(SEED))
    return float(answer("emoji/read_back.py", str(model), str(adapter), *options, *SHOWN).split()[-1])


def read_by_comfyui(model: Path, adapter: Path) -> str:
    """What scripts/show.py says that ComfyUI makes of the file."""
    readers = json.loads(answer("show.py", str(adapter), "--model", str(model), "--json"))["readers"]
    return next((str(reader["sentence"]) for reader in readers if "ComfyUI" in reader["program"]), "ComfyUI: not known")


def check_free(output: Path, model: Path, overwrite: bool) -> None:
    """Raises ValueError for what would be replaced in a folder that is not the demo's own."""
    written = [output / f"{NAME}{end}" for end in (".safetensors", "-loss.csv", "-loss.png", "-plan.txt", "-plan.json")]
    written += [output / name for name in ("loss.png", "plan.txt", "before_after.png", "updates.png")]
    written += [output / "images" / name for name in ("prompts.txt", "base-prompts.txt")]
    own = output.resolve() == OUTPUT.resolve()
    check_outputs([*written, *drawn_before(output)], [model, EMOJI], overwrite or own)


def problems_of(before: float, after: float, colours: Sequence[float], same: bool, difference: float) -> list[str]:
    """What the adapter is not as it should be in.

    Args:
        before, after: held-out losses.
        colours: of the pictures, by strength.
        same: whether strength 0 draws the base model's pictures.
        difference: of diffusers' pictures from ours.
    """
    problems = []
    if not same:
        problems.append("at strength 0 the images differ from the base model's.")
    if not after <= MAX_LOSS_RATIO * before:
        problems.append(f"the held-out loss is {after / before:.2f} of the base model's, above {MAX_LOSS_RATIO}.")
    if not colours[-1] <= MAX_COLOUR_RATIO * colours[0]:
        problems.append(f"the colour is {colours[-1] / colours[0]:.2f} of the base model's, above {MAX_COLOUR_RATIO}.")
    if not difference <= MAX_DIFFERENCE:
        problems.append(f"diffusers draws other pictures with the file, by {difference:.1f} of 255.")
    return problems


def demo(args: argparse.Namespace) -> int:
    """Train, draw, compare. Returns 0, or 1 when the adapter is not what it should be."""
    start, output, model = time.monotonic(), Path(args.output), Path(args.model)
    if not (model / "model_index.json").is_file():
        raise ValueError(f"{model} is missing or incomplete. Restore it from version control.")
    check_free(output, model, args.overwrite)
    truth = true_images(SHOWN)
    run("train_network.py", train_arguments(model, output, args.steps))
    trained = time.monotonic() - start
    base, rows = draw_rows(model, output, args.draw_steps)
    adapter = output / f"{NAME}.safetensors"
    run("show.py", [str(adapter), f"--plot={output / 'updates.png'}", "--overwrite"])
    difference, comfyui = read_by_diffusers(model, adapter, args.draw_steps), read_by_comfyui(model, adapter)
    write_atomically(output / "loss.png", partial(shutil.copyfile, output / f"{NAME}-loss.png"))
    write_atomically(output / "plan.txt", partial(shutil.copyfile, output / f"{NAME}-plan.txt"))
    labels = [(f"strength {strength:g}", rows[strength]) for strength in STRENGTHS]
    make_grid([*labels, ("true style", truth)], SHOWN, output / "before_after.png")

    before, after = held_out_losses(output / f"{NAME}-loss.csv")
    colours = [colour(rows[strength]) for strength in STRENGTHS]
    same = all(first.tobytes() == second.tobytes() for first, second in zip(base, rows[0.0], strict=True))
    print(f"\n{'':28}" + "".join(f"{f'strength {strength:g}':>14}" for strength in STRENGTHS) + f"{'true style':>14}")
    print(f"{'colour of the images':28}" + "".join(f"{value:14.3f}" for value in [*colours, colour(truth)]))
    found = "".join(f"{recognised(rows[strength], truth):14.0%}" for strength in STRENGTHS)
    print(f"{'nearest true outline':28}{found}")
    print(f"{'loss on held-out images':28}{before:14.4f}{'':14}{after:14.4f}")
    print(f"\ndiffusers reads the file: its pictures are ours within {difference:.3f} of 255")
    print(f"by the model of its loader, {comfyui}")
    print(f"\ntraining {told_time(trained)}, everything {told_time(time.monotonic() - start)}")
    print(f"adapter  {adapter}\npictures {output / 'before_after.png'}, {output / 'loss.png'}")
    print(f"updates  {output / 'updates.png'}\nplan     {output / 'plan.txt'}")

    problems = problems_of(before, after, colours, same, difference)
    if args.no_check or not problems:
        return 0
    print("\nThe demo FAILED its own checks:\n- " + "\n- ".join(problems), file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description="Train and show an adapter.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=250, help="training steps; default: 250")
    parser.add_argument("--draw_steps", type=int, default=24, help="steps of drawing one image; default: 24")
    parser.add_argument("--model", metavar="FOLDER", default=str(EMOJI / "model"), help="default: the embedded model")
    parser.add_argument("--output", metavar="FOLDER", default=str(OUTPUT), help="default: output/demo")
    add_overwrite(parser)
    parser.add_argument("--no_check", action="store_true", help="succeed whatever the adapter is like (for tests)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(demo, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
