"""Files in the form of another program or algorithm: names by hand, updates by dense formulas in float64, what is lost
and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import api
from networks.cli import convert as command

Q, K = "lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_self_attn_k"  # of Wan, whose names are the trainer's own
X = "lora_unet_x"  # of no model that is known
WEIGHTS = {"blocks.0.self_attn.q.weight": (48, 32), "blocks.0.self_attn.k.weight": (48, 32)}


def pair(name: str, O: int, I: int, rank: int = 2, alpha: float = 1.0, *kernel: int) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.randn(rank, I, *kernel),
        f"{name}.lora_up.weight": torch.randn(O, rank, *[1] * len(kernel)),
        f"{name}.alpha": torch.tensor(alpha),
    }


def product(tensors: Mapping[str, Tensor], name: str, down: str = "lora_down", up: str = "lora_up") -> Tensor:
    """[O, J], what a LoRA of a file adds; of a large one its product with a few vectors, [O, 3]."""
    D, U = (tensors[f"{name}.{suffix}.weight"].double().flatten(1) for suffix in (down, up))
    alpha = tensors.get(f"{name}.alpha")
    if U.shape[0] * D.shape[1] > 1 << 16:
        D = D @ torch.linspace(-1, 2, 3 * D.shape[1], dtype=torch.float64).sin().reshape(-1, 3)
    return U @ D * (1.0 if alpha is None else float(alpha) / len(D))


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def converted(folder: Path, tensors: Mapping[str, Tensor], to: str | list[str], **more: Any) -> dict[str, Tensor]:
    """What becomes of a file of these, `out.safetensors` or the folder `out`."""
    save_file(dict(tensors), folder / "in.safetensors", more.pop("metadata", {}))
    out = folder / ("out" if to == "peft" else "out.safetensors")
    api.convert(folder / "in.safetensors", out, to=to, overwrite=True, **more)
    return load_file(out / "adapter_model.safetensors" if out.is_dir() else out)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


# -- names


FLUX_QKV, FLUX_1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
FLUX = (
    "transformer.transformer_blocks.0.attn.to_{q,k,v} "
    "transformer.single_transformer_blocks.0.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"
)
SDXL = {
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
}
ZIMAGE = {f"lora_unet_layers_0_attention_{name}": (3840, 3840) for name in ("to_q", "to_out_0")}
# Release, layers of the trainer's, target -> names there.
NAMES = {
    ("flux", "diffusers"): ({FLUX_QKV: (9216, 3072), FLUX_1: (21504, 3072)}, FLUX),
    ("sdxl", "diffusers"): (
        SDXL,
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1 unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
        ".to_q",
    ),
    ("sdxl", "blissful"): (SDXL, " ".join(SDXL)),
    ("sdxl", "lycoris"): (SDXL, " ".join(SDXL)),
    ("zimage", "comfyui"): (ZIMAGE, "diffusion_model.layers.0.attention.{to_q,out}"),
    ("zimage", "peft"): (ZIMAGE, "base_model.model.layers.0.attention.{to_q,to_out.0}"),
}
SUFFIXES = {"diffusers": {"lora_A.weight", "lora_B.weight"}, "peft": {"lora_A.weight", "lora_B.weight"}}
FLAGS = {"blissful": {"use_rslora_flag", "use_dora_flag"}}


def spelt(line: str) -> list[str]:
    """`a.{b,c}` -> a.b, a.c."""
    found = []
    for word in line.split():
        stem, _, rest = word.partition("{")
        inner, _, end = rest.partition("}")
        found += [f"{stem}{one}{end}" for one in inner.split(",")] if rest else [word]
    return found


@pytest.mark.parametrize(("model", "to"), NAMES)
def test_names_by_hand_and_back(model: str, to: str, tmp_path: Path) -> None:
    """And the file that comes back adds what the first one added; bit for bit where names alone have changed."""
    torch.manual_seed(0)
    layers, line = NAMES[model, to]
    tensors = {key: t for name, (O, I) in layers.items() for key, t in pair(name, O, I).items()}
    found = converted(tmp_path, tensors, to, model=model)
    suffixes = SUFFIXES.get(to, {"lora_down.weight", "lora_up.weight", "alpha"})
    assert found.keys() == {f"{name}.{suffix}" for name in spelt(line) for suffix in suffixes} | FLAGS.get(to, set())
    source = tmp_path / ("out" if to == "peft" else "out.safetensors")
    report = api.convert(source, tmp_path / "back.safetensors", to="portable", model=model)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for name in layers:
        assert far(product(back, name), product(tensors, name)) < 1e-6 and report.error < 1e-6
    if to not in SUFFIXES:
        assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_fused_layers_are_divided_row_by_row(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = pair(FLUX_QKV, 9216, 3072, 2, 3.0)
    found = converted(tmp_path, tensors, "diffusers", model="flux")
    rows = product(tensors, FLUX_QKV).split(3072)
    for name, wanted in zip("qkv", rows, strict=True):
        path = f"transformer.transformer_blocks.0.attn.to_{name}"
        assert far(product(found, path, "lora_A", "lora_B"), wanted) < 1e-6


# -- algorithms


def lokr(name: str) -> tuple[dict[str, Tensor], Tensor]:
    w1, a, b = torch.randn(4, 2), torch.randn(12, 3), torch.randn(3, 16)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
    return {f"{name}.{key}": t for key, t in tensors.items()}, 2 * torch.kron(w1.double(), a.double() @ b.double())


def loha(name: str) -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = torch.randn(48, 2), torch.randn(2, 32), torch.randn(48, 2), torch.randn(2, 32)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
    update = 0.5 * (a.double() @ b.double()) * (c.double() @ d.double())
    return {f"{name}.{key}": t for key, t in tensors.items()}, update


def plain(name: str) -> tuple[dict[str, Tensor], Tensor]:
    tensors = pair(name, 48, 32, 3, 2.0)
    return tensors, product(tensors, name)


INPUTS = {"lokr": lokr, "loha": loha, "lora": plain}
RANKS = {"lokr": 4 // 2 * 3, "loha": 4, "lora": 3}  # rank(w1) r, r^2, r


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float8_e4m3fn))
def test_exact_algebra(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To a LoRA of the rank that it takes, and to the difference; what is made of float8 is bfloat16."""
    torch.manual_seed(2)
    tensors, _ = INPUTS[kind](X)
    stored = {key: t if key.endswith("alpha") else t.to(dtype) for key, t in tensors.items()}
    torch.manual_seed(2)
    _, update = INPUTS[kind](X)
    if dtype != torch.float32:  # what the rounded factors amount to
        update = _update(kind, {key: t.double() for key, t in stored.items()})
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    stays = dtype if kind == "lora" or dtype.itemsize > 1 else torch.bfloat16
    lora = converted(tmp_path, stored, "lora")
    assert lora.keys() == {f"{X}.{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert lora[f"{X}.lora_down.weight"].shape == (RANKS[kind], 32)
    assert lora[f"{X}.lora_up.weight"].dtype == stays and far(product(lora, X), update) < limit
    diff = converted(tmp_path, stored, "diff")
    assert diff.keys() == {f"{X}.diff"} and diff[f"{X}.diff"].dtype == (dtype if dtype.itemsize > 1 else torch.bfloat16)
    assert far(diff[f"{X}.diff"], update) < limit


def _update(kind: str, t: Mapping[str, Tensor]) -> Tensor:
    if kind == "lora":
        return product(t, X)
    if kind == "loha":
        pairs = [t[f"{X}.hada_w{i}_a"] @ t[f"{X}.hada_w{i}_b"] for i in (1, 2)]
        return 0.5 * pairs[0] * pairs[1]
    return 2 * torch.kron(t[f"{X}.lokr_w1"], t[f"{X}.lokr_w2_a"] @ t[f"{X}.lokr_w2_b"])


def test_what_is_told_is_the_error_of_the_file(tmp_path: Path) -> None:
    """Of the nearest of a lower rank, and of what the dtype rounds, under the file's names and for another program."""
    torch.manual_seed(3)
    tensors, update = loha(Q)
    save_file(tensors, tmp_path / "in.safetensors")
    base = {key: torch.randn(shape) for key, shape in WEIGHTS.items()}
    save_file(base, tmp_path / "base.safetensors")
    names = (Q, "lora_down", "lora_up"), ("transformer.blocks.0.attn1.to_q", "lora_A", "lora_B")
    for (name, *sides), more in zip(names, ([], ["diffusers"]), strict=True):
        for rule, dtype in ((api.RankRule(2), torch.float32), (None, torch.bfloat16)):
            out = tmp_path / f"{len(more)}{dtype}.safetensors"
            given = {"base": [tmp_path / "base.safetensors"], "rule": rule, "dtype": dtype}
            report = api.convert(tmp_path / "in.safetensors", out, to=["lora", *more], **given)
            error = far(product(load_file(out), name, *sides), update)
            assert 1e-4 < error and math.isclose(report.error, error, rel_tol=1e-5), (more, dtype)
            assert ("exact, but for" in " ".join(report.lines())) == (rule is None)


def test_scales_that_go_into_rounded_factors_are_told(tmp_path: Path) -> None:
    """A third is none of bfloat16's values."""
    torch.manual_seed(4)
    stored = {key: t.bfloat16() if t.dim() else t for key, t in pair(Q, 48, 32, 3).items()}
    save_file(stored, tmp_path / "in.safetensors")
    save_file({key: torch.randn(shape) for key, shape in WEIGHTS.items()}, tmp_path / "base.safetensors")
    more = {"base": [tmp_path / "base.safetensors"], "dtype": torch.bfloat16}
    report = api.convert(tmp_path / "in.safetensors", tmp_path / "o.safetensors", to="diffusers", **more)
    path = "transformer.blocks.0.attn1.to_q"
    found = load_file(tmp_path / "o.safetensors")
    sides = [t.double() for t in (found[f"{path}.lora_B.weight"], found[f"{path}.lora_A.weight"])]
    wanted = [t.double() for t in (stored[f"{Q}.lora_up.weight"], stored[f"{Q}.lora_down.weight"])]
    error = far(sides[0] @ sides[1], wanted[0] @ wanted[1] / 3)
    assert math.isclose(report.error, error, rel_tol=1e-5) and error > 1e-4


def test_convolutions_and_cores(tmp_path: Path) -> None:
    """A LoRA with a core becomes a plain one, which more programs read."""
    torch.manual_seed(5)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(4, 20, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(24, 4, 1, 1)
    factors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    tensors = {f"{name}.{suffix}": t for suffix, t in factors.items()}
    found = converted(tmp_path, tensors, "lora")
    wanted = 0.5 * torch.einsum("or,rsxy,si->oixy", *(t.double() for t in (up[..., 0, 0], mid, down[..., 0, 0])))
    assert found[f"{name}.lora_down.weight"].shape == (4, 20, 3, 3) and f"{name}.lora_mid.weight" not in found
    assert far(product(found, name), wanted.flatten(1)) < 1e-6
    assert far(converted(tmp_path, tensors, "diff")[f"{name}.diff"], wanted) < 1e-6


def test_biases_norms_and_what_nobody_knows_stay(tmp_path: Path) -> None:
    torch.manual_seed(6)
    rest = {f"{X}.diff_b": torch.randn(48), f"{X}_norm.w_norm": torch.randn(32), "emb_params": torch.randn(3)}
    tensors, _ = loha(X)
    for to in ("lora", "lokr", "diff"):
        found = converted(tmp_path, {**tensors, **rest}, to)
        assert all(torch.equal(found[key], tensor) for key, tensor in rest.items()), to
        assert not any("hada" in key for key in found)


# -- DoRA


def dora() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A file, the base weights, and what its first layer adds."""
    torch.manual_seed(7)
    tensors = {**pair(Q, 48, 32, 3, 2.0), f"{Q}.dora_scale": torch.rand(48, 1) + 3, **pair(K, 48, 32)}
    base = {key: torch.randn(shape) for key, shape in WEIGHTS.items()}
    W = base["blocks.0.self_attn.q.weight"].double()
    changed = W + product(tensors, Q)
    return tensors, base, changed * tensors[f"{Q}.dora_scale"] / changed.norm(dim=1, keepdim=True) - W


def test_dora_to_comfyui_back_and_to_others(tmp_path: Path) -> None:
    tensors, base, update = dora()
    save_file(base, tmp_path / "base.safetensors")
    given = {"base": [tmp_path / "base.safetensors"]}
    found = converted(tmp_path, tensors, "comfyui", **given)
    W = base["blocks.0.self_attn.q.weight"].double()
    theirs = (W + product(found, Q)) * found[f"{Q}.dora_scale"] / W.norm(dim=1, keepdim=True) - W
    assert far(theirs, update) < 1e-6 and "use_folded_dora_flag" in found
    back = converted(tmp_path, found, "portable", **given)
    assert back.keys() == tensors.keys()
    assert far(back[f"{Q}.dora_scale"], tensors[f"{Q}.dora_scale"].double()) < 1e-6
    for source in (tensors, found):  # of either form
        assert far(converted(tmp_path, source, "diff", **given)[f"{Q}.diff"], update) < 1e-6
        lora = converted(tmp_path, source, "lora", rule=api.RankRule(8), **given)
        s = torch.linalg.svdvals(update)
        assert math.isclose(far(product(lora, Q), update), float(s[8:].norm() / s.norm()), rel_tol=1e-4)
        assert lora.keys() == {key for key in tensors if "dora" not in key}


# -- what the header says


def test_metadata_tell_of_the_new_file(tmp_path: Path) -> None:
    training = {"ss_network_module": "networks.loha", "ss_network_args": '{"algo": "loha"}', "ss_steps": "5"}
    training |= {"ss_network_dim": "2", "ss_network_alpha": "1.0", "modelspec.title": "t", "sshs_model_hash": "old"}
    converted(tmp_path, loha(X)[0], "lora", metadata=training)
    found = metadata_of(tmp_path / "out.safetensors")
    assert found["ss_network_module"] == "networks.lora" and found["ss_network_dim"] == "4"
    assert not {"ss_network_args", "ss_network_alpha"} & found.keys() and found["sshs_model_hash"] != "old"
    assert found["ss_steps"] == "5" and found["modelspec.title"] == "t"
    assert json.loads(found["networks_history"])[0]["to"] == ["lora"]
    converted(tmp_path, loha(X)[0], "loha", metadata=training)  # which it is: nothing else changes
    assert training.items() - {("sshs_model_hash", "old")} <= metadata_of(tmp_path / "out.safetensors").items()


def test_files_without_alpha_get_the_one_that_trainers_ask_for(tmp_path: Path) -> None:
    tensors = {f"transformer.blocks.0.attn1.to_q.lora_{one}.weight": torch.randn(3, 5120) for one in "A"}
    tensors |= {"transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(5120, 3)}
    found = converted(tmp_path, tensors, "portable", model="wan")
    assert float(found[f"{Q}.alpha"]) == 3.0


def test_rs_lora_keeps_its_flag(tmp_path: Path) -> None:
    tensors = {**pair(Q, 5120, 5120, 4, 1.0), "use_rslora_flag": torch.tensor(1.0), "use_dora_flag": torch.tensor(0.0)}
    for to in ("blissful", "lora"):
        found = converted(tmp_path, tensors, to, model="wan")
        assert float(found["use_rslora_flag"]) == 1.0 and float(found[f"{Q}.alpha"]) == 1.0
    assert float(converted(tmp_path, tensors, "portable", model="wan")[f"{Q}.alpha"]) == 2.0


# -- what is refused


def test_what_has_no_place_is_lost_only_where_that_is_allowed(tmp_path: Path) -> None:
    name, norm = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_conv_norm_out"
    tensors = {**pair(name, 320, 320), f"{norm}.w_norm": torch.randn(320), "emb_params": torch.randn(3)}
    with pytest.raises(ValueError, match="2 layers or tensors would be lost.*--allow_dropped"):
        converted(tmp_path, tensors, "diffusers", model="sd15")
    assert not (tmp_path / "out.safetensors").exists()
    found = converted(tmp_path, tensors, "diffusers", model="sd15", allow_dropped=True)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert found.keys() == {f"{path}.lora_A.weight", f"{path}.lora_B.weight"}


def test_the_adapters_of_text_encoders_in_a_folder_are_not_forgotten(tmp_path: Path) -> None:
    tensors = {key: t for name, (O, I) in SDXL.items() for key, t in pair(name, O, I).items()}
    converted(tmp_path, tensors, "peft", model="sdxl")
    out = tmp_path / "portable.safetensors"
    with pytest.raises(ValueError, match="text_encoder_2.*an adapter of its own"):
        api.convert(tmp_path / "out", out, to="portable", model="sdxl")
    assert len(api.convert(tmp_path / "out", out, to="portable", model="sdxl", allow_dropped=True).rows) == 1


REFUSED = {
    "no base": ("lora", {}, rf"{Q}.*depends on the weight below it.*--base CHECKPOINT"),
    "another base": ("diff", {"base": "wrong"}, r"do not fit a weight of \(40, 32\)"),
    "no layer of it": ("diff", {"base": "other"}, "has none of the layers"),
    "too far": ("lora", {"base": "base", "rule": api.RankRule(1), "max_error": 0.01}, "more than --max_error 0.01"),
    "no such target": ("comfy", {}, "there is no target comfy, did you mean|there is no target comfy.*comfyui"),
    "two of a kind": (["lora", "lokr"], {}, "one of each"),
    "a rank for names": ("comfyui", {"rule": api.RankRule(4)}, "add --to lora"),
    "no such model": ("comfyui", {"model": "wann"}, "neither a built-in model"),
    "not of that form": ("oft", {"base": "base"}, "oft holds diag-oft alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence_and_leave_no_file(case: str, tmp_path: Path) -> None:
    tensors, base, _ = dora()
    save_file(base, tmp_path / "base.safetensors")
    save_file({key: torch.randn(40, 32) for key in base}, tmp_path / "wrong.safetensors")
    save_file({"x.weight": torch.randn(3, 3)}, tmp_path / "other.safetensors")
    to, given, message = REFUSED[case]
    more = {**given, "base": [tmp_path / f"{given['base']}.safetensors"] if "base" in given else []}
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, tensors, to, **more)
    assert {file.stem for file in tmp_path.iterdir()} == {"base", "wrong", "other", "in"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(loha(X)[0], tmp_path / "in.safetensors")
    line = [str(tmp_path / "in.safetensors"), "--to", "lora", "--out", str(tmp_path / "out.safetensors")]
    assert command.main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"][0]["rank"] == 4 and told["error"] < 1e-6 and told["to"] == ["lora"]
    assert command.main(line) == 2 and "--overwrite" in capsys.readouterr().err
    assert command.main([*line[:4], str(tmp_path / "in.safetensors"), "--overwrite"]) == 2
