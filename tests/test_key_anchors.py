"""Keys and shapes of saved files, written by hand from the trainers' names and sizes: one layer per architecture."""

from __future__ import annotations

import pytest
import torch
from registry import ALGORITHMS
from registry_archs import SPECS, data_of
from toy_models import toy

import networks.lora
from networks.files import codec

# name -> arguments, suffix -> shape with every layer's O and I, alpha; dim 4
FORMS = {
    " ".join([algo, *(f"{name}={value}" for name, value in arguments.items())]): ({"algo": algo, **arguments}, *rest)
    for algo, data in ALGORITHMS.items()
    for arguments, *rest in data.files
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", SPECS)
def test_keys_and_shapes_of_a_file(arch: str, form: str) -> None:
    anchor, (kwargs, wanted, alpha) = data_of(arch).anchor, FORMS[form]
    dotted, saved, O, I = anchor.dotted_name, anchor.saved_name, anchor.O, anchor.I
    spec = SPECS[arch]
    with torch.device("meta"):
        model = toy(arch, blocks=7 if arch == "sdxl" else 1, shrink=1)[spec.denoiser.name]
    pattern = dotted.replace(".", r"\.")
    network = networks.lora.create_network(1.0, 4, 3, None, None, model, only_patterns=pattern, **kwargs)
    sizes = {"O": O, "I": I, "O/8": O // 8, "I/8": I // 8, "O/4": O // 4, "I/4": I // 4}
    sizes["above the diagonal"] = (I // 4) * (I // 4 - 1) // 2
    expected = {f"{saved}.{k}": tuple(sizes.get(n, n) for n in shape) for k, shape in wanted.items()}
    tensors = codec.encode(network.adapted_layers)
    if alpha is not None:
        assert float(tensors[f"{saved}.alpha"]) == alpha and tensors[f"{saved}.alpha"].dtype == torch.float32
        expected[f"{saved}.alpha"] = ()
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected


SPLIT = {
    "flux": ("single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1", 21504, 3072, 4),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536, 3),
}


@pytest.mark.parametrize("arch", SPLIT)
def test_split_projections_are_saved_as_one(arch: str) -> None:
    dotted, saved, O, I, parts = SPLIT[arch]
    with torch.device("meta"):
        model = toy(arch, blocks=1, shrink=1)[SPECS[arch].denoiser.name]
    pattern = dotted.replace(".", r"\.")
    network = networks.lora.create_network(1.0, 4, 3, None, None, model, only_patterns=pattern, split_qkv="True")
    tensors = codec.encode(network.adapted_layers)
    assert {key.removeprefix(saved): tuple(t.shape) for key, t in tensors.items()} == {
        ".lora_down.weight": (4 * parts, I), ".lora_up.weight": (O, 4 * parts), ".alpha": ()
    }  # fmt: skip
    assert float(tensors[f"{saved}.alpha"]) == 3 * parts
