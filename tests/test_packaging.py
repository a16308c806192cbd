"""What an installation holds, and that it works: the wheel is built, installed into a folder of its own, and its
programs, both names and its types are used from there alone. The sdist holds the checkout, so that its tests run."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from networks import __version__
from networks.cli.commands import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kohya_networks", "kohya_trainer", "networks")
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def read_setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_requirement_is_pinned():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)( ; .+)?", line)
            assert match, line
            pinned[match[1]] = match[2]
    setup = read_setup()
    wanted = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for line in "\n".join(wanted).split("\n"):
        name = re.split(r"[<>=;! ]", line.strip())[0].lower()
        assert not name or name in pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = tmp_path_factory.mktemp("wheel") / "code"
    for name in (*PACKAGES, "presets"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in NEEDED:
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, code / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=code, check=True, capture_output=True)
    return next(code.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return folder


def run(site: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python ...` with the installation alone beside the libraries."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def console(site: Path) -> str:
    """The program which the installation made."""
    return str(next((site / "bin").glob("kohya-networks*")))


def test_the_wheel_holds_every_file_once(wheel: Path) -> None:
    """Every file of the packages, data included, under its own path; of the alias nothing but itself."""
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    files = [f.relative_to(ROOT) for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file() and f.suffix != ".pyc"]
    presets = [f"networks/presets/{file.name}" for file in (ROOT / "presets").glob("*.toml")]
    assert sorted(held) == sorted([*(f.as_posix() for f in files), *presets])
    assert {"networks/py.typed", "kohya_networks/py.typed", "kohya_networks/api.pyi"} <= set(held)
    assert [name for name in held if name.startswith("kohya_networks/") and name.endswith(".py")] == [
        "kohya_networks/__init__.py"
    ]
    assert f"Version: {__version__}" in metadata


def test_the_licence_is_in_the_wheel(wheel: Path) -> None:
    """The whole text beside its name. The wheel holds no picture and no weights, thus nothing under the other one."""
    text = (ROOT / "LICENSE").read_bytes()
    assert b"Version 2.0, January 2004" in text and b"END OF TERMS AND CONDITIONS" in text
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
        held = {name: archive.read(name) for name in archive.namelist() if "/licenses/" in name}
        assert not [name for name in archive.namelist() if name.endswith((".png", ".safetensors"))]
    assert list(held.values()) == [text]
    head = metadata.partition("\n\n")[0].splitlines()
    assert "License-Expression: Apache-2.0" in head and "License-File: LICENSE" in head
    artwork = (ROOT / "scripts" / "emoji" / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in artwork and "OpenMoji" in artwork and "creativecommons.org/licenses/by-sa/4.0" in artwork


def test_what_a_package_index_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    head, _, text = metadata.partition("\n\n")
    fields = [tuple(line.split(": ", 1)) for line in head.splitlines()]
    names = [name for name, _ in fields]
    assert {"Summary", "Author", "Keywords", "Classifier", "Requires-Python"} <= set(names)
    assert ("Description-Content-Type", "text/markdown") in fields and text.strip() == read_text("README.md").strip()
    # a licence is told once: an index refuses a classifier of licences beside the expression
    assert not [value for _, value in fields if value.startswith("License ::")]
    versions = [
        value.rpartition(" ")[2] for _, value in fields if value.startswith("Programming Language :: Python :: 3.")
    ]
    oldest = dict(fields)["Requires-Python"].removeprefix(">=")
    assert versions[0] == oldest and versions == [f"3.{n}" for n in range(10, 10 + len(versions))]
    assert {"train", "test"} == {value for name, value in fields if name == "Provides-Extra"}


def test_the_changelog_knows_this_version() -> None:
    """On top, with the day of the release or as not released yet; a day for each version below it."""
    titles = re.findall(r"^## (.+)$", read_text("CHANGELOG.md"), re.M)
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - (Unreleased|\d{{4}}-\d\d-\d\d)", titles[0]), titles
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:])


def read_text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- sdist ----

MADE = ("__pycache__", "*.pyc", ".git", "*.egg-info", "PKG-INFO", "build", "dist", "output", ".*_cache", ".hypothesis",
        "*_latents_*.safetensors", "*_text_*.safetensors")  # fmt: skip


def files_of_the_checkout() -> list[str]:
    """What version control knows; where there is none, as in an unpacked sdist, all but what tools make."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        return sorted(name for name in done.stdout.decode().split("\0") if (ROOT / name).is_file() and name)
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file()]
    return sorted(file.as_posix() for file in files if not any(fnmatch(p, made) for p in file.parts for made in MADE))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout in which somebody has worked: caches, results and an older build lie there."""
    code = tmp_path_factory.mktemp("sdist") / "code"
    for name in files_of_the_checkout():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, code / name)
    for name in (
        "networks/__pycache__/api.cpython-310.pyc",
        ".pytest_cache/README.md",
        "scripts/emoji/heldout/cat_latents_sd_v1.safetensors",
        "scripts/emoji/heldout/cat_text_sd_v1.safetensors",
        "output/demo/plan.txt",
        "dist/old.whl",
        "my_notes.txt",
    ):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_bytes(b"junk")
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=code, check=True, capture_output=True)
    return next(code.parent.glob("*.tar.gz"))


def test_the_sdist_is_the_checkout(sdist: Path) -> None:
    """Every file of it and none that tools made."""
    with tarfile.open(sdist) as archive:
        held = [member.name.partition("/")[2] for member in archive if member.isfile()]
    made = [name for name in held if name == "PKG-INFO" or name.startswith("kohya_networks.egg-info/")]
    assert len(made) > 1  # what setuptools writes by itself
    held = sorted(name for name in held if name not in made)
    assert held == [name for name in files_of_the_checkout() if name not in made]
    needed = {"constraints.txt", "LICENSE", "scripts/emoji/LICENSE", "scripts/start.py", "tests/conftest.py"}
    assert needed <= set(held) and {name.partition("/")[0] for name in held} >= {"presets", "docs", *PACKAGES}


def test_tests_run_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    """With its own modules, helpers and data."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (root,) = tmp_path.iterdir()
    (root / "tests" / "test_where.py").write_text(
        "from pathlib import Path\n\nimport kohya_trainer, networks, registry_archs\n\n\ndef test_where():\n"
        "    for module in (kohya_trainer, networks, registry_archs):\n"
        "        assert Path(__file__).parents[1] in Path(module.__file__).parents\n"
    )
    tests = ["tests/test_where.py", "tests/test_shell_text.py", "tests/test_patterns.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *tests]
    done = subprocess.run(pytest_, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ---- both names ----


def test_both_names_are_one_copy(site: Path, tmp_path: Path) -> None:
    code = (
        "import kohya_networks.lora_wan, networks.lora_wan, kohya_networks.api, networks.api, networks.args.presets\n"
        "assert kohya_networks.lora_wan is networks.lora_wan and kohya_networks.api is networks.api\n"
        "print(networks.lora_wan.__file__, len(networks.args.presets.names()))"
    )
    done = run(site, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, presets = done.stdout.split()
    assert file == str(site / "networks" / "lora_wan.py") and int(presets) == len([*(ROOT / "presets").glob("*.toml")])


def test_the_alias_without_its_modules_says_so(site: Path, tmp_path: Path) -> None:
    """A trainer's folder `networks` beside it is none of ours."""
    shutil.copytree(site / "kohya_networks", tmp_path / "kohya_networks")
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "lora.py").write_text("")
    done = run(tmp_path, "-c", "import kohya_networks", cwd=tmp_path)
    assert f"{tmp_path / 'networks'} is no folder of kohya-networks; install" in done.stderr.splitlines()[-1]


# ---- commands ----


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, an adapter file and a trainer's script, with a folder `networks` of the trainer's."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "networks").mkdir()
    (folder / "networks" / "__init__.py").write_text("")
    (folder / "networks" / "lora.py").write_text("raise SystemExit('the trainer's')\n")
    (folder / "train.py").write_text("import sys, networks.lora\nprint(sys.argv[1:], networks.lora.__file__)\n")
    save_file({"b.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    factors = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_b.{key}": tensor for key, tensor in factors.items()}, folder / "a.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["plan", "sd15", "--network_module", "networks.lora", "--network_dim", "4", "--trained"],
            "lora_unet_mid_block",
        ),
        (["args", "lokr"], "factor: "),
        (["show", "a.safetensors"], "1 x LoRA, dim 2, scale 1"),
        (["merge", "model.safetensors", "a.safetensors", "--out", "merged.safetensors", "--overwrite"], "wrote merged"),
        (["resize", "a.safetensors", "--dims", "1", "--overwrite"], "wrote a-0001.safetensors"),
        (["launch", "train.py", "--x", "1"], "['--x', '1'] {site}"),
    ],
)
def test_each_command_from_the_installation(site: Path, work: Path, arguments: list[str], said: str) -> None:
    """By the program, some by -m too, inside a trainer's folder: `networks` is ours there."""
    starts = [[console(site)], ["-m", "kohya_networks.cli"]]
    for start in starts if arguments[0] in ("args", "launch") else starts[:1]:
        done = run(site, *start, *arguments, cwd=work)
        assert done.returncode == 0, done.stderr
        assert said.format(site=site) in done.stdout


OF_THE_TRAINER = [name for name, command in COMMANDS.items() if command.module.startswith("kohya_trainer.")]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OF_THE_TRAINER])
def test_help_of_each_command(site: Path, tmp_path: Path, command: str) -> None:
    """At once: neither torch nor a library of models is imported for it, nor for a misspelt option."""
    code = (
        "import sys; from kohya_networks.cli.commands import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "print(code, sorted({'torch', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys()))"
    )
    done = run(site, "-c", code, command, "--help", cwd=tmp_path)
    *text, last = done.stdout.splitlines()
    assert last == "0 []", done.stderr
    assert command == "launch" or f"usage: kohya-networks {command} [-h]" in text[0]
    done = run(site, "-c", code, command, "--hlep", cwd=tmp_path)
    assert done.stdout == "2 []\n" and done.stderr.startswith("error: ")


def test_the_program_itself(site: Path, tmp_path: Path) -> None:
    done = run(site, console(site), "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    done = run(site, "-m", "networks.cli", "--version", cwd=tmp_path)
    assert done.stdout.split() == ["kohya-networks", __version__, "from", str(site / "networks")]
    done = run(site, console(site), "mereg", cwd=tmp_path)
    assert done.returncode == 2 and "there is no command mereg. Did you mean merge?" in done.stderr
    assert run(site, console(site), cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("command", OF_THE_TRAINER)
def test_help_of_the_trainer_and_the_generator(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the name by which they were called."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: kohya-networks {command} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("command", OF_THE_TRAINER)
def test_without_the_trainers_libraries(site: Path, tmp_path: Path, command: str) -> None:
    code = (
        "import sys\n"
        "for name in ('accelerate', 'diffusers', 'transformers', 'PIL', 'tqdm'):\n    sys.modules[name] = None\n"
        "from kohya_networks.cli.commands import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = run(site, "-c", code, command, cwd=tmp_path)
    assert done.returncode == 2 and 'pip install "kohya-networks[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_trainer_where_a_trainers_folder_has_the_name(site: Path, work: Path) -> None:
    """In a process of its own it takes the name; where that folder is loaded already, it says what to do."""
    done = run(site, "-c", "import kohya_trainer, networks.api; print(networks.__file__)", cwd=work)
    assert done.stdout.strip() == str(site / "networks" / "__init__.py"), done.stderr
    done = run(site, "-c", "import networks, kohya_trainer", cwd=work)
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: networks is a trainer's folder here ({work}")


def test_arguments_for_programs(site: Path, tmp_path: Path) -> None:
    rows = json.loads(run(site, console(site), "args", "lora_sd3", "--json", cwd=tmp_path).stdout)
    found = {row["name"]: row for row in rows}
    assert found["conv_alpha"]["per_host"]["sd_scripts"] == 1.0 and found["use_dora"]["aliases"]
    assert "x_attn_dim" in found and "img_attn_dim" not in found and "factor" not in found
    done = run(site, console(site), "args", "lora_sd_3", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean lora_sd3?" in done.stderr


# ---- types ----

USER = """
import torch
from {package} import api

def train(unet: torch.nn.Module) -> None:
    network = api.apply(unet, algo="lokr", dim=8, factor=8, network_reg_dims={{".*attn2.*": 16}})
    optimizer = torch.optim.AdamW(network.optimizer_groups(1e-4))
    optimizer.step()
    network.save("my-lokr.safetensors")
    api.merge(unet, {{"my-lokr.safetensors": 0.5}})
"""
WRONG = {  # what is put in place of it: what mypy says
    "factor=8": ("fcator=8", '"fcator"'),
    "dim=8": ('dim="8"', '"dim"'),
    'algo="lokr"': ('algo="lorka"', '"algo"'),
    "network_reg_dims={": ("use_dora={", '"use_dora"'),
    "optimizer_groups(1e-4)": ('optimizer_groups("1e-4")', '"optimizer_groups"'),
    "0.5}": ('"x"}', "dict"),
}


def test_a_type_checker_sees_what_is_wrong(site: Path, tmp_path: Path) -> None:
    """From the installation, by either name; nothing in the right program, and each mistake by itself."""
    expected = {}
    for package in ("networks", "kohya_networks"):
        right = USER.format(package=package)
        (tmp_path / f"right_{package}.py").write_text(right)
        for i, (text, (wrong, said)) in enumerate(WRONG.items()):
            assert text in right
            (tmp_path / f"wrong{i}_{package}.py").write_text(right.replace(text, wrong))
            expected[f"wrong{i}_{package}.py"] = said
    # torch itself takes a minute to be read, and knows nothing of ours
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n")
    files = sorted(file.name for file in tmp_path.glob("*.py"))
    done = run(site, "-m", "mypy", "--strict", "--scripts-are-modules", *files, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if " error: " in line]
    assert {line.partition(":")[0] for line in lines} == expected.keys(), done.stdout
    for line in lines:
        assert expected[line.partition(":")[0]] in line
