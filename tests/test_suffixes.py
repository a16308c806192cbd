"""What files of other programs have beside the factors of a layer, or instead of them; keys as those programs write
them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from merge import main as merge_main
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_parts import sd_unet
from torch import Tensor, nn

import networks.lora
from networks.files.adapter_file import Naming, open_adapter
from networks.files.merged import merged_weight
from networks.tools.ranks import RankRule
from networks.tools.resize import resize

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = f"{ATTENTION}.to_out.0"
NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
DOTTED, FLAT = f"unet.{LAYER}", f"lora_unet_{LAYER.replace('.', '_')}"
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shape(name: str = LAYER) -> tuple[int, ...]:
    return tuple(sd_unet().get_parameter(f"{name}.weight").shape)


def pair(A: str = "lora_A.weight", B: str = "lora_B.weight", name: str = DOTTED) -> tuple[Tensors, Tensor]:
    """A LoRA of rank 2 for the layer, and its weight change at alpha = 2."""
    O, I = shape()
    down, up = torch.randn(2, I), torch.randn(O, 2)
    return {f"{name}.{A}": down, f"{name}.{B}": up}, up @ down


def changed(tensors: Mapping[str, Tensor], **options: str) -> Tensors:
    """What a network of such a file makes of the model: parameter -> its change."""
    unet = sd_unet()
    old = {name: p.detach().clone() for name, p in unet.named_parameters()}
    network, _ = networks.lora.create_network_from_weights(
        1.0, None, None, None, unet, weights_sd=dict(tensors), for_inference=True, **options
    )
    network.merge_to(None, unet)
    now = dict(unet.named_parameters())
    return {name: now[name].detach() - p for name, p in old.items() if not torch.equal(now[name], p)}


def check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-5)


# -- changes of biases


Beside = tuple[str, str, str, float | None, float]
BIASES: dict[str, Beside] = {  # suffixes of the factors, key of the bias, alpha, what multiplies the bias
    # https://huggingface.co/Kijai/WanVideo_comfy: Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32
    "kijai": ("lora_down.weight", "lora_up.weight", "diff_b", 1.0, 1.0),
    "comfyui": ("lora_A.weight", "lora_B.weight", "diff_b", None, 1.0),
    # PEFT with lora_bias=True, diffusers' control LoRAs of FLUX
    "diffusers": ("lora_A.weight", "lora_B.weight", "lora_B.bias", None, 1.0),
    "peft": ("lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias", 1.0, 0.5),
    "adapter": ("lora_A.mine.weight", "lora_B.mine.weight", "lora_B.mine.bias", None, 1.0),
}


@pytest.mark.parametrize("program", BIASES)
def test_a_change_of_the_bias_beside_lora(program: str) -> None:
    A, B, key, alpha, factor = BIASES[program]
    tensors, change = pair(A, B)
    bias = torch.randn(shape()[0])
    tensors[f"{DOTTED}.{key}"] = bias
    if alpha is not None:
        tensors[f"{DOTTED}.alpha"] = torch.tensor(alpha)
    scale = 1.0 if alpha is None else alpha / 2
    check(changed(tensors), {f"{LAYER}.weight": change * scale, f"{LAYER}.bias": bias * factor})


def test_after_a_converter_that_leaves_no_dot() -> None:
    """musubi-tuner's convert_lora.py --target default: only lora_A and lora_B keep their dots."""
    tensors, change = pair("lora_down.weight", "lora_up.weight", FLAT)
    bias = torch.randn(shape()[0])
    tensors |= {f"{FLAT}_diff_b": bias, f"{FLAT}.alpha": torch.tensor(2)}
    check(changed(tensors), {f"{LAYER}.weight": change, f"{LAYER}.bias": bias})


def test_zeros_are_nothing() -> None:
    tensors, change = pair("lora_down.weight", "lora_up.weight")
    size = shape(NORM)
    tensors |= {f"{DOTTED}.diff_b": torch.zeros(shape()[0])}
    tensors |= {f"unet.{NORM}.diff": torch.zeros(size), f"unet.{NORM}.diff_b": torch.zeros(size)}
    tensors |= {"unet.down_blocks.0.diff_m": torch.zeros(1, 6, 8)}
    check(changed(tensors), {f"{LAYER}.weight": change})


def test_a_whole_difference_on_a_norm() -> None:
    """https://github.com/kijai/ComfyUI-WanVideoWrapper/issues/1862"""
    w, b = torch.randn(shape(NORM)), torch.randn(shape(NORM))
    wanted = {f"{NORM}.weight": w, f"{NORM}.bias": b}
    check(changed({f"unet.{NORM}.diff": w, f"unet.{NORM}.diff_b": b}), wanted)
    check(changed({f"unet.{NORM}.w_norm": w, f"unet.{NORM}.b_norm": b}), wanted)


def test_the_bias_acts_trains_and_is_saved(tmp_path: Path) -> None:
    tensors, change = pair()
    bias = torch.randn(shape()[0])
    unet = sd_unet()
    network, _ = networks.lora.create_network_from_weights(
        1.0, None, None, None, unet, weights_sd={**tensors, f"{DOTTED}.diff_b": bias}
    )
    layer = unet.get_submodule(LAYER)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(3, shape()[1])
    before = layer(x)
    network.apply_to(None, unet, False, True)
    y = layer(x)
    torch.testing.assert_close(y - before, x @ change.T + bias, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    parameters = dict(network.named_parameters())
    (own,) = [p for name, p in parameters.items() if name.endswith("diff_b")]
    assert own.grad is not None
    torch.testing.assert_close(own.grad, torch.full_like(own, 3.0))
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    saved = load_file(tmp_path / "a.safetensors")
    assert torch.equal(saved[f"{FLAT}.diff_b"], bias)
    check(changed(saved), {f"{LAYER}.weight": change, f"{LAYER}.bias": bias})
    network.save_weights(str(tmp_path / "half.safetensors"), torch.float16, {})
    assert f"{FLAT}.diff_b" in load_file(tmp_path / "half.safetensors")


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "glora"])
def test_beside_all_additive_factors(algo: str) -> None:
    O, I = shape()
    tensors = {
        "lora": {"lora_down.weight": torch.randn(2, I), "lora_up.weight": torch.randn(O, 2)},
        "loha": {f"hada_w{n}_{k}": torch.randn(*s) for n in (1, 2) for k, s in (("a", (O, 2)), ("b", (2, I)))},
        "lokr": {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(O // 4, I // 4)},
        "glora": {"a1.weight": torch.randn(I, 1), "a2.weight": torch.randn(1, I), "b1.weight": torch.randn(O, 1),
                  "b2.weight": torch.randn(1, I)},
    }[algo]  # fmt: skip
    bias = torch.randn(O)
    named = {f"{FLAT}.{suffix}": t for suffix, t in tensors.items()}
    found, alone = changed({**named, f"{FLAT}.diff_b": bias}), changed(named)
    check(found, {**alone, f"{LAYER}.bias": bias})


def test_a_plain_network_says_that_it_has_no_place(tmp_path: Path) -> None:
    tensors, _ = pair("lora_down.weight", "lora_up.weight", FLAT)
    file = tmp_path / "a.safetensors"
    save_file({**tensors, f"{FLAT}.diff_b": torch.ones(shape()[0])}, file)
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 2, 2, None, None, unet)
    network.apply_to(None, unet, False, True)
    with pytest.raises(ValueError, match=rf"{FLAT}: the file has diff_b, .*--dim_from_weights"):
        network.load_weights(str(file))


def test_a_layer_without_bias_has_no_place_for_it() -> None:
    name = LAYER.replace("to_out.0", "to_q")
    O, I = shape(name)
    tensors = {f"unet.{name}.lora_A.weight": torch.randn(2, I), f"unet.{name}.lora_B.weight": torch.randn(O, 2)}
    with pytest.raises(ValueError, match="diff_b, but this layer has no bias"):
        changed({**tensors, f"unet.{name}.diff_b": torch.ones(O)})


def test_merge_and_resize_keep_it(tmp_path: Path) -> None:
    tensors, change = pair()
    bias = torch.randn(shape()[0])
    tensors |= {f"{DOTTED}.lora_B.bias": bias}
    adapter, checkpoint, out = (tmp_path / f"{name}.safetensors" for name in ("adapter", "model", "out"))
    save_file(tensors, adapter)
    model = sd_unet().state_dict()
    save_file({key: t.contiguous() for key, t in model.items()}, checkpoint)
    assert merge_main([str(checkpoint), str(adapter), "--out", str(out)]) == 0
    merged = load_file(out)
    check({key: merged[key] - t for key, t in model.items() if not torch.equal(merged[key], t)}, {
        f"{LAYER}.weight": change, f"{LAYER}.bias": bias
    })  # fmt: skip
    resize(adapter, tmp_path / "smaller.safetensors", rule=RankRule(1))
    smaller = load_file(tmp_path / "smaller.safetensors")
    assert torch.equal(smaller[f"{DOTTED}.lora_B.bias"], bias) and not any(key.endswith("diff_b") for key in smaller)
    check({k: v for k, v in changed(smaller).items() if k.endswith("bias")}, {f"{LAYER}.bias": bias})


# -- names that mean the same


SPELLINGS = {
    "diffusers before PEFT": ("lora.down.weight", "lora.up.weight"),
    "diffusers' first text encoders": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "an adapter's own name": ("lora_A.some_name.weight", "lora_B.some_name.weight"),
    "XLabs": ("down.weight", "up.weight"),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_spellings_of_the_two_factors(program: str) -> None:
    tensors, change = pair(*SPELLINGS[program])
    check(changed(tensors), {f"{LAYER}.weight": change})


def test_factors_of_inputs_as_peft_has_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    base = model[0].weight.detach().clone()
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    (saved,) = open_adapter(tmp_path, Naming()).all_read().layers.values()
    torch.testing.assert_close(merged_weight(saved, base), wrapped.merge_and_unload()[0].weight.detach())


# -- what is not read


UNREAD = {
    # a parameter of its own that is no layer: https://github.com/Comfy-Org/ComfyUI/issues/8922
    "diff_m": lambda O, I: torch.ones(1, 6, O),
    "set_weight": lambda O, I: torch.ones(O, I),  # ComfyUI's form of FLUX control LoRAs
    "reshape_weight": lambda O, I: torch.tensor([O, I]),
    "vera_lambda_b": lambda O, I: torch.ones(O),  # PEFT's others
    "ia3_l": lambda O, I: torch.ones(O, 1),  # of outputs, which are those of the bias as well
    "lora_embedding_A": lambda O, I: torch.ones(2, I),
}  # fmt: skip


def test_a_block_s_own_parameter_can_be_left_out() -> None:
    """Even one among many layers is an error: https://github.com/Comfy-Org/ComfyUI/issues/8922"""
    tensors, change = pair()
    many = {key.replace("to_out.0", name): t for key, t in tensors.items() for name in ("to_out.0", "to_q")}
    many["unet.down_blocks.0.diff_m"] = torch.ones(1, 6, 8)
    with pytest.raises(ValueError, match=r"lora_unet_down_blocks_0 has diff_m, .*; allow_missing=True goes on"):
        changed(many)
    found = changed(many, allow_missing="True")
    check(found, {f"{ATTENTION}.{name}.weight": change for name in ("to_out.0", "to_q")})


@pytest.mark.parametrize("suffix", UNREAD)
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "alone"])
def test_what_no_algorithm_has_is_named(suffix: str, beside: bool) -> None:
    make: Callable[[int, int], Tensor] = UNREAD[suffix]
    tensors, _ = pair()
    name = DOTTED if beside else DOTTED.replace("attn1", "attn2")
    tensors[f"{name}.{suffix}"] = make(*shape())
    with pytest.raises(ValueError, match=rf"{name.replace('.', '_').removeprefix('unet_')}.* {suffix}"):
        changed(tensors)


def test_what_acts_on_other_tokens_is_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    """Stand-In's files: https://github.com/WeChatCV/Stand-In"""
    tensors, change = pair()
    with caplog.at_level(logging.WARNING):
        found = changed({**tensors, f"unet.{ATTENTION}.q_loras.down.weight": torch.ones(2, 4)})
    check(found, {f"{LAYER}.weight": change})
