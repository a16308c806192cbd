"""save_also: further files at each save, which go when the trainer has removed the file that they stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from registry_archs import SPECS
from safetensors.torch import load_file
from test_every_architecture import create, model_of
from tiny_parts import randomise, sd_unet

from networks import api
from networks.files import outputs
from networks.files.dialects import COMFYUI, PEFT
from networks.network.further import beside

FOREIGN = {"zimage", "qwen_image_21", "hunyuan_video", "hunyuan_image", "hv_1_5", "framepack", "hidream_o1", "ltx2"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def made(arch: str = "zimage", **kwargs: str) -> Any:
    network = create(arch, model_of(arch), **kwargs)
    randomise(network)
    return network


def save(network: Any, folder: Path, name: str) -> None:
    network.save_weights(str(folder / f"{name}.safetensors"), torch.float32, {"ss_network_dim": "2"})


@pytest.mark.parametrize("arch", SPECS)
def test_auto_is_for_architectures_of_which_comfyui_misses_layers(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    network = made(arch)
    save(network, tmp_path, "a")
    further = {"a-comfyui.safetensors"} if arch in FOREIGN else set()
    assert names(tmp_path) == {"a.safetensors", *further}
    told = [note for note in network.plan.notes if "each save also writes NAME-comfyui.safetensors" in note]
    assert len(told) == len(further) and ("saved a-comfyui.safetensors, too (" in caplog.text) == bool(further)
    assert all(text in caplog.text for text in told), "it is told when the network is made"


@pytest.mark.parametrize(
    ("kwargs", "wanted"),
    [
        ({"save_also": "none"}, ()),
        ({"save_format": "portable"}, ()),
        ({"save_format": "diffusers"}, ()),
        ({"save_also": "diffusers"}, ("a-diffusers.safetensors",)),
        ({"save_also": "auto,diffusers"}, ("a-comfyui.safetensors", "a-diffusers.safetensors")),
        ({"save_also": "comfyui,diffusers,peft"}, ("a-comfyui.safetensors", "a-diffusers.safetensors", "a-peft")),
        ({"save_format": "comfyui", "save_also": "portable"}, ("a-portable.safetensors",)),
        ({"algo": "diag-oft"}, ()),  # whole differences are not written unasked
        ({"algo": "diag-oft", "save_also": "comfyui"}, ("a-comfyui.safetensors",)),
        ({"save_format": "peft"}, ("a-peft",)),
    ],
    ids=str,
)
def test_what_is_written(kwargs: dict[str, str], wanted: set[str], tmp_path: Path) -> None:
    network = made(**kwargs)
    save(network, tmp_path, "a")
    assert names(tmp_path) == {"a.safetensors", *wanted}
    prefixes = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "portable": "lora_unet_"}
    for name in names(tmp_path) - {"a-peft"}:
        form = name.partition("-")[2].partition(".")[0] or kwargs.get("save_format", "portable").replace(
            "peft", "portable"
        )
        assert next(iter(load_file(tmp_path / name))).startswith(prefixes[form])


def test_mistakes_are_told_at_the_start() -> None:
    with pytest.raises(ValueError, match="save_also=comfyui: files are written as save_format=comfyui already"):
        made(save_format="comfyui", save_also="comfyui")
    with pytest.raises(ValueError, match="save_also=diffusers: the boft of lora_unet_"):
        made(algo="boft", save_also="diffusers")
    with pytest.raises(ValueError, match=r"save_also=comfyu is none of auto, none.*did you mean comfyui"):
        made(save_also="comfyu")
    with pytest.raises(ValueError, match="save_also=diffusers holds DoRA of output rows only"):
        made(use_dora="True", wd_on_output="False", save_also="diffusers")


def test_large_files_are_not_written_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("networks.plan.file_format.LARGE", 10)
    network = made()
    save(network, tmp_path, "a")
    assert names(tmp_path) == {"a.safetensors"}
    assert any("save_also=comfyui writes a second file for it" in note for note in network.plan.notes)


@pytest.mark.parametrize("form", ["comfyui", "peft"])
def test_it_goes_with_its_file(form: str, tmp_path: Path) -> None:
    """As --save_last_n_epochs does it: the new file is saved, then an old one removed. What was changed stays, too."""
    further = {"comfyui": "{}-comfyui.safetensors", "peft": "{}-peft"}[form]
    network = made(save_also=form)
    for name in ("1", "2", "3"):
        save(network, tmp_path, name)
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "2.safetensors").unlink()
    changed = tmp_path / further.format("2")
    if form == "peft":
        (changed / "README.md").write_text("mine")
    else:
        changed.write_text("mine")
    foreign = tmp_path / further.format("0")
    foreign.mkdir() if form == "peft" else foreign.write_text("of another run")
    save(network, tmp_path, "4")
    left = {f"{n}.safetensors" for n in "34"} | {further.format(n) for n in "0234"}
    assert names(tmp_path) == left
    if form == "peft":
        assert names(changed) == {"README.md"}
    save(network, tmp_path, "4")
    assert names(tmp_path) == left


def test_a_drive_that_is_away_removes_nothing(tmp_path: Path) -> None:
    network = made()
    (tmp_path / "out").mkdir()
    save(network, tmp_path / "out", "1")
    (tmp_path / "out").rename(tmp_path / "away")
    save(network, tmp_path / "elsewhere", "2")
    (tmp_path / "away").rename(tmp_path / "out")
    assert names(tmp_path / "out") == {"1.safetensors", "1-comfyui.safetensors"}


def test_of_another_run_nothing_goes(tmp_path: Path) -> None:
    save(made(), tmp_path, "1")
    (tmp_path / "1.safetensors").unlink()
    save(made(), tmp_path, "2")
    assert "1-comfyui.safetensors" in names(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("out of memory")], ids=repr)
def test_a_second_file_that_fails_is_a_warning(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, real = made(save_also="comfyui,diffusers"), outputs.replace

    def replace(file: Path, *args: Any) -> None:
        if "comfyui" in file.name:
            raise error
        real(file, *args)

    monkeypatch.setattr(outputs, "replace", replace)
    save(network, tmp_path, "a")
    assert names(tmp_path) == {"a.safetensors", "a-diffusers.safetensors"}
    assert "a.safetensors is saved, but not a-comfyui.safetensors beside it: " in caplog.text
    monkeypatch.undo()
    save(network, tmp_path, "a")
    assert len(names(tmp_path)) == 3


def test_a_network_goes_on_from_the_first_file(tmp_path: Path) -> None:
    """Both say the same, and a trainer resumes from either: names and joins at equal scale are exact."""
    network = made("hv_1_5")
    save(network, tmp_path, "a")
    network.detach()
    for name in ("a", "a-comfyui"):
        again = create("hv_1_5", model_of("hv_1_5"))
        assert not again.load_weights(str(tmp_path / f"{name}.safetensors")).missing
        pairs = zip(network.adapted_layers, again.adapted_layers, strict=True)
        assert all(torch.equal(one.new_weight(w := one.whole_weight()), two.new_weight(w)) for one, two in pairs), name
        again.detach()


def test_the_programs_own_save(tmp_path: Path) -> None:
    network = api.apply(sd_unet().requires_grad_(False), algo="lora", dim=2, save_also="comfyui,peft")
    api.save(network, tmp_path / "a.safetensors")
    assert names(tmp_path) == {"a.safetensors", "a-comfyui.safetensors", "a-peft"}
    api.save(network, tmp_path / "b.safetensors", save_format="diffusers")
    assert next(iter(load_file(tmp_path / "b.safetensors"))).endswith("lora_A.weight")


def test_names() -> None:
    file = Path("out") / "my.model-000001.safetensors"
    assert beside(file, COMFYUI).name == "my.model-000001-comfyui.safetensors"
    assert beside(file, PEFT).name == "my.model-000001-peft"
