"""Files converted. What a file adds to a weight is built by hand before, and read by hand after: dense formulas in
float64, keys as they stand; the programs' own readers are in readers/."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from registry import dense_glora, dense_loha, dense_lokr, dense_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.cli import convert as command
from networks.tools.convert import convert
from networks.tools.ranks import RankRule

Tensors = dict[str, Tensor]
WEIGHTS = {"x": (24, 16), "c": (12, 8, 3, 3)}  # a Linear and a convolution
R, ALPHA = 2, 3.0


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    ones = [1] * (len(shape) - 2)
    own = {"lora_down.weight": rand(R, *shape[1:]), "lora_up.weight": rand(shape[0], R, *ones)}
    return own, dense_lora(own, shape) * ALPHA / R


def tucker(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    if len(shape) == 2:
        return lora(shape, W)
    own = {
        "lora_down.weight": rand(R, shape[1], 1, 1),
        "lora_mid.weight": rand(R, R, *shape[2:]),
        "lora_up.weight": rand(shape[0], R, 1, 1),
    }
    return own, dense_lora(own, shape) * ALPHA / R


def loha(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    columns = math.prod(shape[1:])
    own = {f"hada_w{n}_{s}": rand(*size) for n in (1, 2) for s, size in (("a", (shape[0], R)), ("b", (R, columns)))}
    return own, dense_loha(own, shape) * ALPHA / R


def lokr(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    columns = math.prod(shape[1:]) // 2
    own = {"lokr_w1": rand(2, 2), "lokr_w2_a": rand(shape[0] // 2, R), "lokr_w2_b": rand(R, columns)}
    return own, dense_lokr(own, shape) * ALPHA / R


def whole_lokr(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    own = {"lokr_w1": rand(2, 2), "lokr_w2": rand(shape[0] // 2, shape[1] // 2, *shape[2:])}
    return own, dense_lokr(own, shape)  # without a rank the scale is 1, whatever alpha says


def glora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    O, I, *kernel = shape
    own = {"a1.weight": rand(I, R), "a2.weight": rand(R, I), "b1.weight": rand(O, R), "b2.weight": rand(R, I, *kernel)}
    if kernel:
        own |= {key: own[key][..., None, None] for key in ("a1.weight", "a2.weight", "b1.weight")}
    return own, dense_glora({**own, "base": W}, shape) * ALPHA / R


def ia3(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    w = rand(shape[0], *[1] * (len(shape) - 1)) * 0.1
    return {"weight": w, "on_input": torch.tensor(False)}, W * w


def oft(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    blocks = rand(shape[0] // 4, 4, 4)
    Q, eye = blocks - blocks.transpose(1, 2), torch.eye(4, dtype=torch.float64)
    turns = torch.block_diag(*(torch.linalg.inv((eye + q) @ torch.linalg.inv(eye - q)) for q in Q))
    return {"oft_blocks": blocks}, (turns @ W.flatten(1)).reshape(shape) - W


def full(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    diff = rand(*shape)
    return {"diff": diff}, diff


def dora(shape: tuple[int, ...], W: Tensor) -> tuple[Tensors, Tensor]:
    own, delta = lora(shape, W)
    magnitude = rand(shape[0], *[1] * (len(shape) - 1)).abs() + 1
    new = W + delta
    lengths = new.flatten(1).norm(dim=1).reshape(magnitude.shape)
    return {**own, "dora_scale": magnitude}, magnitude * new / lengths - W


MAKERS: dict[str, Callable[[tuple[int, ...], Tensor], tuple[Tensors, Tensor]]] = {
    one.__name__: one for one in (lora, tucker, loha, lokr, whole_lokr, glora, ia3, oft, full, dora)
}
ON_BASE = {"glora", "ia3", "oft", "dora"}
HIDDEN = {"loha", "lokr"}  # whose factors do not tell a kernel from columns
WITHOUT_ALPHA = {"ia3", "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a file of each kind for it."""
    found = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    weights = {name: rand(*shape) for name, shape in WEIGHTS.items()}
    save_file({f"{name}.weight": W for name, W in weights.items()}, found / "base.safetensors")
    for kind, make in MAKERS.items():
        tensors = dict[str, Tensor]()
        for name, shape in WEIGHTS.items():
            own, update = make(shape, weights[name])
            if kind not in WITHOUT_ALPHA:
                own["alpha"] = torch.tensor(0.0 if kind == "oft" else ALPHA)
            tensors |= {f"lora_unet_{name}.{key}": t.contiguous() for key, t in own.items()}
            WANTED[kind, name] = update
        save_file(tensors, found / f"{kind}.safetensors", {"ss_steps": "5", "ss_network_module": f"networks.{kind}"})
    return found


WANTED: dict[tuple[str, str], Tensor] = {}


def by_hand(path: Path) -> dict[str, Tensor]:
    """What a file of plain LoRA, LoHa, LoKr or differences adds to each weight."""
    tensors, found = {key: t.double() for key, t in load_file(path).items()}, dict[str, Tensor]()
    for name, shape in WEIGHTS.items():
        stem = f"lora_unet_{name}."
        own = {key.removeprefix(stem): t for key, t in tensors.items() if key.startswith(stem)}
        alpha = float(own.pop("alpha", torch.tensor(1.0)))
        if "diff" in own:
            found[name] = own["diff"]
        elif "lora_up.weight" in own:
            found[name] = dense_lora(own, shape) * alpha / own["lora_down.weight"].shape[0]
        elif "hada_w1_a" in own:
            found[name] = dense_loha(own, shape) * alpha / own["hada_w1_b"].shape[0]
        else:
            rank = own["lokr_w2_b"].shape[0] if "lokr_w2_b" in own else alpha
            found[name] = dense_lokr(own, shape) * alpha / rank
    return found


def off(found: Mapping[str, Tensor], kind: str) -> float:
    """How far the file is from what it was to be, as a share of that."""
    pairs = [(found[name], WANTED[kind, name]) for name in WEIGHTS]
    return math.sqrt(
        sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    )


@pytest.mark.parametrize("target", ("lora", "loha", "lokr", "diff"))
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_becomes_every_other(folder: Path, tmp_path: Path, kind: str, target: str) -> None:
    dense = kind in ("ia3", "oft", "full", "dora", "whole_lokr") or (kind, target) == ("glora", "loha")
    rule = RankRule(4) if target != "diff" and (dense or target == "lokr") else None
    base = [folder / "base.safetensors"] if kind in ON_BASE | HIDDEN else []
    report = convert(
        folder / f"{kind}.safetensors", tmp_path / "a.safetensors", to=target, rule=rule, base=base, dtype=torch.float64
    )
    error = off(by_hand(tmp_path / "a.safetensors"), kind)
    assert math.isclose(report.error, error, rel_tol=1e-6, abs_tol=1e-12), (report.error, error)
    if rule is None:
        assert error < 1e-12
    else:
        assert error < 0.99 and all(row.rank is None or row.rank <= 4 for row in report.rows)
    if rule is not None and target == "lora":  # the nearest there is, says numpy
        for row in report.rows:
            s = torch.linalg.svdvals(WANTED[kind, row.name.removeprefix("lora_unet_")].flatten(1))
            best = float((s[4:].square().sum() / s.square().sum()).sqrt())
            assert row.error is not None and math.isclose(row.error, best, rel_tol=1e-6, abs_tol=1e-9)


def test_ranks_are_those_of_the_algebra(folder: Path, tmp_path: Path) -> None:
    """R^2 of a LoHa, rank(w1) R of a LoKr, 2 R of a GLoRA, which with a kernel has one of its own for each position."""
    for kind, rank in (("loha", R * R), ("lokr", 2 * R), ("glora", 2 * R), ("tucker", R)):
        report = convert(
            folder / f"{kind}.safetensors",
            tmp_path / f"{kind}.safetensors",
            to="lora",
            base=[folder / "base.safetensors"],
        )
        assert {row.rank for row in report.rows if kind != "glora" or row.name == "lora_unet_x"} == {rank}, kind


def test_what_depends_on_the_base_asks_for_it(folder: Path, tmp_path: Path) -> None:
    for kind in ON_BASE:
        with pytest.raises(ValueError, match=rf"{kind}\.safetensors: lora_unet_[cx]: .*--base CHECKPOINT"):
            convert(folder / f"{kind}.safetensors", tmp_path / "a.safetensors", to="diff")
    assert not [*tmp_path.iterdir()]


def test_an_error_above_the_limit_writes_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.\d+ off its input, more than --max_error 0\.01"):
        convert(folder / "full.safetensors", tmp_path / "a.safetensors", to="lora", rule=RankRule(2), max_error=0.01)
    assert not [*tmp_path.iterdir()]


def test_a_lora_larger_than_its_weight_is_not_written_unasked(tmp_path: Path) -> None:
    save_file({"lora_unet_x.diff": torch.randn(40, 40)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="x: as lora of all its 40 ranks it has more values than its weight: give a rank"
    ):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora")


def test_dtypes_biases_and_keys_that_are_no_layer_stay(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {key: t.bfloat16() for key, t in load_file(folder / "loha.safetensors").items() if "alpha" not in key}
    tensors |= {"lora_unet_x.diff_b": torch.randn(24).bfloat16(), "lora_unet_n.w_norm": torch.randn(6).bfloat16()}
    tensors |= {"lora_unet_x.alpha": torch.tensor(2), "step": torch.tensor(7)}
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora")
    found = load_file(tmp_path / "b.safetensors")
    assert {key: t.dtype for key, t in found.items()} == {
        **{f"lora_unet_{name}.lora_{side}.weight": torch.bfloat16 for name in WEIGHTS for side in ("down", "up")},
        **{f"lora_unet_{name}.alpha": torch.float32 for name in WEIGHTS},
        "lora_unet_x.diff_b": torch.bfloat16,
        "lora_unet_n.w_norm": torch.bfloat16,
        "step": torch.int64,
    }
    for key in ("lora_unet_x.diff_b", "lora_unet_n.w_norm", "step"):
        assert torch.equal(found[key], tensors[key]), key


def test_metadata_and_hashes_of_what_is_written(folder: Path, tmp_path: Path) -> None:
    import hashlib

    convert(folder / "loha.safetensors", tmp_path / "b.safetensors", to="lora")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        known = file.metadata()
    assert known["ss_steps"] == "5" and known["ss_network_module"] == "networks.lora" and known["ss_network_dim"] == "4"
    (done,) = json.loads(known["networks_history"])
    assert done["command"] == "convert" and done["to"] == ["lora"] and done["input"] == "loha.safetensors"
    data = (tmp_path / "b.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert known["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


# -- forms of programs


def flux_file(
    path: Path, algo: Callable[[tuple[int, ...], Tensor], tuple[Tensors, Tensor]] = lora
) -> dict[str, Tensor]:
    """A file and its checkpoint beside it, in the trainer's names; layer -> what it adds."""
    torch.manual_seed(2)
    D = 8
    shapes = {
        "double_blocks.0.img_attn.qkv": (3 * D, D),
        "double_blocks.0.img_attn.proj": (D, D),
        "single_blocks.0.linear1": (7 * D, D),
        "single_blocks.0.linear2": (D, 5 * D),
    }
    weights = {name: rand(*shape) for name, shape in shapes.items()}
    save_file({f"{name}.weight": W for name, W in weights.items()}, path.with_name("flux-base.safetensors"))
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for name, shape in shapes.items():
        own, wanted[name] = algo(shape, weights[name])
        own["alpha"] = torch.tensor(ALPHA)
        tensors |= {f"lora_unet_{name}.".replace(".", "_")[:-1] + f".{key}": t for key, t in own.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return wanted


DIFFUSERS = {  # layer there -> the trainer's, and its rows in units of the width
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0, 1),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", 1, 2),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", 2, 3),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, 1),
    "single_transformer_blocks.0.attn.to_q": ("single_blocks.0.linear1", 0, 1),
    "single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1", 1, 2),
    "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2, 3),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3, 7),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", 0, 1),
}


@pytest.mark.parametrize("algo", (lora, loha, lokr))
def test_layers_of_diffusers_by_hand(tmp_path: Path, algo: Callable[..., tuple[Tensors, Tensor]]) -> None:
    wanted = flux_file(tmp_path / "a.safetensors", algo)
    base = [tmp_path / "flux-base.safetensors"]
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=["lora", "diffusers"], base=base)
    found = {key: t.double() for key, t in load_file(tmp_path / "b.safetensors").items()}
    assert found.keys() == {f"transformer.{name}.lora_{side}.weight" for name in DIFFUSERS for side in "AB"}
    for name, (layer, start, stop) in DIFFUSERS.items():
        update = found[f"transformer.{name}.lora_B.weight"] @ found[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(update, wanted[layer][8 * start : 8 * stop], atol=1e-9, rtol=1e-9)
    assert report.error < 1e-9
    # and back under the trainer's names
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="portable", base=base)
    back = {key: t.double() for key, t in load_file(tmp_path / "c.safetensors").items()}
    for layer, update in wanted.items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        down, up = back[f"{stem}.lora_down.weight"], back[f"{stem}.lora_up.weight"]
        torch.testing.assert_close(up @ down * float(back[f"{stem}.alpha"]) / len(down), update, atol=1e-9, rtol=1e-9)


def test_dora_in_the_form_for_comfyui_and_back(tmp_path: Path) -> None:
    """There W' = magnitude * (W + dW) / ||W||, so it is the magnitude * ||W|| / ||W + dW|| that is written."""
    wanted = flux_file(tmp_path / "a.safetensors", dora)
    base = [tmp_path / "flux-base.safetensors"]
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui", base=base)
    tensors, weights = load_file(tmp_path / "b.safetensors"), load_file(base[0])
    assert "use_folded_dora_flag" in tensors
    for layer, update in wanted.items():
        stem, W = f"lora_unet_{layer.replace('.', '_')}", weights[f"{layer}.weight"].double()
        down, up = (tensors[f"{stem}.lora_{side}.weight"].double() for side in ("down", "up"))
        theirs = tensors[f"{stem}.dora_scale"].double() * (W + up @ down * ALPHA / R) / W.norm(dim=1, keepdim=True)
        torch.testing.assert_close(theirs - W, update, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="portable", base=base)
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(last[key].double(), tensor.double(), atol=1e-6, rtol=1e-6)


def test_names_alone_change_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    flux_file(tmp_path / "a.safetensors")
    base = [tmp_path / "flux-base.safetensors"]
    for form in ("comfyui", "blissful"):
        convert(tmp_path / "a.safetensors", tmp_path / f"{form}.safetensors", to=form, base=base)
        convert(tmp_path / f"{form}.safetensors", tmp_path / f"{form}2.safetensors", to="portable", base=base)
        first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / f"{form}2.safetensors")
        assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first), form


def test_a_folder_for_peft(tmp_path: Path) -> None:
    wanted = flux_file(tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", to="peft", base=[tmp_path / "flux-base.safetensors"])
    settings = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    tensors = {key: t.double() for key, t in load_file(tmp_path / "folder" / "adapter_model.safetensors").items()}
    assert settings["peft_type"] == "LORA" and settings["r"] == settings["lora_alpha"] == R
    for name, (layer, start, stop) in DIFFUSERS.items():
        stem = f"base_model.model.{name}"
        update = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(update, wanted[layer][8 * start : 8 * stop], atol=1e-9, rtol=1e-9)


def test_what_a_form_has_no_place_for(folder: Path, tmp_path: Path) -> None:
    flux_file(tmp_path / "a.safetensors", loha)
    base = [tmp_path / "flux-base.safetensors"]
    with pytest.raises(ValueError, match="layers of loha, and blissful holds lora alone: add --to lora"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="blissful", base=base)
    flux_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors") | {"step": torch.tensor(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="1 layers or tensors would be lost, e.g. step .* --allow_dropped"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui", base=base)
    report = convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui", base=base, allow_dropped=True
    )
    assert report.dropped == [("step", "is no adapter")]


# -- the command


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = folder / "loha.safetensors", tmp_path / "a.safetensors"
    assert command.main([str(source), "--to", "lora", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["command"] == "convert" and len(told["layers"]) == 2 and told["error"] < 1e-9
    assert command.main([str(source), "--to", "lora", "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert command.main([str(source), "--to", "lora", "--out", str(source), "--overwrite"]) == 2
    assert "choose another output" in capsys.readouterr().err
    for options, message in (
        (["--to", "lorra"], "there is no target lorra; did you mean lora?"),
        (["--to", "lora", "--to", "diff"], "give an algorithm, the form of a program, or one of each"),
        (["--to", "lora", "--energy", "0.9", "--sv_ratio", "3"], "two rules for one rank"),
        (["--to", "lora", "--energy", "1.5"], "above 0 and up to 1"),
        (["--to", "comfyui", "--dim", "4"], "a rank or a factor is for an algorithm"),
        (["--to", "diff", "--dim", "4"], "the whole difference has no rank"),
        (["--to", "lora", "--factor", "4"], "factor=4 is for lokr alone"),
    ):
        assert command.main([str(source), *options, "--out", str(tmp_path / "b.safetensors")]) == 2
        assert message in capsys.readouterr().err, options
