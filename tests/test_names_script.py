"""scripts/names.py: what is recorded, compared, and left as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import names
import pytest
from registry_archs import SPECS
from test_arch_names import trainer_models
from tiny_two_streams import MageFlow
from torch import nn

from networks.models import skeleton


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is recorded."""
    shutil.copytree(names.NAMES, tmp_path / "names")
    shutil.copytree(skeleton.OUTLINES, tmp_path / "skeletons")
    for module, name, folder in (
        (names, "ROOT", tmp_path),
        (names, "NAMES", tmp_path / "names"),
        (names, "OUTLINES", tmp_path / "skeletons"),
    ):
        monkeypatch.setattr(module, name, folder)
    return tmp_path


def krea() -> dict[str, nn.Module]:
    return trainer_models("krea2")


def test_check_finds_what_differs_and_writes_nothing(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names.main(["krea2", "--check", "--skeletons"]) == 0
    path = recorded / "skeletons" / "krea2.txt"
    old = path.read_text(encoding="utf-8")
    path.write_text(old.replace("6144", "6145", 1), encoding="utf-8")
    assert names.main(["krea2", "--check"]) == 1
    out = capsys.readouterr().out
    assert f"{Path('skeletons', 'krea2.txt')}: differs from its class" in out
    assert "tests/names/krea2.txt stays as it is: it was recorded from the trainer's own model" in out
    assert path.read_text(encoding="utf-8") != old
    assert names.main(["krea2"]) == 0
    assert path.read_text(encoding="utf-8") == old


def test_a_factory_builds_the_class_that_only_a_trainer_has(recorded: Path) -> None:
    """Byte for byte, from the model which the file describes."""
    path = recorded / "names" / "krea2.txt"
    old = path.read_bytes()
    path.unlink()
    assert names.main(["krea2", "--factory", "test_names_script:krea"]) == 0
    assert path.read_bytes() == old


def mage() -> dict[str, nn.Module]:
    return {"dit": MageFlow()}


def test_a_class_that_no_library_has_gives_the_outline_too(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [recorded / folder / "mage_flow.txt" for folder in ("names", "skeletons")]
    old = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert names.main(["mage_flow"]) == 0 and not any(path.is_file() for path in paths)
    assert "the outlines of mage_flow stay as they are: it was recorded from a stand-in" in capsys.readouterr().out
    assert names.main(["mage_flow", "--factory", "test_names_script:mage"]) == 0
    assert [path.read_bytes() for path in paths] == old


def test_a_class_that_is_not_installed_leaves_its_outline(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(release: object) -> nn.Module:
        raise ValueError("Krea2Transformer2DModel is not in the installed diffusers")

    monkeypatch.setattr(names, "denoiser_of", lacking)
    (recorded / "skeletons" / "krea2.txt").write_text("as it was", encoding="utf-8")
    assert names.main(["krea2", "--skeletons"]) == 0
    assert "the outlines of krea2 stay as they are: Krea2Transformer2DModel is not in" in capsys.readouterr().out
    assert (recorded / "skeletons" / "krea2.txt").read_text(encoding="utf-8") == "as it was"


@pytest.mark.parametrize(
    ("argv", "words"), [(["flx"], "did you mean flux"), (["flux", "sd3", "--factory", "a:b"], "name that")]
)
def test_mistakes(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert names.main(argv) == 2 and words in capsys.readouterr().err


def test_what_is_recorded_belongs_to_something() -> None:
    """No file is left of an architecture, a release or an encoder that is no more."""
    known = [one for spec in SPECS.values() for one in spec.releases]
    wanted = {one.name for one in known} | {encoder.name for one in known for encoder in one.text_encoders if encoder}
    assert {path.stem for path in skeleton.OUTLINES.glob("*.txt")} == wanted, "run `python scripts/names.py`"
    assert {path.stem for path in names.NAMES.glob("*.txt")} == SPECS.keys(), "run `python scripts/names.py`"
