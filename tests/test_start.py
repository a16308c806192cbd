"""start.py without an install: commands, marker, messages; and check.py."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import pytest
import start

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what start.py reads, as its checkout; nothing may be installed."""
    root = tmp_path / "code"
    root.mkdir()
    for name in start.INPUTS:
        shutil.copyfile(ROOT / name, root / name)
    monkeypatch.setattr(start, "ROOT", root)
    monkeypatch.delenv("KOHYA_NETWORKS_VENV", raising=False)
    monkeypatch.setattr(start, "run_logged", lambda command, log: pytest.fail(f"ran {command}"))
    return root


@pytest.mark.parametrize("argv", [[], ["dmeo"], ["--version"]])
def test_unknown_command_shows_the_usage(argv, monkeypatch, capsys):
    monkeypatch.setattr(start, "prepare", lambda folder: pytest.fail("set up"))
    assert start.main(argv) == 2
    error = capsys.readouterr().err
    assert "usage:" in error and "demo" in error and "test" in error


def test_help(capsys):
    assert start.main(["--help"]) == 0
    assert "usage:" in capsys.readouterr().out


def test_environment_is_beside_the_checkout_or_where_the_variable_says(checkout, monkeypatch, tmp_path):
    assert start.environment_folder() == tmp_path / "code-venv"
    monkeypatch.setenv("KOHYA_NETWORKS_VENV", str(tmp_path / "other"))
    assert start.environment_folder() == tmp_path / "other"


def test_torch_comes_first_and_alone(checkout):
    python = Path("python")
    first, second = (command for _, command in start.install_commands(python))
    assert re.fullmatch(r"torch==[\d.]+", first[-1]) and "-c" not in first
    assert second[second.index("-c") + 1] == str(checkout / "constraints.txt")
    assert second[-2:] == ["-e", f"{checkout}[train,test]"] and "editable_mode=compat" in second


def test_a_finished_environment_is_reused_until_its_inputs_change(checkout, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "code-venv"
    folder.mkdir()
    monkeypatch.setattr(start, "starts", lambda python: True)
    installed: list[list[str]] = []
    monkeypatch.setattr(start, "run_logged", lambda command, log: installed.append(command))
    start.prepare(folder)
    assert len(installed) == 2 and start.is_current(folder)
    start.prepare(folder)
    assert len(installed) == 2
    assert "using the environment" in capsys.readouterr().out
    (checkout / "constraints.txt").write_text("torch==0.0\n")
    assert not start.is_current(folder)
    start.prepare(folder)
    assert len(installed) == 4 and "torch==0.0" in installed[2]


def test_a_failed_install_leaves_no_marker(checkout, monkeypatch, tmp_path):
    folder = tmp_path / "code-venv"
    folder.mkdir()
    (folder / start.MARKER).write_text(json.dumps({"fingerprint": "old"}))
    monkeypatch.setattr(start, "starts", lambda python: True)

    def fail(command: list[str], log: Path) -> None:
        raise start.SetupError("no")

    monkeypatch.setattr(start, "run_logged", fail)
    with pytest.raises(start.SetupError):
        start.prepare(folder)
    assert not (folder / start.MARKER).exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"fingerprint": 1}'])
def test_a_damaged_marker_is_no_marker(checkout, tmp_path, content):
    (tmp_path / start.MARKER).write_text(content)
    assert not start.is_current(tmp_path)


def test_a_folder_with_something_else_is_refused(checkout, tmp_path):
    folder = tmp_path / "code-venv"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(start.SetupError, match="not a virtual environment"):
        start.make_environment(folder)
    assert (folder / "thesis.txt").read_text() == "mine"
    with pytest.raises(start.SetupError, match="is a file"):
        start.make_environment(folder / "thesis.txt")


def test_missing_venv_module(checkout, monkeypatch, tmp_path):
    said = "The virtual environment was not created successfully because ensurepip is not available."
    failed = subprocess.CompletedProcess([], 1, stdout=said, stderr="")
    monkeypatch.setattr(start.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(start.SetupError, match="apt install python3-venv"):
        start.make_environment(tmp_path / "new")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no file for this Python"),
        ("Segmentation fault", ""),
    ],
)
def test_remedies(output, expected):
    assert expected in start.remedy(output) and bool(expected) == bool(start.remedy(output))


def test_a_failed_command_shows_its_last_lines(tmp_path, capsys):
    log = tmp_path / "install.log"
    start.run_logged([sys.executable, "-c", "print('fine')"], log)
    code = "print('one'); print('No space left on device'); raise SystemExit(3)"
    with pytest.raises(start.SetupError, match=r"(?s)exit 3.*one.*disk is full.*install\.log"):
        start.run_logged([sys.executable, "-c", code], log)
    assert log.read_text().split() == "fine one No space left on device".split()


def test_old_python_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(start, "OLDEST", (99, 0))
    assert start.main(["test"]) == 2
    assert "too old" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "check"])
def test_tests_are_refused_where_their_libraries_are_too_old(monkeypatch, capsys, command):
    monkeypatch.setattr(start, "OLDEST_OF_TESTS", (99, 0))
    assert start.main([command]) == 2
    assert f"{command} needs Python 3.11 or newer" in capsys.readouterr().err


def test_child_runs_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables = start.child_environment("test")
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(start.ROOT), "elsewhere"]
    assert (variables["PYTHONUTF8"], variables["OMP_NUM_THREADS"]) == ("1", "1")
    assert "OMP_NUM_THREADS" not in start.child_environment("demo")


def test_exit_code_and_arguments_are_passed_on(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.setattr(start, "prepare", lambda folder: Path(sys.executable))
    monkeypatch.setitem(start.COMMANDS, "test", ("", [str(script)]))
    assert start.main(["test", "-k", "x y"]) == 3


def test_only_the_standard_library_is_imported():
    tree = ast.parse((ROOT / "scripts" / "start.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= sys.stdlib_module_names


def test_check_runs_every_step(monkeypatch, capsys):
    ran = []

    def call(command: list[str], **kwargs: object) -> int:
        ran.append(command)
        return int("mypy" in command)

    monkeypatch.setattr(check.subprocess, "call", call)
    assert check.main(["-k", "x"]) == 1
    assert [name for name in ("format", "check", "mypy") if any(name in command for command in ran)] == [
        "format",
        "check",
        "mypy",
    ]
    assert ran[-1][-2:] == ["-k", "x"]
    assert "FAILED (1)" in capsys.readouterr().out
