"""What earlier versions wrote acts as it did then: adapter files, live states, training states.

tests/golden/make.py says what there is, which version made it and how. Saved values are compared bit for bit where a
file holds the parameters themselves. Updates, next steps and what is computed at a save follow the machine's BLAS and
LAPACK in their last bits, and are compared relative to the largest value of their tensor. Measured with torch 2.13 and
2.5, with and without the wide instructions of the CPU: updates, outputs and next steps within 3e-7 (6e-7 of a PiSSA
file, whose factors are rounded at the save), adapters of resumed runs within 8e-6.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import replay
from golden.replay import Case
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from kohya_trainer import train as trainer
from networks.cli import merge as merge_script

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[1]
UPDATE = 1e-6
STEP = 1e-5
RESUMED = 5e-5
# What was wrong in these files, `file` or `file-case`: later versions write them otherwise and read them by what they
# mean. Such cases have tests of their own for merging and saving.
MENDED = {
    "wan": "0.1.0 saves norm2 and norm3 of the trainer's class under each other's names",
    "diag-oft-input": "0.1.0 saves the whole Cayley transform under a key at which all other programs read its series",
}
# Saved values that are results of arithmetic: lengths and factors may be kept as their difference from the start.
COMPUTED = ("dora_scale", "dora_layer.weight", "lora_magnitude_vector.weight", "rescale")


@functools.cache
def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@functools.cache
def archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class Golden:
    """One case of a folder."""

    folder: Path
    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.folder.name}-{self.file}-{self.name}"

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / f"{self.file}.json")["cases"][self.name]
        return found

    @property
    def case(self) -> Case:
        return Case(**self.said["call"])

    @property
    def mended(self) -> bool:
        return any(f"{self.file}-{self.name}".startswith(name) for name in MENDED)

    @property
    def tolerance(self) -> float:
        return 0.0 if self.case.exact else UPDATE

    def models(self, model: str = "") -> replay.Models:
        models = replay.build(read_json(self.folder / "models.json")[model or self.case.model])
        assert model or replay.digest(models) == self.said["base"], "not the base weights that it was trained on"
        return models

    def data(self, member: str) -> bytes:
        return archive(self.folder / f"{self.file}.zip").read(f"{self.name}/{member}")

    def tensors(self, member: str) -> dict[str, Tensor]:
        return load(self.data(member))

    def unpack(self, member: str, folder: Path) -> Path:
        path = folder / member
        path.write_bytes(self.data(member))
        return path


def all_cases() -> list[Golden]:
    files = [path for path in sorted(GOLDEN.glob("*/*.json")) if path.stem not in ("models", "states")]
    return [Golden(path.parent, path.stem, name) for path in files for name in read_json(path)["cases"]]


def test_all_that_the_first_version_had_is_here() -> None:
    """A case that is lost would fail nowhere."""
    first = [golden for golden in all_cases() if golden.folder.name == "5cb7757"]
    algorithms = "lora loha lokr dylora lora_fa glora tlora full norm diag-oft boft ia3".split()
    assert {golden.file for golden in first} == {*algorithms, "wan", "archs"} and len(first) == 226
    formats = {golden.case.args.get("save_format", "") for golden in first}
    assert formats == {"", "blissful", "comfyui", "diffusers", "oft", "oft_flux"}
    assert {golden.name for golden in all_states()} == {"lora", "dora", "boft", "lokr_text"}


every_case = pytest.mark.parametrize("golden", all_cases(), ids=str)


def assert_near(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """No value differs by more than so much of the largest of its tensor; a tensor that is not there is 0."""
    for key in sorted(found.keys() | wanted.keys()):
        want, got = wanted.get(key, torch.zeros(())), found.get(key, torch.zeros(()))
        error, largest = float((got.double() - want.double()).abs().max()), float(want.abs().max())
        assert error <= tolerance * largest, f"{what}, {key}: {error:.3g} off, the largest is {largest:.3g}"


@pytest.mark.sweep(2)
@every_case
def test_a_file_acts_as_it_did(golden: Golden, tmp_path: Path) -> None:
    """Merged by the functions for that, and applied by a new network of the same call."""
    case, models = golden.case, golden.models()
    before = replay.weights({part: model.double() for part, model in models.items()})
    update = golden.tensors("update.safetensors")
    for name in () if case.unmerged or golden.mended else golden.said["keys"]:
        replay.merge_file(case, models, golden.unpack(name, tmp_path), tmp_path)
        wanted = golden.tensors(name.replace("adapter", "update"))
        assert_near(f"{name} merged", replay.changes(before, replay.weights(models)), wanted, golden.tolerance)
        replay.set_weights(models, before)
    replay.set_weights(models, before, update)
    outputs = {key: y + update.get(key, 0.0) for key, y in replay.outputs(models).items()}
    replay.set_weights(models, before)
    network = replay.create(case, models, tmp_path, for_file=True)
    report = network.load_weights(str(golden.unpack("adapter.safetensors", tmp_path)))
    assert not report.missing and not report.unexpected
    network.eval()
    assert_near("applied", replay.outputs(models), outputs, UPDATE)


@pytest.mark.sweep(2)
@every_case
def test_a_live_state_goes_on_as_it_did(golden: Golden, tmp_path: Path) -> None:
    """It saves the same file, bit for bit where that holds the parameters themselves, and takes the same next step."""
    case, models, said = golden.case, golden.models(), golden.said
    network = replay.create(case, models, tmp_path)
    optimizer = replay.make_optimizer(case, network)
    network.load_state_dict(golden.tensors("live.safetensors"))
    optimizer.load_state_dict(replay.optimizer_state(golden.tensors("optimizer.safetensors"), said["groups"]))
    files = replay.save(case, network, tmp_path / "saved")
    files = {name: path for name, path in files.items() if not name.endswith("-comfyui.safetensors")}  # of save_also
    assert files.keys() == said["keys"].keys()
    for name, path in () if golden.mended else files.items():
        assert_same_file(case, load_file(path), golden.tensors(name), said["keys"][name])
    update = replay.updates(case, models, network)
    assert_near("state", update, golden.tensors("update.safetensors"), golden.tolerance)
    assert replay.step(case, models, network, optimizer) == pytest.approx(said["loss"], rel=STEP)
    assert_near("next step", replay.updates(case, models, network), golden.tensors("next.safetensors"), STEP)


def assert_same_file(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor], keys: list[str]) -> None:
    assert sorted(found) == sorted(wanted) == keys
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (t.shape, t.dtype) for k, t in wanted.items()}
    if case.product:
        found, wanted = products(found), products(wanted)
    for key, tensor in wanted.items():
        near = key.endswith((*COMPUTED, *case.computed, *(("lora_up.weight",) if case.product else ())))
        assert_near("saved", {key: found[key]}, {key: tensor}, case.saved if near else 0.0)


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The update of every LoRA in place of its factors."""
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        up, down = found.pop(key), found.pop(key.replace("lora_up", "lora_down"))
        found[key] = up.double().flatten(1) @ down.double().flatten(1)
    return found


# -- training states


def all_states() -> list[Golden]:
    files = sorted(GOLDEN.glob("*/states.json"))
    return [Golden(path.parent, path.stem, name) for path in files for name in read_json(path)["cases"]]


@pytest.mark.parametrize("golden", all_states(), ids=str)
def test_a_training_state_folder_goes_on_as_it_did(golden: Golden, tmp_path: Path) -> None:
    """The run whose third step it keeps had two more: the same losses, learning rates and adapter."""
    with zipfile.ZipFile(golden.folder / f"{golden.file}.zip") as whole:
        for member in whole.namelist():
            if member.startswith(f"{golden.name}/state/"):
                whole.extract(member, tmp_path)
    replay.draw_images(tmp_path / "images")
    arguments = [*replay.run_arguments(ROOT, tmp_path), *golden.said["options"]]
    assert trainer.main([*arguments, f"--resume={tmp_path / golden.name / 'state'}", "--debug"]) == 0
    rows = (tmp_path / "out" / "adapter-loss.csv").read_text(encoding="utf-8").splitlines()[1:]
    found, wanted = ([list(filter(None, row.split(","))) for row in one] for one in (rows, golden.said["rows"]))
    assert len(found) == len(wanted) == 2
    for got, want in zip(found, wanted, strict=True):
        assert [float(value) for value in got] == pytest.approx([float(value) for value in want], rel=STEP)
    adapter = load_file(tmp_path / "out" / "adapter.safetensors")
    assert sorted(adapter) == golden.said["keys"]["adapter.safetensors"]
    assert_near("resumed", adapter, golden.tensors("adapter.safetensors"), RESUMED)


# -- Wan's norms, which 0.1.0 saved under each other's names on the trainer's class

# Layers of the trainer's class -> of diffusers'. norm3 there and norm2 here are the one norm with a weight.
WAN_LAYERS = {
    "blocks.0.norm3": "blocks.0.norm2",
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.norm_q": "blocks.0.attn1.norm_q",
    "blocks.0.cross_attn.norm_k": "blocks.0.attn2.norm_k",
}
WAN_KEYS = {
    "lora_unet_blocks_0_norm3.w_norm",
    "lora_unet_blocks_0_norm3.b_norm",
    "lora_unet_blocks_0_self_attn_norm_q.w_norm",
    "lora_unet_blocks_0_cross_attn_norm_k.w_norm",
    "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "lora_unet_blocks_0_self_attn_q.lora_up.weight",
    "lora_unet_blocks_0_self_attn_q.alpha",
}
# The alpha marks the norm without a weight, whose name old files have for the one with a weight (see Twins).
WAN_BARE_KEYS = {f"lora_unet_blocks_0_norm{n}.{kind}_norm" for n in (1, 2) for kind in "wb"} | {
    "lora_unet_blocks_0_norm2.alpha"
}
# case -> norm in its file -> the trainer's norm that was trained
TRAINED = {"affine": {"norm2": "norm3"}, "all": {"norm2": "norm3", "norm3": "norm2"}}


def wan(name: str) -> Golden:
    return Golden(GOLDEN / "5cb7757", "wan", name)


def on_class(model: str, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes under the names of one class, "wan" or "wan_diffusers", for those of the other."""
    names = {theirs: own for own, theirs in WAN_LAYERS.items()} if model == "wan" else WAN_LAYERS
    found = {}
    for key, tensor in changes.items():
        part, _, dotted = key.partition(" ")
        layer, _, parameter = dotted.rpartition(".")
        found[f"{part} {names[layer]}.{parameter}"] = tensor
    return found


@pytest.mark.parametrize("model", ["wan", "wan_diffusers"])
@pytest.mark.parametrize("name", ["affine", "diffusers_affine"])
def test_wan_norms_with_swapped_names(name: str, model: str, tmp_path: Path) -> None:
    """At every door and on both classes, a file of 0.1.0 acts on the norm that was trained, whatever name it has
    there. Only one norm of a block has a weight, so a file of norms with weights says which it must be."""
    golden = wan(name)
    case, update = golden.case, golden.tensors("update.safetensors")
    update = update if model == case.model else on_class(model, update)
    models, file = golden.models(model), golden.unpack("adapter.safetensors", tmp_path)
    before = replay.weights({part: model.double() for part, model in models.items()})
    replay.merge_file(case, models, file, tmp_path)
    assert_near("merged", replay.changes(before, replay.weights(models)), update, UPDATE)
    replay.set_weights(models, before, update)
    outputs = replay.outputs(models)
    replay.set_weights(models, before)
    network = replay.create(case, models, tmp_path)
    report = network.load_weights(str(file))
    assert not report.missing and not report.unexpected
    network.eval()
    assert_near("applied", replay.outputs(models), outputs, UPDATE)
    checkpoint = {key.partition(" ")[2]: weight.contiguous() for key, weight in before.items()}
    save_file(checkpoint, tmp_path / "model.safetensors")
    assert (
        merge_script.main([str(tmp_path / "model.safetensors"), str(file), f"--out={tmp_path / 'm.safetensors'}"]) == 0
    )
    merged = {f"dit {key}": weight for key, weight in load_file(tmp_path / "m.safetensors").items()}
    assert_near("merged into a checkpoint", replay.changes(before, merged), update, UPDATE)


@pytest.mark.parametrize("name", ["affine", "all", "diffusers_affine", "diffusers_all"])
def test_wan_norms_are_saved_under_the_trainers_names(name: str, tmp_path: Path) -> None:
    """By a live state of 0.1.0, too."""
    golden = wan(name)
    network = replay.create(golden.case, golden.models(), tmp_path)
    network.load_state_dict(golden.tensors("live.safetensors"))
    found = load_file(replay.save(golden.case, network, tmp_path / "saved")["adapter.safetensors"])
    assert found.keys() == WAN_KEYS | (WAN_BARE_KEYS if name.endswith("all") else set())
    for key, tensor in golden.tensors("adapter.safetensors").items():
        layer, _, suffix = key.partition(".")
        norm = layer.rpartition("_")[2]
        own = layer.removesuffix(norm) + TRAINED.get(name, {}).get(norm, norm)
        assert torch.equal(found[f"{own}.{suffix}"], tensor), key
