"""The model of Forge, held to names that were written down when it ran, and to the program itself where FORGE_PATH
gives it."""

from __future__ import annotations

import re
from pathlib import Path

import forge_program as program
import pytest
import torch
from comfyui_program import of_trainer
from common import KINDS, WIDE, trained
from registry_archs import SPECS, data_of
from test_reads_comfyui import assert_as_made, given, target, values
from torch import Tensor, nn
from toy_models import toy

from networks.files.codec import decode
from networks.files.readers import Given, forge
from networks.files.readers.patcher import slots

READER = forge.READERS[0]
# What it knows, and what it does not, of one layer of each kind.
KNOWN = {
    "sd": """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q lora_unet_input_blocks_1_1_proj_in
        lycoris_down_blocks_0_resnets_0_conv1 down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out
        lora_te_text_model_encoder_layers_0_self_attn_q_proj lora_te1_text_model_encoder_layers_11_mlp_fc1
    """,
    "sdxl": """
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q lora_te1_text_model_encoder_layers_0_mlp_fc2
        lora_te2_text_model_encoder_layers_31_self_attn_out_proj unet.mid_block.resnets.0.conv1
    """,
    "flux": """
        lora_unet_double_blocks_0_img_attn_qkv lora_unet_single_blocks_37_linear1 lora_transformer_proj_out
        diffusion_model.double_blocks.0.txt_mod.lin transformer.transformer_blocks.0.attn.to_k
        lycoris_single_transformer_blocks_0_proj_mlp lora_te3_encoder_block_0_layer_0_SelfAttention_q
    """,
    "chroma": "lora_unet_double_blocks_0_img_attn_qkv lora_te1_encoder_block_0_layer_0_SelfAttention_q",
    "sd3": "lora_unet_joint_blocks_0_x_block_attn_qkv lora_te2_text_model_encoder_layers_0_mlp_fc1",
}
UNKNOWN = {
    "sd": "lora_te_text_model_encoder_layers_0_layer_norm1 transformer_blocks.0",
    "sdxl": "lora_te_text_model_encoder_layers_31_mlp_fc1",
    "flux": "lora_unet_double_blocks_0_img_attn_norm_query_norm transformer_blocks.0.attn.to_k",
    "chroma": "transformer.transformer_blocks.0.attn.to_k lora_unet_single_blocks_0_norm_key_norm",
    "sd3": "transformer.transformer_blocks.0.attn.to_q lora_transformer_transformer_blocks_0_attn_to_q",
}


@pytest.mark.parametrize("arch", forge.MODELS)
def test_names_as_written_down(arch: str) -> None:
    known = slots(given(arch), forge.MODELS[arch])
    assert set(KNOWN[arch].split()) <= known.keys()
    assert known.keys().isdisjoint(UNKNOWN[arch].split())


def read(layers: int, **tensors: Tensor) -> tuple[str, int]:
    """(why it takes nothing, layers that it loads) of a file with as many layers of SDXL."""
    names = [f"input_blocks.4.1.transformer_blocks.{i}.attn1.to_q" for i in range(layers)]
    saved = [f"lora_unet_{name}".replace(".", "_") for name in names]
    file = {f"{name}.{suffix.replace('__', '.')}": t for name in saved for suffix, t in tensors.items()}
    shapes = {"unet": dict.fromkeys(names, (8, 6))}
    reading = READER.read(Given(file, {}, SPECS["sdxl"], shapes, decode(file)[0]))
    assert reading is not None
    return reading.refused, reading.loaded


def test_more_than_twelve_keys_that_it_does_not_know() -> None:
    lora = {"lora_up__weight": values(8, 2), "lora_down__weight": values(2, 6)}
    assert read(13, **lora, alpha=torch.tensor(1.0)) == ("", 13)
    assert read(6, oft_blocks=values(2, 4, 4)) == ("", 0)
    assert read(12, oft_blocks=values(2, 4, 4)) == ("", 0)
    assert "13 keys" in read(13, oft_blocks=values(2, 4, 4))[0]
    assert "another shape" in read(1, **lora, dora_scale=values(8))[0]


# -- the program itself


def check(arch: str, arguments: dict[str, str], folder: Path) -> None:
    part = SPECS[arch].denoiser.name
    models = {part: toy(arch, shrink=data_of(arch).shrink)[part].eval().requires_grad_(False)}
    run = trained(arch, models, folder / "a.safetensors", **arguments)
    base, where = of_trainer(arch, "", models[part])
    made = {s: program.patched(arch, run.given.tensors, base, program.CONFIGS[arch], s) for s in (1.0, 0.7)}
    if len(made[1.0][1]) > 12:
        reading = READER.read(run.given)
        assert reading is not None and f"{len(made[1.0][1])} keys" in reading.refused
        return

    def weight_at(module: nn.Module, strength: float) -> Tensor:
        key, rows = where[module]
        return made[strength][0].get(key, base[key])[rows]

    assert_as_made(READER, run, weight_at)


if program.ROOT:  # tests of what is not installed are not collected

    @pytest.mark.parametrize("arch", forge.MODELS)
    def test_all_names_as_it_knows_them(arch: str) -> None:
        """Of every layer of a model of full size, and no other names."""
        sized, encoders = given(arch), dict[str, Tensor]()
        for part, name in zip(SPECS[arch].text_encoders, program.encoder_names(arch), strict=False):
            shapes = sized.shapes.get(part.name, {}) if name else {}
            encoders |= {f"{name}.transformer.{k}.weight": torch.empty(s, device="meta") for k, s in shapes.items()}
        known = {name: target(slot)[1:] for name, slot in slots(sized, forge.MODELS[arch]).items()}
        real = program.key_map(arch, encoders)
        theirs = {name: real[name][1:] for name in known}
        assert {n: t for n, t in known.items() if t[1]} == {n: t for n, t in theirs.items() if known[n][1]}
        reached = {real[name][0] for name in known}
        more = [name for name, (path, *_) in real.items() if path in reached and name not in known]
        assert not [name for name in more if not re.fullmatch(r".*class_embedding[._]linear_[12]", name)]

    CASES = [(arch, kind) for arch in forge.MODELS for kind in KINDS if kind != "norms"]

    @pytest.mark.parametrize(("arch", "kind"), [one for one in CASES if one[1] in WIDE or one[0] in ("sd", "flux")])
    def test_weights_as_it_makes_them(arch: str, kind: str, tmp_path: Path) -> None:
        check(arch, KINDS[kind], tmp_path)
