"""Fused projections: one adapter for each part (split_qkv), and one adapter over several modules."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FACTORED, assert_close, learn_lengths, options_for, randomise
from tiny_parts import randomise as randomise_network
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora_flux
import networks.lora_sd3
from networks.algos import ALGOS
from networks.algos.additive import AdditiveParts
from networks.archs import ARCHS
from networks.files import reader
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.max_norm import update_norm
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors.geometry import Geometry

SPECS = {spec.name: spec for spec in ARCHS}
SPLIT = [algo for algo, cls in ALGOS.items() if "split_qkv" in cls.spec.features and algo in FACTORED]
SIZES = (48, 24, 24)
# The fused layer's rows in modules of their own, one of them with its halves swapped.
PIECES: tuple[tuple[tuple[int, int], ...], ...] = (((0, 48),), ((60, 72), (48, 60)), ((72, 96),))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fused() -> nn.Linear:
    return nn.Linear(36, sum(SIZES)).double().requires_grad_(False)


def apart(base: nn.Linear) -> list[nn.Linear]:
    modules = []
    for pieces in PIECES:
        rows = torch.cat([torch.arange(*piece) for piece in pieces])
        module = nn.Linear(36, len(rows)).double().requires_grad_(False)
        module.weight.copy_(base.weight[rows])
        module.bias.copy_(base.bias[rows])
        modules.append(module)
    return modules


def together(modules: list[nn.Linear], x: Tensor) -> Tensor:
    """Their outputs in the order of the fused rows."""
    y = x.new_empty(*x.shape[:-1], sum(SIZES))
    for module, pieces in zip(modules, PIECES, strict=True):
        rows = torch.cat([torch.arange(*piece) for piece in pieces])
        y[..., rows] = module(x)
    return y


@pytest.mark.parametrize("algo", SPLIT)
@pytest.mark.parametrize("options", [{}, {"use_scalar": True}], ids=["plain", "scalar"])
def test_a_split_layer_is_its_parts_and_its_file_is_the_whole(algo: str, options: dict[str, Any]) -> None:
    base, x = fused(), torch.randn(2, 5, 36, dtype=torch.float64)
    adapter = AdditiveParts(ALGOS[algo], Geometry.of(base), 3, SIZES, options_for(algo, options)).double()
    randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, 0.75, runtime=Runtime(0.7))
    plain = copy.deepcopy(base)
    layer.attach()
    y = base(x)
    wanted = []
    for part, rows in zip(adapter.parts, x.new_empty(sum(SIZES)).split(list(SIZES)), strict=True):
        scalar = 1.0 if part.scalar is None else part.scalar
        wanted.append(x @ (part.delta() * scalar).T)
        assert len(rows) == part.geometry.out_features
    wanted_y = plain(x) + 0.7 * 0.75 * torch.cat(wanted, -1)
    assert_close(y, wanted_y, "forward")
    assert_close(layer.new_weight(plain.weight), plain.weight + 0.7 * 0.75 * _rows(adapter), "new_weight")
    # As a plain reader sees the file: alpha / rank of one adapter on the whole layer.
    single = ALGOS[algo](Geometry.of(plain), 9, options_for(algo, {})).double()
    single.unpack_(adapter.pack())
    assert layer.alpha == pytest.approx(0.75 * 9)
    assert_close(single.delta() * layer.alpha / 9, _rows(adapter) * 0.75, "the file")
    assert_close(adapter.norm(), _rows(adapter).norm(), "norm")
    other = AdditiveParts(ALGOS[algo], Geometry.of(plain), 3, SIZES, options_for(algo, options)).double()
    other.unpack_(adapter.pack())
    assert_close(_rows(other), _rows(adapter), "loaded")
    assert all(p.grad is not None for p in _backward(y, adapter) if p.requires_grad)


def _rows(adapter: AdditiveParts) -> Tensor:
    return torch.cat([p.delta() * (1.0 if p.scalar is None else p.scalar) for p in adapter.parts]).detach()


def _backward(y: Tensor, adapter: nn.Module) -> list[nn.Parameter]:
    y.square().sum().backward()
    return list(adapter.parameters())


def test_max_norm_of_a_split_layer() -> None:
    base = fused()
    adapter = AdditiveParts(ALGOS["lora"], Geometry.of(base), 3, SIZES, {}).double()
    randomise(adapter)
    before = adapter.delta().detach()
    adapter.rescale_(0.5)
    assert_close(adapter.delta(), before * 0.5, "half")


def test_a_whole_adapter_is_no_stack() -> None:
    whole = ALGOS["lora"](Geometry.of(fused()), 9, {}).double()
    randomise(whole)
    with pytest.raises(ValueError, match="mixes the parts of its layer"):
        ALGOS["lora"].unstack(whole.pack(), SIZES)


@pytest.mark.parametrize("dora", ["", "output", "input"])
@pytest.mark.parametrize("algo", list(FACTORED))
def test_one_adapter_on_several_modules_is_that_of_the_fused_layer(algo: str, dora: str) -> None:
    """Forward, gradients, merge and norms; LoKr with pieces that do and do not fall on blocks of its second factor."""
    base = fused()
    for factor in ({"factor": 4}, {"factor": 2}, {}) if algo == "lokr" else ({},):
        modules, x = apart(base), torch.randn(2, 5, 36, dtype=torch.float64)
        layers = []
        for sites in ([Site(copy.deepcopy(base))], [Site(m, p) for m, p in zip(modules, PIECES, strict=True)]):
            torch.manual_seed(1)
            adapter = ALGOS[algo](Geometry.of(base), 3, options_for(algo, factor)).double()
            randomise(adapter)
            layer = AdaptedLayer("x", sites, adapter, 0.75, runtime=Runtime(0.7), dora=dora).double()
            layer.load_magnitude(None)
            if layer.magnitude is not None:
                learn_lengths(layer)
            layers.append(layer)
        one, several = layers
        for layer in layers:
            layer.attach()
        y, wanted = together(modules, x), one.base(x)
        assert_close(y, wanted, "forward")
        upstream = torch.randn_like(y)
        y.backward(upstream)
        wanted.backward(upstream)
        for (name, a), b in zip(several.named_parameters(), one.parameters(), strict=True):
            if not a.requires_grad:
                continue
            assert_close(a.grad, b.grad, name)
        assert_close(update_norm(several), update_norm(one), "norm")
        for layer in layers:
            layer.detach()
            layer.backup()
            layer.merge()
        assert_close(together(modules, x), wanted, "merged")
        for layer in layers:
            layer.restore()
        assert torch.equal(several.whole_weight(), base.weight)


def test_a_split_adapter_on_several_modules() -> None:
    base = fused()
    modules, x = apart(base), torch.randn(5, 36, dtype=torch.float64)
    adapter = AdditiveParts(ALGOS["lora"], Geometry.of(base), 3, SIZES, {}).double()
    randomise(adapter)
    layer = AdaptedLayer("x", [Site(m, p) for m, p in zip(modules, PIECES, strict=True)], adapter, 0.75)
    plain = together(modules, x)
    layer.attach()
    assert_close(together(modules, x), plain + 0.75 * x @ adapter.delta().T, "forward")


def models(arch: str) -> tuple[list[Any], nn.Module]:
    found, spec = toy(arch), SPECS[arch]
    return [found.get(part.name) for part in spec.text_encoders], found[spec.denoiser.name]


@pytest.mark.sweep
@pytest.mark.parametrize("algo", SPLIT)
@pytest.mark.parametrize("arch", [spec.name for spec in ARCHS if spec.fused_rows and not spec.denoiser.tasks])
def test_split_files_load_at_full_strength_as_plain_ones(arch: str, algo: str, tmp_path: Path) -> None:
    """What a plain reader, and the trainers' own create_network_from_weights, make of the file."""
    entry = __import__(f"networks.{SPECS[arch].entry}", fromlist=["create_network"])
    encoders, dit = models(arch)
    network = entry.create_network(1.0, 2, 1, None, encoders, dit, algo=algo, split_qkv="True")
    split = [row for row, _ in network.layers if row.split]
    assert split and all(sum(row.split) == row.shape[0] and row.scale == 0.5 for row in split)
    network.apply_to(encoders, dit, True, True)
    randomise_network(network)
    network.eval()  # some algorithms draw at random in training
    wanted = dit(signal()).detach()
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    tensors, _ = reader.read_tensors(file)
    name, n = split[0].saved_name, len(split[0].split)
    first = "hada_w1_a" if algo == "loha" else "lora_up.weight"
    assert tensors[f"{name}.{first}"].shape == (split[0].shape[0], 2 * n) and float(tensors[f"{name}.alpha"]) == n
    network.detach()
    for options in ({}, {"split_qkv": "True"}):
        loaded, _ = entry.create_network_from_weights(1.0, file, None, encoders, dit, **options)
        assert bool([row for row, _ in loaded.layers if row.split]) == bool(options)
        loaded.apply_to(encoders, dit)
        loaded.eval()
        torch.testing.assert_close(dit(signal()), wanted)
        loaded.detach()
    again = entry.create_network(1.0, 2, 4, None, encoders, dit, algo=algo, split_qkv="True")
    again.apply_to(encoders, dit, True, True)
    again.load_weights(file)
    again.eval()
    torch.testing.assert_close(dit(signal()), wanted)
    assert {layer.scale for layer in again.adapted_layers} == {0.5}


def test_split_qkv_and_others() -> None:
    encoders, flux = models("flux")
    with pytest.raises(ValueError, match="split_qkv.*lokr"):
        networks.lora_flux.plan(4, 1, encoders, flux, split_qkv="True", algo="lokr")
    told = networks.lora_flux.plan(4, 1, encoders, flux, split_qkv="True", only_patterns=".*proj").warnings
    assert any("split_qkv (no layer with fused projections is left to train)" in line for line in told)
    plan = networks.lora_flux.plan(4, 1, encoders, flux, split_qkv="True", use_dora="True")
    assert {row.plain for row in plan.trained if row.split} == {"split_qkv"}
    assert any("DoRA on" in note and "split_qkv" in note for note in plan.notes)


def test_a_fused_file_does_not_load_into_a_split_network(tmp_path: Path) -> None:
    encoders, flux = models("flux")
    network = networks.lora_flux.create_network(1.0, 6, 1, None, encoders, flux)
    randomise_network(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    with pytest.raises(ValueError, match="trained without split_qkv|no stack of"):
        networks.lora_flux.create_network_from_weights(
            1.0, str(tmp_path / "a.safetensors"), None, encoders, flux, split_qkv="True"
        )


def test_dropouts_act_in_each_part() -> None:
    base = fused()
    adapter = AdditiveParts(ALGOS["lora"], Geometry.of(base), 3, SIZES, {}).double()
    randomise(adapter)
    layer = AdaptedLayer("x", base, adapter, 1.0, Dropouts(rank_dropout=0.5))
    layer.attach()
    x = torch.randn(4, 3, 36, dtype=torch.float64)
    assert not torch.equal(base(x), base(x))
    layer.eval()
    assert torch.equal(base(x), base(x))
    assert replace(adapter.laid_out, stacked=1).saved_rank == 3
