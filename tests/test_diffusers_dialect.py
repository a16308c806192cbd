"""save_format=diffusers: the names of diffusers' models, the strength in the factors, and the way back."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import swap_scale_shift
from registry_archs import IN_DIFFUSERS, SPECS
from safetensors.torch import load_file, save_file
from test_diffusers_layouts import found, meta_model
from test_every_architecture import create, from_file, model_of
from tiny_parts import randomise, sd_unet, text_encoder
from torch import Tensor, nn

import networks.loha
import networks.lora
from networks.archs.places import Layer, places, targets
from networks.cli import merge
from networks.files import codec
from networks.files.adapter_file import FileTensors, Naming
from networks.files.dialects import DIFFUSERS, FileFormat
from networks.files.save_formats import translated

FORM = {"save_format": "diffusers"}
DORA = {"use_dora": "True"}


@functools.cache
def whole_model(arch: str) -> nn.Module:
    """diffusers' full-size model, on the meta device."""
    return meta_model(arch)


@pytest.mark.parametrize("arch", IN_DIFFUSERS)
def test_every_layer_is_found_where_diffusers_has_it(arch: str) -> None:
    """All layers of diffusers' full-size models, each with the rows that the attached adapter gives it."""
    model, spec = whole_model(arch), SPECS[arch]
    for candidate in found(arch, model).values():
        geometry = candidate.geometry
        theirs = places(spec, spec.denoiser, candidate.trainer_name, geometry.out_features, geometry.in_features)
        own = candidate.own_names or (candidate.dotted_name,)
        component = "" if own[0].startswith("connectors.") else f"{spec.denoiser.diffusers}."  # of the pipeline
        assert [place.path for place in theirs] == [component + name for name in own]
        for place, (_, pieces) in zip(theirs, candidate.bases, strict=True):
            middle = (place.start + place.stop) // 2
            halves = ((middle, place.stop), (place.start, middle))
            assert (pieces or ((0, geometry.out_features),)) == (
                halves if place.swapped else ((place.start, place.stop),)
            )


def new_weights(network: Any) -> dict[str, Tensor]:
    """W' of every layer, as it acts."""
    return {layer.lora_name: layer.new_weight(layer.whole_weight()).detach() for layer in network.adapted_layers}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", IN_DIFFUSERS)
def test_from_the_trainers_classes_and_back(arch: str, tmp_path: Path) -> None:
    """Saved from the trainer's own classes: diffusers' names, alpha nowhere; the same weights when it is loaded."""
    splits = [{"split_qkv": "True"}] if SPECS[arch].fused_rows else []
    known = {f"{SPECS[arch].denoiser.diffusers}.{name}" for name, _ in whole_model(arch).named_modules()}
    for number, kwargs in enumerate([{"use_rslora": "True"}, DORA, *splits]):
        model = model_of(arch)
        network = create(arch, model, **FORM, **kwargs)
        randomise(network)
        wanted = new_weights(network)
        file = str(tmp_path / f"{number}.safetensors")
        network.save_weights(file, None, {})
        network.detach()
        tensors = load_file(file)
        assert {key.partition(".lora_")[0] for key in tensors} <= known
        suffixes = {"A.weight", "B.weight"} | ({"magnitude_vector.weight"} if kwargs is DORA else set())
        assert {key.partition(".lora_")[2] for key in tensors} == suffixes
        for form in ({}, FORM):
            again = create(arch, model, **form, **kwargs)
            assert not again.load_weights(file).missing
            assert_same(new_weights(again), wanted)
            again.detach()
        assert_same(new_weights(from_file(arch, model, tensors)), wanted)


def test_text_encoders_have_the_level_that_transformers_dropped(tmp_path: Path) -> None:
    """diffusers expects `text_model` in files of every version."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, conv_dim="2", **FORM)
    network.apply_to(encoder, unet, True, True)
    randomise(network)
    wanted = new_weights(network)
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    network.detach()
    keys = load_file(file)
    assert {key.partition(".")[0] for key in keys} == {"unet", "text_encoder"}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert keys["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"].shape == (2, 16, 3, 3)
    again, _ = networks.lora.create_network_from_weights(1.0, file, None, encoder, unet)
    assert_same(new_weights(again), wanted)


def test_what_the_dialect_cannot_hold_is_refused() -> None:
    unet, flux = sd_unet(), model_of("flux")
    for algo in ("loha", "diag-oft", "ia3", "full"):
        with pytest.raises(
            ValueError, match=f"save_format=diffusers: the {algo} of lora_unet_\\S+ is no LoRA of fewer"
        ):
            networks.loha.create_network(1.0, 40, 1, None, None, unet, algo=algo, **FORM)
    with pytest.raises(ValueError, match="the norm of lora_unet_"):
        networks.lora.create_network(1.0, 4, 1, None, None, unet, train_norm="True", **FORM)
    with pytest.raises(ValueError, match="holds DoRA of output rows only"):
        networks.lora.create_network(1.0, 4, 1, None, None, flux, wd_on_output="False", **FORM, **DORA)
    with pytest.raises(ValueError, match="diffusers reads no adapter of the dit of HiDream-O1"):
        create("hidream_o1", model_of("hidream_o1"), **FORM)


def flux_file(path: Path, **more: Any) -> dict[str, Tensor]:
    """As another program writes a LoRA of diffusers' FLUX.1: factors of its own for each projection, rank 2 and 3."""
    torch.manual_seed(0)
    wide = model_of("flux").get_submodule("double_blocks.0.img_attn.qkv").in_features
    tensors = {}
    for rank, name in ((2, "to_q"), (3, "to_k"), (2, "to_v")):
        at = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = (
            torch.randn(rank, wide),
            torch.randn(wide, rank),
        )
    save_file(tensors, path, **more)
    return tensors


def updates(tensors: dict[str, Tensor], scale: dict[str, float]) -> Tensor:
    """The rows of query, key and value below each other."""
    at = "transformer.transformer_blocks.0.attn"
    pairs = [(tensors[f"{at}.{n}.lora_B.weight"], tensors[f"{at}.{n}.lora_A.weight"], scale[n]) for n in scale]
    return torch.cat([up @ down * s for up, down, s in pairs])


@pytest.mark.parametrize("rslora", [False, True])
def test_the_metadata_state_the_strength(rslora: bool, tmp_path: Path) -> None:
    """Files of diffusers' own trainers: PEFT's settings as JSON, for every way of loading a path."""
    file = tmp_path / "a.safetensors"
    settings = {
        "transformer.lora_alpha": 4, "transformer.r": 2, "transformer.use_rslora": rslora,
        "transformer.rank_pattern": {"attn.to_k": 3}, "transformer.alpha_pattern": {"attn.to_k": 9},
    }  # fmt: skip
    tensors = flux_file(file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    root = math.sqrt if rslora else float
    scale = {"to_q": 4 / root(2), "to_k": 9 / root(3), "to_v": 4 / root(2)}
    model = model_of("flux")
    network, _ = networks.lora.create_network_from_weights(1.0, str(file), None, None, model)
    (layer,) = network.adapted_layers
    assert layer.lora_name == "lora_unet_double_blocks_0_img_attn_qkv"
    torch.testing.assert_close(layer.adapter.delta() * layer.scale, updates(tensors, scale))
    again = networks.lora.create_network(1.0, 7, 1, None, None, model, only_patterns=r"double_blocks\.0\.img_attn\.qkv")
    again.load_weights(str(file))
    torch.testing.assert_close(again.adapted_layers[0].adapter.delta(), updates(tensors, scale))
    save_file(tensors, file)  # without them: scale 1
    network, _ = networks.lora.create_network_from_weights(1.0, str(file), None, None, model)
    (layer,) = network.adapted_layers
    torch.testing.assert_close(layer.adapter.delta() * layer.scale, updates(tensors, dict.fromkeys(scale, 1.0)))


def test_a_projection_that_is_missing_changes_nothing(tmp_path: Path) -> None:
    """The rows of the keys stay as they are, and the others change as in the whole file."""
    tensors = flux_file(tmp_path / "a.safetensors")
    half = {key: tensor for key, tensor in tensors.items() if "to_k" not in key}
    changes = []
    for given in (tensors, half):
        made, _ = networks.lora.create_network_from_weights(1.0, None, None, None, model_of("flux"), given)
        name = next(name for name, _ in made.named_children() if name.endswith("double_blocks_0_img_attn_qkv"))
        layer = getattr(made, name)
        changes.append(layer.adapter.delta() * layer.scale)
    whole, without = (change.chunk(3) for change in changes)
    assert whole[1].any() and not without[1].any()
    for i in (0, 2):
        assert torch.allclose(whole[i], without[i], rtol=1e-6, atol=1e-9)


SIX_AND_TWO = ((0, 48), (1, 16))  # blocks and the rows of their modulation, of 8 columns


def test_halves_are_in_the_trainers_order() -> None:
    """SD3: shift and scale of the last block's modulation are the other way round in diffusers, by its own conversion;
    the six parts of the other blocks are alike. With the magnitude, there and back."""
    torch.manual_seed(0)
    at, ours, wide = "transformer.transformer_blocks.{}.norm1_context.linear", "lora_unet_joint_blocks_{}_", 8
    theirs = {}
    for block, rows in SIX_AND_TWO:
        theirs[f"{at.format(block)}.lora_A.weight"] = torch.randn(2, wide)
        theirs[f"{at.format(block)}.lora_B.weight"] = torch.randn(rows, 2)
        theirs[f"{at.format(block)}.lora_magnitude_vector.weight"] = torch.rand(rows)
    spec = SPECS["sd3"]
    opened = FileTensors(theirs).opened(Naming(spec))
    shapes = {f"{ours.format(block)}context_block_adaLN_modulation_1": (rows, wide) for block, rows in SIX_AND_TWO}
    read = codec.write(opened.on(shapes.get).layers.values())
    for block, turn in ((0, lambda rows: rows), (1, lambda rows: swap_scale_shift(rows, dim=0))):
        name = f"{ours.format(block)}context_block_adaLN_modulation_1"
        assert torch.equal(read[f"{name}.lora_down.weight"], theirs[f"{at.format(block)}.lora_A.weight"])
        assert torch.equal(read[f"{name}.lora_up.weight"], turn(theirs[f"{at.format(block)}.lora_B.weight"]))
        magnitude = theirs[f"{at.format(block)}.lora_magnitude_vector.weight"]
        assert torch.equal(read[f"{name}.dora_scale"].flatten(), turn(magnitude))
    layers = [
        Layer(
            spec.denoiser,
            f"joint_blocks.{block}.context_block.adaLN_modulation.1",
            f"{ours.format(block)}context_block_adaLN_modulation_1",
            (rows, wide),
        )
        for block, rows in SIX_AND_TWO
    ]
    form = FileFormat(DIFFUSERS, targets=targets(spec, layers, DIFFUSERS.program))
    written, _ = translated(codec.decode(read)[0].values(), form, lambda name: torch.empty(0))
    again = codec.written(written, form)
    assert again.keys() == theirs.keys() and all(torch.equal(again[key], tensor) for key, tensor in theirs.items())


def test_metadata_that_are_no_json_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    flux_file(file, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="metadata lora_adapter_metadata of .* cannot be read"):
        networks.lora.create_network_from_weights(1.0, str(file), None, None, model_of("flux"))


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "base_model.model.", "transformer.", "", "model.diffusion_model."]
)
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_dotted_names_of_other_programs(algo: str, prefix: str) -> None:
    """The trainer's own layer names behind any of these prefixes, for every algorithm, with alpha."""
    model = model_of("ace_step")
    network = create("ace_step", model, algo=algo)
    randomise(network)
    wanted = new_weights(network)
    tensors = {}
    for row, layer in network.layers:
        for suffix, tensor in layer.adapter.pack().items():
            suffix = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(suffix, suffix)
            tensors[f"{prefix}{row.trainer_name}.{suffix}"] = tensor
        tensors[f"{prefix}{row.trainer_name}.alpha"] = torch.tensor(layer.alpha)
    network.detach()
    assert_same(new_weights(from_file("ace_step", model, tensors)), wanted)


@pytest.mark.parametrize("arch", ["flux", "sdxl", "sd3", "wan", "qwen_image", "ace_step"])
def test_merging_into_a_checkpoint(arch: str, tmp_path: Path) -> None:
    """scripts/merge.py: by the names of the checkpoint, the same as the file with the trainers' names."""
    model = model_of(arch)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    for number, form in enumerate(({}, FORM)):
        network = create(arch, model, **form, **DORA)
        randomise(network)
        network.save_weights(str(tmp_path / f"{number}.safetensors"), None, {})
        network.detach()
        adapter = f"{tmp_path / f'{number}.safetensors'}=0.6"
        out = str(tmp_path / f"out{number}.safetensors")
        assert merge.main([str(tmp_path / "m.safetensors"), adapter, "--out", out, "--strict"]) == 0
    assert_same(load_file(tmp_path / "out1.safetensors"), load_file(tmp_path / "out0.safetensors"))
