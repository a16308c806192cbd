"""What a record of an algorithm says fits its class, the argument table and the readers; nothing else names one."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers_numeric import FACTORED, assert_start
from registry import ALGORITHMS as TESTED
from registry import data_of

from networks.algos import ALGOS, Adapter
from networks.args.table import BY_NAME, TABLE
from networks.records import ALGORITHMS, AlgoSpec
from networks.tensors.geometry import Geometry
from networks.tensors.norms import NormGeometry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "networks"
every_algo = pytest.mark.parametrize("algo", ALGORITHMS)


def subclasses(cls: type[Adapter]) -> set[type[Adapter]]:
    return {cls} | {below for own in cls.__subclasses__() for below in subclasses(own)}


def test_every_algorithm_has_test_data_and_the_other_way_round() -> None:
    for algo in ALGORITHMS:
        data = data_of(algo)
        assert (data.delta is None) != (data.weight is None), f"{algo}: give tests/registry.py either delta or weight"
        assert data.flops or ALGORITHMS[algo].family != Geometry.family, f"tests/registry.py: write flops of {algo}"
        assert data.rank_axes or algo not in FACTORED, f"tests/registry.py: write rank_axes of {algo}"
        assert data.values.keys() <= ALGORITHMS[algo].options, algo
        assert data.effects.keys() <= {arg.name for arg in ALGORITHMS[algo].arguments}, algo
    assert TESTED.keys() == ALGORITHMS.keys()


def test_every_record_has_one_class_in_the_file_of_the_same_name() -> None:
    for algo, cls in ALGOS.items():
        name = cls.__module__.rpartition(".")[2]
        record = import_module(f"networks.records.{name}")
        assert cls.spec in vars(record).values(), f"the record of {algo} is not in networks/records/{name}.py"
    own = {cls for cls in subclasses(Adapter) if "spec" in vars(cls) and cls.__module__.startswith("networks.algos.")}
    assert own == set(ALGOS.values()), "a class has a spec that is no record of networks/records"


@every_algo
def test_arguments_are_rows_of_the_table(algo: str) -> None:
    spec = ALGORITHMS[algo]
    for name in spec.takes:
        assert name in BY_NAME, f"{name} of {algo} is no argument: write its row (Arg) in `arguments` of the record"
        assert algo in (BY_NAME[name].algos or ()), f"{name} of {algo} is only another spelling"
    for arg in spec.arguments:
        assert arg.name in spec.takes, f"{arg.name} has a row in the record of {algo}, which does not take it"
    keywords = inspect.signature(ALGOS[algo].layout).parameters.keys()
    assert spec.options <= keywords, f"{algo}: `layout` lacks the options {sorted(spec.options - keywords)}"


def test_no_argument_is_stated_twice() -> None:
    names = [name for arg in TABLE for name in arg.names]
    assert len(names) == len(set(names))


@every_algo
def test_names_in_the_record_are_those_of_its_parameters_and_files(algo: str) -> None:
    spec = ALGORITHMS[algo]
    parameters = {*spec.keys} | ({*ALGORITHMS[spec.saved_as].keys} if spec.saved_as else set())
    for field in ("plus", "frozen", "near_one", "fold"):
        assert set(getattr(spec, field)) <= parameters, f"{algo}: {field} names no parameter of its keys"
    suffixes = {*spec.keys.values(), *spec.more_keys, *(f"{suffix}.0" for suffix in spec.numbered)}
    suffixes |= {*ALGORITHMS[spec.saved_as].keys.values()} if spec.saved_as else set()
    used = {suffix for marks in (*spec.required, *(kind.marks for kind in spec.kinds)) for suffix in marks}
    used |= {suffix for suffix, _ in spec.rank_shows} | {*filter(None, [spec.bias_key])}
    assert used <= suffixes, f"{algo}: {sorted(used - suffixes)} are no suffixes of its files"
    assert spec.fold or "use_scalar" not in spec.options, f"{algo}: no factor takes up the scalar at save (fold)"
    assert spec.alpha_option in spec.options | {""} and spec.no_starts.keys() <= set(BY_NAME["init"].choices)
    assert spec.unsaved <= spec.options | AlgoSpec.__dataclass_fields__["unsaved"].default
    assert spec.family in (Geometry.family, NormGeometry.family) and spec.start_error >= 0
    assert all((PACKAGE / f"{entry}.py").is_file() for entry in spec.own_entries)


@every_algo
def test_files_of_an_algorithm_are_no_other_ones(algo: str) -> None:
    """By names alone, or `accepts` of its class tells the tensors apart."""
    spec = ALGORITHMS[algo]
    for marks in spec.required or (frozenset(spec.keys.values()),):
        others = [
            name for name, other in ALGORITHMS.items() if other.recognises(marks) and other.file_algo != spec.file_algo
        ]
        told = all("accepts" in vars(ALGOS[name]) for name in (algo, *others))
        assert not others or told, f"{algo} has the marks of {others}: choose other suffixes, or write `accepts`"


NAMED = {*ALGORITHMS} - {"norm"}  # a word of its own
FOREIGN = [
    file
    for folder in (PACKAGE, ROOT / "kohya_trainer", ROOT / "scripts")
    for file in sorted(folder.rglob("*.py"))
    if file.parent not in (PACKAGE, PACKAGE / "records", PACKAGE / "algos")
]


def branches_on_names(source: str) -> list[int]:
    """Lines that compare something with the name of an algorithm, or look one up by it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        values: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                values += side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]
        elif isinstance(node, ast.Subscript):
            values = [node.slice] if isinstance(node.value, ast.Name) and node.value.id.startswith("ALGO") else []
        found += [node.lineno for value in values if isinstance(value, ast.Constant) and value.value in NAMED]
    return found


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_branch_on_the_name_of_an_algorithm(file: Path) -> None:
    lines = branches_on_names(file.read_text(encoding="utf-8"))
    assert not lines, f"{file.name}:{lines}: a record lacks a field, or the contract a method"


def test_branches_on_names_are_seen() -> None:
    assert branches_on_names('a = x == "lokr"\nb = x in ("lora", y)\nALGOS["loha"]\nc = x == "other"') == [1, 2, 3]


def test_a_start_off_by_more_than_the_record_says_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.tensor([1.0, -2.0])
    assert_start(base, base.clone(), "boft", "x")
    near = base + torch.tensor([0.0, 2 * torch.finfo(torch.float32).eps])
    with pytest.raises(AssertionError, match="off by 1.0 eps.*start_error"):
        assert_start(near, base, "boft", "x")
    monkeypatch.setattr(ALGOS["boft"], "spec", replace(ALGORITHMS["boft"], start_error=1.0))
    assert_start(near, base, "boft", "x")
