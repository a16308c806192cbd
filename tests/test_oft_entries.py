"""networks.oft and networks.oft_flux: sd-scripts' meaning of dim and alpha, its targets, its files."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close
from safetensors.torch import save_file
from tiny_parts import draw, sd_unet, text_encoder
from tiny_parts import randomise as randomise_network
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora
import networks.lora_flux
import networks.oft
import networks.oft_flux
from networks.algos import ALGOS, make_adapter
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.max_norm import limit_norms, update_norm
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors.geometry import Geometry

ATTENTION = {"sd": 128, "sdxl": 560, "flux": 76, "chroma": 76}
ALL = {"sd": 192, "sdxl": 722, "flux": 304, "chroma": 228}
ENTRIES: dict[str, Any] = {
    "sd": networks.oft,
    "sdxl": networks.oft,
    "flux": networks.oft_flux,
    "chroma": networks.oft_flux,
}
SIZES = (12, 12, 12, 48)  # query, key, value, MLP


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def models(arch: str, blocks: int = 2) -> tuple[list[Any], nn.Module]:
    found = toy(arch, blocks, shrink=16)
    encoders = [found[name] for name in sorted(found) if name.startswith("text_encoder")]
    return encoders, next(model for name, model in found.items() if not name.startswith("text_encoder"))


def rotated(blocks: Tensor, W: Tensor, alpha: float, multiplier: float) -> Tensor:
    """Rows of W [N B, ...] by the trainer's definition: N blocks, the norm of all Q together at most alpha * rows."""
    Q = blocks - blocks.transpose(1, 2)
    Q = Q * min(1.0, alpha * len(W) / float(Q.norm()))
    one = torch.eye(Q.shape[1], dtype=Q.dtype)
    rows = []
    for q, w in zip(Q, W.split(Q.shape[1]), strict=True):
        R = (one + q) @ torch.linalg.inv(one - q)
        rows.append(torch.tensordot(one + multiplier * (R - one), w, dims=([0], [0])))
    return torch.cat(rows)


# -- which layers


@pytest.mark.parametrize("arch", ATTENTION)
def test_targets_are_the_trainers(arch: str) -> None:
    encoders, denoiser = models(arch, 99)
    entry = ENTRIES[arch]
    plan = entry.plan(4, 1e-3, encoders, denoiser)
    assert len(plan.trained) == ATTENTION[arch], "the attention alone, and no text encoder"
    known = r".*attn[12]\.to_(q|k|v|out\.0)" if arch.startswith("sd") else r"double_blocks\.\d+\..*attn\.(qkv|proj)"
    assert all(re.fullmatch(known, row.dotted_name) for row in plan.trained)
    assert len(entry.plan(4, 1e-3, encoders, denoiser, enable_all_linear="True").trained) == ALL[arch]
    if entry is networks.oft_flux:  # the other trainer has FLUX.1, too
        assert len(entry.plan(4, 1e-3, encoders, denoiser, host="musubi").trained) == ATTENTION[arch]


@pytest.mark.parametrize(("arch", "linear", "more"), [("sd", "False", 214), ("sd", "True", 278), ("sdxl", "1", 788)])
def test_enable_conv_is_read_as_a_boolean(arch: str, linear: str, more: int) -> None:
    _, denoiser = models(arch, 99)
    options = {"enable_all_linear": linear}
    plan = networks.oft.plan(4, 1e-3, None, denoiser, enable_conv="True", **options)
    assert len(plan.trained) == more and {row.dim for row in plan.trained} == {4}
    off = networks.oft.plan(4, 1e-3, None, denoiser, enable_conv="False", **options)
    assert len(off.trained) == (ATTENTION[arch] if linear == "False" else ALL[arch])


def test_enable_conv_in_other_entries() -> None:
    plan = networks.lora.plan(6, 3, None, sd_unet(), enable_conv="True")
    assert {(row.dim, row.alpha) for row in plan.trained if row.geometry.has_kernel} == {(6, 3.0)}
    assert plan.rows == networks.lora.plan(6, 3, None, sd_unet(), conv_dim="6", conv_alpha="3").rows
    with pytest.raises(ValueError, match="enable_conv=False contradicts conv_dim=2"):
        networks.lora.plan(6, 3, None, sd_unet(), enable_conv="False", conv_dim="2")
    with pytest.raises(ValueError, match="enable_conv has no effect"):
        networks.oft_flux.plan(4, 1, None, models("flux")[1], enable_conv="True")


# -- what they are


def test_dim_is_the_number_of_blocks_and_alpha_the_constraint() -> None:
    unet = sd_unet()
    network = networks.oft.create_network(1.0, 4, 0.03125, None, text_encoder(), unet)
    for row, layer in network.layers:
        blocks = layer.adapter.get_parameter("blocks")
        assert blocks.shape == (4, row.shape[0] // 4, row.shape[0] // 4)
        assert layer.alpha == 0.03125 and layer.adapter.limit == 0.03125 * row.shape[0]
    default = networks.oft.create_network(1.0, None, None, None, None, unet)
    assert {layer.alpha for layer in default.adapted_layers} == {1e-3}
    assert {len(layer.adapter.get_parameter("blocks")) for layer in default.adapted_layers} == {4}


@pytest.mark.parametrize("entry", [networks.oft, networks.oft_flux])
def test_any_width(entry: Any, tmp_path: Path) -> None:
    """5 divides neither 16 nor 32, nor the widths of the stand-in for FLUX.1: the next smaller number of blocks."""
    model = sd_unet() if entry is networks.oft else models("flux")[1]
    plan = entry.plan(5, 1, None, model)
    assert any("fewer blocks than network_dim" in note for note in plan.notes)
    assert not any("fewer blocks" in note for note in entry.plan(4, 1, None, model).notes)
    network = entry.create_network(1.0, 5, 1, None, None, model)
    network.apply_to(None, model, True, True)
    randomise_network(network)
    wanted = signal_of(model)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    loaded, _ = entry.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, model)
    loaded.apply_to(None, model)
    assert torch.equal(signal_of(model), wanted)


@torch.no_grad()
def signal_of(model: nn.Module) -> Tensor:
    return model(signal()) if type(model).__name__ == "Flux" else draw(model)


def test_another_algorithm_makes_it_any_entry() -> None:
    unet, encoder = sd_unet(), text_encoder()
    for algo in ("lora", "lokr", "ia3"):
        wanted = networks.lora.plan(4, 2, encoder, unet, algo=algo).rows
        assert networks.oft.plan(4, 2, encoder, unet, algo=algo).rows == wanted
    network = networks.oft.create_network(1.0, 4, 2, None, encoder, unet, algo="lora")
    assert network.file_format.dialect.name == "portable" and network.text_encoder_loras


def test_it_is_for_flux() -> None:
    with pytest.raises(ValueError, match="this model is Stable Diffusion 1.x / 2.x"):
        networks.oft_flux.plan(4, 1, None, sd_unet())


# -- files


@pytest.mark.parametrize("alpha", [torch.tensor(1), torch.tensor(2**-7), torch.tensor(2**-9, dtype=torch.float16)])
@pytest.mark.parametrize("entry", [networks.oft, networks.lora])
def test_a_file_of_the_trainer(entry: Any, alpha: Tensor, tmp_path: Path) -> None:
    """Alpha is whole where --network_alpha was not given. Applied, merged, and merged from the file alone."""
    unet = sd_unet().double()
    names = [n for n, m in unet.named_modules() if re.search(r"attn\d\.to", n) and isinstance(m, nn.Linear)]
    file: dict[str, Tensor] = {}
    wanted = {}
    for name in names:
        W, key = unet.get_submodule(name).weight.detach(), f"oft_unet_{name}".replace(".", "_")
        blocks = torch.randn(4, len(W) // 4, len(W) // 4, dtype=torch.float64) * 0.1
        file |= {f"{key}.oft_blocks": blocks, f"{key}.alpha": alpha.clone()}
        wanted[name] = rotated(blocks, W, float(alpha), 0.7)
    path = str(tmp_path / "theirs.safetensors")
    save_file(file, path)
    network, tensors = entry.create_network_from_weights(0.7, path, None, [text_encoder()], unet, for_inference=True)
    assert len(network.adapted_layers) == len(names) and not network.text_encoder_loras
    network.double()
    network.apply_to([text_encoder()], unet)
    network.load_state_dict(tensors, strict=True)
    applied = draw_double(unet)
    network.detach()
    saved = codec.decode(tensors)[0]
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        for name in names:
            layer, weight = saved[f"lora_unet_{name}".replace(".", "_")], twin.get_submodule(name).weight
            assert_close(merged_weight(layer, weight.clone(), 0.7), wanted[name], "from the file alone")
            weight.copy_(wanted[name])
    assert_close(applied, draw_double(twin), "applied")
    network.merge_to([text_encoder()], unet, tensors, torch.float64, "cpu")
    assert_close(draw_double(unet), draw_double(twin), "merged")


@torch.no_grad()
def draw_double(unet: nn.Module) -> Tensor:
    latents, times, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 16)
    torch.manual_seed(0)
    return unet(latents.double() * 0 + 0.1, times, text.double() * 0 + 0.2).sample


@pytest.mark.parametrize(("arch", "name"), [("sd", "oft"), ("flux", "oft_flux")])
def test_our_file_has_the_trainers_keys(arch: str, name: str, tmp_path: Path) -> None:
    _, denoiser = models(arch)
    network = ENTRIES[arch].create_network(1.0, 4, 2**-7, None, None, denoiser, enable_all_linear="True")
    network.apply_to(None, denoiser, True, True)
    randomise_network(network)
    path = str(tmp_path / "ours.safetensors")
    network.save_weights(path, None, {})
    tensors, metadata = reader.read_tensors(path)
    assert metadata["networks_dialect"] == name
    expected: dict[str, tuple[int, ...]] = {}
    for row in network.plan.trained:
        key = f"oft_unet_{row.dotted_name}".replace(".", "_")
        expected[f"{key}.alpha"] = ()
        sizes = row.split or (row.shape[0],)
        assert bool(row.split) == bool(re.search(r"qkv|linear1", row.dotted_name)), row.dotted_name
        for i, size in enumerate(sizes):
            list_of = f"oft_blocks.{i}" if arch == "flux" else "oft_blocks"
            expected[f"{key}.{list_of}"] = (4, size // 4, size // 4)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
    assert {float(t) for key, t in tensors.items() if key.endswith("alpha")} == {2**-7}
    wanted = denoiser(signal()).detach()
    network.detach()
    again, _ = ENTRIES[arch].create_network_from_weights(1.0, path, None, None, denoiser)
    again.apply_to(None, denoiser)
    assert torch.equal(denoiser(signal()), wanted)
    again.save_weights(str(tmp_path / "again.safetensors"), None, {})
    assert reader.read_tensors(tmp_path / "again.safetensors")[0].keys() == tensors.keys()
    again.detach()
    other = ENTRIES[arch].create_network(1.0, 4, 1, None, None, denoiser, enable_all_linear="True")
    other.apply_to(None, denoiser, True, True)
    other.load_weights(path)
    assert torch.equal(denoiser(signal()), wanted), "the constraint is the file's"
    other.detach()
    # Any entry reads it, and a merge that knows keys alone.
    plain = networks.lora if arch == "sd" else networks.lora_flux
    third, _ = plain.create_network_from_weights(1.0, path, None, None, denoiser)
    third.apply_to(None, denoiser)
    assert torch.equal(denoiser(signal()), wanted)
    third.detach()
    saved = codec.decode(tensors)[0]
    for row, layer in third.layers:
        W = denoiser.get_submodule(row.dotted_name).weight.detach()
        assert_close(merged_weight(saved[row.saved_name], W), layer.new_weight(W).detach(), row.saved_name, 1e-6)


def split_layer(multiplier: float = 0.7, rescaled: bool = False) -> tuple[AdaptedLayer, nn.Linear]:
    base = nn.Linear(20, sum(SIZES)).double().requires_grad_(False)
    options = {"constraint": 2**-5, "dim_is_count": True, "rescaled": rescaled}
    adapter = make_adapter(ALGOS["diag-oft"], Geometry.of(base), 4, options, SIZES).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3)
    return AdaptedLayer("lora_unet_x", base, adapter, 1.0, runtime=Runtime(multiplier)), base


def test_each_projection_has_a_rotation_and_a_constraint_of_its_own() -> None:
    layer, base = split_layer()
    W, x = base.weight.clone(), torch.randn(2, 5, 20, dtype=torch.float64)
    packed = layer.adapter.pack()
    parts = [packed[f"oft_blocks.{i}"] for i in range(4)]
    assert [tuple(part.shape) for part in parts] == [(4, 3, 3)] * 3 + [(4, 12, 12)]
    wanted = torch.cat([rotated(b, w, 2**-5, 0.7) for b, w in zip(parts, W.split(list(SIZES)), strict=True)])
    assert_close(layer.new_weight(W).detach(), wanted, "new_weight")
    layer.attach()
    assert_close(base(x).detach(), x @ wanted.T + base.bias, "forward")
    base(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    norm = float(update_norm(layer))
    assert_close(update_norm(layer), ((layer.new_weight(W, 1.0) - W).norm()).detach(), "norm")
    limit_norms([layer], norm / 2)
    assert float(update_norm(layer)) == pytest.approx(norm / 2, rel=1e-5)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_split_rotation_in_a_file(rescaled: bool) -> None:
    layer, base = split_layer(rescaled=rescaled)
    tensors = codec.encode([layer])
    saved = codec.decode(tensors)[0]["lora_unet_x"]
    assert saved.parts == SIZES and float(tensors["lora_unet_x.alpha"]) == 2**-5
    W = base.weight
    assert_close(merged_weight(saved, W, 0.7), layer.new_weight(W).detach(), "merged")
    other, _ = split_layer()
    if rescaled:
        with pytest.raises(ValueError, match="the file has .*rescale; this network wants oft_blocks.0"):
            other.adapter.unpack_(saved.tensors)
    with pytest.raises(ValueError, match=r"do not fit projections of \(42, 42\)"):
        saved.algorithm.unstack(saved.tensors, (42, 42))


@pytest.mark.parametrize("pieces", [((0, 12),), ((12, 36),), ((36, 84),), ((36, 60), (60, 84)), ((30, 50),)], ids=str)
def test_modules_of_a_divided_layer_read_no_weight_where_they_hold_whole_blocks(
    pieces: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, whole = split_layer()
    x = torch.randn(5, 20, dtype=torch.float64)
    layer.attach()
    rows = torch.cat([torch.arange(*piece) for piece in pieces])
    wanted = whole(x)[:, rows].detach()
    layer.detach()
    module = nn.Linear(20, len(rows)).double().requires_grad_(False)
    module.weight.copy_(whole.weight[rows])
    module.bias.copy_(whole.bias[rows])
    rest = nn.Linear(20, 84 - len(rows)).double().requires_grad_(False)
    others = torch.tensor([i for i in range(84) if i not in rows.tolist()])
    rest.weight.copy_(whole.weight[others])
    runs = tuple((int(i), int(i) + 1) for i in others)
    several = AdaptedLayer("x", [Site(module, pieces), Site(rest, runs)], layer.adapter, 1.0, runtime=Runtime(0.7))
    several.attach()
    if pieces in (((0, 12),), ((36, 84),)):
        monkeypatch.setattr(AdaptedLayer, "whole_weight", lambda *args: pytest.fail("the weight was read"))
    assert_close(module(x).detach(), wanted, "forward")


# -- loud


def test_what_the_trainer_cannot_hold() -> None:
    unet = sd_unet()
    for options, message in (
        ({"rescaled": "True"}, "no place for rescaled"),
        ({"constraint": "0"}, "the constraint 0 means no rotation at all"),
        ({"train_on_input": "True"}, "no place for train_on_input"),
    ):
        network = networks.oft.create_network(1.0, 4, 1, None, None, unet, **options)
        assert network.file_format.dialect.name == "portable"
        assert any(message in note and "written as save_format=portable instead" in note for note in network.plan.notes)
        with pytest.raises(ValueError, match=message):
            networks.oft.plan(4, 1, None, unet, save_format="oft", **options)
    with pytest.raises(ValueError, match="save_format=oft holds diag-oft only, not lora"):
        networks.lora.plan(4, 1, None, unet, save_format="oft")


def test_notes() -> None:
    unet = sd_unet()
    notes = " ".join(networks.oft.plan(4, 1, None, unet).notes)
    assert "network_alpha=1 is the constraint of the rotations, and next to none" in notes
    assert "oft_unet_... instead of lora_unet_" in notes and "scale 1" not in notes
    assert "next to none" not in " ".join(networks.oft.plan(4, 1e-3, None, unet).notes)
    wan = models("wan")[1]
    assert "no other program reads such files of Wan" in " ".join(networks.oft.plan(4, 1e-3, None, wan).notes)


def test_both_hosts_calls() -> None:
    unet, encoder = sd_unet(), text_encoder()
    network = networks.oft.create_network(1.0, 4, 1, None, encoder, unet)
    network.apply_to(encoder, unet, True, True)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in network.parameters())
    network.detach()
    with pytest.raises(ValueError, match="no layer is left to train"):
        networks.oft.create_network(1.0, 4, 1, None, encoder, unet).apply_to(encoder, unet, True, False)
    wan = models("wan")[1]
    musubi = networks.oft.create_arch_network(1.0, 4, 1, None, None, wan)
    musubi.apply_to(None, wan, False, True)
    assert {layer.alpha for layer in musubi.adapted_layers} == {1.0}
