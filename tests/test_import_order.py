"""Whose module `networks.X` is, in every layout of the trainers and for every way to install ours.

Small checkouts are made here: sd-scripts has a folder `networks` without `__init__.py` beside its scripts; musubi-tuner
has one with `__init__.py` in `src/musubi_tuner`, which its trainer appends to sys.path. Each cell runs a script in an
environment of its own; nothing heavy is imported.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest

from networks import __version__
from networks.cli import doctor

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch.py"

PROBE = """
import importlib.util, json, os, sys
def main():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.append(os.path.dirname(here) if MUSUBI else here)
    found = {}
    for name in sys.argv[1:]:
        try:
            found[name] = getattr(importlib.util.find_spec(name), "origin", None)
        except ModuleNotFoundError:
            found[name] = None
    print(json.dumps(found))
"""
CALL = 'if __name__ == "__main__":\n    main()\n'

HOST_MODULES = ("lora", "host_only")  # what the checkouts have; we have `lora` and `lokr`


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both checkouts."""
    folder = tmp_path_factory.mktemp("hosts")
    sd, musubi = folder / "sd-scripts", folder / "musubi-tuner"
    write(sd / "train_network.py", "MUSUBI = False\n" + PROBE + CALL)
    write(sd / "library" / "train_util.py")
    for name in HOST_MODULES:
        write(sd / "networks" / f"{name}.py")
    package = musubi / "src" / "musubi_tuner"
    for inner in ("", "networks", "training"):
        write(package / inner / "__init__.py")
    for name in HOST_MODULES:
        write(package / "networks" / f"{name}.py")
    write(package / "training" / "trainer_base.py", "MUSUBI = True\n" + PROBE)
    write(package / "wan_train_network.py", "from musubi_tuner.training.trainer_base import main\n" + CALL)
    write(musubi / "wan_train_network.py", "from musubi_tuner.wan_train_network import main\n" + CALL)
    return folder


SCRIPTS = {
    "sd-scripts": "sd-scripts/train_network.py",
    "musubi root": "musubi-tuner/wan_train_network.py",
    "musubi inside": "musubi-tuner/src/musubi_tuner/wan_train_network.py",
}


@pytest.fixture(scope="module")
def environments(hosts: Path, tmp_path_factory: pytest.TempPathFactory) -> Environments:
    return Environments(tmp_path_factory.mktemp("environments"), hosts)


class Environments:
    """Virtual environments, each with ours installed in one way, and with musubi-tuner as `pip install -e` links it."""

    def __init__(self, folder: Path, hosts: Path) -> None:
        self.folder, self.hosts = folder, hosts
        self.source = folder / "source"
        for name in ("networks", "kohya_networks", "presets", "kohya_trainer"):
            shutil.copytree(ROOT / name, self.source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml", "README.md"):
            shutil.copyfile(ROOT / name, self.source / name)
        self.python = cache(self._python)

    def _python(self, install: str) -> Path:
        home = self.folder / install.replace(" ", "-")
        venv.create(home, symlinks=os.name != "nt")
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
        write(site / "musubi.pth", str(self.hosts / "musubi-tuner" / "src"))
        if install == "copy":
            for name in ("networks", "kohya_networks"):
                shutil.copytree(self.source / name, site / name)
        elif install.startswith("editable"):
            wheel = self._editable_wheel(install.split()[1], home)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        return python

    def _editable_wheel(self, mode: str, home: Path) -> Path:
        """What `pip install --config-settings editable_mode=MODE -e` unpacks; setuptools itself writes it."""
        tree = home / "tree"
        shutil.copytree(self.source, tree)
        code = (
            "import sys; from setuptools.build_meta import build_editable as b\n"
            "b(sys.argv[1], {'editable_mode': sys.argv[2]})"
        )
        command = [sys.executable, "-c", code, str(home), mode]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
        return next(home.glob("*.whl"))

    def run(self, install: str, layout: str, *names: str) -> dict[str, str]:
        """name -> "ours", "host" or "-" (not found)."""
        found = self._json(install, self.hosts / SCRIPTS[layout], *names)
        return {name: self._owner(origin) for name, origin in found.items()}

    def twins(self, install: str, layout: str, *arguments: str) -> dict[str, str]:
        """What TWINS finds, started where the layout's own script is."""
        script = (self.hosts / SCRIPTS[layout]).with_name("twins.py")
        write(script, f"MUSUBI = {layout == 'musubi inside'}\n" + TWINS)
        return self._json(install, script, *arguments)

    def _json(self, install: str, script: Path, *arguments: str) -> dict[str, str]:
        """What a script prints."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command, cwd = [str(script)], script.parent
        if install == "PYTHONPATH":
            environment["PYTHONPATH"] = str(self.source)
        if install.endswith("launcher"):
            command = [str(LAUNCH), script.name]
        python = self.python("editable lenient" if install == "lenient + launcher" else install)
        done = subprocess.run([python, *command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def _owner(self, origin: str | None) -> str:
        if origin is None:
            return "-"
        path = Path(origin).resolve()
        return "host" if path.is_relative_to(self.hosts.resolve()) else "ours"


NAMES = ("networks.lora", "networks.lokr", "networks.host_only", "kohya_networks.lora")
OURS_WINS = "ours ours host ours"
TABLE = {
    # install: (sd-scripts, musubi root, musubi inside), each the owners of NAMES
    "nothing": ("host - host -", "host - host -", "host - host -"),
    "copy": (OURS_WINS, OURS_WINS, "host - host ours"),
    "PYTHONPATH": (OURS_WINS, OURS_WINS, "host - host ours"),
    "editable lenient": ("host ours host ours", "host ours host ours", "host ours host ours"),
    "editable strict": (OURS_WINS, OURS_WINS, "host - host ours"),
    "editable compat": (OURS_WINS, OURS_WINS, "host - host ours"),
    "launcher": (OURS_WINS, OURS_WINS, OURS_WINS),
    "lenient + launcher": (OURS_WINS, OURS_WINS, OURS_WINS),
}


@pytest.mark.parametrize("layout", SCRIPTS)
@pytest.mark.parametrize("install", TABLE)
def test_whose_module_it_is(environments: Environments, install: str, layout: str) -> None:
    expected = dict(zip(NAMES, TABLE[install][list(SCRIPTS).index(layout)].split(), strict=True))
    assert environments.run(install, layout, *NAMES) == expected


@pytest.mark.parametrize("install", ("nothing", "copy", "PYTHONPATH", "editable lenient"))
def test_the_doctor_says_whose_it_is(
    environments: Environments, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the table holds, with what to write for it: ours under either name, or the launcher."""
    for name in [name for name in os.environ if name.startswith("PYTHON")]:
        monkeypatch.delenv(name)
    if install == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", str(environments.source))
    monkeypatch.setattr(sys, "executable", str(environments.python(install)))
    for checkout, layouts in (("sd-scripts", ["sd-scripts"]), ("musubi-tuner", ["musubi root", "musubi inside"])):
        assert doctor.main([str(environments.hosts / checkout), "--json"]) == 1  # there is no torch
        said = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["about"] == "networks"]
        for layout, finding in zip(layouts, said, strict=True):
            lora, lokr, _, alias = TABLE[install][list(SCRIPTS).index(layout)].split()
            package = "networks" if (lora, lokr) == ("ours", "ours") else "kohya_networks" if alias == "ours" else None
            folder = (environments.hosts / SCRIPTS[layout]).parent
            assert f"scripts in {folder} " in finding["text"]
            entry = "lokr" if checkout == "sd-scripts" else "lora_wan"
            modules = [line for line in finding["lines"] if line.startswith("--network_module")]
            assert modules == ([f"--network_module {package}.{entry}"] if package else []), finding
            assert (package == "networks") != any(str(LAUNCH) in line for line in finding["lines"])
            silent = lora == "host" and (lokr == "ours" or not package)  # some or all names are not ours, unasked
            assert finding["mark"] == ("problem" if silent else "ok" if package == "networks" else "note")


def test_the_doctor_needs_no_torch(environments: Environments) -> None:
    done = subprocess.run(
        [environments.python("nothing"), str(ROOT / "scripts" / "doctor.py")], capture_output=True, text=True,
        cwd=environments.hosts / "sd-scripts", env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["problem", "torch", "not", "installed;"] in [line[:4] for line in lines]
    assert lines[0][:3] == ["ok", "trainer", "sd-scripts"] and lines[-1] == ["problems:", "3,", "notes:", "0"]


TWINS = """
import importlib, json, logging, os, pickle, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
here = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(here) if MUSUBI else here)
order, inner = sys.argv[1].split(","), sys.argv[2:]
for package in order:
    for name in inner:
        try:
            importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError:
            pass
found = {}
for name in inner:
    host, ours = (sys.modules.get(f"{package}.{name}") for package in ("networks", "kohya_networks"))
    found[name] = "none" if ours is None else "alone" if host is None else "one" if host is ours else "two"
    if ours is not None:
        parent, _, last = f"kohya_networks.{name}".rpartition(".")
        assert getattr(sys.modules[parent], last) is ours
        assert importlib.util.find_spec(f"kohya_networks.{name}").origin == ours.__file__ == ours.__spec__.origin
        kind = vars(ours).get("Arg")
        assert kind is None or pickle.loads(pickle.dumps(kind)) is kind
print(json.dumps(found))
"""
INNER = ("args.table", "_version", "hosts.beside", "host_only")


@pytest.mark.parametrize("order", ("networks,kohya_networks", "kohya_networks,networks", "kohya_networks"))
@pytest.mark.parametrize("layout", SCRIPTS)
@pytest.mark.parametrize("install", ("copy", "PYTHONPATH", "editable lenient", "editable strict", "launcher"))
def test_one_module_under_two_names(environments: Environments, install: str, layout: str, order: str) -> None:
    """Whichever name comes first. What only the trainer's folder has is never there under our own name, and where that
    folder is the whole of `networks`, both stay as they are."""
    found = environments.twins(install, layout, order, *INNER)
    assert found.pop("host_only") == "none"
    lokr_is_hosts = TABLE[install][list(SCRIPTS).index(layout)].split()[1] != "ours"
    if order == "kohya_networks":  # the launcher itself has imported some under the other name
        assert set(found.values()) <= {"alone", "one"}
    else:
        assert set(found.values()) == {"alone" if lokr_is_hosts else "one"}


OBSERVED = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import networks
sys.path.append(sys.argv[1])  # late, as musubi-tuner does
import networks.host_only, networks.records.spec, networks.cli.command_line, kohya_networks.records.spec
import importlib
for name in ("networks.host_only", "networks.missing"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
print("torch" in sys.modules)
"""


def test_a_module_of_the_trainer_is_announced_once(environments: Environments) -> None:
    """Nothing is said of our own modules, and the package alone does not import torch."""
    folder = environments.hosts / "sd-scripts"
    command = [environments.python("copy"), "-c", OBSERVED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=environments.folder)
    assert done.returncode == 0, done.stderr
    origin = folder / "networks" / "host_only.py"
    said, *rest = done.stdout.splitlines()
    assert said == f"networks.host_only is not part of kohya-networks {__version__}: taken from {origin}"
    assert rest == ["No module named 'networks.missing'", "False"]


def test_ours_work_where_our_init_never_runs(environments: Environments) -> None:
    """In a lenient editable install `networks` is the trainer's folder, and only names that it lacks are ours."""
    code = (
        "import networks, networks.hosts.beside as ours\nprint(networks.__file__, ours.__file__)\n"
        "ours.origin('networks.lokr')"
    )
    environment = {**os.environ, "PYTHONPATH": str(environments.hosts / "sd-scripts")}
    command = [environments.python("editable lenient"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=environments.folder)
    assert done.returncode == 0, done.stderr
    init, ours = done.stdout.split()
    assert init == "None" and Path(ours).name == "beside.py"
    assert "networks is the trainer's own folder" in done.stderr and "scripts/launch.py" in done.stderr


def test_no_module_needs_our_init() -> None:
    """What is imported from the package itself is a module of its folder, not a name that its `__init__` defines."""
    for file in (ROOT / "networks").rglob("*.py"):
        depth = len(file.relative_to(ROOT / "networks").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == depth and not node.module:
                for alias in node.names:
                    found = ROOT / "networks" / alias.name
                    assert found.is_dir() or found.with_suffix(".py").is_file(), f"{file}: {alias.name}"
