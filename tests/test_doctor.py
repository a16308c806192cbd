"""`kohya-networks doctor`: what it reads of a trainer's folder, and what it says of an environment.

Whose modules a script finds is tested on real environments, in tests/test_import_order.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from networks import __version__
from networks.cli import doctor, environment
from networks.cli.environment import NOTE, OK, PROBLEM, Finding
from networks.hosts.checkouts import Checkout, find_checkout

HASH = "0123456789abcdef0123456789abcdef01234567"
REQUIREMENTS = """\
accelerate==1.6.0
diffusers[torch]==0.32.1
# a comment
opencv-python==4.10.0.84   # another
bitsandbytes
lion_pytorch>=0.2
-e .
"""
PROJECT = """\
[project]
name = "musubi-tuner"
version = "0.3.4"
dependencies = [
    "accelerate==1.6.0",
    # "sageattention>=1.0.6",
    "pillow>=11.3.0",
]

[tool.x]
version = "9"
"""


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def sd_scripts(root: Path) -> Path:
    write(root / "library" / "train_util.py")
    write(root / "requirements.txt", REQUIREMENTS)
    return root


def musubi(root: Path) -> Path:
    write(root / "src" / "musubi_tuner" / "networks" / "__init__.py")
    write(root / "pyproject.toml", PROJECT)
    return root


def found(folder: Path) -> Checkout:
    checkout = find_checkout(folder)
    assert checkout is not None
    return checkout


# -- the checkout


def test_both_trainers_are_known_from_any_folder_of_theirs(tmp_path: Path) -> None:
    sd, tuner = sd_scripts(tmp_path / "gui" / "sd-scripts"), musubi(tmp_path / "musubi-tuner")
    for folder in (sd, sd / "library", tmp_path / "gui"):  # the GUI has it below
        assert (found(folder).name, found(folder).root, found(folder).version) == ("sd-scripts", sd, "")
    package = tuner / "src" / "musubi_tuner"
    assert [each.folder for each in found(tuner).layouts] == [tuner, package]
    assert [each.folder for each in found(package).layouts] == [package]
    assert found(package).version == "0.3.4" and found(package).package == "musubi_tuner"
    sd_scripts(tmp_path / "gui" / "other")
    assert find_checkout(tmp_path / "gui") is None  # which of the two?
    assert find_checkout(tmp_path / "musubi-tuner" / "nowhere") is not None and find_checkout(tmp_path) is not None


def test_requirements_are_read_as_both_files_write_them(tmp_path: Path) -> None:
    needs = found(sd_scripts(tmp_path / "a")).needs
    pins = {"accelerate": "1.6.0", "diffusers": "0.32.1", "opencv-python": "4.10.0.84"}
    assert needs == {**pins, "bitsandbytes": "", "lion-pytorch": ""}
    assert found(musubi(tmp_path / "b")).needs == {"accelerate": "1.6.0", "pillow": ""}


@pytest.mark.parametrize("form", ("loose", "packed", "detached", "submodule", "work tree", "none"))
def test_the_commit_as_git_keeps_it(tmp_path: Path, form: str) -> None:
    root = sd_scripts(tmp_path / "sd-scripts")
    git, head = root / ".git", "ref: refs/heads/dev/x\n"
    if form in ("submodule", "work tree"):
        write(git, "gitdir: ../modules/sd\n")
        git = tmp_path / "modules" / "sd"
    common = git
    if form == "work tree":
        common = tmp_path / "common"
        write(git / "commondir", "../../common\n")
    if form != "none":
        write(git / "HEAD", f"{HASH}\n" if form == "detached" else head)
    if form == "packed":
        write(git / "packed-refs", f"# pack-refs\n{'f' * 40} refs/heads/dev\n{HASH} refs/heads/dev/x\n")
    elif form not in ("detached", "none"):
        write(common / "refs" / "heads" / "dev" / "x", f"{HASH}\n")
    expected = {"detached": HASH[:9], "none": ""}.get(form, f"dev/x {HASH[:9]}")
    assert found(root).commit == expected


# -- the environment


def probed(**changes: Any) -> dict[str, Any]:
    """An answer of the probe where all is well."""
    libraries = {name: "1.6.0" for name in (*environment.LIBRARIES, "opencv-python-headless", "lion-pytorch")}
    libraries |= {"diffusers": "0.32.1+cu124"}
    return {"libraries": libraries, "pip": True, "modules": {}, "path": []} | changes


def marks(findings: list[Finding]) -> list[str]:
    return [finding.mark for finding in findings]


def test_torch_is_judged(tmp_path: Path) -> None:
    there = {"version": "2.6.0+cu124", "build": "CUDA 12.4", "devices": ["A card"]}
    cases: list[tuple[dict[str, Any], str, str]] = [
        (there, OK, "2.6.0+cu124, CUDA 12.4, A card"),
        ({**there, "devices": []}, NOTE, "2.6.0+cu124, CUDA 12.4, no GPU that it can use"),
        ({**there, "build": "", "devices": []}, NOTE, "built for the CPU alone"),
        ({**there, "build": "", "devices": ["MPS"]}, OK, "2.6.0+cu124, MPS"),
        ({**there, "version": "2.4.1"}, PROBLEM, "2.4.1 is too old"),
        ({"error": "OSError: no cudart"}, PROBLEM, "does not start: OSError: no cudart"),
    ]
    for answer, mark, text in cases:
        finding = environment.torch_finding(answer, probed())
        assert finding.mark == mark and text in finding.text, finding
    missing = environment.torch_finding({"error": "ModuleNotFoundError"}, probed(libraries={}))
    assert missing.mark == PROBLEM and missing.lines[0].endswith(" -m pip install torch")
    with_uv = environment.torch_finding({}, probed(libraries={}, pip=False))
    assert with_uv.lines[0].startswith("uv pip install --python ")


def test_lines_are_for_the_shells_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """PowerShell runs a quoted program behind & alone."""
    monkeypatch.setattr(environment, "WINDOWS", True)
    monkeypatch.setattr(environment.sys, "executable", r"C:\AI Tools\venv\Scripts\python.exe")
    assert environment.pip(probed()) == r'& "C:\AI Tools\venv\Scripts\python.exe" -m pip install'
    assert environment.pip(probed(pip=False)).startswith(r'uv pip install --python "C:\AI Tools')
    monkeypatch.setattr(environment.sys, "executable", r"C:\venv\Scripts\python.exe")
    assert environment.pip(probed()) == r"C:\venv\Scripts\python.exe -m pip install"


def test_libraries_are_judged(tmp_path: Path) -> None:
    """Missing ones with what they are for and a line to run; a headless opencv is one; a build of a pin is that pin."""
    sd = found(sd_scripts(tmp_path / "with space" / "sd"))
    assert marks(list(environment.library_findings(sd, probed()))) == [OK]
    assert marks(list(environment.library_findings(None, probed(libraries={})))) == [OK, PROBLEM]
    lacking = probed(libraries={"safetensors": "1", "accelerate": "1.7.0"})
    said = list(environment.library_findings(sd, lacking))
    assert marks(said) == [OK, PROBLEM, NOTE, NOTE] and not said[2].lines  # the line of the problem is theirs, too
    assert said[1].text.endswith("diffusers") and said[3].text.endswith("accelerate 1.7.0 (1.6.0)")
    assert "opencv-python, bitsandbytes (8-bit optimizers" in said[2].text
    assert said[1].lines[0] == f'cd "{sd.root}"' and said[1].lines[1].endswith("pip install -r requirements.txt")
    tuner = found(musubi(tmp_path / "musubi"))
    for origin, text in ((None, "is not installed"), (str(tmp_path / "x" / "__init__.py"), "of another folder")):
        lacking = probed(modules={"musubi_tuner": origin})
        (finding,) = [each for each in environment.library_findings(tuner, lacking) if each.mark == PROBLEM]
        assert text in finding.text and finding.lines[1].endswith("pip install -e .")


@pytest.mark.parametrize("folder", ("bin/python", "Scripts/python.exe"))
def test_an_environment_beside_the_trainer_is_named(tmp_path: Path, folder: str) -> None:
    for home in (tmp_path / "sd" / ".venv", tmp_path / "venv"):
        write(home / folder)
        said = [each for each in environment.python_findings(tmp_path / "sd", "doctor.py .") if str(home) in each.text]
        assert marks(said) == [NOTE] and said[0].lines == (f"{home / folder} doctor.py .",)


@pytest.mark.parametrize(("version", "relation"), [(__version__, "same"), ("0.0.9", "older"), ("10.0", "newer")])
def test_another_copy_of_ours(tmp_path: Path, version: str, relation: str) -> None:
    """The one that trains must be the one that was asked; others on the path are noted."""
    for name in ("first", "second"):
        write(tmp_path / name / "networks" / "_version.py", f'__version__ = "{version}"\n')
        write(tmp_path / name / "networks" / "hosts" / "beside.py")
        write(tmp_path / name / "networks" / "__init__.py")
    write(tmp_path / "third" / "networks" / "__init__.py")  # somebody else's
    path = [str(tmp_path / name) for name in ("third", "first", "second", "first")] + [str(doctor.HOME.parent)]
    used = {"networks.lora": str(tmp_path / "first" / "networks" / "lora.py")}
    said = list(doctor._copies(probed(path=path, modules=used)))
    assert marks(said) == [NOTE if relation == "same" else PROBLEM, NOTE]
    assert [("not used" in each.text, relation in each.text) for each in said] == [(False, True), (True, True)]
    assert list(doctor._copies(probed(path=[str(doctor.HOME.parent)]))) == []


def test_a_stranger_named_networks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module `networks.py` beside the scripts hides every folder of that name; and the line says which file."""
    ask = doctor._ask
    monkeypatch.setattr(doctor, "_ask", lambda *given: {"error": "slow"} if given[1] == "torch" else ask(*given))
    root = sd_scripts(tmp_path / "sd")
    write(root / "networks.py")
    assert doctor.main([str(root)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"{root / 'networks.py'}, which hides every folder networks (a script's own folder comes first)" in text


def test_the_gui_is_told_what_to_write(tmp_path: Path) -> None:
    sd = found(sd_scripts(tmp_path / "sd-scripts"))
    names = [f"{package}.{entry}" for package in ("networks", "kohya_networks") for entry in doctor.ENTRIES]
    answer = probed(modules=dict.fromkeys(names), package=None, pythonpath=[], site=[], pth={})
    facts = {"layouts": {str(sd.root): answer}, "torch": {"error": ""}}
    lines = "--network_module networks.lycoris"
    for has_it in (False, True):
        assert has_it == any(lines in finding.lines for finding in doctor.examine(sd, sd.root, facts))
        write(tmp_path / "kohya_gui.py")


def test_a_folder_without_a_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_checkout(tmp_path) is None and doctor._trainer(None, tmp_path).mark == NOTE
    assert doctor.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_json_holds_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "_ask", lambda *arguments: {"error": "no such python"})
    assert doctor.main([str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][-1]["mark"] == PROBLEM and "no such python" in told["findings"][-1]["text"]
    assert told["facts"]["torch"] == {"error": "no such python"}
