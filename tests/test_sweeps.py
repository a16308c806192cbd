"""What a usual run takes of the tests with many combinations."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

from conftest import usual


def item(name: str, mark: str | None, *marks: Any, **parameters: int) -> Any:
    """A collected test."""
    found = {} if mark is None else {mark: SimpleNamespace(args=marks)}
    return SimpleNamespace(nodeid=name, get_closest_marker=found.get, callspec=SimpleNamespace(params=parameters))


class Item(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def hashable(items: list[Any]) -> list[Any]:
    return [Item(**vars(one)) for one in items]


def test_every_value_of_every_parameter_stays() -> None:
    items = hashable([item(f"f[{a}-{b}]", "sweep", a=a, b=b) for a, b in product(range(3), range(5))])
    kept = usual(items)
    assert {i.callspec.params["a"] for i in kept} == {*range(3)} and len(kept) < len(items)
    assert {i.callspec.params["b"] for i in kept} == {*range(5)}


def test_a_part_of_a_list_stays_and_it_is_the_same_in_each_run() -> None:
    items = hashable([item(f"f[{a}]", "sweep", 4, a=a) for a in range(400)])
    kept = usual(items)
    assert 70 < len(kept) < 130 and usual(items) == kept


def test_others_stay_and_long_ones_do_not() -> None:
    plain, long = hashable([item("f", None), item("g", "long")])
    assert usual([plain, long]) == {plain}
