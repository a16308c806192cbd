"""The chart of the algorithms: the demo's task by each of them, with the trainer and the generator as a user runs them.

    python scripts/emoji/compare.py

Algorithms with a rank get a dim that makes them about equally large; those without have the size that they have. The
learning rates are not tuned: one value was tried for most, up to three for loha, ia3 and diag-oft. What is in the
output folder already is not made again; one algorithm takes about a minute on a free CPU, BOFT several.
`algorithms.png` beside this file is the result. It and the default output folder are this program's own; elsewhere it
replaces something only with --overwrite.
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
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from demo import EMOJI, NAME, SEED, draw_arguments, read_images, run, train_arguments, true_images  # noqa: E402

from networks.cli.command_line import add_overwrite, check_outputs, run_program, write_atomically  # noqa: E402
from networks.records import ALGORITHMS  # noqa: E402

OUTPUT = HERE.parents[1] / "output" / "compare"
CHART = HERE / "algorithms.png"
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


# As many values and rates as suit each; an algorithm that is not here is tried like LoRA.
TUNED = (
    Entry("lora", 4, 3e-3),
    Entry("loha", 2, 8e-3),
    Entry("lokr", 14, 3e-3, ("factor=4",)),
    Entry("dylora", 4, 4e-3),
    Entry("lora_fa", 4, 4e-3),
    Entry("glora", 2, 2e-3),
    Entry("tlora", 4, 2e-3),
    Entry("diag-oft", 32, 1e-3),
    Entry("boft", 2, 2e-3),
    Entry("ia3", 1, 3e-2),
    Entry("norm", 1, 1e-2),
    Entry("full", 1, 1e-3),
)
ENTRIES = (*TUNED, *(Entry(name, 4, 3e-3) for name in ALGORITHMS if name not in {entry.algo for entry in TUNED}))


@dataclass(frozen=True)
class Result:
    """What came of one algorithm.

    Attributes:
        before, after: loss on the held-out pictures.
        size: bytes of the file (fp32).
    """

    algo: str
    before: float
    after: float
    size: int


@dataclass(frozen=True)
class Cost:
    """CPU time of one thread for a training step, in parts of the frozen UNet's passes, and the trained parameters."""

    step: float
    parameters: int


def costs(repeats: int = 6) -> dict[str, Cost]:
    """Of all algorithms, in turns, so that other work of the computer weighs on all of them alike."""
    import torch
    from diffusers import UNet2DConditionModel

    import networks.lora

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    latents, text = torch.randn(BATCH, 27, 16, 16).requires_grad_(), torch.randn(BATCH, 12, 128)
    unet = UNet2DConditionModel.from_pretrained(EMOJI / "model" / "unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    made: dict[str, tuple[Any, Any]] = {}
    for entry in ENTRIES:
        network = networks.lora.create_network(1.0, entry.dim, entry.dim, None, None, unet, **entry.arguments)
        groups, _ = network.prepare_optimizer_params(None, 1e-6, 1e-6)
        made[entry.algo] = network, torch.optim.AdamW(groups)
    times: dict[str, list[float]] = {algo: [] for algo in ("", *made)}
    for _ in range(repeats):
        for algo in times:
            network, optimizer = made.get(algo, (None, None))
            if network is not None:
                network.apply_to(None, unet, False, True)
            start = time.process_time()
            unet(latents, torch.full((BATCH,), 500), text).sample.square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            times[algo].append(time.process_time() - start)
            if network is not None:
                network.detach()
    bare = statistics.median(times.pop(""))
    parameters = {algo: sum(p.numel() for g in o.param_groups for p in g["params"]) for algo, (_, o) in made.items()}
    return {algo: Cost(statistics.median(spent) / bare, parameters[algo]) for algo, spent in times.items()}


def measure(entry: Entry, model: Path, output: Path, steps: int) -> Result:
    """Train it, and draw with it.

    Args:
        entry: the algorithm.
        model: folder of the embedded model.
        output: folder of what comes of it; pictures of an earlier run go.
        steps: of training.

    Raises:
        ValueError: the trainer or the generator failed.
    """
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
    for earlier in output.glob("im_*.png"):  # the generator goes on after them
        earlier.unlink()
    adapter = output / f"{NAME}.safetensors"
    run("gen_img.py", draw_arguments(model, output, prompts, 24, adapter))
    return Result(entry.algo, losses[0], losses[-1], adapter.stat().st_size)


def draw_chart(results: Sequence[Result], cost: dict[str, Cost], steps: int, output: Path, path: Path) -> None:
    """Loss against parameters, cost of a step, and what each draws.

    Args:
        results: one for each algorithm.
        cost: of a step, by algorithm.
        steps: of the training, for the label.
        output: folder whose subfolders have the drawn pictures.
        path: of the PNG.
    """
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
        axes.plot(cost[result.algo].parameters, result.after, "o", color=colour, markersize=9)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    _label(axes, results, cost)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"loss on held-out pictures after {steps} steps (base model: {results[0].before:.3f})")
    axes.grid(alpha=0.3)
    bars = figure.add_subplot(upper[1])
    ordered = sorted(zip(results, colours, strict=True), key=lambda pair: -cost[pair[0].algo].step)
    lengths = [cost[r.algo].step for r, _ in ordered]
    bars.bar_label(
        bars.barh([r.algo for r, _ in ordered], lengths, color=[c for _, c in ordered]), fmt="%.1f", padding=3
    )
    bars.set_xscale("log")
    bars.set_xlim(0.9, 1.4 * max(lengths))
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


def _label(axes: Any, results: Sequence[Result], cost: dict[str, Cost]) -> None:
    """Names beside their points, with a line to them; those of near points one above the other."""
    low, high = axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for result in sorted(results, key=lambda r: r.after):
        x, y = cost[result.algo].parameters, result.after
        while any(max(x / other, other / x) < 2 and y < place + 0.045 * (high - low) for other, place in taken):
            y += 0.002 * (high - low)
        taken.append((x, y))
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7}
        axes.annotate(result.algo, (x, result.after), (1.5 * x, y), va="center", arrowprops=line)


def identity(entry: Entry, steps: int) -> dict[str, Any]:
    """What a result is the result of."""
    return {"entry": asdict(entry) | {"more": list(entry.more)}, "steps": steps}


def known_result(entry: Entry, folder: Path, steps: int) -> Result | None:
    """The result of an earlier run with the same settings."""
    cache = folder / "result.json"
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    wanted = identity(entry, steps)
    return Result(**known["result"]) if {key: known.get(key) for key in wanted} == wanted else None


def compare(args: argparse.Namespace) -> int:
    """Make what is missing, then the chart."""
    output, model, chart = Path(args.output), Path(args.model), Path(args.chart)
    known = {entry: known_result(entry, output / entry.algo, args.steps) for entry in ENTRIES}
    replaced = [] if chart.resolve() == CHART.resolve() else [chart]
    if output.resolve() != OUTPUT.resolve():
        folders = [output / entry.algo for entry, result in known.items() if result is None]
        names = ("result.json", "prompts.txt", f"{NAME}*", "im_*.png")
        replaced += [path for folder in folders for name in names for path in sorted(folder.glob(name))]
    check_outputs(replaced, [model, EMOJI / "style", EMOJI / "heldout"], args.overwrite)
    results = []
    for entry, found in known.items():
        result = found or measure(entry, model, output / entry.algo, args.steps)
        if found is None:
            text = json.dumps({**identity(entry, args.steps), "result": asdict(result)}, indent=1)
            cache = output / entry.algo / "result.json"
            write_atomically(cache, partial(Path.write_text, data=text, encoding="utf-8"))
        results.append(result)
    cost = costs()
    draw_chart(results, cost, args.steps, output, chart)
    print(f"\n{'':10}{'parameters':>12}{'file':>10}{'loss':>9}{'step':>7}")
    for r in results:
        print(f"{r.algo:10}{cost[r.algo].parameters:12,}{r.size / 1e6:7.2f} MB{r.after:9.4f}{cost[r.algo].step:7.2f}")
    print(f"chart  {args.chart}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the algorithms; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare.py", description="Compare the algorithms.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="training steps of each; default: 40")
    parser.add_argument("--model", metavar="FOLDER", default=str(EMOJI / "model"), help="default: the embedded model")
    parser.add_argument("--output", metavar="FOLDER", default=str(OUTPUT), help="default: output/compare")
    parser.add_argument("--chart", metavar="FILE", default=str(CHART), help="default: beside this file")
    add_overwrite(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(compare, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
