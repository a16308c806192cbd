"""Wan's norm2 and norm3, which diffusers calls the other way round: files whose names are swapped load onto the layer
that was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import randomise
from torch import Tensor, nn

import networks.lora_wan
from networks.files import codec, twins
from networks.files.adapter_file import Naming, open_adapter
from networks.files.checkpoint import Checkpoint
from networks.files.keys import FileKeys
from networks.files.merge import CheckpointMerge, MergeInput
from networks.hosts import key_merge

WIDTH = 32
THEIRS = {"norm2": "norm3", "norm3": "norm2"}  # in diffusers' class
ARGUMENTS = {"all": {"train_norm": "True"}, "with a weight": {"train_norm": "affine"}}
every_class = pytest.mark.parametrize("cls", ["trainer", "diffusers"])
every_choice = pytest.mark.parametrize("choice", ARGUMENTS)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)


class WanAttentionBlock(nn.Module):
    """The layers of the trainer's, under their names: only norm3 has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.self_attn = Projections()
        self.norm3 = nn.LayerNorm(WIDTH)
        self.cross_attn = Projections()
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


class WanModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WanAttentionBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Any = None) -> Tensor:
        return x


def made(cls: str) -> nn.Module:
    if cls == "trainer":
        return WanModel().requires_grad_(False)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=WIDTH, num_layers=2, cross_attn_norm=True,
    ).requires_grad_(False)  # fmt: skip


def attached(model: nn.Module, choice: str) -> Any:
    network = networks.lora_wan.create_arch_network(1.0, 4, 4, None, None, model, **ARGUMENTS[choice])
    network.apply_to(None, model, False, True)
    return network


def values(network: Any, model: nn.Module, cls: str) -> dict[str, dict[str, Tensor]]:
    """The trainer's name of each of the two layers of a block -> what is trained of it, by the module itself."""
    paths = {module: name for name, module in model.named_modules()}
    found = {}
    for row, layer in network.layers:
        head, _, last = paths[layer.base].rpartition(".")
        if row.algo == "norm" and last in THEIRS:
            name = last if cls == "trainer" else THEIRS[last]
            found[f"{head}.{name}"] = {key: p.detach().clone() for key, p in layer.adapter.named_parameters()}
    return found


def trained(cls: str, choice: str, folder: Path) -> tuple[dict[str, dict[str, Tensor]], Path, dict[str, Tensor]]:
    """What was trained, its file, and its live state."""
    model = made(cls)
    network = attached(model, choice)
    randomise(network)
    network.save_weights(str(folder / "new.safetensors"), torch.float32, {})
    return values(network, model, cls), folder / "new.safetensors", network.state_dict()


def swapped(key: str) -> str:
    for name, other in THEIRS.items():
        if f"_{name}." in key:
            return key.replace(f"_{name}.", f"_{other}.")
    return key


def old(tensors: dict[str, Tensor], cls: str) -> dict[str, Tensor]:
    """As it was written before names were right: without marks, and swapped if the class was the trainer's."""
    unmarked = {k: t for k, t in tensors.items() if not (k.endswith(".alpha") and "_norm" in k) and k != twins.NAMED}
    return {swapped(k) if cls == "trainer" else k: t for k, t in unmarked.items()}


def equal(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].keys() == tensors.keys() and all(torch.equal(found[name][k], t) for k, t in tensors.items())
        for name, tensors in wanted.items()
    )


def loaded(door: str, file: Path, cls: str, choice: str) -> dict[str, dict[str, Tensor]]:
    model = made(cls)
    if door == "from the file":
        network, _ = networks.lora_wan.create_network_from_weights(1.0, str(file), None, None, model)
        network.apply_to(None, model, False, True)
    elif door == "from tensors":
        network = networks.lora_wan.create_arch_network_from_weights(1.0, load_file(file), unet=model)
        network.apply_to(None, model, False, True)
    else:
        network = attached(model, choice)
        if door == "load_weights":
            network.load_weights(str(file))
        else:
            network.load_state_dict(load_file(file), strict=False)
    return values(network, model, cls)


DOORS = ("from the file", "from tensors", "load_weights", "load_state_dict")
every_door = pytest.mark.parametrize("door", DOORS)


@pytest.mark.sweep
@every_choice
@every_class
@pytest.mark.parametrize("onto", ["trainer", "diffusers"])
@every_door
def test_files_load_onto_the_layer_that_was_trained(
    door: str, onto: str, cls: str, choice: str, tmp_path: Path
) -> None:
    wanted, file, _ = trained(cls, choice, tmp_path)
    names = {key.partition(".")[0] for key in load_file(file) if "_norm3" in key or "_norm2" in key}
    numbers = (3,) if choice == "with a weight" else (2, 3)
    assert names == {f"lora_unet_blocks_{i}_norm{n}" for i in range(2) for n in numbers}
    marks = {key for key in load_file(file) if key.endswith(".alpha") and "_norm" in key}
    assert marks == {f"lora_unet_blocks_{i}_norm{n}.alpha" for i in range(2) for n in numbers if n == 2}
    assert {f"blocks.{i}.norm{n}" for i in range(2) for n in numbers} == wanted.keys()
    assert equal(loaded(door, file, onto, choice), wanted)


@every_choice
@every_class
@every_door
def test_old_files_do_so_on_their_class(door: str, cls: str, choice: str, tmp_path: Path) -> None:
    wanted, file, _ = trained(cls, choice, tmp_path)
    save_file(old(load_file(file), cls), tmp_path / "old.safetensors", {"networks_version": "0.1.0"})
    assert equal(loaded(door, tmp_path / "old.safetensors", cls, choice), wanted)


@every_class
@every_door
def test_old_files_of_layers_with_a_weight_do_so_on_both(door: str, cls: str, tmp_path: Path) -> None:
    wanted, file, _ = trained(cls, "with a weight", tmp_path)
    save_file(old(load_file(file), cls), tmp_path / "old.safetensors")
    other = {"trainer": "diffusers", "diffusers": "trainer"}[cls]
    assert equal(loaded(door, tmp_path / "old.safetensors", other, "with a weight"), wanted)


def test_an_old_file_that_may_be_of_either_class_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, _ = trained("trainer", "all", tmp_path)
    for tensors, count in ((load_file(file), 0), (old(load_file(file), "trainer"), 1)):
        monkeypatch.setattr(twins, "_warned", set())
        caplog.clear()
        networks.lora_wan.create_arch_network_from_weights(1.0, tensors, unet=made("trainer"))
        told = [r.getMessage() for r in caplog.records if "have each other's names in old files" in r.getMessage()]
        assert len(told) == count and all("norm3 and lora_unet_blocks_0_norm2" in text for text in told)


class Wrapper(nn.Module):
    """As torch's data-parallel ones: its walk never reaches the network's load_state_dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@every_choice
@every_class
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("age", ["new", "old"])
def test_live_states(age: str, wrapped: bool, cls: str, choice: str, tmp_path: Path) -> None:
    wanted, _, state = trained(cls, choice, tmp_path)
    state = dict(state) if age == "new" else old(state, cls)
    model = made(cls)
    network = attached(model, choice)
    if wrapped:
        Wrapper(network).load_state_dict({f"module.{key}": tensor for key, tensor in state.items()})
    else:
        network.load_state_dict(state)
    assert equal(values(network, model, cls), wanted)
    again = network.state_dict()
    assert again.keys() == trained(cls, choice, tmp_path)[2].keys()


def test_states_of_other_networks_have_no_mark() -> None:
    model = made("trainer")
    network = networks.lora_wan.create_arch_network(1.0, 4, 4, None, None, model)
    network.apply_to(None, model, False, True)
    assert twins.NAMED not in network.state_dict()
    assert twins.NAMED in attached(made("trainer"), "with a weight").state_dict()


@every_class
@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize("layout", ["trainer", "diffusers"])
def test_merging_into_a_checkpoint(layout: str, age: str, cls: str, tmp_path: Path) -> None:
    """Of either library's names."""
    wanted, file, _ = trained(cls, "with a weight", tmp_path)
    if age == "old":
        save_file(old(load_file(file), cls), file)
    base = {key: tensor for key, tensor in made(layout).state_dict().items() if key.startswith("blocks.")}
    save_file(base, tmp_path / "base.safetensors")
    checkpoint = Checkpoint(tmp_path / "base.safetensors")
    adapter = MergeInput.open(file, 1.0, checkpoint.shapes)
    CheckpointMerge(checkpoint, [adapter]).write(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for i in range(2):
        key, new = f"blocks.{i}.{'norm3' if layout == 'trainer' else 'norm2'}", wanted[f"blocks.{i}.norm3"]
        torch.testing.assert_close(merged[f"{key}.weight"], base[f"{key}.weight"] + new["w_norm"])
        torch.testing.assert_close(merged[f"{key}.bias"], base[f"{key}.bias"] + new["b_norm"])


@every_choice
@pytest.mark.parametrize("age", ["new", "old"])
def test_merging_weight_by_weight(age: str, choice: str, tmp_path: Path) -> None:
    """As a generator loads the trainer's model."""
    wanted, file, _ = trained("trainer", choice, tmp_path)
    tensors = load_file(file) if age == "new" else old(load_file(file), "trainer")
    without_bias = {key: tensor for key, tensor in tensors.items() if not key.endswith("b_norm")}
    keys, weight = set(without_bias), torch.ones(WIDTH)
    for i in range(2):
        new = key_merge.merge_weights_to_tensor(
            weight, f"lora_unet_blocks_{i}_norm3", without_bias, keys, 1.0, torch.device("cpu")
        )
        torch.testing.assert_close(new, weight + wanted[f"blocks.{i}.norm3"]["w_norm"])
    left = "norm2" if age == "new" else "norm3"
    assert {key for key in keys if "_norm2." in key or "_norm3." in key} == (
        set() if choice == "with a weight" else {key for key in without_bias if f"_{left}." in key}
    )
    layers = open_adapter(tensors, Naming(), "the file").layers
    for name, new_values in wanted.items():
        assert torch.equal(layers[f"lora_unet_{name.replace('.', '_')}"].tensors["w_norm"], new_values["w_norm"])


def test_files_of_lycoris_have_the_names_of_the_class_at_hand(tmp_path: Path) -> None:
    """It trains layers with a weight alone, and marks none."""
    w, b = torch.randn(WIDTH), torch.randn(WIDTH)
    for name in ("norm3", "norm2"):
        tensors = {f"lora_unet_blocks_0_{name}.w_norm": w, f"lora_unet_blocks_0_{name}.b_norm": b}
        layers, _ = codec.decode(tensors)
        assert layers.keys() == {"lora_unet_blocks_0_norm3"}
        save_file(tensors, tmp_path / "a.safetensors")
        for cls in ("trainer", "diffusers"):
            found = loaded("from the file", tmp_path / "a.safetensors", cls, "all")
            assert equal(found, {"blocks.0.norm3": {"w_norm": w, "b_norm": b}})


def test_other_forms_of_such_layers_keep_their_names() -> None:
    tensors = {f"lora_unet_blocks_0_norm{i}.{end}": torch.ones(WIDTH) for i in (2, 3) for end in ("diff", "diff_b")}
    assert twins.right_names({"lora_unet_blocks_0_norm2": {"diff", "diff_b"}, "x": set()}, True) == {}
    assert codec.decode(tensors)[0].keys() == {f"lora_unet_blocks_0_norm{i}" for i in (2, 3)}


@pytest.mark.parametrize("names", [["norm2"], ["norm2", "norm3"]], ids=" and ".join)
def test_tools_that_keep_a_files_names_keep_swapped_ones(names: list[str]) -> None:
    """Whether a layer changes or stays, it is written where the file has it, and once."""
    tensors = {f"lora_unet_blocks_0_{name}.w_norm": torch.randn(WIDTH) for name in names} | {"step": torch.ones(1)}
    file = open_adapter(tensors, Naming())
    keys = FileKeys(file)
    for factor in (1.0, 2.0):
        found = keys.rest()
        for saved in file.layers.values():
            changed = replace(saved, tensors={key: factor * t for key, t in saved.tensors.items()})
            written = keys.of(saved if factor == 1 else changed)
            assert not written.keys() & found.keys()
            found |= written
        assert found.keys() == tensors.keys() and torch.equal(found["step"], tensors["step"])
        for key in tensors.keys() - {"step"}:
            assert torch.equal(found[key], factor * tensors[key]), key
