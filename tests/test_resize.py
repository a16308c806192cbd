"""Files of a lower dim: by the tool, at save, and read by the trainer's formula alpha / rank."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def factors(path: str, O: int = 24, J: int = 16, R: int = 8) -> dict[str, torch.Tensor]:
    """Of a layer whose singular values fall off, under PEFT's names."""
    falling = 0.6 ** torch.arange(R)
    return {f"{path}.lora_A.weight": falling[:, None] * torch.randn(R, J), f"{path}.lora_B.weight": torch.randn(O, R)}


RULES = [  # with how many of these singular values stay, by a loop over them
    (RankRule(3), lambda s: 3),
    (RankRule(None, "energy", 0.9), lambda s: fewest(s**2, 0.9)),
    (RankRule(None, "sv_fro", 0.9), lambda s: fewest(s**2, 0.81)),
    (RankRule(None, "sv_cumulative", 0.8), lambda s: fewest(s, 0.8)),
    (RankRule(2, "sv_ratio", 5.0), lambda s: min(2, sum(value >= s[0] / 5 for value in s))),
]


def fewest(values: torch.Tensor, share: float) -> int:
    return next(n for n in range(1, len(values) + 1) if float(values[:n].sum()) >= share * float(values.sum()))


@pytest.mark.parametrize(("rule", "kept"), RULES, ids=lambda value: str(value) if isinstance(value, RankRule) else "")
def test_names_way_and_precision_stay(rule: RankRule, kept: Callable[[torch.Tensor], int], tmp_path: Path) -> None:
    torch.manual_seed(3)
    paths = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k")
    tensors = {key: t.bfloat16() for path in paths for key, t in factors(path).items()}
    tensors[f"{paths[0]}.lora_magnitude_vector"] = torch.rand(24) + 1
    tensors["transformer.transformer_blocks.0.attn.norm_q.diff"] = torch.randn(8)
    tensors["step"] = torch.tensor(7)
    save_file(tensors, tmp_path / "a.safetensors", {"other": "stays"})
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rule=rule)
    found, metadata = load_file(tmp_path / "b.safetensors"), reader.read_header(tmp_path / "b.safetensors").metadata
    assert found.keys() == tensors.keys() and metadata["other"] == "stays" and "resize" in metadata["networks_history"]
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in tensors.items()}
    for key in tensors.keys() - {key for key in tensors if ".lora_A." in key or ".lora_B." in key}:
        assert torch.equal(found[key], tensors[key]), key
    errors = {row.name: row.error for row in report.rows}
    for path in paths:
        old, new = (t[f"{path}.lora_B.weight"].double() @ t[f"{path}.lora_A.weight"].double() for t in (tensors, found))
        s = torch.linalg.svdvals(old)[:8]
        assert len(found[f"{path}.lora_A.weight"]) == kept(s)
        torch.testing.assert_close(errors[path], float((new - old).norm() / old.norm()), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(float((new - old).norm()), float(s[kept(s) :].norm()), rtol=0.05, atol=0)


def test_strength_beside_the_tensors_is_kept(tmp_path: Path) -> None:
    """A folder of PEFT, alpha 32, r 8 and 2: 4 and 16 times the factors' products, in every reader of the new file."""
    torch.manual_seed(4)
    q, k = (f"base_model.model.transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    tensors = factors(q) | factors(k, R=2)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "rank_pattern": {"to_k": 2}}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(settings))
    for dim in (2, 12):  # the second layer stays with 2
        resize(tmp_path / "in", tmp_path / "b.safetensors", rule=RankRule(dim), overwrite=True)
        found = load_file(tmp_path / "b.safetensors")
        assert found.keys() == tensors.keys()
        for path, scale in ((q, 4), (k, 16)):
            old, new = (
                t[f"{path}.lora_B.weight"].double() @ t[f"{path}.lora_A.weight"].double() for t in (tensors, found)
            )
            lost = float(torch.linalg.svdvals(old)[dim:8].norm())
            assert float((new - scale * old).norm()) == pytest.approx(scale * lost, rel=1e-5, abs=1e-4)
            assert len(found[f"{path}.lora_A.weight"]) == dim


def test_fp8_grows_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(6)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((4, 16), (24, 4)))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rule=RankRule(8))
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found[f"{name}.lora_down.weight"][:4].float(), down.float())
    assert torch.equal(found[f"{name}.lora_up.weight"][:, :4].float(), up.float())
    assert not found[f"{name}.lora_up.weight"][:, 4:].float().any() and found[f"{name}.alpha"] == 6
    assert found[f"{name}.lora_down.weight"][4:].float().abs().sum(1).gt(0).all() and report.error < 1e-12
    again = resize(tmp_path / "a.safetensors", tmp_path / "c.safetensors", rule=RankRule(8), seed=1)
    other = load_file(tmp_path / "c.safetensors")
    assert again.out and not torch.equal(
        other[f"{name}.lora_down.weight"].float(), found[f"{name}.lora_down.weight"].float()
    )


def test_the_command(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    save_file(factors("transformer.transformer_blocks.0.attn.to_q"), file)
    before = file.read_bytes()
    assert tool.main([str(file), "--energy", "0.9", "--dim", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"].endswith("a-energy-0.9.safetensors") and 0 < told["layers"][0]["rank"] <= 4
    assert tool.main([str(file), "--dims", "2,16", "--json"]) == 0
    assert [len(one["layers"]) for one in json.loads(capsys.readouterr().out)] == [1, 1]
    for arguments, message in (
        (["--dims", "4", "--energy", "0.9"], "--dims and --energy say the same thing twice"),
        (["--dims", "4,2", "--out", str(tmp_path / "b.safetensors")], "--out is one file"),
        ([], "say how many ranks are to stay"),
        (["--dim", "4", "--out", str(file)], "writing it would destroy it"),
        (["--dim", "4", "--out", str(tmp_path / "a-0002.safetensors")], "would be replaced"),
        (["--dim", "1", "--max_error", "0.01"], "more than --max_error 0.01"),
        (["--energy", "0.8", "--way", "first"], "the first ranks stand alone at a dim, not at energy"),
    ):
        assert tool.main([str(file), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-0002.safetensors", "a-0016.safetensors", "a-energy-0.9.safetensors", "a.safetensors"
    ] and file.read_bytes() == before  # fmt: skip
