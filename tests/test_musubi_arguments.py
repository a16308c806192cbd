"""Each argument and each known-good combination of the blissful forks' reference, on a stand-in of Qwen-Image:
something that a user can observe changes, and it is what the reference says."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_musubi import split_by_the_trainer
from tiny_parts import randomise, sd_unet
from torch import nn
from toy_models import signal, toy

import networks.lora
import networks.lora_flux
import networks.lora_qwen_image
import networks.lora_wan

MOD = ("img_mod", "txt_mod")


def dit(arch: str = "qwen_image") -> nn.Module:
    return toy(arch)["dit"].eval().requires_grad_(False)


def create(model: nn.Module, *network_args: str, dim: int = 16, alpha: float = 8, entry: Any = None) -> Any:
    kwargs = split_by_the_trainer(list(network_args))
    module = entry or networks.lora_qwen_image
    network = module.create_arch_network(1.0, dim, alpha, None, None, model, neuron_dropout=None, **kwargs)
    network.prepare_network(object())
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return network


def names(network: Any) -> set[str]:
    return {row.dotted_name for row in network.plan.trained}


def trained(network: Any, model: nn.Module) -> float:
    """Two steps as the trainer makes them; the loss must fall."""
    groups, _ = network.prepare_optimizer_params(unet_lr=1e-3)
    network.prepare_grad_etc(model)
    network.on_epoch_start(model)
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(4):
        network.on_step_start()
        loss = (model(signal()) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return losses[-1]


# -- RS-LoRA


def test_rs_lora_scales_by_the_root_of_the_rank() -> None:
    """The reference's own example: dim 128, alpha 64 is 0.5, or 5.66."""
    for arguments, scale in (((), 0.5), (("use_rslora=True",), 64 / math.sqrt(128))):
        network = create(dit(), *arguments, dim=128, alpha=64)
        assert {layer.scale for layer in network.adapted_layers} == {scale}


@pytest.mark.parametrize("arguments", [(), ("use_rslora=True",)])
def test_alpha_0_is_scale_1(arguments: tuple[str, ...]) -> None:
    assert {layer.scale for layer in create(dit(), *arguments, alpha=0).adapted_layers} == {1.0}


@pytest.mark.parametrize("alpha", [8, 0])
def test_rs_lora_files_have_the_right_strength_for_readers_of_alpha_over_rank(alpha: float, tmp_path: Path) -> None:
    network = create(dit(), "use_rslora=True", alpha=alpha)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.bfloat16, {"a": "b"})
    tensors = load_file(tmp_path / "a.safetensors")
    for layer in network.adapted_layers:
        rank = tensors[f"{layer.lora_name}.lora_down.weight"].shape[0]
        assert float(tensors[f"{layer.lora_name}.alpha"]) / rank == pytest.approx(layer.scale, rel=1e-6)


def test_max_norm_uses_the_rs_lora_scale() -> None:
    network = create(dit(), "use_rslora=True")
    randomise(network)
    layer = network.adapted_layers[0]
    zero = torch.zeros(layer.adapter.geometry.weight_shape)
    norm = float(layer.new_weight(zero).detach().norm())
    network.apply_max_norm_regularization(norm / 2, "cpu")
    assert float(layer.new_weight(zero).detach().norm()) == pytest.approx(norm / 2, rel=1e-4)


# -- DoRA


def test_dora_has_a_magnitude_per_row_and_falls_back_where_it_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="networks"):
        network = create(dit(), "use_dora=True")
    assert "DoRA on " in caplog.text
    for layer in network.adapted_layers:
        assert layer.magnitude is not None and layer.magnitude.numel() == layer.base.weight.shape[0]
        torch.testing.assert_close(layer.magnitude.flatten(), layer.base.weight.norm(dim=1))
    for dropout in ("rank_dropout=0.1", "dropout=0.1"):
        caplog.clear()
        made = create(dit(), "use_dora=True", dropout)
        assert not any(layer.side for layer in made.adapted_layers)
        assert f"use_dora (it is left on no layer, off on {len(made.layers)} {dropout[:-4]}" in caplog.text
    for nothing in ("rank_dropout=0.0", "dropout=0.0", "module_dropout=0.1"):
        assert all(layer.magnitude is not None for layer in create(dit(), "use_dora=True", nothing).adapted_layers)


def test_dora_is_the_formula_of_the_reference() -> None:
    """delta = (m / n - 1) * (base without bias) + m / n * lora * scale, with n = ||W + scale * BA|| by rows."""
    model = dit()
    network = create(model, "use_dora=True")
    randomise(network)
    layer = network.adapted_layers[3]
    weight, bias = layer.base.weight, layer.base.bias
    x = torch.randn(2, 5, weight.shape[1])
    up, down = layer.adapter.up, layer.adapter.down
    n = (weight + layer.scale * up @ down).norm(dim=1)
    k = layer.magnitude.flatten() / n
    plain = x @ weight.T
    wanted = plain + bias + (k - 1) * plain + k * (x @ down.T @ up.T) * layer.scale
    torch.testing.assert_close(layer.base(x), wanted, rtol=1e-4, atol=1e-4)


def test_dora_at_multiplier_0_is_a_true_no_op() -> None:
    model = dit()
    base, weights = model(signal()), {key: t.clone() for key, t in model.state_dict().items()}
    network = create(model, "use_dora=True")
    randomise(network)
    network.set_multiplier(0.0)
    assert torch.equal(model(signal()), base)
    network.merge_to(None, model)
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())


def test_the_summary_counts_layers_with_and_without_dora(caplog: pytest.LogCaptureFixture) -> None:
    """A projection in parts, of which each has an adapter, stays plain."""
    with caplog.at_level(logging.INFO, logger="networks"):
        network = create(dit("flux"), "use_dora=True", "split_qkv=True", entry=networks.lora_flux)
    plain = {row.dotted_name for row in network.plan.trained if not row.dora}
    assert f"DoRA on {len(network.plan.trained) - len(plain)} layers, off on {len(plain)} split_qkv" in caplog.text
    assert plain == {name for name in names(network) if name.endswith((".qkv", ".linear1"))} and len(plain) == 6


# -- LoRA+


def test_loraplus_multiplies_the_rate_of_the_up_factors() -> None:
    network = create(dit(), "loraplus_lr_ratio=8", "use_dora=True")
    groups, descriptions = network.prepare_optimizer_params(unet_lr=5e-5)
    rates = {text: group["lr"] for text, group in zip(descriptions, groups, strict=True)}
    assert rates == {"dit": 5e-5, "dit plus": pytest.approx(4e-4)}
    plus = {id(p) for p in groups[descriptions.index("dit plus")]["params"]}
    assert plus == {id(layer.adapter.up) for layer in network.adapted_layers}


# -- dropouts


def test_rank_dropout_zeroes_ranks_and_module_dropout_layers() -> None:
    for argument in ("rank_dropout=0.5", "module_dropout=0.5"):
        model = dit()
        network = create(model, argument)
        randomise(network)
        network.train()
        torch.manual_seed(0)
        first, second = model(signal()), model(signal())
        assert not torch.equal(first, second)
        network.eval()
        assert torch.equal(model(signal()), model(signal()))


def test_module_dropout_leaves_the_base_alone() -> None:
    model = dit()
    network = create(model, "module_dropout=0.99")
    randomise(network)
    network.train()
    torch.manual_seed(1)
    layer = network.adapted_layers[0]
    x = torch.randn(2, layer.base.in_features)
    base = torch.nn.functional.linear(x, layer.base.weight, layer.base.bias)
    assert any(torch.equal(layer.base(x), base) for _ in range(5))


# -- convolutions


def test_conv_dim_and_conv_alpha_default_to_the_network_s() -> None:
    kernels = [row for row in create(sd_unet(), entry=networks.lora).plan.trained if row.geometry.has_kernel]
    assert {(row.dim, row.alpha) for row in kernels} == {(16, 8.0)}
    for arguments, wanted in ((["conv_dim=32"], (32, 8.0)), (["conv_alpha=2"], (16, 2.0))):
        network = create(sd_unet(), *arguments, entry=networks.lora)
        assert {(row.dim, row.alpha) for row in network.plan.trained if row.geometry.has_kernel} == {wanted}
    network = create(sd_unet(), "conv_dim=32", "conv_alpha=16", entry=networks.lora)
    assert {(row.dim, row.alpha) for row in network.plan.trained if row.geometry.has_kernel} == {(32, 16.0)}


# -- which modules


def test_patterns_speak_of_dotted_names() -> None:
    every = names(create(dit()))
    without = names(create(dit(), "exclude_patterns=['.*attn.*']"))
    assert without == {name for name in every if "attn" not in name} < every
    qkv = "include_patterns=['.*attn\\.to_q.*', '.*attn\\.to_k.*', '.*attn\\.to_v.*']"
    rescued = names(create(dit(), "exclude_patterns=['.*attn.*']", qkv))
    assert rescued == without | {name for name in every if name.rpartition(".")[2] in ("to_q", "to_k", "to_v")}


@pytest.mark.parametrize("arch", ["qwen_image", "flux", "hunyuan_video"])
def test_modulation_is_excluded_by_default(arch: str) -> None:
    """With or without a list of the user's, and writing the default out changes nothing."""
    model = dit(arch)
    default = names(create(model, entry=networks.lora))
    written = names(create(model, "exclude_patterns=['.*(img_mod|txt_mod|modulation).*']", entry=networks.lora))
    more = names(create(model, "exclude_patterns=['.*mlp.*']", entry=networks.lora))
    assert default == written > more
    assert not any("_mod" in name or "modulation" in name for name in default | more)


def test_include_patterns_override_the_default_exclusion() -> None:
    network = create(dit(), "include_patterns=['.*img_mod.*']")
    assert names(network) == names(create(dit())) | {f"transformer_blocks.{i}.img_mod.1" for i in range(2)}


def test_exclude_mod() -> None:
    """True by default; False trains the modulation layers, for likeness."""
    default, with_mod = names(create(dit())), names(create(dit(), "exclude_mod=False"))
    assert default == names(create(dit(), "exclude_mod=True"))
    assert with_mod - default == {f"transformer_blocks.{i}.{mod}.1" for i in range(2) for mod in MOD}
    with pytest.raises(ValueError, match="exclude_mod has no effect"):
        create(dit("wan"), "exclude_mod=False", entry=networks.lora_wan)


def test_files_with_modulation_layers_load_whole(tmp_path: Path) -> None:
    """The trainer's own default means to leave them out but does not: its files have them."""
    model = dit()
    theirs = create(model, "exclude_mod=False")
    randomise(theirs)
    theirs.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {"a": "b"})
    wanted = model(signal())
    theirs.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    ours = networks.lora_qwen_image.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
    assert names(ours) == names(theirs)
    ours.merge_to(None, model, tensors, torch.float32, "cpu")
    torch.testing.assert_close(model(signal()), wanted)


def test_verbose_lists_every_layer_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="networks"):
        create(dit(), "verbose=True")
    lines = caplog.text.splitlines()
    to_q = next(line for line in lines if "transformer_blocks.0.attn.to_q" in line)
    dim, alpha, scale, _, parameters, _ = to_q.split()[-6:]
    assert (dim, alpha, scale, parameters) == ("16", "8", "0.5", "1,536")
    assert any("transformer_blocks.0.img_mod.1" in line and "exclude_mod=False" in line for line in lines)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="networks"):
        create(dit(), "verbose=False")
    assert "transformer_blocks.0.attn.to_q" not in caplog.text


DEFAULTS = {
    "use_rslora": ("False", "false"),
    "use_dora": ("False", "no"),
    "loraplus_lr_ratio": ("None",),
    "rank_dropout": ("None", "0.0"),
    "module_dropout": ("None", "0"),
    "exclude_patterns": ("[]", "None"),
    "include_patterns": ("[]", "None"),
    "exclude_mod": ("True", "1"),
    "verbose": ("False", "off"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_that_is_written_out_changes_nothing(name: str, tmp_path: Path) -> None:
    """In every spelling that the trainers' users have; values arrive as they were typed, blanks included."""
    files = []
    for value in (None, *DEFAULTS[name], f" {DEFAULTS[name][0]} "):
        torch.manual_seed(0)
        model = dit()
        network = create(model, *([] if value is None else [f"{name}={value}"]))
        groups, descriptions = network.prepare_optimizer_params(unet_lr=1e-3)
        network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {"a": "b"})
        tensors = load_file(tmp_path / "a.safetensors")
        files.append(
            (names(network), descriptions, [g["lr"] for g in groups], {k: t.sum() for k, t in tensors.items()})
        )
    assert all(file == files[0] for file in files[1:])


# -- known-good combinations

COMBINATIONS = {
    "rs": ["use_rslora=True"],
    "dora": ["use_dora=True"],
    "rs+dora": ["use_rslora=True", "use_dora=True"],
    "lora+ and rs": ["use_rslora=True", "loraplus_lr_ratio=8"],
    "all three": ["use_rslora=True", "use_dora=True", "loraplus_lr_ratio=8"],
    "likeness": ["use_rslora=True", "loraplus_lr_ratio=8", "exclude_mod=False"],
    "style": ["use_dora=True", "module_dropout=0.1"],
    "selected": ["exclude_patterns=['.*single_blocks.*']", "use_rslora=True"],
}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("form", ["portable", "blissful"])
def test_known_good_combinations(name: str, form: str, tmp_path: Path) -> None:
    """Trains, differs from plain LoRA, and its file gives the same model: merged, resumed, and by alpha / rank."""
    arch = "flux" if name == "selected" else "qwen_image"
    entry = networks.lora_flux if name == "selected" else networks.lora_qwen_image
    arguments = [*COMBINATIONS[name], f"save_format={form}"]
    model, plain = dit(arch), dit(arch)
    torch.manual_seed(0)
    network = create(model, *arguments, entry=entry)
    torch.manual_seed(0)
    ordinary = create(plain, entry=entry)
    assert trained(network, model) != trained(ordinary, plain)
    if name == "selected":
        assert names(network) == {n for n in names(ordinary) if "single_blocks" not in n}
    network.eval()
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, torch.float32, {"ss_network_args": "{}"})
    wanted = model(signal()).detach()
    network.detach()

    resumed = create(model, *arguments, entry=entry)
    resumed.load_weights(file)
    resumed.eval()
    torch.testing.assert_close(model(signal()), wanted)
    resumed.detach()
    tensors = load_file(file)
    merged = entry.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
    merged.merge_to(None, model, tensors, torch.float32, "cpu")
    torch.testing.assert_close(model(signal()), wanted, rtol=1e-4, atol=1e-4)
