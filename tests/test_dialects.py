"""The dialect of DustyL's blissful-tuner: its keys, and what it does when a file contradicts the arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import randomise
from torch import Tensor, nn
from toy_models import signal, toy

import networks.loha
import networks.lora
from networks.files import codec, dialects
from networks.files.merge import merged_weight

BLISSFUL = {"save_format": "blissful"}
RS, DORA = {"use_rslora": "True"}, {"use_dora": "True"}


def dit() -> nn.Module:
    return toy("flux")["dit"].eval().requires_grad_(False)


def network(model: nn.Module, dim: int = 9, alpha: float = 2, **kwargs: str) -> Any:
    made = networks.lora.create_arch_network(1.0, dim, alpha, None, None, model, neuron_dropout=None, **kwargs)
    made.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return made


def saved(path: Path, dtype: torch.dtype | None = torch.float32, **kwargs: Any) -> tuple[str, Tensor]:
    """A file of a randomised network, and the output of the model with it."""
    model = dit()
    made = network(model, **kwargs)
    randomise(made)
    made.save_weights(str(path), dtype, {"ss_network_dim": "9"})
    return str(path), model(signal())


def rewritten(path: Path, change: Any) -> str:
    """A copy of a file, without our metadata, its tensors changed."""
    tensors = load_file(path)
    change(tensors)
    copy = path.with_stem(path.stem + "-copy")
    save_file(tensors, copy)
    return str(copy)


@pytest.mark.parametrize("kwargs", [{}, RS, DORA, {**RS, **DORA}], ids=["plain", "rs", "dora", "rs+dora"])
def test_keys_and_values(kwargs: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", **BLISSFUL, **kwargs)
    tensors = load_file(tmp_path / "a.safetensors")
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    suffixes = {"lora_down.weight", "lora_up.weight", "alpha"} | (
        {"dora_layer.weight"} if "use_dora" in kwargs else set()
    )
    assert {key.partition(".")[2] for key in tensors if key.startswith(layer + ".")} == suffixes
    assert {key for key in tensors if "." not in key} == {"use_rslora_flag", "use_dora_flag"}
    for key, wanted in (("use_rslora_flag", "use_rslora" in kwargs), ("use_dora_flag", "use_dora" in kwargs)):
        assert tensors[key].shape == () and tensors[key].is_floating_point() and bool(tensors[key]) is wanted
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert alphas == {2.0}, "alpha as it was given, RS-LoRA or not"
    if "use_dora" in kwargs:
        rows = tensors[f"{layer}.lora_up.weight"].shape[0]
        assert tensors[f"{layer}.dora_layer.weight"].shape == (rows,)


def test_the_strength_follows_the_flag(tmp_path: Path) -> None:
    """An independent reading of that program's formula, layer by layer."""
    model = dit()
    made = network(model, **BLISSFUL, **RS, **DORA)
    randomise(made)
    made.save_weights(str(tmp_path / "a.safetensors"), torch.float64, {})
    tensors = load_file(tmp_path / "a.safetensors")
    for layer in made.adapted_layers:
        down, up, alpha, magnitude = (
            tensors[f"{layer.lora_name}.{suffix}"].double()
            for suffix in ("lora_down.weight", "lora_up.weight", "alpha", "dora_layer.weight")
        )
        weight = layer.base.weight.double()
        changed = weight + alpha / math.sqrt(down.shape[0]) * (up @ down)
        wanted = changed * (magnitude / changed.norm(dim=1))[:, None]
        mine = merged_weight(codec.decode(tensors)[0][layer.lora_name], weight)
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.new_weight(weight), wanted, rtol=1e-5, atol=1e-6)


def test_alpha_0_is_saved_as_the_root_of_the_rank(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", alpha=0, **BLISSFUL, **RS)
    alphas = {float(t) for key, t in load_file(tmp_path / "a.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {3.0}  # of rank 9: scale 1
    saved(tmp_path / "b.safetensors", alpha=0, **BLISSFUL)
    alphas = {float(t) for key, t in load_file(tmp_path / "b.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {9.0}


@pytest.mark.parametrize("kwargs", [{}, RS, DORA, {**RS, **DORA}], ids=["plain", "rs", "dora", "rs+dora"])
@pytest.mark.parametrize("form", [{}, BLISSFUL], ids=["into portable", "into blissful"])
def test_loads_back(kwargs: dict[str, str], form: dict[str, str], tmp_path: Path) -> None:
    """In training, from the file alone, and through a strict load_state_dict, in whichever form the network saves."""
    path, wanted = saved(tmp_path / "a.safetensors", **BLISSFUL, **kwargs)
    model = dit()
    made = network(model, **form, **kwargs)
    made.load_weights(path)
    torch.testing.assert_close(model(signal()), wanted)
    made.save_weights(str(tmp_path / "b.safetensors"), torch.float32, {})
    made.detach()
    for file in (path, str(tmp_path / "b.safetensors")):
        tensors = load_file(file)
        again = networks.lora.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
        again.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        torch.testing.assert_close(model(signal()), wanted)
        again.load_state_dict(tensors, strict=True)
        torch.testing.assert_close(model(signal()), wanted)
        again.detach()


def test_rs_lora_that_differs_is_a_hard_error(tmp_path: Path) -> None:
    with_rs, _ = saved(tmp_path / "with.safetensors", **BLISSFUL, **RS)
    without, _ = saved(tmp_path / "without.safetensors", **BLISSFUL)
    for path, kwargs, remedy in ((with_rs, {}, "True"), (without, RS, "False"), (with_rs, BLISSFUL, "True")):
        made = network(dit(), **kwargs)
        before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
        with pytest.raises(ValueError, match=f"RS-LoRA flag mismatch: .* give use_rslora={remedy}"):
            made.load_weights(path)
        assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_suspicious_alphas_are_hinted_at(dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The flag lost, more than half of the alphas at sqrt(rank), here 200: 14.125 in bf16."""

    def lose_the_flag(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key] = tensors[key].to(dtype)
        del tensors["use_rslora_flag"], tensors["use_dora_flag"]

    saved(tmp_path / "a.safetensors", dim=200, alpha=0, **BLISSFUL, **RS)
    path = rewritten(tmp_path / "a.safetensors", lose_the_flag)
    with pytest.raises(ValueError, match="flag mismatch: .*says nothing of RS-LoRA.* Hint: (\\d+) of \\1 alphas"):
        network(dit(), dim=200, **BLISSFUL, **RS).load_weights(path)
    network(dit(), dim=200, **RS).load_weights(path)  # not in that dialect: alpha / rank, with a warning
    assert "alphas are the square root of their rank, as RS-LoRA" in caplog.text
    caplog.clear()
    saved(tmp_path / "b.safetensors", dim=200, alpha=2, **BLISSFUL, **RS)
    path = rewritten(tmp_path / "b.safetensors", lose_the_flag)
    with pytest.raises(ValueError, match="give use_rslora=False, as it was trained$"):
        network(dit(), dim=200, **BLISSFUL, **RS).load_weights(path)
    network(dit(), dim=200, **RS).load_weights(path)
    assert "square root" not in caplog.text


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (5.0, 2.5)])
def test_the_strength_of_a_layer_without_a_model(alpha: float | None, scale: float) -> None:
    """alpha / rank; an alpha of 0, or none, stands for the rank."""
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    tensors = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
    tensors |= {} if alpha is None else {"lora_unet_x.alpha": torch.tensor(alpha)}
    saved = codec.decode(tensors)[0]["lora_unet_x"]
    assert saved.scale == scale
    torch.testing.assert_close(merged_weight(saved, torch.zeros(4, 6)), scale * up @ down)


@pytest.mark.parametrize(("roots", "suspicious"), [(4, False), (5, False), (6, True), (10, True)])
def test_more_than_half_of_the_alphas_make_a_file_suspicious(
    roots: int, suspicious: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Of ten layers of rank 9."""
    tensors = {f"lora_unet_{i}.lora_down.weight": torch.zeros(9, 4) for i in range(10)}
    tensors |= {f"lora_unet_{i}.alpha": torch.tensor(3.0 if i < roots else 9.0) for i in range(10)}
    flags = dialects.Flags.of(tensors)
    assert flags.suspicious == (roots, 10)
    dialects.FileFormat(rs_lora=True).check(flags, {}, "a file")
    assert (f"{roots} of 10 alphas are the square root of their rank" in caplog.text) == suspicious
    with pytest.raises(ValueError, match="RS-LoRA flag mismatch") as caught:
        dialects.FileFormat(dialects.BLISSFUL, rs_lora=True).check(flags, {}, "a file")
    assert ("Hint: " in str(caught.value)) == suspicious


def test_a_portable_file_is_at_home_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its alpha says the strength, whatever was trained and whatever the network is."""
    path, wanted = saved(tmp_path / "a.safetensors", dim=4, alpha=1, **RS)
    for kwargs in ({}, RS, BLISSFUL, {**BLISSFUL, **RS}):
        model = dit()
        network(model, dim=4, alpha=1, **kwargs).load_weights(path)
        torch.testing.assert_close(model(signal()), wanted)
    assert "RS-LoRA" not in caplog.text


def test_dora_that_is_missing_is_a_hard_error(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "a.safetensors", **BLISSFUL)
    with pytest.raises(ValueError, match="DoRA flag mismatch: this network expects DoRA but"):
        network(dit(), **DORA).load_weights(path)

    def lose_some(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("dora_layer.weight")][:7]:
            del tensors[key]

    saved(tmp_path / "b.safetensors", **BLISSFUL, **DORA)
    path = rewritten(tmp_path / "b.safetensors", lose_some)
    with pytest.raises(
        ValueError, match="no DoRA magnitude for 7 of \\d+ layers: (lora_unet_\\S+, ){4}lora_unet_\\S+;"
    ):
        network(dit(), **DORA).load_weights(path)


@pytest.mark.parametrize("flagged", [True, False])
def test_dora_that_is_not_expected_is_ignored_with_a_warning(
    flagged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where only the magnitudes tell; the network does not become one with DoRA by it."""

    def lose_the_flag(tensors: dict[str, Tensor]) -> None:
        if not flagged:
            del tensors["use_dora_flag"]

    saved(tmp_path / "a.safetensors", **BLISSFUL, **DORA)
    path = rewritten(tmp_path / "a.safetensors", lose_the_flag)
    model = dit()
    made = network(model, **BLISSFUL)
    made.load_weights(path)
    assert "DoRA flag mismatch" in caplog.text and "they are ignored" in caplog.text
    made.save_weights(str(tmp_path / "b.safetensors"), torch.float32, {})
    tensors = load_file(tmp_path / "b.safetensors")
    assert not bool(tensors["use_dora_flag"]) and not any("dora_layer" in key for key in tensors)
    plain = networks.lora.create_arch_network_from_weights(1.0, tensors, unet=dit())
    assert not any(layer.side for layer in plain.adapted_layers)


def test_layers_whose_dropout_switched_dora_off(tmp_path: Path) -> None:
    """That program writes its flag then, too, and cannot read the file; ours says what is in it."""
    without = network(dit(), rank_dropout="0.1", **BLISSFUL, **DORA)
    without.save_weights(str(tmp_path / "b.safetensors"), torch.float32, {})
    assert not bool(load_file(tmp_path / "b.safetensors")["use_dora_flag"])
    path, wanted = saved(tmp_path / "a.safetensors", **BLISSFUL)

    def flag(tensors: dict[str, Tensor]) -> None:
        tensors["use_dora_flag"] = torch.tensor(1.0)

    model = dit()
    tensors = load_file(rewritten(tmp_path / "a.safetensors", flag))
    made = networks.lora.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
    made.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    torch.testing.assert_close(model(signal()), wanted)


def test_network_keys_do_not_come_first(tmp_path: Path) -> None:
    """Some programs look at the first key of a file, and want a layer there."""
    for dtype in (None, torch.float32, torch.bfloat16):
        path, _ = saved(tmp_path / "a.safetensors", dtype=dtype, **BLISSFUL, **RS)
        assert next(iter(load_file(path))).startswith("lora_unet_")


def test_what_the_dialect_cannot_hold_is_refused() -> None:
    from tiny_parts import sd_unet

    with pytest.raises(ValueError, match="save_format=blissful holds lora only, not loha"):
        networks.loha.create_arch_network(1.0, 4, 1, None, None, dit(), **BLISSFUL)
    assert network(dit(), **BLISSFUL, algo="lora_fa").layers, "its files are LoRA"
    with pytest.raises(ValueError, match="holds DoRA of output rows only"):
        network(dit(), **BLISSFUL, **DORA, wd_on_output="False")
    with pytest.raises(ValueError, match="holds DoRA of Linear only, not of Conv2d"):
        network(sd_unet(), **BLISSFUL, **DORA)


def test_stacked_parts_have_the_root_of_the_whole_rank(tmp_path: Path) -> None:
    """split_qkv: readers see one layer of n times the rank."""
    path, wanted = saved(tmp_path / "a.safetensors", **BLISSFUL, **RS, split_qkv="True")
    model = dit()
    made = networks.lora.create_arch_network_from_weights(1.0, load_file(path), unet=model, for_inference=True)
    made.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    torch.testing.assert_close(model(signal()), wanted)


def test_merging_by_key_reads_the_flag(tmp_path: Path) -> None:
    from networks.hosts.key_merge import merge_weights_to_tensor

    path, _ = saved(tmp_path / "a.safetensors", **BLISSFUL, **RS)
    tensors = load_file(path)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    zero = torch.zeros(up.shape[0], down.shape[1])
    merged = merge_weights_to_tensor(zero, name, tensors, set(tensors), 1.0, "cpu")
    torch.testing.assert_close(merged, 2 / 3 * (up @ down))


@pytest.mark.parametrize("flagged", [False, True])
def test_lokr_files_of_that_program(flagged: bool) -> None:
    """They have a third key for the whole file; two whole factors are scaled there, by alpha / longest side of w2."""
    own = torch.Generator().manual_seed(0)
    w1, w2, b1, a, b = (torch.randn(*shape, generator=own) for shape in ((8, 6), (6, 8), (8, 8), (6, 2), (2, 6)))
    tensors = {"lora_unet_a.lokr_w1": w1, "lora_unet_a.lokr_w2": w2, "lora_unet_a.alpha": torch.tensor(3.0)}
    tensors |= {"lora_unet_b.lokr_w1": b1, "lora_unet_b.lokr_w2_a": a, "lora_unet_b.lokr_w2_b": b}
    tensors["lora_unet_b.alpha"] = torch.tensor(3.0)
    if flagged:
        for key, value in (("use_rslora_flag", 0.0), ("use_dora_flag", 0.0), ("lokr_factor", 8.0)):
            tensors[key] = torch.tensor(value)
    layers, unknown = codec.decode(tensors)
    assert not unknown and layers.keys() == {"lora_unet_a", "lora_unet_b"}
    zero = torch.zeros(48, 48, dtype=torch.float64)
    whole = torch.kron(w1.double(), w2.double()) * (3 / 8 if flagged else 1)
    torch.testing.assert_close(merged_weight(layers["lora_unet_a"], zero), whole, rtol=1e-6, atol=1e-6)
    low = torch.kron(b1.double(), a.double() @ b.double()) * 1.5
    torch.testing.assert_close(merged_weight(layers["lora_unet_b"], zero), low, rtol=1e-6, atol=1e-6)
