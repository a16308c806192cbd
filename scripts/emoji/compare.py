"""The chart of the algorithms: the demo's task by each of them, with the trainer and the generator as a user runs them.

    python scripts/emoji/compare.py

Algorithms with a rank get a dim that makes them about equally large; those without have the size that they have. Each
has a learning rate that a few short runs found good. What is in the output folder already is not made again; one
algorithm takes about a minute on a free CPU. `algorithms.png` beside this file is the result.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from demo import EMOJI, NAME, SEED, draw_arguments, read_images, run, train_arguments, true_images  # noqa: E402

from networks.hosts.command_line import run_program, write_atomically  # noqa: E402

CAPTIONS = ("crown", "fish")
BATCH = 16


@dataclass(frozen=True)
class Entry:
    """One algorithm: its name in `algo=`, dim, learning rate and further network arguments."""

    algo: str
    dim: int
    rate: float
    more: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, str]:
        """Of the network, as the trainer hands them over."""
        rank = {"algo": self.algo, "conv_dim": str(self.dim), "conv_alpha": str(self.dim)}
        return rank | dict(argument.split("=") for argument in self.more)


ENTRIES = (
    Entry("lora", 4, 3e-3),
    Entry("loha", 2, 3e-3),
    Entry("lokr", 14, 3e-3, ("factor=4",)),
    Entry("dylora", 4, 4e-3),
    Entry("lora_fa", 4, 4e-3),
    Entry("glora", 2, 2e-3),
    Entry("tlora", 4, 2e-3),
    Entry("diag-oft", 32, 3e-3),
    Entry("boft", 2, 2e-3),
    Entry("ia3", 1, 1e-2),
    Entry("norm", 1, 1e-2),
    Entry("full", 1, 1e-3),
)


@dataclass(frozen=True)
class Result:
    """What came of one algorithm.

    Attributes:
        before, after: loss on the held-out pictures.
        parameters: that are trained.
        size: bytes of the file (fp32).
        seconds: of one thread for a training step.
    """

    algo: str
    before: float
    after: float
    parameters: int
    size: int
    seconds: float


def step_seconds(entry: Entry | None, repeats: int = 5) -> tuple[float, int]:
    """(CPU time of forward, backward and optimizer step, median; trained parameters), or of the bare UNet's passes."""
    import torch
    from diffusers import UNet2DConditionModel

    import networks.lora

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel.from_pretrained(EMOJI / "model" / "unet", torch_dtype=torch.float32).requires_grad_(
        False
    )
    latents, text = torch.randn(BATCH, 27, 16, 16).requires_grad_(), torch.randn(BATCH, 12, 128)
    optimizer, parameters = None, 0
    if entry is not None:
        network = networks.lora.create_network(1.0, entry.dim, entry.dim, None, None, unet, **entry.arguments)
        network.apply_to(None, unet, False, True)
        groups, _ = network.prepare_optimizer_params(None, 1e-6, 1e-6)
        optimizer, parameters = torch.optim.AdamW(groups), sum(p.numel() for g in groups for p in g["params"])
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        unet(latents, torch.full((BATCH,), 500), text).sample.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.process_time() - start)
    return statistics.median(times[1:]), parameters


def measure(entry: Entry, model: Path, output: Path, steps: int) -> Result:
    """Train it, draw with it, time it."""
    arguments = [
        a for a in train_arguments(model, output, steps) if not a.startswith(("--network_", "conv_", "--learn"))
    ]
    wanted = [f"{name}={value}" for name, value in entry.arguments.items()]
    run(
        "train_network.py",
        [
            *arguments, "--network_module=networks.lora", f"--network_dim={entry.dim}", f"--network_alpha={entry.dim}",
            "--network_args", *wanted, "--network_train_unet_only", f"--learning_rate={entry.rate}",
            f"--validate_every_n_steps={steps}", f"--train_batch_size={BATCH}",
        ],
    )  # fmt: skip
    with (output / f"{NAME}-loss.csv").open(encoding="utf-8", newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    prompts = output / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
    adapter = output / f"{NAME}.safetensors"
    run("gen_img.py", draw_arguments(model, output, prompts, 24, adapter))
    seconds, parameters = step_seconds(entry)
    return Result(entry.algo, losses[0], losses[-1], parameters, adapter.stat().st_size, seconds)


def draw_chart(results: Sequence[Result], bare: float, steps: int, output: Path, path: Path) -> None:
    """Loss against parameters, cost of a step, and what each draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 8), dpi=110)
    rows = len(CAPTIONS)
    grid = figure.add_gridspec(2, 1, height_ratios=(2.2, 1), hspace=0.22, left=0.07, right=0.985, top=0.94, bottom=0.02)
    upper = grid[0].subgridspec(1, 2, width_ratios=(1.7, 1), wspace=0.28)
    axes = figure.add_subplot(upper[0])
    colours = [pyplot.get_cmap("tab20")(i) for i in range(len(results))]
    for result, colour in zip(results, colours, strict=True):
        axes.plot(result.parameters, result.after, "o", color=colour, markersize=9)
    _label(axes, results)
    axes.axhline(results[0].before, color="#888888", linestyle="--", linewidth=1)
    axes.text(0.01, results[0].before, "base model", transform=axes.get_yaxis_transform(), va="bottom", color="#666666")
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.1 * results[0].before)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"loss on held-out pictures after {steps} steps")
    axes.grid(alpha=0.3)
    bars = figure.add_subplot(upper[1])
    ordered = sorted(zip(results, colours, strict=True), key=lambda pair: -pair[0].seconds)
    bars.barh([r.algo for r, _ in ordered], [r.seconds / bare for r, _ in ordered], color=[c for _, c in ordered])
    bars.axvline(1, color="#888888", linestyle="--", linewidth=1)
    bars.set_xlabel("cost of a training step\n(1 = the frozen UNet, forward and backward)")
    pictures = [read_images(output / result.algo, rows) for result in results]
    truth = true_images(CAPTIONS)
    lower = grid[1].subgridspec(rows, len(results) + 1, wspace=0.06, hspace=0.06)
    for column, (name, images) in enumerate(
        [*((r.algo, p) for r, p in zip(results, pictures, strict=True)), ("true", truth)]
    ):
        for row, image in enumerate(images):
            place = figure.add_subplot(lower[row, column])
            place.imshow(image, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            if row == 0:
                place.set_title(name, fontsize=10)
            if column == 0:
                place.set_ylabel(CAPTIONS[row], fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    pyplot.close(figure)


def _label(axes: Any, results: Sequence[Result]) -> None:
    """Names beside their points; those of near points one above the other."""
    taken: list[tuple[float, float]] = []
    step = 0.045 * results[0].before
    for result in sorted(results, key=lambda r: r.after):
        y = result.after
        while any(abs(x / result.parameters - 1) < 0.9 and abs(y - other) < step for x, other in taken):
            y += step / 4
        taken.append((result.parameters, y))
        axes.annotate(result.algo, (result.parameters, y), textcoords="offset points", xytext=(8, -4))


def compare(args: argparse.Namespace) -> int:
    """Make what is missing, then the chart."""
    output, model = Path(args.output), Path(args.model)
    results = []
    for entry in ENTRIES:
        folder = output / entry.algo
        cache = folder / "result.json"
        wanted = {"entry": asdict(entry) | {"more": list(entry.more)}, "steps": args.steps}
        known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
        if {key: known.get(key) for key in wanted} != wanted:
            result = measure(entry, model, folder, args.steps)
            known = {**wanted, "result": asdict(result)}
            cache.write_text(json.dumps(known, indent=1), encoding="utf-8")
        results.append(Result(**known["result"]))
    bare = step_seconds(None)[0]
    draw_chart(results, bare, args.steps, output, Path(args.chart))
    print(f"\n{'':10}{'parameters':>12}{'file':>10}{'loss':>9}{'step':>7}")
    for r in results:
        print(f"{r.algo:10}{r.parameters:12,}{r.size / 1e6:7.2f} MB{r.after:9.4f}{r.seconds / bare:7.2f}")
    print(f"chart  {args.chart}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the algorithms; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare.py", description="Compare the algorithms.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="training steps of each; default: 40")
    parser.add_argument("--model", metavar="FOLDER", default=str(EMOJI / "model"), help="default: the embedded model")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default=str(HERE.parents[1] / "output" / "compare"),
        help="default: output/compare",
    )
    parser.add_argument(
        "--chart", metavar="FILE", default=str(HERE / "algorithms.png"), help="default: beside this file"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(compare, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
