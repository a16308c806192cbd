"""Arguments by block and by kind of layer, and every architecture of sd-scripts from creation to a loaded file."""

from __future__ import annotations

import importlib
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS
from registry import data_of
from tiny_parts import sd_unet, sdxl_unet, text_encoder
from toy_models import signal, toy

import networks.lora
import networks.lora_flux
from networks.archs import ARCHS
from networks.plan.plan import PlanRow

SPECS = {spec.name: spec for spec in ARCHS}
TOYS = sorted(SPECS.keys() - {"sd", "sdxl"})
DOWN, MID, UP = (
    "down_blocks.0.attentions.0.proj_in",
    "mid_block.attentions.0.proj_in",
    "up_blocks.1.attentions.1.proj_in",
)


def rows(unet: Any, dim: int = 4, alpha: float = 2, **kwargs: str) -> dict[str, PlanRow]:
    return {row.dotted_name: row for row in networks.lora.plan(dim, alpha, None, unet, **kwargs).trained}


def csv(count: int, default: Any, **numbered: Any) -> str:
    values = [default] * count
    for key, value in numbered.items():
        values[int(key[1:])] = value
    return ",".join(map(str, values))


def models(arch: str, blocks: int = 2) -> tuple[list[Any], Any]:
    found = toy(arch, blocks)
    spec = SPECS[arch]
    return [found.get(part.name) for part in spec.text_encoders], found[spec.denoiser.name]


def test_dims_and_alphas_by_block() -> None:
    dims, alphas = csv(25, 3, b1=6, b17=0), csv(25, "", b1=1.5)
    found = rows(sd_unet(), block_dims=dims, block_alphas=alphas)
    assert (found[DOWN].dim, found[DOWN].alpha, found[DOWN].scale) == (6, 1.5, 0.25)
    assert (found[MID].dim, found[MID].alpha) == (3, 2)  # an empty item means network_alpha
    assert UP not in found  # block 17 has dim 0
    conv = rows(sd_unet(), block_dims=csv(25, 3), conv_block_dims=csv(25, 2, b1=5), conv_block_alphas=csv(25, "", b1=4))
    kernel = conv["down_blocks.0.resnets.0.conv1"]
    assert (kernel.dim, kernel.alpha) == (5, 4) and conv["mid_block.resnets.0.conv1"].alpha == 1
    regex = rows(sd_unet(), block_dims=csv(25, 3), network_reg_dims=".*attn1.*=7")
    assert {row.dim for name, row in regex.items() if "attn1" in name} == {7} and regex[DOWN].dim == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_dims": "4,4"}, "block_dims has 2 values, but Stable Diffusion 1.x / 2.x has 25 blocks"),
        ({"block_alphas": csv(25, 1)}, "block_alphas is given without block_dims"),
        ({"conv_block_dims": csv(25, 1)}, "conv_block_dims is given without block_dims"),
        ({"down_lr_weight": "cosin"}, r"down_lr_weight=cosin is no curve.*did you mean cosine\?"),
        ({"down_lr_weight": csv(13, 1)}, "down_lr_weight has 13 values, but there are 12 blocks"),
        ({"block_dims": "4;4"}, "is not a whole number"),
    ],
)
def test_mistakes(kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(sd_unet(), **kwargs)


def test_a_threshold_without_lists_is_told() -> None:
    told = networks.lora.plan(4, 1, None, sd_unet(), block_lr_zero_threshold="0.5").warnings
    assert any("block_lr_zero_threshold (without down_, mid_ or up_lr_weight)" in line for line in told)


def test_learning_rates_by_block() -> None:
    network = networks.lora.create_network(
        1.0, 4, 1, None, text_encoder(), sd_unet(),
        down_lr_weight="cosine+.25", mid_lr_weight="0.5", up_lr_weight="0,0,0,0",
    )  # fmt: skip
    blocks = {row.block: row.block_rate for row, _ in network.layers if row.part == "unet"}
    assert blocks[1] == pytest.approx(math.cos(math.pi / 22) + 0.25) and blocks[12] == 0.5
    assert 16 not in blocks and blocks[17] == 1.0  # a factor of 0 trains nothing; a short list goes on with 1
    groups, texts = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-3)
    rates = dict(zip(texts, (group["lr"] for group in groups), strict=True))
    assert rates["unet block 12"] == pytest.approx(5e-3) and rates["text_encoder"] == 1e-3
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_sdxl_levels_start_behind_the_embeddings() -> None:
    weights = ",".join(["1"] * 4 + ["0.5"] * 5)
    unet = sdxl_unet()
    found = rows(unet, down_lr_weight=weights, mid_lr_weight="1,0.25")
    assert {row.block_rate for row in found.values() if row.block == 5} == {0.5}
    assert {row.block_rate for row in found.values() if row.block == 11} == {0.25}
    assert {row.block_rate for row in found.values() if (row.block or 0) >= 13} == {1.0}


def test_kinds_of_layers() -> None:
    encoders, flux = models("flux")
    found = rows(flux, img_attn_dim="8", single_dim="0", in_dims="[2,0,0,3,0]", train_double_block_indices="1")
    assert found["double_blocks.1.img_attn.qkv"].dim == 8 and found["double_blocks.1.txt_attn.qkv"].dim == 4
    assert "double_blocks.0.img_attn.qkv" not in found and "single_blocks.0.linear1" not in found
    assert found["single_blocks.0.modulation.lin"].dim == 4
    assert (found["img_in"].dim, found["guidance_in.in_layer"].dim) == (2, 3) and "txt_in" not in found
    only = rows(flux, train_blocks="single", in_dims="[2,0,0,0,0]")
    assert {name.split(".")[0] for name in only} == {"single_blocks", "img_in"}
    assert {row.block for row in rows(flux, blocks="19-20").values()} == {19, 20}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_dims": "2,2"}, "in_dims has 2 values and wants 5: img_in"),
        ({"train_blocks": "doubl"}, r"train_blocks=doubl is none of all, double, single; did you mean double\?"),
        ({"train_single_block_indices": "0-7"}, "this model has the blocks 0 to 1 of single_blocks"),
        ({"emb_dims": "1,1,1,1,1,1"}, "emb_dims has no effect on FLUX.1; it belongs to Stable Diffusion 3"),
        ({"down_lr_weight": "zeros"}, "down_lr_weight has no effect on FLUX.1; it belongs to Stable Diffusion"),
        ({"img_attn_dim": "8", "train_blocks": "single"}, "img_attn_dim has no effect: no such layer is left"),
    ],
)
def test_mistakes_on_flux(kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(models("flux")[1], **kwargs)


@pytest.mark.parametrize("value", ["none", ""])
def test_no_block_at_all(value: str) -> None:
    """Nothing behind the sign means none, as in the trainer."""
    found = rows(models("flux")[1], train_double_block_indices=value)
    assert found and not any(name.startswith("double_blocks") for name in found)


def test_chroma_has_no_guidance_layer() -> None:
    with pytest.raises(ValueError, match="in_dims: this model has no layer guidance_in"):
        rows(models("chroma")[1], in_dims="2,0,0,2,2")


def test_an_entry_asserts_its_model() -> None:
    with pytest.raises(ValueError, match=r"networks.lora_flux: this model is .* 3 / 3.5: use .*networks.lora_sd3"):
        networks.lora_flux.plan(4, 1, *models("sd3"))


def test_a_model_of_other_kinds_of_layers_is_a_warning_and_one_of_another_size_a_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers that are missing in every block mean another model, or a library with other names; fewer blocks do not."""
    encoders, flux = models("flux", 3)
    plan = networks.lora_flux.plan(4, 1, encoders, flux)
    assert any(note.startswith("of a size of its own: 39 layers by default, released") for note in plan.notes)
    for block in flux.get_submodule("double_blocks").children():
        del block._modules["img_mlp"]
    with caplog.at_level(logging.INFO, logger="networks"):
        networks.lora_flux.create_network(1.0, 4, 1, None, encoders, flux)
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert said.startswith("FLUX.1 usually has 228 or 304 layers to train of 7 or 10 kinds, this model has 33 of 9")
    assert not plan.warnings and not any("size" in record.getMessage() for record in caplog.records)


def test_t5_is_trained_on_request_and_where_a_file_has_it(tmp_path: Path) -> None:
    encoders, flux = models("flux")
    assert not networks.lora_flux.create_network(1.0, 4, 1, None, encoders, flux).train_t5xxl
    network = networks.lora_flux.create_network(1.0, 4, 1, None, encoders, flux, train_t5xxl="true")
    assert network.train_t5xxl
    network.save_weights(tmp_path / "a.safetensors", None, {})
    again, _ = networks.lora_flux.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, encoders, flux
    )
    assert again.train_t5xxl and len(again.text_encoder_loras) == len(network.text_encoder_loras)


@pytest.mark.sweep
@pytest.mark.parametrize("algo", FOR_LINEARS)
@pytest.mark.parametrize("arch", TOYS)
def test_train_save_load(arch: str, algo: str, tmp_path: Path) -> None:
    """A few optimizer steps; the file alone gives the same outputs, applied and merged."""
    entry = importlib.import_module(f"networks.{SPECS[arch].entry}")
    encoders, denoiser = models(arch, blocks=1)
    network = entry.create_network(
        1.0, max(4, data_of(algo).least_dim), 2, None, encoders, denoiser, neuron_dropout=None, algo=algo
    )
    network.apply_to(encoders, denoiser, True, True)
    rate = 1e-5 * data_of(algo).rate
    groups, texts = network.prepare_optimizer_params_with_multiple_te_lrs([rate], 2 * rate, rate)
    assert len(groups) == len(texts)
    optimizer = torch.optim.AdamW(groups)
    parts = [model for model in (*encoders, denoiser) if model is not None]
    base = [model(signal()).detach() for model in parts]
    losses = []
    for _ in range(4):
        loss = torch.stack(
            [(model(signal()) - y - 0.1).square().mean() for model, y in zip(parts, base, strict=True)]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    network.eval()  # some algorithms draw at random in training
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), torch.float32, {})
    wanted = [model(signal()).detach() for model in parts]
    network.detach()
    loaded, weights = entry.create_network_from_weights(1.0, str(file), None, encoders, denoiser, for_inference=True)
    loaded.apply_to(encoders, denoiser)
    loaded.load_state_dict(weights, strict=True)
    for model, y in zip(parts, wanted, strict=True):
        torch.testing.assert_close(model(signal()), y)
    loaded.detach()
    loaded.merge_to(encoders, denoiser, weights, torch.float32, "cpu")
    for model, y in zip(parts, wanted, strict=True):
        torch.testing.assert_close(model(signal()), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold,trained", [("0.25", False), ("0.2499", True)])
def test_a_block_at_the_threshold_is_left_out(threshold: str, trained: bool) -> None:
    """As the trainers do: rates above it are trained."""
    found = networks.lora.plan(4, 1, None, sd_unet(), mid_lr_weight="0.25", block_lr_zero_threshold=threshold).rows
    middle = [row for row in found if row.dotted_name.startswith("mid_block.") and row.kind == "Linear"]
    inside = [row for row in middle if ".attentions." in row.dotted_name]
    assert inside and all(row.trained is trained for row in inside)
    assert trained or {row.reason for row in inside} == {"its block has the learning rate factor 0"}
