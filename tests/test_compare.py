"""The comparison of the algorithms: its search for a learning rate, what it keeps, and that its tables are of it."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import compared_table
import pytest
from PIL import Image

from networks.algos import ALGOS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "which-algorithm.md"


# -- the rates


def searched(loss: Callable[[float], float], first: float) -> dict[float, float]:
    tried: dict[float, float] = {}
    while (rate := compared_table.next_rate(tried, first)) is not None:
        assert rate not in tried, "no rate twice"
        tried[rate] = loss(rate)
    return tried


def test_the_grid_is_1_2_5() -> None:
    assert [compared_table.rate_of(step) for step in range(-9, -2)] == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    assert all(compared_table.step_of(compared_table.rate_of(step)) == step for step in range(-15, 4))
    assert compared_table.step_of(0.0047) == compared_table.step_of(5e-3)


@pytest.mark.parametrize("first", [1e-4, 2e-3, 1e-2, 0.2])
def test_a_search_ends_between_two_worse_neighbours(first: float) -> None:
    tried = searched(lambda rate: abs(math.log(rate / 4e-3)), first)
    assert {2e-3, 5e-3, 1e-2} <= tried.keys() and compared_table.chosen(tried) == 5e-3
    assert len(tried) <= 2 + max(2, abs(compared_table.step_of(first) - compared_table.step_of(5e-3)) + 1)


def test_rates_that_diverge_lead_to_lower_ones() -> None:
    tried = searched(lambda rate: math.inf if rate > 2e-3 else 1e-3 - rate / 10, 1e-2)
    assert compared_table.chosen(tried) == 2e-3 and tried[5e-3] == math.inf


def test_nothing_is_chosen_before_both_neighbours_were_tried() -> None:
    assert compared_table.chosen({}) is None
    assert compared_table.chosen({1e-3: 0.1, 2e-3: 0.2}) is None
    assert compared_table.chosen({5e-4: 0.3, 1e-3: 0.1, 2e-3: 0.2}) == 1e-3


# -- the program


def test_every_algorithm_is_compared() -> None:
    assert {entry.algo for entry in compare.ENTRIES} == set(ALGOS)
    assert len({entry.name for entry in compare.ENTRIES}) == len(compare.ENTRIES)


def test_pictures_that_are_drawn_chose_no_rate() -> None:
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted((compare.EMOJI / "heldout").glob("*.txt"))]
    assert set(compare.CAPTIONS) <= set(captions) - set(captions[:: compare.CHOICE_EVERY])


class Trained:
    """In place of `compare.train`: a loss that depends on the rate and the seed."""

    def __init__(self, breaks_after: int = 10**9) -> None:
        self.jobs: list[compare.Job] = []
        self.breaks_after = breaks_after

    def __call__(self, job: compare.Job) -> tuple[compare.Run, Any]:
        if len(self.jobs) == self.breaks_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        entry = job.entry
        loss = 0.05 + 0.01 * abs(math.log(job.rate / 4e-3)) + 0.001 * job.seed
        size = 1000 if entry.name == "lora" else 100
        picture = Image.new("RGB", (144, 48), (255, 20 * len(entry.name), 0)) if job.seed == 1 else None
        curve = ((job.steps, 0.1, loss),)
        return compare.Run(
            entry.name, entry.algo, entry.dim, entry.options, size, job.rate, job.seed, curve, loss, 1.0
        ), picture


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The program on results in a folder of the test, without a model."""
    store = compare.Store(tmp_path / "results.jsonl")
    setting = compare.setting_of(2) | {"base": {"choice": 0.14, "shown": 0.15}, "pictures": {"choice": 14, "shown": 28}}
    store.begin(setting, Image.new("RGB", (144, 48), (0, 0, 255)))
    monkeypatch.setattr(compare, "costs", lambda entries, model: {entry.name: 1.5 for entry in entries})

    def call(train: Trained, *options: str) -> int:
        monkeypatch.setattr(compare, "train", train)
        paths = [f"--results={store.path}", f"--chart={tmp_path / 'chart.png'}", "--overwrite", "--steps=2"]
        return compare.main([*paths, *options])

    return call


def test_a_run_that_was_finished_is_not_made_again(
    program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, rest = Trained(breaks_after=5), Trained()
    assert program(broken, "--only", "lora", "norm") == 130
    assert program(rest, "--only", "lora", "norm") == 0
    made = [(job.entry.name, job.rate, job.seed) for job in (*broken.jobs, *rest.jobs)]
    assert len(made) == len(set(made)) and len(broken.jobs) == 5
    assert {(name, seed) for name, _, seed in made} == {(n, s) for n in ("lora", "norm") for s in (0, 1, 2, 3)}
    assert {rate for _, rate, seed in made if seed} == {5e-3}, "the seeds are trained at the best rate alone"
    assert "norm                    100    5e-3         0.0542    0.0532 to 0.0552  1.5 x" in capsys.readouterr().out
    table = compared_table.results(compared_table.read(tmp_path / "results.jsonl"))
    assert "| norm | algo=norm dim 1 | 100 (0.1 x) | 5e-3 | 1 x | 0.0542 | 0.0532 to 0.0552 | 1.5 |\n" in table
    drawn = Image.open(tmp_path / "chart.png").convert("RGB")
    colours = {colour for _, colour in drawn.getcolors(1 << 20) or ()}
    assert drawn.width > 1000 and {(255, 80, 0), (0, 0, 255)} <= colours

    again = Trained()
    assert program(again, "--redraw") == 0 and not again.jobs


def test_results_of_other_steps_are_not_mixed(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert program(Trained(), "--steps=3") == 2
    assert "has runs of 2 steps" in capsys.readouterr().err


def test_an_entry_that_is_none_is_named(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert program(Trained(), "--only", "lorra") == 2
    assert "--only 'lorra': unknown. Did you mean lora?" in capsys.readouterr().err


def test_without_lora_there_is_no_picture_yet(program: Callable[..., int], tmp_path: Path) -> None:
    assert program(Trained(), "--only", "norm") == 0
    assert not (tmp_path / "chart.png").exists()


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "setting", "steps": 2}\n{"kind": "run", "name": "lora"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not a result of compare.py"):
        compared_table.read(path)


def test_a_run_learns_and_is_the_same_again() -> None:
    entry = next(entry for entry in compare.ENTRIES if entry.name == "norm")
    run, picture = compare.train(compare.Job(entry, 2e-2, 4, steps=3))
    again, _ = compare.train(compare.Job(entry, 2e-2, 4, steps=3))
    base = compared_table.read().setting["base"]
    assert picture is None and run.loss is not None and [row[0] for row in run.curve] == [1, 2, 3]
    assert run.loss < 0.9 * base["shown"] and run.choice < 0.9 * base["choice"]
    assert (again.curve, again.loss) == (run.curve, run.loss)


# -- what is in the repository


def test_sizes_are_equal_where_there_is_a_dim() -> None:
    compared = compared_table.read()
    sizes = {run.name: run.parameters for run in compared.runs}
    free = {"full", "norm", "ia3", "lora, dim 2", "lora, dim 32"}
    ratios = {name: size / sizes["lora"] for name, size in sizes.items() if name not in free}
    assert all(abs(ratio - 1) < compared_table.NEAR for ratio in ratios.values()), ratios


def test_results_are_of_the_entries_at_the_programs_setting() -> None:
    compared = compared_table.read()
    entries = {entry.name: (entry.algo, entry.dim, entry.options) for entry in compare.ENTRIES}
    assert {(run.name, run.algo, run.dim, run.options) for run in compared.runs} <= {
        (name, *entry) for name, entry in entries.items()
    }
    assert {outcome.run.name for outcome in compared.finished()} <= compared.costs.keys()
    assert {key: compared.setting[key] for key in compare.setting_of(compare.STEPS)} == compare.setting_of(
        compare.STEPS
    )


def part(name: str) -> str:
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert found
    return found[1]


def test_the_page_names_every_entry_as_finished_or_not() -> None:
    rows = [line.strip("| ").split(" | ")[0] for line in part("compared").splitlines()[2:]]
    left = re.match(r"Not finished, so not in the table: (.*?)\. ", part("unfinished"))
    assert sorted(rows + (left[1].split("; ") if left else [])) == sorted(entry.name for entry in compare.ENTRIES)
    assert len(rows) >= 9


def test_redraw_gives_the_picture_and_the_table_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--redraw", f"--chart={tmp_path / 'chart.png'}"]) == 0
    printed = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    rows = [line.strip("| ").split(" | ") for line in part("compared").splitlines()[2:]]
    assert rows
    for name, _, size, rate, _, mean, spread, step in rows:
        assert [name, size.partition(" ")[0], rate, mean, spread, f"{step} x"] in printed
    with Image.open(tmp_path / "chart.png") as drawn, Image.open(compare.CHART) as kept:
        assert drawn.size == kept.size


def test_redraw_without_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    assert compare.main(["--redraw", f"--results={tmp_path / 'none.jsonl'}"]) == 2
    assert "Leave --redraw out to train first" in capsys.readouterr().err
