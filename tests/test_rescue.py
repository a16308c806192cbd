"""Files that do not work, made by hand with a known update: what is said of them, and what the mended file does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from networks.cli.rescue import main
from networks.models import skeleton as skeletons
from networks.tools import causes, opened
from networks.tools import rescue as tool
from networks.tools.report import Report
from networks.tools.rescue import rescue

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0."
SHAPES = {"attn1_to_q": (320, 320), "attn2_to_k": (320, 768), "ff_net_2": (320, 1280)}
IN_MODEL = {"attn1_to_q": "attn1.to_q", "attn2_to_k": "attn2.to_k", "ff_net_2": "ff.net.2"}
Q = f"lora_unet_{BLOCK}attn1_to_q"
DOWN, UP, ALPHA, DORA = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
RANK, SCALE = 4, 0.5
Tensors = dict[str, Tensor]


def good() -> Tensors:
    rng = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for name, (rows, columns) in SHAPES.items():
        stem = f"lora_unet_{BLOCK}{name}"
        found[stem + DOWN] = torch.randn(RANK, columns, generator=rng)
        found[stem + UP] = torch.randn(rows, RANK, generator=rng)
        found[stem + ALPHA] = torch.tensor(SCALE * RANK)
    return found


def update(tensors: Tensors, name: str, scale: float | None = None) -> Tensor:
    """By the definition of LoRA, in float64."""
    stem = f"lora_unet_{BLOCK}{name}"
    down, up = tensors[stem + DOWN].double(), tensors[stem + UP].double()
    return up @ down * (float(tensors[stem + ALPHA]) / len(down) if scale is None else scale)


def broken(changes: Callable[[Tensors], object]) -> Tensors:
    tensors = good()
    changes(tensors)
    return tensors


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): t for key, t in tensors.items()}


def nan(tensors: Tensors) -> None:
    tensors[Q + UP][0, 0] = float("nan")


def without(*ends: str) -> Tensors:
    return {key: t for key, t in good().items() if not key.endswith(ends)}


def exchanged() -> Tensors:
    return renamed(renamed(renamed(good(), DOWN, ".x"), UP, DOWN), ".x", UP)


PEFT = {
    f"unet.{DOTTED}{IN_MODEL[name]}.lora_{side}.weight": good()[f"lora_unet_{BLOCK}{name}{end}"]
    for name in SHAPES
    for side, end in (("A", DOWN), ("B", UP))
}
DORA_TRAINED = {
    "ss_network_module": "networks.lora",
    "ss_network_args": json.dumps({"use_dora": "True", "dropout": "0"}),
}
# tensors, metadata, what is said, scale of the update, whether Q is lost
CASES: dict[str, tuple[Tensors, dict[str, str], str, float, bool]] = {
    "sound": (good(), {}, "", SCALE, False),
    "NaN": (broken(nan), {}, "lora_up.weight has NaN or infinite values", SCALE, True),
    "too large": (broken(lambda t: t[Q + UP].mul_(1e12)), {}, "which no training gives", SCALE, True),
    "half": (broken(lambda t: t.pop(Q + UP)), {}, "has lora_down.weight without lora_up.weight", SCALE, True),
    "alpha alone": (without("q" + UP, "q" + DOWN), {}, "an alpha alone, without factors", SCALE, True),
    "int8": (broken(lambda t: t.update({Q + UP: t[Q + UP].to(torch.int8)})), {}, "of type int8", SCALE, True),
    "other shape": (broken(lambda t: t.update({Q + UP: torch.ones(7, RANK)})), {}, "do not fit a weight of (320, 320)",
                    SCALE, True),
    "unknown value": (broken(lambda t: t.update({f"{Q}.foo": torch.ones(3)})), {}, "has foo, a form which this version",
                      SCALE, True),
    "flag of RS-LoRA": (
        {k: t / RANK**0.5 if k.endswith(ALPHA) else t for k, t in good().items()}
        | {"use_rslora_flag": torch.tensor(1.0), "use_dora_flag": torch.tensor(0.0)},
        {}, "by the root of the rank", SCALE, False),
    "other ranks": (broken(lambda t: t.update({Q + UP: torch.ones(320, 3)})), {}, "4 and 3 ranks", SCALE, True),
    "alpha missing in one": (broken(lambda t: t.pop(Q + ALPHA)), {}, "written with strength 0.5, that of all other",
                             SCALE, False),
    "alpha NaN": (broken(lambda t: t.update({Q + ALPHA: torch.tensor(float("nan"))})), {}, "no finite number", SCALE,
                  False),
    "alpha of two": (broken(lambda t: t.update({Q + ALPHA: torch.ones(2)})), {}, "no finite number", SCALE, False),
    "alpha in the header": (without(ALPHA), {"lora_alpha": "1"}, "a number in the header", 0.25, False),
    "doubled": (renamed(good(), "lora_unet_", "lora_unet_lora_unet_"), {}, "a beginning twice", SCALE, False),
    "compiled": (renamed(good(), "lora_unet_", "lora_unet__orig_mod_"), {}, "wrapped the model", SCALE, False),
    "distributed": (renamed(good(), "lora_unet_", "module.lora_unet_"), {}, "wrapped the model", SCALE, False),
    "float64": ({k: t.double() for k, t in good().items()}, {}, "are in float64", SCALE, False),
    "turned": ({k: t.T if t.dim() else t for k, t in good().items()}, {}, "turned back", SCALE, False),
    "exchanged": (exchanged(), {}, "given back their names", SCALE, False),
    "one turned": (broken(lambda t: t.update({Q + UP: t[Q + UP].T})), {}, "one of the two factors", SCALE, False),
    "twice": (good() | renamed({k: t.clone() for k, t in good().items()}, "lora_unet_", "lycoris_"), {},
              "there twice under two names", SCALE, False),
    "names of diffusers": (PEFT, {}, "its names are", 1.0, False),
    "magnitudes lost": (good(), DORA_TRAINED, "a converter has left them out", SCALE, False),
    "magnitudes lost by a converter of names": (PEFT, DORA_TRAINED, "a converter has left them out", 1.0, False),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model for all tests, and other programs are asked in one of them: this is what takes time."""
    for module in (causes, opened):
        monkeypatch.setattr(module, "skeleton", _model)
    if "case" not in request.fixturenames or request.node.callspec.params["case"] != "doubled":
        monkeypatch.setattr(tool, "verdicts", lambda given: ())


_model = functools.cache(skeletons.skeleton)


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file(case: str, tmp_path: Path) -> None:
    tensors, metadata, said, scale, lost = CASES[case]
    save_file({key: t.contiguous() for key, t in tensors.items()}, path := tmp_path / "in.safetensors", metadata)
    out = tmp_path / "out.safetensors"
    if case == "NaN":
        with pytest.raises(ValueError, match="would be lost.*nothing was written.*--allow_dropped"):
            rescue(path, out, model="sd15")
        assert not out.exists()
    report = rescue(path, out, model="sd15", allow_dropped=lost)
    told = "; ".join(one["sentence"] for one in report.details["findings"])
    assert said in told and report.details["sound"] == (not said), told
    found = load_file(out)
    kept = [name for name in SHAPES if not (lost and name == "attn1_to_q")]
    assert len(report.rows) == len(kept) and found.keys() == {
        f"lora_unet_{BLOCK}{name}{end}" for name in kept for end in (DOWN, UP, ALPHA)
    }
    for name in kept:
        mine = update(found, name)
        torch.testing.assert_close(mine, update(good(), name, scale), rtol=1e-6, atol=0)
    with safe_open(out, "pt") as file:
        assert "use_dora" not in str(file.metadata()), "it would be asked for again"
    assert report.error == 0 and all(row.error == 0 for row in report.rows)
    if case == "doubled":
        readers = {one["program"].split()[0]: (one["before"], one["after"]) for one in report.details["readers"]}
        assert readers["ComfyUI"] == ("0/3 layers", "3/3 layers")


def diagnosed(path: Path, **options: object) -> tuple[Report, str]:
    report = rescue(path, **options)  # type: ignore[arg-type]
    return report, "; ".join(one["sentence"] for one in report.details["findings"])


def test_the_strength_of_the_user_counts_where_the_file_is_silent_or_disagrees(tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(without(ALPHA), path)
    assert any("--strength says another" in note for note in rescue(path, model="sd15").notes)
    for metadata in ({}, {"alpha": "4", "lora_alpha": "2"}):
        save_file(without(ALPHA), path, metadata)
        if metadata:
            with pytest.raises(ValueError, match="alpha = 4 and lora_alpha = 2.*--strength"):
                rescue(path, model="sd15")
        rescue(path, out, model="sd15", strength=0.75, overwrite=True)
        torch.testing.assert_close(update(load_file(out), "ff_net_2"), update(good(), "ff_net_2", 0.75))


def test_a_damaged_file_gives_what_is_whole(tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    data = save(good())
    last = [key for key in good() if "ff_net_2" in key]
    path.write_bytes(data[:-8000])
    with pytest.raises(ValueError, match="would be lost"):
        rescue(path, out, model="sd15")
    report = rescue(path, out, model="sd15", allow_dropped=True)
    assert {name for name, _ in report.dropped} >= {key for key in last if key.endswith("up.weight")}
    torch.testing.assert_close(update(load_file(out), "attn1_to_q"), update(good(), "attn1_to_q"))
    path.write_bytes(data + b"xx")
    report, told = diagnosed(path, model="sd15")
    assert not report.dropped and "damaged" in told and len(report.rows) == 3
    others = {
        data[:40]: "header", b"version https://git-lfs.github.com/spec/v1\n": "Git LFS",
        b"<!DOCTYPE html>": "web page", b"PK\x03\x04" + bytes(60): "pickled",
    }  # fmt: skip
    for content, what in others.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"nothing can be read of .*{what}"):
            rescue(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint with the three weights, under diffusers' names."""
    rng = torch.Generator().manual_seed(1)
    weights = {f"{DOTTED}{IN_MODEL[n]}.weight": torch.randn(shape, generator=rng) / 20 for n, shape in SHAPES.items()}
    save_file(weights, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def lengths(base: Path) -> dict[str, Tensor]:
    weights = load_file(base)
    return {name: weights[f"{DOTTED}{IN_MODEL[name]}.weight"].double().norm(dim=1, keepdim=True) for name in SHAPES}


def test_rounded_magnitudes_that_training_left_alone_become_exact(tmp_path: Path, base: Path) -> None:
    path, out, norms = tmp_path / "in.safetensors", tmp_path / "out.safetensors", lengths(base)
    moved = norms["attn1_to_q"] * torch.linspace(0.9, 1.1, 320, dtype=torch.float64)[:, None]
    true = norms | {"attn1_to_q": moved}
    save_file(good() | {f"lora_unet_{BLOCK}{n}{DORA}": m.bfloat16() for n, m in true.items()}, path)
    assert "--base" in diagnosed(path, model="sd15")[1]
    rescue(path, out, model="sd15", base=[base])
    found = load_file(out)
    for name, magnitude in true.items():
        mine = found[f"lora_unet_{BLOCK}{name}{DORA}"]
        exact = magnitude if name != "attn1_to_q" else magnitude.bfloat16().double()
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-7, atol=0)


def test_folded_magnitudes_are_unfolded_and_back(tmp_path: Path, base: Path) -> None:
    path, out, norms, weights = (
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        lengths(base),
        load_file(base),
    )
    true, folded = {}, good() | {"use_folded_dora_flag": torch.tensor(1.0)}
    for name in SHAPES:
        key, weight = f"lora_unet_{BLOCK}{name}{DORA}", weights[f"{DOTTED}{IN_MODEL[name]}.weight"].double()
        true[key] = 1.1 * norms[name]
        folded[key] = (true[key] * norms[name] / (weight + update(good(), name)).norm(dim=1, keepdim=True)).float()
    save_file(folded, path)
    with pytest.raises(ValueError, match="--base CHECKPOINT"):
        rescue(path, out, model="sd15")
    assert not out.exists() and "--base CHECKPOINT" in diagnosed(path, model="sd15")[1]
    rescue(path, out, model="sd15", base=[base])
    found = load_file(out)
    assert "use_folded_dora_flag" not in found
    for key, magnitude in true.items():
        torch.testing.assert_close(found[key].double(), magnitude, rtol=1e-6, atol=0)
    rescue(out, again := tmp_path / "again.safetensors", model="sd15", base=[base], to="comfyui")
    for key, tensor in load_file(again).items():
        torch.testing.assert_close(tensor, folded[key], rtol=1e-6, atol=0)


def test_layers_with_each_others_names(tmp_path: Path) -> None:
    path, out, stem = tmp_path / "in.safetensors", tmp_path / "out.safetensors", "lora_unet_blocks_0_"
    one, two = torch.randn(1536), torch.randn(1536)
    for old, right in (({"norm2": one}, {"norm3": one}), ({"norm2": one, "norm3": two}, {"norm3": one, "norm2": two})):
        save_file({f"{stem}{name}.w_norm": t for name, t in old.items()}, path)
        report = rescue(path, out, model="wan2.1-t2v-1.3b", overwrite=True)
        assert "each other's names" in report.details["findings"][0]["what"]
        found = load_file(out)
        assert {name: True for name in right} == {
            name: torch.equal(found[f"{stem}{name}.w_norm"], t) for name, t in right.items()
        }
        assert rescue(out, model="wan2.1-t2v-1.3b").details["sound"], "the new file is read as it is meant"


def test_what_no_cure_is_for(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    cases: dict[str, tuple[Tensors, str]] = {
        "is no adapter: its keys look like nothing": ({}, ""),
        "nothing is left of": ({Q + DOWN: torch.ones(4, 320)}, ""),
        "there is no form": (good(), "auto"),
    }
    for said, (tensors, to) in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=said):
            rescue(path, to=to)
    save_file(good() | {"step": torch.ones(1), "diffusion_model.x": torch.ones(2)}, path)
    report, told = diagnosed(path, model="sd15")
    assert {name for name, _ in report.dropped} == {"step", "diffusion_model.x"} and "keys are no adapter" in told


FOR = ["--model", "sd15"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(good(), path)
    assert main([*FOR, str(path)]) == 0 and "nothing is wrong" in capsys.readouterr().out
    save_file(broken(nan), path)
    assert main([*FOR, str(path)]) == 1
    assert "NaN" in capsys.readouterr().out
    assert main([*FOR, str(path), "--out", str(out)]) == 2 and not out.exists()
    assert main([*FOR, str(path), "--out", str(path), "--allow_dropped", "--overwrite"]) == 2
    capsys.readouterr()
    assert main([*FOR, str(path), "--out", str(out), "--allow_dropped", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["lost"] is True and out.exists()
    assert main([*FOR, str(out)]) == 0
