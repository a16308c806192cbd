"""The results of `scripts/emoji/compare.py` as tables: what each algorithm reached, and every learning rate it tried.

They are read from `scripts/emoji/compared.jsonl`, one line for each training run or measured cost, so that neither the
tables in docs/which-algorithm.md nor the picture need a training.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "emoji" / "compared.jsonl"
SEARCH_SEED = 0
SEEDS = (1, 2, 3)
REFERENCE = "lora"  # sizes and learning rates are said beside those of this entry
NEAR = 0.1  # sizes that differ from it by less count as equal


@dataclass(frozen=True)
class Entry:
    """What is compared.

    Attributes:
        name: for people.
        algo, dim: the algorithm and network_dim.
        first: learning rate from which the search begins.
        options: network arguments, and network_alpha; without it alpha is dim, so that the scale is 1.
        start: dims and alphas to start with, and who says so.
    """

    name: str
    algo: str
    dim: int
    first: float
    options: tuple[str, ...] = ()
    start: str = ""

    @property
    def given(self) -> dict[str, str]:
        """The options by their names."""
        return dict(one.split("=", 1) for one in self.options)

    @property
    def alpha(self) -> float:
        return float(self.given.get("network_alpha", self.dim))

    @property
    def arguments(self) -> dict[str, str]:
        """Of the network, as a trainer hands them over."""
        more = {name: value for name, value in self.given.items() if name != "network_alpha"}
        return {"algo": self.algo, "conv_dim": str(self.dim), **more}


# Sizes as near to that of LoRA of dim 8 as dims and options allow; `full`, `norm` and `ia3` have no dim.
ENTRIES = (
    Entry(
        "lora", "lora", 8, 5e-3, (), "dim 4 to 128, alpha half of it or the same (sd-scripts' `docs/train_network.md`)"
    ),
    Entry(
        "loha",
        "loha",
        4,
        1e-2,
        (),
        "half of LoRA's dim has its size; dim up to 32, alpha 1 to dim / 2 (LyCORIS); dim 32, alpha 16 at 2e-4 "
        "(example in both trainers' `docs/loha_lokr.md`)",
    ),
    Entry(
        "lokr",
        "lokr",
        16,
        5e-3,
        ("factor=2",),
        "for much detail factor 4 to 8 and dim 100000, with which alpha has no effect (LyCORIS); dim 32, alpha 16 "
        "at 2e-4 (example in both trainers' `docs/loha_lokr.md`)",
    ),
    Entry("dora", "lora", 8, 2e-3, ("use_dora=True",), "as LoRA"),
    Entry("glora", "glora", 5, 2e-3, (), "half to two thirds of LoRA's dim have its size"),
    Entry("dylora", "dylora", 8, 5e-3, (), "a large dim, alpha dim / 4 to dim, and more steps (LyCORIS)"),
    Entry("lora_fa", "lora_fa", 26, 2e-3, (), "two to three times LoRA's dim have its size"),
    Entry(
        "tlora",
        "tlora",
        8,
        2e-3,
        ("sig_type=last", "use_data_init=False"),
        "as LoRA; these options are the start of the paper, without them it is that of LyCORIS",
    ),
    Entry(
        "diag-oft",
        "diag-oft",
        16,
        1e-3,
        ("dim_is_count=True",),
        "dim is the size of a block, with `dim_is_count=True` their number; `networks.oft_v2`: dim 32 at 1e-4 "
        "(example in sd-scripts' `docs/train_network_oft_boft.md`)",
    ),
    Entry("norm", "norm", 1, 2e-2, (), "no dim"),
    Entry("ia3", "ia3", 1, 5e-2, (), "no dim; 5e-3 to 1e-2 (LyCORIS, on Stable Diffusion 1)"),
    Entry("full", "full", 1, 5e-4, (), "no dim"),
    Entry(
        "boft-input",
        "boft-input",
        6,
        1e-3,
        ("butterflies=2",),
        "dim 8 with `butterflies=2` (example in sd-scripts' `docs/train_network_oft_boft.md`)",
    ),
    Entry("boft", "boft", 4, 1e-3, (), "dim is the size of a block"),
    Entry(
        "lora, alpha 1",
        "lora",
        8,
        2e-2,
        ("network_alpha=1",),
        "the same LoRA with the trainers' default of `--network_alpha`: scale 1 / 8",
    ),
    Entry("lora, dim 32", "lora", 32, 1e-3, ()),
    Entry(
        "lora+, ratio 4",
        "lora",
        8,
        2e-3,
        ("loraplus_lr_ratio=4",),
        "as LoRA; the rate is that of the down factors, up has four times of it (musubi-tuner's "
        "`docs/advanced_config.md`: start around 4)",
    ),
    Entry("lora, dim 2", "lora", 2, 5e-3, ()),
    Entry("lora, pissa", "lora", 8, 1e-3, ("init=pissa",), "as LoRA"),
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of the entry: an algorithm with its options.
        parameters: that are trained.
        rate: learning rate.
        curve: [step, mean loss of the training since the last row, loss on the pictures by which rates are chosen].
        loss: on the other held-out pictures after the last step; None where the training diverged.
        seconds: that the run took.
    """

    name: str
    algo: str
    dim: int
    options: tuple[str, ...]
    parameters: int
    rate: float
    seed: int
    curve: tuple[tuple[int, float, float], ...]
    loss: float | None
    seconds: float

    @property
    def choice(self) -> float:
        """What a learning rate is chosen by; infinite where the training diverged."""
        return math.inf if self.loss is None else self.curve[-1][2]


@dataclass(frozen=True)
class Compared:
    """What is in the file of results.

    Attributes:
        setting: of all runs: steps, batch, pictures and losses of the base model.
        runs: in the order in which they were made.
        costs: CPU time of a training step by entry, in parts of the frozen UNet's forward and backward pass.
    """

    setting: Mapping[str, Any]
    runs: tuple[Run, ...]
    costs: Mapping[str, float]

    def search(self, name: str) -> dict[float, float]:
        """The rates that an entry tried, with the loss by which they are chosen."""
        return {run.rate: run.choice for run in self.runs if (run.name, run.seed) == (name, SEARCH_SEED)}

    def finished(self) -> list[Outcome]:
        """Entries whose rate is chosen and whose seeds are complete, the lowest loss first."""
        found = []
        for name in dict.fromkeys(run.name for run in self.runs):
            rate = chosen(self.search(name))
            seeds = {run.seed: run for run in self.runs if run.name == name and run.rate == rate}
            if rate is not None and all(seed in seeds for seed in SEEDS):
                found.append(Outcome(tuple(seeds[seed] for seed in SEEDS)))
        return sorted(found, key=lambda outcome: outcome.mean)


@dataclass(frozen=True)
class Outcome:
    """An entry at its best rate: a run for each of SEEDS."""

    runs: tuple[Run, ...]

    @property
    def run(self) -> Run:
        return self.runs[0]

    @property
    def losses(self) -> list[float]:
        """One for each seed, infinite where the training diverged."""
        return [math.inf if run.loss is None else run.loss for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def rate_of(step: int) -> float:
    """The learning rate at a place of the grid 1, 2, 5, 10, ...; 0 is 1."""
    decade, place = divmod(step, 3)
    return float(f"{(1, 2, 5)[place]}e{decade}")


def step_of(rate: float) -> int:
    """The place in the grid that is nearest to a learning rate."""
    return min(range(-30, 10), key=lambda step: abs(math.log(rate_of(step) / rate)))


def next_rate(tried: Mapping[float, float], first: float) -> float | None:
    """The rate that a search runs next: the neighbours of the best one, the larger first.

    Args:
        tried: loss by rate.
        first: where the search begins.

    Returns:
        None at the end, when both neighbours of the best rate were tried.
    """
    if not tried:
        return first
    best = step_of(min(tried, key=lambda rate: (tried[rate], rate)))
    return next((rate for rate in (rate_of(best + 1), rate_of(best - 1)) if rate not in tried), None)


def chosen(tried: Mapping[float, float]) -> float | None:
    """The best rate, once its search is at its end."""
    if not tried or next_rate(tried, 1.0) is not None:
        return None
    return min(tried, key=lambda rate: (tried[rate], rate))


def read(path: Path = RESULTS) -> Compared:
    """The file of results.

    Raises:
        ValueError: a line is none of those that compare.py writes.
    """
    setting: dict[str, Any] = {}
    runs: list[Run] = []
    costs: dict[str, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            kind = content.pop("kind")
            if kind == "setting":
                setting = content
            elif kind == "cost":
                costs[content["name"]] = float(content["step"])
            else:
                curve = tuple(tuple(row) for row in content["curve"])
                runs.append(Run(**{**content, "options": tuple(content["options"]), "curve": curve}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a result of compare.py ({error}). Delete the line."
            ) from error
    return Compared(setting, tuple(runs), costs)


# -- as text


def rate_text(rate: float) -> str:
    """`5e-4`."""
    return f"{rate:.0e}".replace("e-0", "e-")


def size_text(parameters: int, reference: int) -> str:
    """`564,736`, and where that is another size than the reference's, how much."""
    share = parameters / reference
    note = "" if abs(share - 1) < NEAR else f" ({share:.2g} x)"
    return f"{parameters:,}{note}"


def reference_of(outcomes: Sequence[Outcome]) -> Run:
    """The entry that others are compared with. Raises ValueError when it is not finished."""
    found = next((outcome.run for outcome in outcomes if outcome.run.name == REFERENCE), None)
    if found is None:
        raise ValueError(f"compared.jsonl has no finished entry {REFERENCE}. Run python scripts/emoji/compare.py.")
    return found


def results(compared: Compared) -> str:
    """What each entry reached, the lowest loss first."""
    outcomes = compared.finished()
    reference = reference_of(outcomes)
    lines = [
        "| | dim, options | parameters | learning rate | of LoRA's | held-out loss | lowest to highest | step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        run = outcome.run
        options = " ".join([f"algo={run.algo}", f"dim {run.dim}", *run.options])
        cost = compared.costs.get(run.name)
        lines.append(
            f"| {run.name} | {options} | {size_text(run.parameters, reference.parameters)} | {rate_text(run.rate)} "
            f"| {run.rate / reference.rate:g} x | {outcome.mean:.4f} "
            f"| {min(outcome.losses):.4f} to {max(outcome.losses):.4f} | {f'{cost:.1f}' if cost else '-'} |"
        )
    return "\n".join(lines) + "\n"


def plain(compared: Compared) -> str:
    """The same for a terminal of 80 columns."""
    lines = [f"{'':16}{'parameters':>11}{'rate':>8}{'held-out loss':>15}{'lowest to highest':>20}{'step':>7}"]
    for outcome in compared.finished():
        run, losses, cost = outcome.run, outcome.losses, compared.costs.get(outcome.run.name)
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        lines.append(
            f"{run.name:16}{run.parameters:11,}{rate_text(run.rate):>8}{outcome.mean:15.4f}{spread:>20}"
            f"{f'{cost:.1f} x' if cost else '-':>7}"
        )
    return "\n".join(lines) + "\n"


def searches(compared: Compared) -> str:
    """Every rate that was tried, with the loss by which it was chosen; the chosen one is bold."""
    names = [outcome.run.name for outcome in compared.finished()]
    names += [name for name in dict.fromkeys(run.name for run in compared.runs) if name not in names]
    rates = sorted({rate for name in names for rate in compared.search(name)})
    lines = ["| | " + " | ".join(map(rate_text, rates)) + " |", "| --- |" + " --- |" * len(rates)]
    for name in names:
        tried = compared.search(name)
        best = chosen(tried)
        cells = ["" if rate not in tried else loss_text(tried[rate], rate == best) for rate in rates]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loss_text(loss: float, bold: bool = False) -> str:
    text = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    return f"**{text}**" if bold else text


def starts(compared: Compared) -> str:
    """The learning rate of each entry over LoRA's, with the dims and alphas to start with."""
    outcomes = {outcome.run.name: outcome for outcome in compared.finished()}
    reference = reference_of(list(outcomes.values()))
    lines = ["| | here with | learning rate over LoRA's | dim and alpha |", "| --- | --- | --- | --- |"]
    for entry in ENTRIES:
        found = outcomes.get(entry.name)
        factor = f"{found.run.rate / reference.rate:g} x" if found else "-"
        lines.append(f"| {entry.name} | {' '.join([f'dim {entry.dim}', *entry.options])} | {factor} | {entry.start} |")
    return "\n".join(lines) + "\n"


def unfinished(compared: Compared) -> str:
    """Which entries have no row in the table of results, with what is known of them; empty where none is left."""
    done = {outcome.run.name for outcome in compared.finished()}
    left = [entry.name for entry in ENTRIES if entry.name not in done]
    if not left:
        return ""
    begun = [name for name in left if compared.search(name)]
    also = f" Begun: {', '.join(begun)}." if begun else ""
    next_step = "`python scripts/emoji/compare.py` goes on with them."
    return f"Not finished, so not in the table: {'; '.join(left)}.{also} {next_step}\n"


# Of docs/which-algorithm.md, for scripts/docs.py.
PARTS = {
    "compared": lambda: results(read()),
    "rates": lambda: searches(read()),
    "starts": lambda: starts(read()),
    "unfinished": lambda: unfinished(read()),
}
