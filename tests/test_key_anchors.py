"""Keys and shapes of saved files, written by hand from the trainers' names and sizes: one layer per architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registry_archs import SPECS, data_of
from toy_models import toy

import networks.lora
from networks.files import codec

# arguments -> suffix -> shape, with every layer's O and I; dim 4, LoKr with factor 8
FORMS: dict[str, tuple[dict[str, str], dict[str, tuple[Any, ...]]]] = {
    "lora": ({}, {"lora_down.weight": (4, "I"), "lora_up.weight": ("O", 4)}),
    "tlora": ({"algo": "tlora"}, {"lora_down.weight": (8, "I"), "lora_up.weight": ("O", 8)}),
    "loha": (
        {"algo": "loha"},
        {"hada_w1_a": ("O", 4), "hada_w1_b": (4, "I"), "hada_w2_a": ("O", 4), "hada_w2_b": (4, "I")},
    ),
    "lokr": (
        {"algo": "lokr", "factor": "8"},
        {"lokr_w1": (8, 8), "lokr_w2_a": ("O/8", 4), "lokr_w2_b": (4, "I/8")},
    ),
    "lokr, full": (
        {"algo": "lokr", "factor": "8", "full_matrix": "True"},
        {"lokr_w1": (8, 8), "lokr_w2": ("O/8", "I/8")},
    ),
    "glora": (
        {"algo": "glora"}, {"a1.weight": ("I", 4), "a2.weight": (4, "I"), "b1.weight": ("O", 4), "b2.weight": (4, "I")}
    ),
    "diag-oft": ({"algo": "diag-oft"}, {"oft_blocks": ("O/4", 4, 4)}),
    "oft with a number of blocks": ({"algo": "diag-oft", "dim_is_count": "True"}, {"oft_blocks": (4, "O/4", "O/4")}),
    "ia3": ({"algo": "ia3"}, {"weight": ("O",), "on_input": ()}),
    "oft on the input side": (
        {"algo": "diag-oft", "dim_is_count": "True", "train_on_input": "True"},
        {"oft_R.weight": (4, "above the diagonal")},
    ),
    "ia3 on the input side": ({"algo": "ia3", "train_on_input": "True"}, {"weight": ("I",), "on_input": ()}),
    "lora, DoRA": (
        {"use_dora": "True"},
        {"lora_down.weight": (4, "I"), "lora_up.weight": ("O", 4), "dora_scale": ("O", 1)},
    ),
    "lokr, DoRA on the input side": (
        {"algo": "lokr", "factor": "8", "use_dora": "True", "wd_on_output": "False"},
        {"lokr_w1": (8, 8), "lokr_w2_a": ("O/8", 4), "lokr_w2_b": (4, "I/8"), "dora_scale": (1, "I")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", SPECS)
def test_keys_and_shapes_of_a_file(arch: str, form: str) -> None:
    anchor, (kwargs, wanted) = data_of(arch).anchor, FORMS[form]
    dotted, saved, O, I = anchor.dotted_name, anchor.saved_name, anchor.O, anchor.I
    spec = SPECS[arch]
    with torch.device("meta"):
        model = toy(arch, blocks=7 if arch == "sdxl" else 1, shrink=1)[spec.denoiser.name]
    pattern = dotted.replace(".", r"\.")
    network = networks.lora.create_network(1.0, 4, 3, None, None, model, only_patterns=pattern, **kwargs)
    sizes = {"O": O, "I": I, "O/8": O // 8, "I/8": I // 8, "O/4": O // 4}
    sizes["above the diagonal"] = (I // 4) * (I // 4 - 1) // 2
    expected = {f"{saved}.{k}": tuple(sizes.get(n, n) for n in shape) for k, shape in wanted.items()}
    tensors = codec.encode(network.adapted_layers)
    if form == "oft on the input side":  # sd-scripts' networks.oft_v2 has no alpha
        assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
        return
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {**expected, f"{saved}.alpha": ()}
    alphas = {"lokr, full": 4, "ia3": 4, "ia3 on the input side": 4, "tlora": 6}
    alpha = tensors[f"{saved}.alpha"]
    assert float(alpha) == (0 if "oft" in form else alphas.get(form, 3)) and alpha.dtype == torch.float32


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
