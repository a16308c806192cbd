"""The pages of docs/ that are made from records: their examples are accepted, and what they say of files is so."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
from pages import lines
from pages.arguments import shown_on

from networks.archs import ARCHS
from networks.args.table import TABLE
from networks.hosts.trainer_scripts import SCRIPTS
from networks.models.skeleton import skeleton
from networks.plan.plan import Plan
from networks.records import ALGORITHMS, Arg
from networks.records.arg import NOTHING

BY_NAME = {arch.name: arch for arch in ARCHS}
STOPS = {"help", "dry_run"}  # end the run: tests/test_stops.py
NEEDS_A_FILE = {"training_adapter"}  # tests/test_training_adapter.py
# Their file differs where a row says `nothing`, or does not where it says more: in what a plan has not.
NOT_IN_A_PLAN = {"save_format", "init", "split_qkv", "block_lr_zero_threshold", "constraint", "dim_is_size"}
TOGETHER = {"ggpo_sigma", "ggpo_beta"}  # neither stands alone
model = lru_cache(skeleton)


def arch_of(arg: Arg) -> str:
    own = [arch.name for arch in ARCHS if arg.name in arch.arguments]
    return "sdxl" if not own or "sdxl" in own else own[0]


def planned(arg: Arg, args: Mapping[str, str]) -> Plan:
    spec, module = BY_NAME[arch_of(arg)], shown_on(arg).line.module.rpartition(".")[2]
    models = model(spec.releases[0].name)
    entry = importlib.import_module(f"networks.{module}")
    found: Plan = entry.plan(8, 4, models.text_encoders, models.unet, **args)
    return found


def in_file(plan: Plan) -> set[Any]:
    """Names, shapes and strengths of the layers."""
    return {(row.saved_name, row.algo, row.dim, row.alpha, row.scale, row.dora, _shapes(row)) for row in plan.trained}


@pytest.mark.sweep(4)  # tests/test_documents.py plans them all, as docs/arguments.md has them
@pytest.mark.parametrize(
    "arg", [arg for arg in TABLE if arg.name not in STOPS | NEEDS_A_FILE], ids=lambda arg: arg.name
)
def test_the_example_is_accepted_and_changes_what_it_says(arg: Arg) -> None:
    args = dict(shown_on(arg).line.args)
    left = TOGETHER if arg.name in TOGETHER else {arg.name}
    with_it, without = planned(arg, args), planned(arg, {name: args[name] for name in args if name not in left})
    if arg.name not in NOT_IN_A_PLAN:
        assert (in_file(with_it) == in_file(without)) is arg.file.startswith(NOTHING)


def _shapes(row: Any) -> tuple[Any, ...]:
    return tuple((name, shape) for name, shape in row.layout.shapes.items() if name != "scalar")


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_the_recipe_names_a_script_that_trains_the_model(arch: Any) -> None:
    found = lines.trained_by(arch)
    assert found or arch.name in ("ace_step", "ltx_video")
    for one in found:
        assert one.name in SCRIPTS and "..." in shlex.split(one.start)


@pytest.mark.parametrize("spec", ALGORITHMS.values(), ids=lambda spec: spec.name)
def test_every_algorithm_says_when_to_use_it(spec: Any) -> None:
    assert spec.about.scale and spec.about.use, f"networks/records: {spec.name} lacks `about`"
    assert [one.about.use for one in ALGORITHMS.values()].count(spec.about.use) == 1
    assert spec.about.papers or spec.name in ("full", "norm")
