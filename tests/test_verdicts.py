"""What the models of other programs say of a file is told: at the plan, at creation, at each save and by show. The
programs here are small ones of the tests."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import readers_table
import torch
from registry import ALGORITHMS
from registry_archs import RELEASED, SPECS, release_of
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_parts import randomise, sd_unet, text_encoder
from toy_models import toy

import networks.lora
from networks.cli import plan as plan_script
from networks.cli import show as script
from networks.files import verdicts
from networks.files.adapter_file import FileTensors, Naming
from networks.files.explain import contradictions
from networks.files.readers import Fate, Given, Reading
from networks.models.adapters import given_of, model_of
from networks.models.skeleton import skeleton
from networks.plan import forecast


class Program:
    """Knows Stable Diffusion 1.x; `fate` says what becomes of a layer of a file."""

    unasked = True

    def __init__(self, name: str, fate: Callable[[Given, str], Fate], order: int = 1, refused: str = "") -> None:
        self.name, self.title, self.order, self.fate, self.refused = name, f"{name} 1.0", order, fate, refused
        self.seen: list[Given] = []

    def read(self, given: Given) -> Reading | None:
        self.seen.append(given)
        if given.arch.name != "sd":
            return None
        return Reading({name: self.fate(given, name) for name in given.meant}, self.refused)


def all_of_it(given: Given, name: str) -> Fate:
    return Fate()


def no_to_q(given: Given, name: str) -> Fate:
    return Fate(False, "it knows no such name") if name.endswith("to_q") else Fate()


def doubtful(given: Given, name: str) -> Fate:
    """DoRA of which an error is known with the base weight alone."""
    if given.meant[name].magnitude is None or given.meant[name].folded:
        return Fate()
    errors = (None, None) if given.base is None else (float(given.base(name).norm() > 0), 0.5)
    return Fate(True, "another norm", errors)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Program]]:
    def use(*chosen: Program) -> list[Program]:
        monkeypatch.setattr(verdicts, "READERS", tuple(sorted(chosen, key=lambda one: one.order)))
        return [*chosen]

    return use


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# -- what a program is given before anything is trained is the file


@pytest.mark.sweep
@pytest.mark.parametrize("save_format", ["portable", "comfyui", "diffusers", "blissful"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_forecast_is_of_the_file(algo: str, save_format: str, tmp_path: Path) -> None:
    unet = sd_unet()
    arguments = {"algo": algo, "conv_dim": "4", "save_format": save_format}
    arguments |= {"use_dora": "True"} if save_format != "portable" and algo == "lora" else {}
    arguments |= {"conv_dim": "0"} if save_format == "blissful" else {}
    try:
        network = networks.lora.create_network(
            1.0, max(4, ALGORITHMS[algo].least_dim), 2, None, None, unet, **arguments
        )
    except ValueError as error:
        assert "save_format" in str(error) or "conv_dim" in str(error)  # such files do not exist
        return
    network.apply_to(None, unet, False, True)
    randomise(network)
    try:
        network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    except ValueError as error:
        assert "that program reads no other form" in str(error)  # nor do such, of layers as small as these
        return
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        real = {key: file.get_tensor(key) for key in file.keys()}
    given = forecast.given_of(network.plan, network.file_format)
    assert {key: t.shape for key, t in given.tensors.items()} == {key: t.shape for key, t in real.items()}
    for key, tensor in given.tensors.items():
        assert tensor.is_meta or torch.equal(tensor, real[key]), key
        if key.endswith(".alpha"):
            assert not tensor.is_meta, key
    assert len(given.meant) and all(any(key.startswith(f"{name}.") for key in real) for name in given.meant)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("arch", RELEASED)
def test_a_forecast_has_all_layers_of_the_model(arch: str) -> None:
    model = skeleton(release_of(arch))
    plan = networks.lora.plan(4, 1, model.text_encoders, model.unet)
    given = forecast.given_of(plan, plan.file_format)
    assert given.meant.keys() == {row.saved_name for row in plan.trained}
    assert sum(map(len, given.shapes.values())) == len(plan.rows)
    row = plan.trained[-1]
    assert given.shapes[row.part][row.trainer_name] == row.shape


# -- where it is told


def test_the_plan_tells_who_does_not_read_it_all(programs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    programs(
        Program("second", no_to_q, 2), Program("first", all_of_it, 1), Program("third", all_of_it, 3, "no such file"),
    )  # fmt: skip
    plan = networks.lora.plan(4, 1, None, sd_unet())
    count = len(plan.trained)
    without = sum(row.saved_name.endswith("to_q") for row in plan.trained)
    second, third = plan.readers()
    assert second.startswith(f"second 1.0: {count - without}/{count} layers; {without} not loaded (it knows no such")
    assert third == "third 1.0 refuses the file: no such file"
    assert plan_script.main(["sd15", "--readers", "--trained"]) == 0
    assert "second 1.0: " in (text := capsys.readouterr().out) and text.endswith(f"{third}\n")
    assert plan_script.main(["sd15", "--readers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["readers"][1] == third
    assert networks.lora.plan(4, 1, None, toy("flux")["dit"]).readers() == []  # they do not know it


def test_what_helps_is_told(programs: Any) -> None:
    programs(Program("comfyui", doubtful), Program("another", doubtful, 2))
    mine, other = networks.lora.plan(4, 1, None, sd_unet(), use_dora="True").readers()
    count = len(networks.lora.plan(4, 1, None, sd_unet()).trained)
    assert f"{count} not exact (another norm)" in mine and mine.endswith(
        f"; save_format=comfyui gives {count}/{count} layers"
    )
    assert "save_format" not in other
    assert not networks.lora.plan(4, 1, None, sd_unet(), use_dora="True", save_format="comfyui").readers()


def test_creation_and_each_save(programs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mine, _, _) = programs(
        Program("first", all_of_it), Program("second", no_to_q, 2), Program("third", all_of_it, 3, "no such file")
    )
    unet = sd_unet()
    with caplog.at_level(logging.INFO, "networks"):
        network = networks.lora.create_network(1.0, 4, 1, None, [text_encoder()], unet)
        network.apply_to(None, unet, False, True)
    assert sum(text.startswith("second 1.0: ") for text in messages(caplog)) == 1
    assert not any(text.startswith("first 1.0") for text in messages(caplog))
    count = len(network.plan.trained)
    without = sum(row.saved_name.endswith("to_q") for row in network.plan.trained)
    caplog.clear()
    seen = len(mine.seen)
    with caplog.at_level(logging.INFO, "networks"):
        for name in ("a", "b"):
            network.save_weights(str(tmp_path / f"{name}.safetensors"), torch.float16, {})
    lines = [text for text in messages(caplog) if "first 1.0" in text]
    own = f"first 1.0: {count}/{count} layers; second 1.0: {count - without}/{count} layers; third 1.0: refused"
    assert lines == [f"a.safetensors: {own}", f"b.safetensors: {own}"]
    assert len(mine.seen) == seen  # what was foreseen when the network was applied is the same for each save
    assert all(t.is_meta or t.numel() <= 1 for t in mine.seen[-1].tensors.values())  # no value was read


def test_generation_is_not_told(programs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    networks.lora.create_network(1.0, 4, 1, None, None, unet).save_weights(str(tmp_path / "a.safetensors"), None, {})
    programs(Program("second", no_to_q))
    with caplog.at_level(logging.INFO, "networks"):
        file = str(tmp_path / "a.safetensors")
        networks.lora.create_network_from_weights(1.0, file, None, None, unet, for_inference=True)
    assert not any(text.startswith("second") for text in messages(caplog))


def test_show(programs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a checkpoint, the errors that depend on its weights, too."""
    path = saved(tmp_path, "sd15", use_dora="True")
    programs(Program("mine", doubtful), Program("other", all_of_it, 2), Program("third", all_of_it, 3, "no such file"))
    assert script.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "read by, on Stable Diffusion 1.5" in text and "other 1.0: 8/8 layers, exactly" in text
    assert "mine 1.0: 8/8 layers; 8 not exact (another norm), e.g. lora_unet_" in text and "error of the up" not in text
    assert "third 1.0 refuses the file: no such file" in text
    assert script.main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["readers"][0]
    assert found["layers"] == 8 and found["errors"] == {"1.0": None, "0.7": None} and len(found["not_exact"]) == 8
    model = skeleton("sd15").unet
    weights = {
        key: torch.ones(p.shape, dtype=torch.float16) if "attn2.to_k" in key else torch.zeros(1).expand(p.shape).half()
        for key, p in model.named_parameters()
    }
    save_file({key: t.contiguous() for key, t in weights.items()}, tmp_path / "model.safetensors")
    assert script.main([str(path), "--model", str(tmp_path / "model.safetensors")]) == 0
    assert "error of the update up to 1 at strength 1 and 0.5 at strength 0.7" in capsys.readouterr().out


def test_show_without_a_model(programs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs(Program("mine", all_of_it))
    pair = {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
    save_file(pair, tmp_path / "x.safetensors")
    assert script.main([str(tmp_path / "x.safetensors")]) == 0
    assert "not known" in (text := capsys.readouterr().out) and "--model" in text and "mine" not in text


@pytest.mark.parametrize("release", ["sd15", "sdxl", "flux", "wan_t2v_1_3b", "zimage", "qwen_image"])
def test_the_model_of_a_file(release: str, tmp_path: Path) -> None:
    file = FileTensors(saved(tmp_path, release, 150))  # of Mage-Flow, too, are up to 144 of Qwen-Image
    model = model_of(file)
    assert model.title == skeleton(release).title
    given = given_of(file, model)
    assert given.meant.keys() == {key.rpartition(".lora_down")[0] for key in file if "lora_down" in key}


def saved(folder: Path, release: str, count: int = 8, **arguments: str) -> Path:
    """A file of the first layers of a released model."""
    model = skeleton(release)
    plan = networks.lora.plan(4, 1, None, model.unet, **arguments)
    given = forecast.given_of(plan, plan.file_format)
    names = tuple(f"{name}." for name in [*given.meant][:count])
    kept = {key: t for key, t in given.tensors.items() if key.startswith(names)}
    path = folder / f"{release}.safetensors"
    save_file({key: torch.ones(t.shape) if t.is_meta else t for key, t in kept.items()}, path)
    return path


def test_a_model_that_fails_ends_no_training(programs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(given: Given, name: str) -> Fate:
        raise RuntimeError("cannot be called on meta tensors")

    programs(Program("broken", fails), Program("other", no_to_q, 2))
    with caplog.at_level(logging.INFO, "networks"):
        network = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet())
        network.apply_to(None, None, False, True)
        network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert "broken 1.0: not known (RuntimeError: cannot be called on meta tensors); please report it" in messages(
        caplog
    )
    assert any(text.startswith("a.safetensors: broken 1.0: not known; other 1.0: ") for text in messages(caplog))


# -- the table of the documentation


def test_the_table_counts_all_layers(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are like others, and are not looked at."""
    programs(Program("mine", no_to_q), Program("other", doubtful, 2), Program("third", all_of_it, 3, "no such file"))
    monkeypatch.setattr(readers_table, "ARCHS", (SPECS["sd"], SPECS["wan"]))
    readers_table.cells.cache_clear()
    found = readers_table.cells()
    model = skeleton("sd15")
    trained = networks.lora.plan(4, 1, model.text_encoders, model.unet).trained
    left = sum(not row.saved_name.endswith("to_q") for row in trained)
    arch = SPECS["sd"].title
    assert found["mine 1.0"].keys() == {arch}
    assert all(
        str(cell) == f"{left}/{len(trained)}, it knows no such name" for cell in found["mine 1.0"][arch].values()
    )
    assert str(found["other 1.0"][arch]["DoRA"]) == f"{len(trained)}/{len(trained)}, another norm"
    assert str(found["other 1.0"][arch]["LoKr"]) == f"{len(trained)}/{len(trained)} exact"
    assert str(found["third 1.0"][arch]["IA3"]) == "refused: no such file"
    lines = readers_table.worst().splitlines()
    assert lines[2] == f"| mine 1.0 |{f' layers lost on {arch} {left}/{len(trained)} |' * 3}"
    assert lines[3] == "| other 1.0 | all, exactly | not exact | all, exactly |"
    assert f"| {arch} | {left}/{len(trained)}, it knows" in readers_table.document()
    readers_table.cells.cache_clear()


# -- metadata that contradict the tensors


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ""),
        ({"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0"}, ""),
        ({"ss_network_module": "networks.lora", "ss_network_dim": "2"}, ""),  # stacked
        ({"ss_network_module": "networks.lokr"}, "say it was trained as lokr, and its tensors are those of lora"),
        ({"ss_network_args": '{"algo": "loha"}'}, "trained as loha"),
        ({"ss_network_args": '{"algo": "dylora"}'}, ""),
        ({"ss_network_args": '{"use_dora": "True"}'}, "use_dora, and it has no magnitudes"),
        ({"ss_network_args": '{"dora_wd": "False"}'}, ""),
        ({"ss_network_dim": "16"}, "network_dim=16, and its layers have 4"),
        ({"ss_network_dim": "4", "ss_network_alpha": "4"}, "a strength of 1, and its tensors have 0.5, which counts"),
        ({"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic", "ss_network_args": "[1]"}, ""),
    ],
)
def test_contradictions(metadata: dict[str, str], words: str) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
    file = FileTensors({**tensors, "lora_unet_x.alpha": torch.tensor(2.0)})
    found = contradictions(file.opened(Naming()).layers.values(), metadata)
    assert len(found) == bool(words) and words in " ".join(found)
