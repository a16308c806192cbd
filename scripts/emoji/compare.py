"""The demo's task by every algorithm, each at the best of the learning rates that it tried, and the picture of it.

    python scripts/emoji/compare.py             train what is missing, then draw
    python scripts/emoji/compare.py --redraw    only draw, from the results that are there

The learning rates are 1, 2, 5, 10, ...: from a first guess each entry of ENTRIES goes on until both neighbours of its
best rate were tried, by the loss on a third of the held-out pictures, with seed 0. At that rate it is then trained with
the seeds 1, 2 and 3, and what is shown is their loss on the other two thirds. Entries of one seed see the same pictures
with the same noise in the same order. Every finished run is a line of `compared.jsonl` beside this file, and is not
made again; Ctrl-C loses only the run at work. `algorithms.png` is the picture; `python scripts/docs.py` puts the tables
into docs/which-algorithm.md.

A run takes about half a minute on one core, all of them more than an hour; --processes divides them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from compared_table import (  # noqa: E402
    ENTRIES,
    REFERENCE,
    RESULTS,
    SEARCH_SEED,
    SEEDS,
    Compared,
    Entry,
    Outcome,
    Run,
    chosen,
    next_rate,
    plain,
    rate_text,
    read,
    reference_of,
    size_text,
)
from demo import EMOJI, true_images  # noqa: E402

from networks.cli.command_line import check_outputs, nearest, run_program, write_atomically  # noqa: E402

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from kohya_trainer.training_data import TrainingData

CHART = HERE / "algorithms.png"
CAPTIONS = ("burger", "cactus", "crown")  # drawn by each, of the pictures by which no rate is chosen
DRAW_STEPS = 24
STEPS, BATCH, WARMUP = 75, 8, 5  # 75 steps of 8 are five times through the 120 pictures
PARTS = 3  # of a run, after each of which the loss is taken
CHOICE_EVERY = 3  # one held-out picture in so many is for the choice of the rate


@dataclass(frozen=True)
class Job:
    """One training run that is to be made."""

    entry: Entry
    rate: float
    seed: int
    steps: int = STEPS
    model: str = str(EMOJI / "model")


# -- training


class Bench:
    """The embedded model with its pictures and their captions, all encoded once."""

    def __init__(self, model: str) -> None:
        import torch

        from kohya_trainer.data.caption_folder import read_caption_folder
        from kohya_trainer.families import DataOptions, NoiseOptions
        from kohya_trainer.losses import Loss, LossOptions
        from kohya_trainer.model_folder import load_model
        from kohya_trainer.training_data import TrainingData

        torch.set_num_threads(1)
        logging.getLogger("networks").setLevel(logging.ERROR)  # the same notes in each of a hundred runs
        self.family = load_model(Path(model), torch.device("cpu"), torch.float32, "--model")
        self.loss = Loss(LossOptions(), self.family.make_noise(NoiseOptions()))
        style, held_out = (
            read_caption_folder(EMOJI / name, ".txt", "--model", self.family.medium) for name in ("style", "heldout")
        )
        size = self.family.native_size
        choice = held_out[::CHOICE_EVERY]
        shown = [item for item in held_out if item not in choice]
        self.train, self.choice, self.shown = (
            TrainingData(items, self.family, DataOptions((size, size))) for items in (style, choice, shown)
        )
        for data in (self.train, self.choice, self.shown):
            data.cache_latents()
            data.cache_texts(BATCH)

    def measure(self, network: Any, data: TrainingData) -> float:
        """Mean loss at the trainer's fixed noise and levels; with `network=None` that of the model alone."""
        import torch

        from kohya_trainer.training import Objective

        objective, losses = Objective(network, self.family, self.loss), list[float]()
        with torch.no_grad():
            for batch, *inputs in data.fixed_batches(4 * BATCH):
                losses += objective(data, batch, *inputs).tolist()
        return statistics.fmean(losses)

    def batches(self, seed: int, steps: int) -> Iterator[tuple[dict[str, Any], list[torch.Tensor]]]:
        """Batches with their latents, noise and noise levels, as the trainer has them for this seed."""
        from torch.utils.data import default_collate

        from kohya_trainer.training_data import Order, draw_noise

        order = Order(self.train.sizes, BATCH, seed, 0, 1)
        for step in range(steps):
            epoch, number = divmod(step, len(order.whole(0)))
            rows = [(index, 1.0) for index in order.whole(epoch)[number][0]]
            batch = default_collate([self.train[row] for row in rows])
            latents = self.train.latents(batch)
            yield batch, [latents, *draw_noise(seed, step, batch["index"].tolist(), latents)[:2]]

    def network(self, entry: Entry, rate: float) -> tuple[Any, torch.optim.Optimizer]:
        """A new network, attached, and its optimizer."""
        import torch

        import networks.lora

        family = self.family
        network = networks.lora.create_network(
            1.0, entry.dim, entry.alpha, family.vae, family.text_encoder_argument, family.denoiser, **entry.arguments
        )
        network.apply_to(family.text_encoder_argument, family.denoiser, False, True)
        groups, _ = network.prepare_optimizer_params(None, rate, rate)
        return network, torch.optim.AdamW([{**group, "params": list(group["params"])} for group in groups])

    def draw(self) -> Image:
        """CAPTIONS side by side, from the same noise for every network."""
        import torch
        from PIL import Image

        generators = [torch.Generator().manual_seed(1 + number) for number in range(len(CAPTIONS))]
        drawn = self.family.pipeline(
            list(CAPTIONS), num_inference_steps=DRAW_STEPS, guidance_scale=3.0, generator=generators
        ).images
        strip = Image.new("RGB", (drawn[0].width * len(drawn), drawn[0].height))
        for number, picture in enumerate(drawn):
            strip.paste(picture, (number * picture.width, 0))
        return strip


@cache
def bench(model: str) -> Bench:
    """One for each process."""
    return Bench(model)


def train(job: Job) -> tuple[Run, Image | None]:
    """One run, and with the first of SEEDS what is drawn after it."""
    import torch
    from diffusers.optimization import get_scheduler

    from kohya_trainer.training import Objective
    from kohya_trainer.training_data import seed_of

    start, place, entry = time.monotonic(), bench(job.model), job.entry
    torch.manual_seed(seed_of(job.seed, "network"))
    network, optimizer = place.network(entry, job.rate)
    try:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        schedule = get_scheduler(
            "cosine", optimizer, num_warmup_steps=min(WARMUP, job.steps // 2), num_training_steps=job.steps
        )
        objective, losses, curve = Objective(network, place.family, place.loss), list[float](), []
        marks = {round(job.steps * part / PARTS) for part in range(1, PARTS + 1)}
        for step, (batch, inputs) in enumerate(place.batches(job.seed, job.steps), start=1):
            torch.manual_seed(seed_of(job.seed, "dropout", step))
            network.follow_step(job.seed, step - 1)
            loss = objective(place.train, batch, *inputs).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
            if step in marks:
                network.eval()
                curve.append((step, round(statistics.fmean(losses), 5), round(place.measure(network, place.choice), 5)))
                network.train()
                losses = []
        network.eval()
        end = place.measure(network, place.shown) if math.isfinite((losses or [0.0])[-1]) else math.nan
        picture = place.draw() if job.seed == SEEDS[0] and math.isfinite(end) else None
    finally:
        network.detach()
    run = Run(
        entry.name, entry.algo, entry.dim, entry.options, sum(p.numel() for p in parameters), job.rate, job.seed,
        tuple(curve), round(end, 5) if math.isfinite(end) else None, round(time.monotonic() - start, 1),
    )  # fmt: skip
    return run, picture


def costs(entries: Sequence[Entry], model: str, repeats: int = 5) -> dict[str, float]:
    """CPU time of one thread for a training step, in parts of the frozen UNet's forward and backward pass.

    Args:
        entries: whose steps are measured, in turns, so that other work of the computer weighs on all of them alike.
        model: folder of the embedded model.
        repeats: the median of so many counts.
    """
    import torch

    unet = bench(model).family.denoiser
    latents, text = (torch.randn(BATCH, 27, 16, 16).requires_grad_(), torch.randn(BATCH, 12, 128))
    made = {}
    for entry in entries:
        made[entry.name] = bench(model).network(entry, 1e-6)
        made[entry.name][0].detach()
    times: dict[str, list[float]] = {name: [] for name in ("", *made)}
    for _ in range(repeats):
        for name, spent in times.items():
            network, optimizer = made.get(name, (None, None))
            if network is not None:
                network.apply_to(None, unet, False, True)
            start = time.process_time()
            unet(latents, torch.full((BATCH,), 500), text).sample.square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            spent.append(time.process_time() - start)
            if network is not None:
                network.detach()
    bare = statistics.median(times.pop(""))
    return {name: statistics.median(spent) / bare for name, spent in times.items()}


# -- which runs there are to be


def missing(entries: Sequence[Entry], compared: Compared) -> list[tuple[Entry, float, int]]:
    """Entry, rate and seed of what can be trained next, in the order of the entries."""
    jobs = []
    for entry in entries:
        tried = compared.search(entry.name)
        rate = next_rate(tried, entry.first)
        if rate is not None:
            jobs.append((entry, rate, SEARCH_SEED))
            continue
        best = chosen(tried)
        made = {run.seed for run in compared.runs if (run.name, run.rate) == (entry.name, best)}
        jobs += [(entry, best, seed) for seed in SEEDS if seed not in made and best is not None]
    return jobs


def expected(entries: Sequence[Entry], compared: Compared) -> int:
    """How many runs are left if every search ends as soon as it can."""
    left = len(missing(entries, compared))
    for entry in entries:
        tried = compared.search(entry.name)
        if chosen(tried) is None:
            left += len(SEEDS) + max(0, 2 - len(tried))
    return left


def picture_path(folder: Path, name: str) -> Path:
    """Where what an entry drew is kept."""
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}.png"


class Store:
    """The file of results and the folder of pictures, written line by line."""

    def __init__(self, path: Path) -> None:
        self.path, self.pictures = path, path.with_suffix("")

    def read(self) -> Compared:
        return read(self.path) if self.path.is_file() else Compared({}, (), {})

    def begin(self, setting: dict[str, Any], picture: Image) -> None:
        """A new file, with the setting of all its runs and what the base model draws."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self._picture("base", picture)
        self.add("setting", setting)

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """Another line."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"kind": kind, **content}) + "\n")

    def keep(self, run: Run, picture: Image | None) -> None:
        """A finished run; its picture first, so that no run that is written lacks it."""
        if picture is not None:
            self._picture(run.name, picture)
        self.add("run", asdict(run))

    def _picture(self, name: str, picture: Image) -> None:
        write_atomically(
            picture_path(self.pictures, name), lambda path: picture.save(path, format="png", optimize=True)
        )


def setting_of(steps: int) -> dict[str, Any]:
    """What all runs of a file have in common, but for the losses of the base model."""
    return {"steps": steps, "batch": BATCH, "optimizer": "AdamW", "schedule": "cosine", "warmup": WARMUP}


def train_missing(store: Store, entries: Sequence[Entry], steps: int, model: str, processes: int) -> None:
    """Train what is not in the file yet, several runs at a time if `processes` is above 1.

    Raises:
        ValueError: the file has results of other steps.
    """
    from tqdm import tqdm

    known, wanted = store.read(), setting_of(steps)
    if known.setting and {key: known.setting.get(key) for key in wanted} != wanted:
        raise ValueError(f"{store.path} has runs of {known.setting.get('steps')} steps. Give another file: --results.")
    if not known.setting:
        place = bench(model)
        losses = {"choice": place.measure(None, place.choice), "shown": place.measure(None, place.shown)}
        sizes = {"choice": len(place.choice), "shown": len(place.shown), "train": len(place.train)}
        store.begin({**wanted, "base": {k: round(v, 5) for k, v in losses.items()}, "pictures": sizes}, place.draw())
    with tqdm(desc="runs", initial=len(known.runs), total=len(known.runs) + expected(entries, known)) as bar:

        def note(made: tuple[Run, Image | None]) -> None:
            store.keep(*made)
            now = store.read()
            bar.total = len(now.runs) + expected(entries, now)
            run = made[0]
            loss = "diverged" if run.loss is None else f"{run.loss:.4f}"
            tqdm.write(f"{run.name:14} rate {rate_text(run.rate)}  seed {run.seed}  loss {loss}  {run.seconds:.0f} s")
            bar.update()

        def jobs() -> list[Job]:
            return [Job(*one, steps, model) for one in missing(entries, store.read())]

        if processes > 1:
            run_together(jobs, note, processes)
        else:
            while left := jobs():
                note(train(left[0]))


def run_together(jobs: Any, note: Any, processes: int) -> None:
    """Several runs at a time.

    Args:
        jobs: says what can be trained now.
        note: takes what came of one.
        processes: how many run at a time.
    """
    running: dict[Future[tuple[Run, Image | None]], Job] = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            while True:
                waiting = [job for job in jobs() if job not in running.values()]
                for job in waiting[: processes - len(running)]:
                    running[pool.submit(train, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    note(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


# -- the picture


def draw_chart(compared: Compared, pictures: Path, path: Path) -> None:
    """A row for each entry, the lowest loss on top: losses of the seeds, size and rate, cost of a step, and pictures.

    Args:
        compared: the results.
        pictures: folder of what the entries drew.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    outcomes = compared.finished()
    reference = reference_of(outcomes)
    rows = len(outcomes) + 2  # and the base model, and the true outlines
    figure = pyplot.figure(figsize=(12, 0.55 * rows + 1.5), dpi=110)
    top, bottom = 1 - 0.6 / (0.55 * rows + 1.5), 0.8 / (0.55 * rows + 1.5)
    grid = figure.add_gridspec(
        1, 3, width_ratios=(4.2, 2.2, 1.75), wspace=0.04, left=0.11, right=0.995, top=top, bottom=bottom
    )
    axes = [figure.add_subplot(grid[0, column]) for column in range(3)]
    for one in axes:
        one.set_ylim(rows - 0.5, -0.5)
        one.tick_params(axis="y", length=0, labelsize=11)
    _draw_losses(axes[0], outcomes, compared, reference)
    _draw_costs(axes[1], outcomes, compared, reference)
    _draw_pictures(axes[2], outcomes, pictures)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    pyplot.close(figure)


EQUAL, OTHER = ("#1f5fa8", "#c8641e")  # colours: of about the reference's size, and of another


def _colour(outcome: Outcome, reference: Run) -> str:
    return OTHER if "(" in size_text(outcome.run.parameters, reference.parameters) else EQUAL


def _draw_losses(axes: Any, outcomes: Sequence[Outcome], compared: Compared, reference: Run) -> None:
    """Each seed, their mean, and the line from the lowest to the highest."""
    for row, outcome in enumerate(outcomes):
        colour, losses = _colour(outcome, reference), outcome.losses
        axes.plot([min(losses), max(losses)], [row, row], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(losses, [row] * len(losses), "|", color=colour, markersize=10)
        axes.plot(outcome.mean, row, "o", color=colour, markersize=8)
        axes.annotate(
            f"{outcome.mean:.4f}", (max(losses), row), (9, 0), textcoords="offset points", va="center", fontsize=10
        )
    names = [outcome.run.name for outcome in outcomes]
    axes.set_yticks(range(len(names) + 2), [*names, "base model", "true outlines"])
    axes.margins(x=0.18)
    base, steps = compared.setting["base"]["shown"], compared.setting["steps"]
    axes.annotate(f"{base:.4f}, beyond the right edge", (0.98, len(names)), xycoords=axes.get_yaxis_transform(),
                  ha="right", va="center", fontsize=10, color="#555555")  # fmt: skip
    axes.set_xlabel(f"loss on {compared.setting['pictures']['shown']} held-out pictures after {steps} steps: "
                    f"mean and each of {len(SEEDS)} seeds", fontsize=11)  # fmt: skip
    axes.plot([], [], "o", color=EQUAL, label="about the size of LoRA, dim 8")
    axes.plot([], [], "o", color=OTHER, label="another size")
    axes.legend(loc="lower right", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _draw_costs(axes: Any, outcomes: Sequence[Outcome], compared: Compared, reference: Run) -> None:
    """Bars, with the size and the learning rate in words."""
    lengths = [compared.costs.get(outcome.run.name, 0.0) for outcome in outcomes]
    colours = [_colour(outcome, reference) for outcome in outcomes]
    bars = axes.barh(range(len(outcomes)), lengths, color=colours, alpha=0.55, height=0.62)
    axes.bar_label(bars, labels=[f"{length:.1f}" if length else "" for length in lengths], padding=3, fontsize=10)
    axes.axvline(1, color="#555555", linestyle="--", linewidth=1)
    axes.set_xlim(0, 2.1 * max([1.0, *lengths]))
    for row, outcome in enumerate(outcomes):
        text = f"{size_text(outcome.run.parameters, reference.parameters).partition(' (')[0]}\n"
        axes.annotate(text + f"rate {rate_text(outcome.run.rate)}", (0.98, row), xycoords=axes.get_yaxis_transform(),
                      ha="right", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks([])
    axes.set_title("trained parameters,\nlearning rate", fontsize=10, loc="right")
    axes.set_xlabel("time of a step (1 = frozen UNet)", fontsize=11)


def _draw_pictures(axes: Any, outcomes: Sequence[Outcome], pictures: Path) -> None:
    """What each draws, the base model and the truth below."""
    import numpy as np
    from PIL import Image

    truth = np.hstack([np.asarray(one) for one in true_images(CAPTIONS)])
    names = [*(outcome.run.name for outcome in outcomes), "base"]
    strips = [np.asarray(Image.open(picture_path(pictures, name)).convert("RGB")) for name in names]
    count = len(CAPTIONS)
    for row, strip in enumerate([*strips, truth]):
        axes.imshow(
            strip, extent=(0, count, row + 0.47, row - 0.47), aspect="auto", interpolation="antialiased", zorder=2
        )
    axes.set_xlim(0, count)
    axes.set_ylim(len(strips) + 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xticks([place + 0.5 for place in range(count)], CAPTIONS, fontsize=11)
    axes.tick_params(axis="x", length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)


# -- the program


def chosen_entries(names: Sequence[str] | None) -> list[Entry]:
    """Entries of these names; all without any. Raises ValueError for a name that is none."""
    known = {entry.name: entry for entry in ENTRIES}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"--only {unknown[0]!r}: unknown.{nearest(unknown[0], known)} Known: {'; '.join(known)}.")
    return [known[name] for name in names or known]


def train_all(store: Store, args: argparse.Namespace) -> None:
    """What is not in the file yet: runs, then costs."""
    entries = chosen_entries(args.only)
    store.path.parent.mkdir(parents=True, exist_ok=True)
    train_missing(store, entries, args.steps, args.model, args.processes)
    known = store.read().costs
    if any(entry.name not in known for entry in entries):
        for name, cost in costs(entries, args.model).items():
            store.add("cost", {"name": name, "step": round(cost, 2)})


def compare(args: argparse.Namespace) -> int:
    """Train what is missing, then draw."""
    store, chart = Store(Path(args.results)), Path(args.chart)
    own = chart.resolve() == CHART.resolve()
    check_outputs([] if own else [chart], [Path(args.model), EMOJI / "style", EMOJI / "heldout"], args.overwrite)
    if not args.redraw:
        train_all(store, args)
    elif not store.path.is_file():
        raise ValueError(f"--redraw: there is no {store.path}. Leave --redraw out to train first.")
    compared = store.read()
    if not any(outcome.run.name == REFERENCE for outcome in compared.finished()):
        print(f"\nno picture yet: others are compared with {REFERENCE}, which is not finished")
        return 0
    draw_chart(compared, store.pictures, chart)
    print("\n" + plain(compared))
    print(f"chart  {chart}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the algorithms; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare.py", description="Compare the algorithms.", allow_abbrev=False)
    add = parser.add_argument
    add("--redraw", action="store_true", help="train nothing: the picture and the table from the results")
    add("--only", nargs="+", metavar="NAME", help="train only these entries; default: all")
    add("--processes", type=int, default=1, metavar="N", help="runs at a time, a core each; default: 1")
    add("--steps", type=int, default=STEPS, help=f"training steps of a run; default: {STEPS}")
    add("--model", metavar="FOLDER", default=str(EMOJI / "model"), help="default: the embedded model")
    add("--results", metavar="FILE", default=str(RESULTS), help="default: compared.jsonl beside this program")
    add("--chart", metavar="FILE", default=str(CHART), help="default: algorithms.png beside this program")
    add("--overwrite", action="store_true", help="replace a chart that exists elsewhere")
    add("--debug", action="store_true", help="show the traceback of an error")
    return run_program(compare, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
