"""The issue forms are what GitHub's schema takes: a form with a mistake is left out without a message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from networks.cli.commands import COMMANDS

FOLDER = Path(__file__).resolve().parents[1] / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(file.name for file in FOLDER.glob("*.yml") if file.name != "config.yml")
# type of an element -> the attributes that it may have, and those that it must have
ATTRIBUTES = {
    "markdown": ({"value"}, {"value"}),
    "input": ({"label", "description", "placeholder", "value"}, {"label"}),
    "textarea": ({"label", "description", "placeholder", "value", "render"}, {"label"}),
    "dropdown": ({"label", "description", "multiple", "options", "default"}, {"label", "options"}),
    "checkboxes": ({"label", "description", "options"}, {"label", "options"}),
}


def problems(form: dict[str, Any]) -> list[str]:
    """What GitHub would refuse of a form."""
    found = [f"no {key}" for key in ("name", "description", "body") if not form.get(key)]
    found += [f"unknown key {key}" for key in form.keys() - {"name", "description", "title", "labels", "body"}]
    body = form.get("body") or []
    asked = [element for element in body if element.get("type") != "markdown"]
    found += [] if asked else ["it asks nothing"]
    for key, values in (
        ("id", [element.get("id") for element in asked]),
        ("label", [element.get("attributes", {}).get("label") for element in asked]),
    ):
        found += [f"{key} {value} twice" for value in {v for v in values if values.count(v) > 1}]
    found += [f"id {e.get('id')}" for e in asked if not re.fullmatch(r"[A-Za-z0-9_-]+", str(e.get("id") or ""))]
    return found + [problem for element in body for problem in element_problems(element)]


def element_problems(element: dict[str, Any]) -> list[str]:
    """The same of one element."""
    kind = element.get("type")
    if kind not in ATTRIBUTES:
        return [f"type {kind}"]
    may, must = ATTRIBUTES[kind]
    attributes = element.get("attributes") or {}
    found = [f"{kind}: unknown attribute {name}" for name in attributes.keys() - may]
    found += [f"{kind}: no {name}" for name in must if not attributes.get(name)]
    found += [f"{kind}: unknown key {key}" for key in element.keys() - {"type", "id", "attributes", "validations"}]
    options = attributes.get("options") or []
    if kind == "dropdown":  # unquoted yes and no are not text
        found += [f"option {o}" for o in options if not isinstance(o, str) or options.count(o) > 1 or o == "None"]
    required = (element.get("validations") or {"required": False}).keys() - {"required"}
    return found + [f"validations: {name}" for name in required]


def read(name: str) -> dict[str, Any]:
    form: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return form


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_valid(name: str) -> None:
    assert problems(read(name)) == []


def test_the_forms_ask_for_what_is_needed() -> None:
    """With what is not given, nobody can find the cause."""
    needed = {
        "bug.yml": {"command", "doctor", "log", "trainer"},
        "file-does-not-load.yml": {"reader", "show"},
        "feature.yml": {"kind"},
    }
    assert FORMS == sorted(needed)
    for name, ids in needed.items():
        required = {e["id"] for e in read(name)["body"] if e.get("validations", {}).get("required")}
        assert ids <= required, name


def test_their_commands_exist() -> None:
    for name in FORMS:
        commands = re.findall(r"kohya-networks ([a-z]+) ?(?=[`.A-Z-]|and|$)", (FOLDER / name).read_text(), re.M)
        assert set(commands) <= COMMANDS.keys(), name


def test_the_chooser() -> None:
    config = read("config.yml")
    assert config.keys() <= {"blank_issues_enabled", "contact_links"}
    assert isinstance(config["blank_issues_enabled"], bool)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda form: form.pop("description"), "no description"),
        (lambda form: form["body"][1].update(type="text"), "type text"),
        (lambda form: form["body"][1].pop("id"), "id None"),
        (lambda form: form["body"][1]["attributes"].pop("label"), "textarea: no label"),
        (lambda form: form["body"][1]["attributes"].update(lable="x"), "textarea: unknown attribute lable"),
        (lambda form: form["body"][2].update(id="what"), "id what twice"),
        (lambda form: form["body"][2].update(validations={"require": True}), "validations: require"),
    ],
)
def test_a_mistake_is_found(change: Any, problem: str) -> None:
    form = read("bug.yml")
    change(form)
    assert problem in problems(form)
