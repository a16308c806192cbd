"""save_format=comfyui: magnitudes folded for a reader that divides by the norm of the base weight alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_diffusers_dialect import assert_same, new_weights
from test_every_architecture import create, from_file, model_of
from tiny_parts import randomise, sd_unet
from torch import Tensor

import networks.lora
from networks.cli import merge
from networks.files import codec
from networks.files.merge import merged_weight

COMFYUI = {"save_format": "comfyui", "use_dora": "True"}
FLAG = "use_folded_dora_flag"


def comfyui_weight(weight: Tensor, update: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """What that program computes: (W + dW) m / ||W||, and in between at other strengths."""
    changed = weight + update
    norms = weight.flatten(1).norm(dim=1).reshape(magnitude.shape)
    return weight + strength * (changed * (magnitude / norms) - weight)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_its_formula_gives_what_was_trained(algo: str, tmp_path: Path) -> None:
    """Linear layers and convolutions, at any strength; every tensor but the magnitudes is as in the portable form."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 3, None, None, unet, conv_dim="2", algo=algo, **COMFYUI)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    tensors = load_file(tmp_path / "a.safetensors")
    portable = codec.encode(network.adapted_layers)
    differing = {key for key in portable if not torch.equal(portable[key].cpu(), tensors[key])}
    assert differing == {key for key in portable if key.endswith("dora_scale")}
    assert tensors.keys() - portable.keys() == {FLAG} and next(iter(tensors)) != FLAG
    for layer in network.adapted_layers:
        weight, update = layer.whole_weight(), (layer.adapter.delta() * layer.scale).detach()
        for strength in (1.0, 0.4):
            theirs = comfyui_weight(weight, update, tensors[f"{layer.lora_name}.dora_scale"], strength)
            torch.testing.assert_close(theirs, layer.new_weight(weight, strength).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["flux", "qwen_image", "sdxl"])
def test_loads_back(arch: str, tmp_path: Path) -> None:
    """Into networks of either form, from the file alone, by a merge of files; fused layers of diffusers' FLUX.1 too."""
    model = model_of(arch)
    network = create(arch, model, **COMFYUI)
    randomise(network)
    wanted, file = new_weights(network), str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    network.detach()
    for form in ({"use_dora": "True"}, COMFYUI, {"use_dora": "True", "save_format": "diffusers"}):
        again = create(arch, model, **form)
        assert not again.load_weights(file).missing
        assert_same(new_weights(again), wanted)
        again.detach()
    tensors = load_file(file)
    assert_same(new_weights(from_file(arch, model, tensors)), wanted)
    for name, saved in codec.decode(tensors)[0].items():
        layer = next(one for one in network.adapted_layers if one.lora_name == name)
        torch.testing.assert_close(merged_weight(saved, layer.whole_weight()), wanted[name], rtol=1e-4, atol=1e-5)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    assert merge.main([str(tmp_path / "m.safetensors"), file, "--out", str(tmp_path / "o.safetensors")]) == 0
    merged = load_file(tmp_path / "o.safetensors")
    for layer in network.adapted_layers:
        key = next(name for name, module in model.named_modules() if module is layer.base)
        torch.testing.assert_close(merged[f"{key}.weight"], wanted[layer.lora_name], rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_keep_their_magnitude(tmp_path: Path) -> None:
    model = model_of("qwen_image")
    with torch.no_grad():
        model.get_parameter("transformer_blocks.0.attn.to_q.weight")[1] = 0
    network = create("qwen_image", model, **COMFYUI)
    randomise(network)
    layer = next(one for one in network.adapted_layers if one.lora_name.endswith("blocks_0_attn_to_q"))
    wanted = layer.magnitude.detach().clone()
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "a.safetensors").values())
    randomise(layer.adapter)
    network.load_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(layer.magnitude.detach(), wanted)


def test_folded_magnitudes_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="hold for the whole dim alone; leave out save_dims"):
        create("qwen_image", model_of("qwen_image"), **COMFYUI, algo="dylora", save_dims="1")
