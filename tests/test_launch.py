"""scripts/launch.py: any script of a trainer, as `python SCRIPT` would run it, with our modules first."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import networks.lora_wan
from networks import __version__
from networks.hosts import launching

PRESCRIBED = launching.PRESCRIBED
ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch.py"

SHOW = """
import json, os, sys
sys.path.append(os.path.dirname(os.path.abspath(__file__)))
if __name__ == "__main__":
    import gen_img, library.tool, networks.lokr, networks.only_here
    print(json.dumps({
        "argv": sys.argv, "file": __file__, "first": sys.path[0], "cwd": os.getcwd(),
        "gen_img": gen_img.__file__, "lokr": networks.lokr.__file__, "only": networks.only_here.__file__,
    }))
    sys.exit(7)
"""

WORKERS = """
import sys
from torch.utils.data import DataLoader, Dataset

class Names(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import networks.lora
        return networks.lora.__file__

if __name__ == "__main__":
    print(*DataLoader(Names(), batch_size=None, num_workers=1, multiprocessing_context="spawn"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """sd-scripts' layout: no `__init__.py` in networks, scripts with names that we have too."""
    home = tmp_path / "sd-scripts"
    files = {
        "train_network.py": SHOW,
        "workers.py": WORKERS,
        "gen_img.py": "",
        "library/__init__.py": "",
        "library/train_util.py": "",
        "library/tool.py": "",
        "networks/lora.py": "PREFIX = 'bare'\n",
        "networks/only_here.py": "",
        "networks/helper.py": "import lora, gen_img, library.tool, networks.loha\n"
        "print(lora.PREFIX, networks.loha.__file__, gen_img.__file__)\n",
    }
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return home


LYCORIS = """
import importlib, importlib.util, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
path, sys.path[:] = list(sys.path), []
empty = importlib.util.find_spec("lycoris")  # what the trainers' generators ask; no path, as where it is not installed
assert importlib.util.module_from_spec(empty).__path__ is not None and empty.origin is None
sys.path[:] = path
module = importlib.import_module("lycoris.kohya")  # what trainers call
import lycoris.kohya, lycoris.modules.lokr
from lycoris.kohya import create_network, create_network_from_weights
assert module is lycoris.kohya is sys.modules["networks.lycoris"] and module.create_network is create_network
print(lycoris.modules.lokr.__file__)
try:
    import lycoris.nothing
except ModuleNotFoundError as error:
    print(error)
"""


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(LAUNCH), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_script_sees_what_python_would_show_it(checkout: Path, tmp_path: Path) -> None:
    """Its arguments, its name, its own neighbours (not ours of the same name), and its exit code comes out."""
    script = os.path.join("sd-scripts", "train_network.py")
    done = launch(script, "--help", "--network_args", "a=b", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    seen = json.loads(done.stdout)
    assert seen["argv"] == [script, "--help", "--network_args", "a=b"] and seen["file"] == script
    assert seen["cwd"] == str(tmp_path) and seen["first"] == str(ROOT)
    assert seen["gen_img"] == str(checkout / "gen_img.py")
    assert seen["lokr"] == str(ROOT / "networks" / "lokr.py")
    assert seen["only"] == str(checkout / "networks" / "only_here.py")


def test_a_helper_script_of_the_networks_folder(checkout: Path) -> None:
    """Its bare `import lora` is the neighbour, as ever; what stands in the root is found uninstalled, and it
    is not ours of that name."""
    done = launch("networks/helper.py", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bare", str(ROOT / "networks" / "loha.py"), str(checkout / "gen_img.py")]


def test_spawned_workers_find_ours(checkout: Path) -> None:
    done = launch("workers.py", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "networks" / "lora.py")] * 2


@pytest.mark.sweep(2)
@pytest.mark.parametrize("start", ([str(LAUNCH)], ["-m", "kohya_networks.cli", "launch"]))
def test_under_accelerate(checkout: Path, start: list[str]) -> None:
    """By the checkout's script, and as an installation is started."""
    before = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_cpu_threads_per_process", "1")
    (checkout / "done.py").write_text("import sys, networks.lora\nprint(sys.argv[1:], networks.lora.__file__)\n")
    command = [sys.executable, *before, *start, "done.py", "--x", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"['--x', '1'] {ROOT / 'networks' / 'lora.py'}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_netwrok.py"], "there is no script train_netwrok.py in {home}; did you mean train_network.py?"),
        (["train_network"], "; did you mean train_network.py?"),
        (["zzz.py"], "; it holds gen_img.py, train_network.py, workers.py"),
        (["library"], "library is a folder, not a script; it holds __init__.py, tool.py, train_util.py"),
        (["nowhere/train_network.py"], "there is no folder nowhere: give the path"),
        (["--network_dim", "4", "train_network.py"], "option --network_dim comes before the script"),
        (["accelerate", "launch", "train_network.py"], "accelerate comes first"),
        (["--replace_lycoris=yes", "train_network.py"], "its options after it; did you mean --replace_lycoris?"),
    ],
)
def test_mistakes(checkout: Path, arguments: list[str], message: str) -> None:
    done = launch(*arguments, cwd=checkout)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message.format(home=checkout) in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_script_it_explains_itself(tmp_path: Path) -> None:
    assert launch(cwd=tmp_path).returncode == 2
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0 and "scripts/launch.py train_network.py" in done.stdout


def test_a_module_whose_name_a_trainer_insists_on_trains_with_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its other names stay; another module of the trainer lends its reading alone."""
    for prescribed in (True, False):
        name = "musubi_tuner.networks.lora_wan"
        monkeypatch.setattr(launching, "PRESCRIBED", frozenset({name} if prescribed else ()))
        theirs: Any = ModuleType(name)
        theirs.create_arch_network = theirs.create_arch_network_from_weights = theirs.check_file = len
        with caplog.at_level(logging.INFO, logger="networks"):
            launching._lend_reader(theirs)
        assert (theirs.create_arch_network == networks.lora_wan.create_arch_network) == prescribed
        assert (
            hasattr(theirs, "prepare_network") == prescribed == (f"{name} trains with networks.lora_wan" in caplog.text)
        )
        assert theirs.create_arch_network_from_weights is not len and theirs.check_file is len
        caplog.clear()
    assert "musubi_tuner.networks.lora_mage_flow" in PRESCRIBED


def test_lycoris_is_ours(checkout: Path) -> None:
    """By both names of its functions, said once; what else an installed LyCORIS has stays its own."""
    (checkout / "lycoris_too.py").write_text(LYCORIS)
    stand_in = checkout / "lycoris"
    (stand_in / "modules").mkdir(parents=True)
    (stand_in / "__init__.py").write_text("from . import kohya, modules\n")
    (stand_in / "kohya.py").write_text("raise SystemExit('theirs')\n")
    for name in ("__init__.py", "lokr.py"):
        (stand_in / "modules" / name).write_text("")
    done = launch("--allow_missing", "--replace-lycoris", "lycoris_too.py", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"lycoris.kohya is networks.lycoris of kohya-networks {__version__} here: {ROOT / 'networks' / 'lycoris.py'}",
        str(stand_in / "modules" / "lokr.py"),
        "No module named 'lycoris.nothing'",
    ]


def test_lycoris_stays_itself_unless_asked(checkout: Path) -> None:
    (checkout / "lycoris").mkdir()
    (checkout / "lycoris" / "__init__.py").write_text("")
    (checkout / "lycoris" / "kohya.py").write_text("NAME = 'theirs'\n")
    (checkout / "plain.py").write_text("import lycoris.kohya\nprint(lycoris.kohya.NAME)\n")
    assert launch("plain.py", cwd=checkout).stdout == "theirs\n"
