"""Files of a lower dim: by the tool, at save, and read by the trainer's formula alpha / rank."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from tiny_parts import draw, randomise, sd_unet
from toy_models import signal, toy

import networks.dylora
import networks.lora
import networks.lora_flux
from networks.files import reader
from networks.files.codec import decode
from networks.tools.ranks import RankRule
from networks.tools.resize import resize

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resize_script", ROOT / "scripts" / "resize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(path: Path, entry: ModuleType = networks.dylora, dim: int = 8, **arguments: str) -> torch.nn.Module:
    torch.manual_seed(0)
    unet = sd_unet()
    network = entry.create_network(1.0, dim, 3, None, None, unet, **arguments)
    network.apply_to(None, unet, False, True)
    randomise(network)
    network.save_weights(str(path), None, {"ss_network_module": entry.__name__, "ss_network_dim": str(dim)})
    return network


def updates(path: Path) -> dict[str, torch.Tensor]:
    """alpha / rank * up . down of every layer, dense, in float64."""
    found = {}
    for name, saved in decode(reader.read_tensors(path)[0])[0].items():
        down, up = (saved.tensors[f"lora_{part}.weight"].double().flatten(1) for part in ("down", "up"))
        assert saved.alpha is not None
        found[name] = saved.alpha / len(down) * up @ down
    return found


@pytest.mark.parametrize("rs_lora", ("False", "True"))
def test_dylora_acts_as_it_was_trained_at_that_dim(tool: ModuleType, tmp_path: Path, rs_lora: str) -> None:
    path = tmp_path / "a.safetensors"
    network = trained(path, unit="2", rs_lora=rs_lora)
    assert tool.main([str(path), "--dims", "4,2"]) == 0
    for dim in (2, 4):
        small = tmp_path / f"a-{dim:04d}.safetensors"
        found = updates(small)
        assert reader.read_header(small).metadata["ss_network_dim"] == str(dim)
        for layer in network.adapted_layers:
            down, up = layer.adapter.down.double().flatten(1)[:dim], layer.adapter.up.double().flatten(1)[:, :dim]
            expected = layer.scale * 8 / dim * up @ down
            torch.testing.assert_close(found[layer.lora_name], expected, atol=1e-6, rtol=1e-6)


def test_save_dims_writes_what_the_tool_writes(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    trained(path, save_dims="4")
    at_save = (tmp_path / "a-0004.safetensors").read_bytes()
    assert tool.main([str(path), "--dims", "4", "--out_dir", str(tmp_path / "b")]) == 0
    by_tool = tmp_path / "b" / "a-0004.safetensors"
    ours, theirs = (reader.read_tensors(f)[0] for f in (tmp_path / "a-0004.safetensors", by_tool))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(at_save) < path.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_dims": "8"}, "8 cuts nothing, the largest dim is 8"),
        ({"save_dims": "0"}, "too small"),
        ({"save_dims": "4", "algo": "lora"}, "save_dims=\\(4,\\) has no effect with algo=lora"),
    ],
)
def test_save_dims_without_effect_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.dylora.create_network(1.0, 8, 1, None, None, sd_unet(), **arguments)


def test_save_dims_wants_nested_ranks_everywhere(tmp_path: Path) -> None:
    preset = tmp_path / "mixed.toml"
    preset.write_text('unet_target_module = ["Transformer2DModel"]\n[module_algo_map.Attention]\nalgo = "loha"\n')
    with pytest.raises(ValueError, match="the ranks of loha do not stand alone"):
        networks.dylora.create_network(1.0, 8, 1, None, None, sd_unet(), save_dims="4", preset=str(preset))


def test_a_cut_file_loads_and_draws(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    network = trained(path)
    tool.main([str(path), "--dims", "2"])
    unet = sd_unet()
    cut, _ = networks.lora.create_network_from_weights(1.0, str(tmp_path / "a-0002.safetensors"), None, None, unet)
    cut.apply_to(None, unet, False, True)
    drawn = draw(unet)
    for layer in network.adapted_layers:  # the same ranks by hand
        with torch.no_grad():
            layer.adapter.up[:, 2:] = 0
            layer.adapter.up[:, :2] *= 4
    unet = sd_unet()
    again = networks.lora.create_network(1.0, 8, 3, None, None, unet)
    again.apply_to(None, unet, False, True)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(draw(unet), drawn, atol=1e-5, rtol=1e-5)


def test_stacks_keep_the_first_ranks_of_every_part(tmp_path: Path) -> None:
    model = toy("flux")["dit"]
    network = networks.lora_flux.create_network(1.0, 4, 2, None, [None, None], model, algo="dylora", split_qkv="True")
    network.apply_to([None, None], model, False, True)
    randomise(network)
    whole = {name: tensor.clone() for name, tensor in encoded(network).items()}
    save_file(whole, tmp_path / "a.safetensors")
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rule=RankRule(1), way="first")
    cut = reader.read_tensors(tmp_path / "b.safetensors")[0]
    split = [name for name in decode(whole)[0] if "qkv" in name][0]
    assert whole[f"{split}.lora_down.weight"].shape[0] == 12 and cut[f"{split}.lora_down.weight"].shape[0] == 3
    kept = [0, 4, 8]
    assert torch.equal(cut[f"{split}.lora_down.weight"], whole[f"{split}.lora_down.weight"][kept])
    assert torch.equal(cut[f"{split}.lora_up.weight"], whole[f"{split}.lora_up.weight"][:, kept])
    assert torch.equal(cut[f"{split}.alpha"], whole[f"{split}.alpha"])
    for layer in network.adapted_layers:
        with torch.no_grad():
            for name, p in layer.adapter.named_parameters():
                if name.endswith("up"):
                    p[:, 1:] = 0
                    p *= 4
    network.eval()
    plain = model(signal())
    network.detach()
    other = networks.lora_flux.create_network(1.0, 1, 2, None, [None, None], model, split_qkv="True")
    other.apply_to([None, None], model, False, True)
    other.load_state_dict(cut)
    torch.testing.assert_close(model(signal()), plain, atol=1e-5, rtol=1e-5)


def encoded(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    from networks.files import codec

    return codec.encode(network.adapted_layers, network.file_format)


def test_nearest_is_the_best_of_its_rank_at_the_same_strength(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    trained(path, networks.lora, conv_dim="8", use_tucker="True")
    assert tool.main([str(path), "--dims", "3"]) == 0
    whole, small = updates_of_all_forms(path), updates(tmp_path / "a-0003.safetensors")
    lost = total = 0.0
    for name, update in whole.items():
        s = torch.linalg.svdvals(update)
        error = torch.linalg.matrix_norm(small[name] - update)
        torch.testing.assert_close(error, s[3:].square().sum().sqrt(), atol=1e-5, rtol=1e-4)
        lost, total = lost + float(error) ** 2, total + float(s.square().sum())
    assert f"error {(lost / total) ** 0.5:.2%} of the whole update" in capsys.readouterr().out


def updates_of_all_forms(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, saved in decode(reader.read_tensors(path)[0])[0].items():
        down, up = (saved.tensors[f"lora_{part}.weight"].double() for part in ("down", "up"))
        mid = saved.tensors.get("lora_mid.weight")
        if mid is None:
            delta = up.flatten(1) @ down.flatten(1)
        else:
            delta = torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid.double(), down.flatten(1)).flatten(1)
        assert saved.alpha is not None
        found[name] = saved.alpha / len(down) * delta
    return found


def test_what_cannot_be_cut_says_so(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    trained(path, networks.lora, algo="ia3")
    assert tool.main([str(path), "--dims", "2"]) == 2
    assert "its layers (ia3) have no ranks: kohya-networks convert" in capsys.readouterr().err
    trained(path, networks.lora)
    assert tool.main([str(path), "--dims", "8"]) == 2
    assert "no layer has more than 8 ranks" in capsys.readouterr().err
    assert tool.main([str(path), "--dims", "4", "--way", "first"]) == 0
    assert "does not say that DyLoRA trained it" in capsys.readouterr().out
    assert tool.main([str(path), "--dims", "four"]) == 2
    assert "write 4,8,16" in capsys.readouterr().err
