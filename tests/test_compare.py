"""The chart of the algorithms: that it has all of them, and that it can be drawn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from networks.algos import ALGOS


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "emoji" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_algorithms", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_algorithm_is_compared(compare: ModuleType) -> None:
    assert {entry.algo for entry in compare.ENTRIES} == set(ALGOS)


def test_the_chart_shows_what_came_of_each(compare: ModuleType, tmp_path: Path) -> None:
    results, cost = [], {}
    for number, entry in enumerate(compare.ENTRIES):
        results.append(compare.Result(entry.algo, 0.15, 0.05 + 0.001 * number, 1000))
        cost[entry.algo] = compare.Cost(1 + number / 10, 10 ** (3 + number % 4))
        (tmp_path / entry.algo).mkdir()
        for image in range(len(compare.CAPTIONS)):
            colour = (255, 20 * number, 0)
            Image.new("RGB", (48, 48), colour).save(tmp_path / entry.algo / f"im_{image:06d}.png")
    compare.draw_chart(results, cost, 40, tmp_path, tmp_path / "chart.png")
    drawn = Image.open(tmp_path / "chart.png").convert("RGB")
    assert drawn.width > 1000 and {colour for _, colour in drawn.getcolors(1 << 20)} >= {(255, 0, 0), (255, 20, 0)}
