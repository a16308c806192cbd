"""Files for other programs, `save_format`: their names by hand, exact joins, what is converted, and the way back."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS
from registry_archs import SPECS
from safetensors.torch import load_file
from test_diffusers_dialect import new_weights
from test_every_architecture import create, from_file, model_of
from tiny_parts import randomise, sd_unet
from torch import Tensor

import networks.lora
from networks.files.adapter_file import FileTensors

DOUBLE, MODULATION = (
    "double_blocks.[01].{img,txt}_{attn.qkv,attn.proj,mlp.0,mlp.2}",
    "double_blocks.[01].{img,txt}_mod.lin",
)
SINGLE, OF_SINGLE = "single_blocks.[01].{linear1,linear2}", "single_blocks.[01].modulation.lin"
# What ComfyUI 0.19.3 calls the layers that are trained by default; [..] and {..} are alternatives. Of HiDream-O1 and
# Qwen-Image 2.1, which it does not have, what later versions do.
NAMES = {
    "zimage": ("layers.[01].attention.{to_q,to_k,to_v,out}", "layers.[01].feed_forward.{w1,w2,w3}"),
    "qwen_image_21": (
        "transformer_blocks.[01].attn.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.[01].img_mlp.{gate_layer,proj,out}",
    ),
    "hunyuan_video": (DOUBLE, SINGLE),
    "hunyuan_image": (DOUBLE, MODULATION, SINGLE, OF_SINGLE),
    "hv_1_5": (DOUBLE, MODULATION),
    "framepack": (DOUBLE, SINGLE),
    "hidream_o1": (
        "language_model.layers.[01].self_attn.{q,k,v,o}_proj",
        "language_model.layers.[01].mlp.{gate,up,down}_proj",
        "x_embedder.proj[12]",
        "final_layer2.linear",
    ),
    "ltx2": (
        "transformer_blocks.[01].{attn1,attn2,audio_attn1,audio_attn2,audio_to_video_attn,video_to_audio_attn}"
        ".{to_q,to_k,to_v,to_out.0}",
    ),
}
FORMS: dict[str, dict[str, str]] = {
    **{algo: {"algo": algo} for algo in FOR_LINEARS},
    "dora": {"use_dora": "True"},
    "dora of inputs": {"use_dora": "True", "wd_on_output": "False"},
    "lokr dora": {"algo": "lokr", "use_dora": "True"},
    "lokr whole": {"algo": "lokr", "full_matrix": "True"},
    "rescaled": {"algo": "diag-oft", "rescaled": "True", "constraint": "0.1"},
    "of inputs": {"algo": "diag-oft", "train_on_input": "True"},
}
# How far half precision may be from what was trained, in parts of the update: a product of up to five rounded factors.
NEAR = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def expanded(line: str) -> list[str]:
    parts = re.split(r"(\[\w+\]|\{[\w,.]+\})", line)
    choices = [list(p[1:-1]) if p[:1] == "[" else p[1:-1].split(",") if p[:1] == "{" else [p] for p in parts]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def layers_of(tensors: dict[str, Tensor]) -> set[str]:
    """What stands before the suffixes of algorithms, all of which are known here."""
    suffixes = r"\.(lora_(down|up)\.weight|alpha|dora_scale|diff|lokr_\w+|hada_\w+|[ab][12]\.weight)$"
    return {re.sub(suffixes, "", key) for key in tensors if "." in key}


def saved(arch: str, folder: Path, dtype: torch.dtype | None = None, **kwargs: str) -> tuple[Any, Path]:
    network = create(arch, model_of(arch), **kwargs)
    randomise(network)
    network.save_weights(str(folder / "a.safetensors"), dtype, {})
    network.detach()
    return network, folder / "a.safetensors"


@pytest.mark.parametrize("algo", ["lora", "lokr", "diag-oft", "glora"])
@pytest.mark.parametrize("arch", NAMES)
def test_names_of_comfyui_by_hand(arch: str, algo: str, tmp_path: Path) -> None:
    _, file = saved(arch, tmp_path, save_format="comfyui", algo=algo)
    root = "transformer." if arch == "qwen_image_21" else "diffusion_model."
    wanted = {f"{root}{name}" for line in NAMES[arch] for name in expanded(line)}
    assert layers_of(load_file(file)) == wanted


@pytest.mark.parametrize("arch", [name for name in SPECS if name not in NAMES])
def test_the_trainers_names_stay_where_comfyui_knows_them(arch: str, tmp_path: Path) -> None:
    """And then a file for it is the portable one, bit for bit."""
    network, file = saved(arch, tmp_path, save_format="comfyui", algo="lokr")
    for_comfyui = load_file(file)
    network.file_format = networks.lora.create_network(1.0, 2, 1, None, None, sd_unet()).file_format
    network.save_weights(str(tmp_path / "b.safetensors"), None, {})
    portable = load_file(tmp_path / "b.safetensors")
    assert for_comfyui.keys() == portable.keys()
    assert all(torch.equal(for_comfyui[key], tensor) for key, tensor in portable.items())


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("form", ["comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("arch", SPECS)
def test_the_file_has_what_was_trained(arch: str, name: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Read back by our own reader into a network of the file; or the error says what is not possible, at creation."""
    try:
        network, file = saved(arch, tmp_path, dtype, save_format=form, **FORMS[name])
    except ValueError as error:
        assert form != "comfyui", "what it computes, or can be told as a difference, is never refused"
        assert re.search(
            "is no LoRA of fewer values|holds DoRA of output rows|reads no adapter of|takes the", str(error)
        )
        return
    path = tmp_path / "a-peft" / "adapter_model.safetensors" if form == "peft" else file
    wanted, base = new_weights(network), {layer.lora_name: layer.whole_weight() for layer in network.adapted_layers}
    found = new_weights(from_file(arch, model_of(arch), FileTensors(path)))
    assert found.keys() == wanted.keys()
    for layer, weight in wanted.items():
        update = (weight - base[layer]).norm()
        assert (found[layer] - weight).norm() <= NEAR[dtype] * update + 1e-7 * weight.norm(), layer


@pytest.mark.parametrize("algo", ["lora", "loha", "dylora", "tlora"])
def test_joined_at_equal_scale_bit_for_bit(algo: str, tmp_path: Path) -> None:
    """Query, key and value, each with its rank, become one block-diagonal layer of all ranks."""
    network, file = saved("hv_1_5", tmp_path, save_format="comfyui", algo=algo)
    tensors, at = load_file(file), "diffusion_model.double_blocks.0.img_attn.qkv"
    own = {layer.lora_name: layer for layer in network.adapted_layers}
    parts = [own[f"lora_unet_double_blocks_0_img_attn_{letter}"] for letter in "qkv"]
    packs, rank, rows = [part.adapter.pack() for part in parts], 0, 0
    for pack in packs:
        for suffix, tensor in pack.items():
            whole = tensors[f"{at}.{suffix}"]
            if suffix.endswith(("down.weight", "_b")):
                assert torch.equal(whole[rank : rank + len(tensor)], tensor)
            else:
                assert torch.equal(whole[rows : rows + len(tensor), rank : rank + tensor.shape[1]], tensor)
        left = pack.get("lora_up.weight", pack.get("hada_w1_a"))
        assert left is not None
        rows, rank = rows + left.shape[0], rank + left.shape[1]
    assert all(
        int(tensors[f"{at}.{key}"].count_nonzero()) == sum(int(p[key].count_nonzero()) for p in packs)
        for key in packs[0]
    )
    assert float(tensors[f"{at}.alpha"]) / rank == parts[0].scale


def test_projections_of_which_some_are_trained(tmp_path: Path) -> None:
    """Rows of the others stay as they are; with DoRA, whose lengths nobody knows there, as a difference."""
    for name, kwargs in {"plain": {}, "dora": {"use_dora": "True"}}.items():
        only = r"double_blocks\.0\.img_attn_[qv]"
        network, file = saved("hv_1_5", tmp_path, save_format="comfyui", only_patterns=only, **kwargs)
        tensors = load_file(file)
        at = "diffusion_model.double_blocks.0.img_attn.qkv"
        assert layers_of(tensors) == {at}
        if name == "dora":
            found = tensors[f"{at}.diff"]
        else:
            down, up = (tensors[f"{at}.lora_{side}.weight"] for side in ("down", "up"))
            found = up @ down * (float(tensors[f"{at}.alpha"]) / len(down))
        changes = {
            layer.lora_name[-1]: layer.new_weight(w := layer.whole_weight()) - w for layer in network.adapted_layers
        }
        wanted = torch.cat([changes["q"], torch.zeros_like(changes["q"]), changes["v"]]).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"algo": "diag-oft"}, r"save_format=comfyui: 14 layers as the whole difference, 0 MiB"),
        ({"algo": "ia3"}, "14 layers as the whole difference"),
        ({"algo": "lokr"}, ""),
        ({"algo": "tlora"}, ""),
    ],
)
def test_what_is_converted_is_told(
    kwargs: dict[str, str], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    network, _ = saved("zimage", tmp_path, save_format="comfyui", **kwargs)
    notes = " ".join(note for note in network.plan.notes if note.startswith("save_format="))
    assert re.search(told, notes) if told else not notes
    assert ("a.safetensors: 14 layers as the whole difference (" in caplog.text) == bool(told)


def test_tucker_forms_that_comfyui_does_not_compute(tmp_path: Path) -> None:
    """A LoKr with a core is a flat LoRA there; LoRA and LoHa of two axes keep theirs. It is computed by hand."""
    for algo, suffix in (("lokr", "lora_down.weight"), ("lora", "lora_mid.weight"), ("loha", "hada_t1")):
        options = {"algo": algo, "use_tucker": "True", "save_format": "comfyui", "only_patterns": r".*conv1"}
        network = networks.lora.create_network(1.0, 2, 1, None, None, sd_unet(), conv_dim="1", **options)
        randomise(network)
        network.save_weights(str(tmp_path / f"{algo}.safetensors"), None, {})
        tensors = load_file(tmp_path / f"{algo}.safetensors")
        name = network.adapted_layers[0].lora_name
        assert f"{name}.{suffix}" in tensors and not any("lokr" in key for key in tensors)
        if algo == "lokr":
            layer, down, up = network.adapted_layers[0], tensors[f"{name}.{suffix}"], tensors[f"{name}.lora_up.weight"]
            found = torch.einsum("or,rikl->oikl", up.flatten(1), down) * float(tensors[f"{name}.alpha"]) / len(down)
            wanted = layer.new_weight(weight := layer.whole_weight()) - weight
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algo", ["loha", "lokr", "glora"])
def test_diffusers_gets_loras_of_few_ranks(algo: str, tmp_path: Path) -> None:
    network, file = saved("qwen_image", tmp_path, save_format="diffusers", algo=algo)
    tensors = load_file(file)
    assert {key.partition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    layer = next(one for one in network.adapted_layers if one.lora_name.endswith("blocks_0_attn_to_q"))
    down, up = (tensors[f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "AB")
    wanted = layer.new_weight(weight := layer.whole_weight()) - weight
    torch.testing.assert_close(up @ down, wanted.detach(), rtol=1e-4, atol=1e-5)
