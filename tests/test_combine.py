"""The sum of adapter files, against formulas in numpy and names written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import api
from networks.cli import combine as command
from networks.files.adapter_file import FileTensors
from networks.models.skeleton import Skeleton, skeleton

Files = dict[str, Tensor]
Matrix = np.ndarray[Any, np.dtype[np.float64]]
Q, CONV, NORM = "lora_unet_blocks_0_q", "lora_unet_blocks_1_conv", "lora_unet_norm"  # of no model that is known


def lora(name: str, shape: tuple[int, ...], rank: int, alpha: float, dtype: torch.dtype = torch.float32) -> Files:
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2)).to(dtype)
    down = torch.randn(rank, *shape[1:]).to(dtype)
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(alpha)}


def wide(tensors: Files, name: str, suffix: str) -> Matrix:
    found: Matrix = tensors[f"{name}.{suffix}"].double().flatten(1).numpy()
    return found


def of_lora(tensors: Files, name: str) -> Matrix:
    up, down = wide(tensors, name, "lora_up.weight"), wide(tensors, name, "lora_down.weight")
    found: Matrix = up @ down * (float(tensors[f"{name}.alpha"]) / len(down))
    return found


def off(found: Matrix, wanted: Matrix) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def saved(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_side_by_side_is_the_sum(tmp_path: Path) -> None:
    """Ranks, alphas, dtypes and kernels differ, and so do the layers that the files have."""
    a = lora(Q, (24, 16), 3, 1.5) | lora(CONV, (12, 8, 3, 3), 2, 2.0) | {f"{NORM}.w_norm": torch.randn(6)}
    b = lora(Q, (24, 16), 4, 8.0, torch.float16) | {f"{NORM}.w_norm": torch.randn(6), f"{NORM}.b_norm": torch.randn(6)}
    a[f"{Q}.diff_b"], b[f"{Q}.diff_b"] = torch.randn(24), torch.randn(24).half()
    files = {saved(tmp_path / "a.safetensors", a): 0.5, saved(tmp_path / "b.safetensors", b): -0.3}
    report = api.combine(files, tmp_path / "c.safetensors")
    made = load_file(tmp_path / "c.safetensors")

    assert off(of_lora(made, Q), 0.5 * of_lora(a, Q) - 0.3 * of_lora(b, Q)) < 1e-7
    assert off(of_lora(made, CONV), 0.5 * of_lora(a, CONV)) < 1e-7
    assert made[f"{Q}.lora_down.weight"].shape == (7, 16) and made[f"{CONV}.lora_down.weight"].shape == (2, 8, 3, 3)
    for key in (f"{Q}.diff_b", f"{NORM}.w_norm"):
        assert torch.allclose(made[key], 0.5 * a[key] - 0.3 * b[key].float(), atol=1e-7)
    assert torch.allclose(made[f"{NORM}.b_norm"], -0.3 * b[f"{NORM}.b_norm"])
    assert report.error < 1e-6 and all(row.exact for row in report.rows)


def test_a_change_of_the_bias_alone(tmp_path: Path) -> None:
    """Some programs write it for layers of which nothing else is changed."""
    a, b = lora(Q, (24, 16), 3, 3.0), {f"{Q}.diff_b": torch.randn(24), f"{Q}.diff": torch.zeros(24, 16)}
    b |= lora(CONV, (12, 8, 3, 3), 2, 2.0)
    files = [saved(tmp_path / "a.safetensors", a), saved(tmp_path / "b.safetensors", b)]
    api.combine(files, tmp_path / "c.safetensors")
    made = load_file(tmp_path / "c.safetensors")
    assert torch.equal(made[f"{Q}.diff_b"], b[f"{Q}.diff_b"]) and off(of_lora(made, Q), of_lora(a, Q)) < 1e-6


def test_factors_at_one_scale_stay_bit_for_bit(tmp_path: Path) -> None:
    """In half precision a third times a factor would be another factor; so it goes into alpha."""
    a, b = (lora(Q, (24, 16), rank, rank / 3, torch.bfloat16) for rank in (3, 4))
    files = {saved(tmp_path / "a.safetensors", a): -0.7, saved(tmp_path / "b.safetensors", b): 0.7}
    api.combine(files, tmp_path / "c.safetensors")
    made = load_file(tmp_path / "c.safetensors")
    down, up = "lora_down.weight", "lora_up.weight"
    assert torch.equal(made[f"{Q}.{down}"], torch.cat([a[f"{Q}.{down}"], b[f"{Q}.{down}"]]))
    assert torch.equal(made[f"{Q}.{up}"], torch.cat([-a[f"{Q}.{up}"], b[f"{Q}.{up}"]], 1))
    assert float(made[f"{Q}.alpha"]) == pytest.approx(7 * 0.7 / 3, rel=1e-7)
    assert header(tmp_path / "c.safetensors")["ss_network_alpha"] == f"{7 * 0.7 / 3:g}"


def test_more_ranks_than_a_layer_can_have(tmp_path: Path) -> None:
    """All of those, whole, and no error: such a layer is in every file of a high dim."""
    a, b = lora(Q, (40, 24), 20, 20.0), lora(Q, (40, 24), 18, 9.0)
    files = [saved(tmp_path / "a.safetensors", a), saved(tmp_path / "b.safetensors", b)]
    api.combine(files, tmp_path / "c.safetensors")
    made = load_file(tmp_path / "c.safetensors")
    assert made[f"{Q}.lora_down.weight"].shape == (24, 24)
    assert off(of_lora(made, Q), of_lora(a, Q) + of_lora(b, Q)) < 1e-6


def of_every(name: str, kind: str) -> tuple[Files, Matrix]:
    """A layer [12, 8] of an algorithm, and its update by the formula."""
    if kind == "loha":
        names = {"w1_a": (12, 2), "w1_b": (2, 8), "w2_a": (12, 2), "w2_b": (2, 8)}
        t = {f"{name}.hada_{key}": torch.randn(shape) for key, shape in names.items()}
        one, two = (wide(t, name, f"hada_w{i}_a") @ wide(t, name, f"hada_w{i}_b") for i in (1, 2))
        return t | {f"{name}.alpha": torch.tensor(1.0)}, one * two / 2
    if kind == "lokr":
        t = {f"{name}.lokr_w1": torch.randn(3, 2), f"{name}.lokr_w2_a": torch.randn(4, 2)}
        t[f"{name}.lokr_w2_b"] = torch.randn(2, 4)
        two = wide(t, name, "lokr_w2_a") @ wide(t, name, "lokr_w2_b")
        return t | {f"{name}.alpha": torch.tensor(1.0)}, np.kron(wide(t, name, "lokr_w1"), two) / 2
    if kind == "diff":
        t = {f"{name}.diff": torch.randn(12, 8)}
        return t, wide(t, name, "diff")
    t = lora(name, (12, 8), 2, 3.0)
    return t, of_lora(t, name)


@pytest.mark.parametrize("to", ("lora", "diff", "loha", "lokr"))
def test_any_algorithms(tmp_path: Path, to: str) -> None:
    strengths = {"lora": 1.0, "loha": -0.5, "lokr": 2.0, "diff": 0.25}
    files, wanted = dict[Path | str, float](), np.zeros((12, 8))
    for kind, strength in strengths.items():
        tensors, update = of_every(Q, kind)
        files[saved(tmp_path / f"{kind}.safetensors", tensors)] = strength
        wanted += strength * update
    report = api.combine(files, tmp_path / "c.safetensors", to=to)
    made = load_file(tmp_path / "c.safetensors")
    if to == "loha":
        one, two = (wide(made, Q, f"hada_w{i}_a") @ wide(made, Q, f"hada_w{i}_b") for i in (1, 2))
        found: Matrix = one * two * (float(made[f"{Q}.alpha"]) / len(made[f"{Q}.hada_w1_b"]))
    elif to == "lokr":  # which the sum is not: the nearest one, by the first singular value of its rearranged blocks
        found = np.kron(wide(made, Q, "lokr_w1"), wide(made, Q, "lokr_w2")).astype(np.float64)
        (m, n), (p, q) = made[f"{Q}.lokr_w1"].shape, made[f"{Q}.lokr_w2"].shape
        values = np.linalg.svd(wanted.reshape(m, p, n, q).transpose(0, 2, 1, 3).reshape(m * n, p * q))[1]
        assert off(found, wanted) == pytest.approx(np.linalg.norm(values[1:]) / np.linalg.norm(values), rel=1e-5)
    else:
        found = of_lora(made, Q) if to == "lora" else wide(made, Q, "diff")
    assert report.error == pytest.approx(off(found, wanted), abs=1e-5)
    assert to == "lokr" or off(found, wanted) < 1e-5


@pytest.mark.parametrize("rule", (api.RankRule(3), api.RankRule(None, "energy", 0.8)))
def test_the_nearest_of_a_rank(tmp_path: Path, rule: api.RankRule) -> None:
    a, b = lora(Q, (24, 16), 5, 5.0), lora(Q, (24, 16), 4, 2.0)
    files = {saved(tmp_path / "a.safetensors", a): 1.0, saved(tmp_path / "b.safetensors", b): -0.3}
    report = api.combine(files, tmp_path / "c.safetensors", rule=rule)
    made, wanted = load_file(tmp_path / "c.safetensors"), of_lora(a, Q) - 0.3 * of_lora(b, Q)
    u, s, vh = np.linalg.svd(wanted)
    rank = rule.dim or int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), rule.value)) + 1
    assert len(made[f"{Q}.lora_down.weight"]) == rank
    assert off(of_lora(made, Q), u[:, :rank] * s[:rank] @ vh[:rank]) < 1e-6
    assert report.error == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), rel=1e-5)


# -- names, parts and blocks


DOUBLE, SINGLE = "lora_unet_double_blocks_{}_img_attn_proj", "lora_unet_single_blocks_{}_linear2"
ENCODER = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def flux(blocks: Mapping[str, tuple[int, int]], rank: int = 1) -> Files:
    found: Files = {}
    for name, shape in blocks.items():
        found |= lora(name, shape, rank, float(rank))
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files, Files]:
    """Two files for FLUX.1: a under the trainer's names, b has q, k and v apart as diffusers' model does."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("flux")
    a = flux({DOUBLE.format(i): (3072, 3072) for i in (0, 8)} | {SINGLE.format(3): (3072, 15360)})
    a |= lora("lora_unet_double_blocks_0_img_attn_qkv", (9216, 3072), 2, 1.0) | lora(ENCODER, (3072, 768), 1, 1.0)
    b: Files = {}
    for i, layer in enumerate(("to_q", "to_k", "to_v")):
        path = f"transformer.transformer_blocks.0.attn.{layer}"
        b |= {f"{path}.lora_A.weight": torch.randn(1 + i, 3072), f"{path}.lora_B.weight": torch.randn(3072, 1 + i)}
    said = {"ss_base_model_version": "flux1"}
    saved(folder / "a.safetensors", a, **said, ss_seed="1", ss_steps="9", ss_network_module="networks.lora_flux")
    saved(folder / "b.safetensors", b, **said, ss_seed="2", ss_network_module="networks.lora_flux")
    return folder, a, b


def test_layouts_meet_under_the_trainers_names(pair: tuple[Path, Files, Files], tmp_path: Path) -> None:
    folder, a, b = pair
    out = tmp_path / "c.safetensors"
    api.combine({folder / "a.safetensors": 1.0, folder / "b.safetensors": -0.5}, out, model="flux")
    made, name, x = load_file(out), "lora_unet_double_blocks_0_img_attn_qkv", torch.randn(3072, 1, dtype=torch.float64)

    def acts(tensors: Files, path: str, down: str, up: str) -> Tensor:
        return tensors[f"{path}.{up}.weight"].double() @ (tensors[f"{path}.{down}.weight"].double() @ x)

    theirs = [f"transformer.transformer_blocks.0.attn.{one}" for one in ("to_q", "to_k", "to_v")]
    wanted = acts(a, name, "lora_down", "lora_up") / 2 - torch.cat([acts(b, p, "lora_A", "lora_B") for p in theirs]) / 2
    scale = float(made[f"{name}.alpha"]) / len(made[f"{name}.lora_down.weight"])
    assert off((acts(made, name, "lora_down", "lora_up") * scale).numpy(), wanted.numpy()) < 1e-6
    assert {key.partition(".")[0] for key in made} == {key.partition(".")[0] for key in a}
    known = header(out)
    assert known["ss_base_model_version"] == "flux1" and "ss_seed" not in known and "ss_steps" not in known
    past = json.loads(known["networks_history"])[-1]
    assert past["command"] == "combine"
    assert [one["strength"] for one in past["strengths"]] == [1.0, -0.5]


def test_strengths_of_parts_and_blocks(pair: tuple[Path, Files, Files], tmp_path: Path) -> None:
    folder, a, _ = pair
    out = tmp_path / "c.safetensors"
    blocks = ["a:dit=2", "a.safetensors:blocks.8-21=3", f"{folder / 'a.safetensors'}:single_blocks.0-3,5=0"]
    blocks += ["a:text_encoder1:.*fc1=-1", r"a:double_blocks\.0\..*qkv=0.5"]
    api.combine({folder / "a.safetensors": 0.25}, out, model="flux", blocks=blocks)
    made = load_file(out)
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    wanted = {DOUBLE.format(0): 2.0, DOUBLE.format(8): 3.0, ENCODER: -1.0, qkv: 0.5}  # SINGLE 3 is the 22nd block
    assert {key.partition(".")[0] for key in made} == {*wanted}
    for name, strength in wanted.items():
        assert np.allclose(wide(made, name, "lora_down.weight"), wide(a, name, "lora_down.weight")), name
        scale = float(made[f"{name}.alpha"]) / float(a[f"{name}.alpha"])
        up = wide(made, name, "lora_up.weight") * scale
        assert np.allclose(up, strength * wide(a, name, "lora_up.weight")), name


@pytest.mark.parametrize(
    ("blocks", "says"),
    (
        ("b:dit=1", "write FILE:WHAT=0.5 with one of the files"),
        ("a:dit", "write FILE:WHAT=0.5"),
        ("a:dit=much", "'much' is no strength"),
        (
            "a:text_encodr1=1",
            "means no layer of .*did you mean text_encoder1.*parts are text_encoder1, text_encoder3, dit",
        ),
        ("a:double_blocks.5=1", "means no layer of"),
        ("a:double_blocks.8-19=1", "this model has double_blocks.0 to 18"),
        ("a:blocks.57=1", "this model has blocks.0 to 56"),
        ("a:*=1", "the regular expression .* is wrong"),
    ),
)
def test_strengths_that_mean_nothing(pair: tuple[Path, Files, Files], tmp_path: Path, blocks: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        api.combine([pair[0] / "a.safetensors"], tmp_path / "c.safetensors", model="flux", blocks=[blocks])
    assert not [*tmp_path.iterdir()]


def test_a_name_of_two_files_is_no_name(tmp_path: Path) -> None:
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files.append(saved(tmp_path / folder / "a.safetensors", lora(Q, (6, 4), 1, 1.0)))
    out = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="a is the name of 2 files"):
        api.combine(files, out, blocks=["a:.*=0.5"])
    api.combine(files, out, blocks=[f"{files[1]}:.*=0"])
    assert len(load_file(out)[f"{Q}.lora_down.weight"]) == 1
    assert [one["file"] for one in json.loads(header(out)["networks_history"])[-1]["strengths"]] == [
        "a.safetensors"
    ] * 2


def test_the_form_of_a_program(pair: tuple[Path, Files, Files], tmp_path: Path) -> None:
    """Under diffusers' names, with q, k and v apart again; nothing else is left beside the file."""
    folder, _, b = pair
    out = tmp_path / "c.safetensors"
    api.combine({folder / "b.safetensors": 0.5}, out, to=["lora", "diffusers"], model="flux")
    made, x = load_file(out), torch.randn(3072, 1)
    assert made.keys() == b.keys()
    for key in (one for one in b if one.endswith(".lora_A.weight")):
        up = key.replace("lora_A", "lora_B")
        assert torch.allclose(made[up] @ (made[key] @ x), 0.5 * (b[up] @ (b[key] @ x)), rtol=1e-4, atol=1e-3), key
    commands = [one["command"] for one in json.loads(header(out)["networks_history"])]
    assert commands == ["combine", "convert"] and [*tmp_path.iterdir()] == [out]


# -- what does not go together


def test_parts_of_one_model_need_no_layer_in_common(pair: tuple[Path, Files, Files], tmp_path: Path) -> None:
    """A file of the denoiser and one of a text encoder. Where no model is known, nothing says that they are of one."""
    te = saved(tmp_path / "te.safetensors", lora(ENCODER, (3072, 768), 1, 1.0))
    api.combine([pair[0] / "b.safetensors", te], tmp_path / "c.safetensors", model="flux")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "c.safetensors")}
    assert names == {ENCODER, "lora_unet_double_blocks_0_img_attn_qkv"}
    strange = saved(tmp_path / "x.safetensors", lora("some_layer", (6, 4), 1, 1.0))
    other = saved(tmp_path / "y.safetensors", lora("other_layer", (6, 4), 1, 1.0))
    with pytest.raises(ValueError, match="no layer in common"):
        api.combine([strange, other], tmp_path / "d.safetensors")


def test_the_model_of_one_file_decides_for_another(
    pair: tuple[Path, Files, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes of a few layers are those of several models; those that it has not stay an error."""

    def model_of(file: FileTensors) -> Skeleton:
        if Path(file.source).name == "a.safetensors":
            return skeleton("flux")
        raise ValueError("it may be for several")

    monkeypatch.setattr("networks.tools.opened.model_of", model_of)  # which takes seconds to find that out
    few = flux({DOUBLE.format(1): (3072, 3072)})
    files = [pair[0] / "a.safetensors", saved(tmp_path / "few.safetensors", few)]
    api.combine(files, tmp_path / "c.safetensors", blocks=["few:blocks.1=0.5"])
    made, name = load_file(tmp_path / "c.safetensors"), DOUBLE.format(1)
    assert torch.equal(made[f"{name}.lora_up.weight"], few[f"{name}.lora_up.weight"])
    assert float(made[f"{name}.alpha"]) == 0.5
    strange = saved(tmp_path / "x.safetensors", lora("some_layer", (6, 4), 1, 1.0))
    with pytest.raises(ValueError, match="no layer in common"):
        api.combine([files[0], strange], tmp_path / "d.safetensors")


def test_files_of_two_models(tmp_path: Path) -> None:
    sd = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    a = saved(tmp_path / "a.safetensors", lora(sd, (320, 320), 1, 1.0))
    b = saved(tmp_path / "b.safetensors", lora(xl, (640, 640), 1, 1.0))
    with pytest.raises(ValueError, match=r"a.safetensors is for .*, .*b.safetensors for Stable Diffusion XL"):
        api.combine([a, b], tmp_path / "c.safetensors")
    c = saved(tmp_path / "c.safetensors", lora(Q, (6, 4), 1, 1.0))
    d = saved(tmp_path / "d.safetensors", lora(Q, (8, 4), 1, 1.0))
    with pytest.raises(ValueError, match="6 x 4 in .* and 8 x 4 in"):
        api.combine([c, d], tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="given twice"):
        api.combine([c, str(c)], tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="every strength is 0"):
        api.combine({c: 0.0}, tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists()


def test_what_acts_on_the_weight_takes_the_base(tmp_path: Path) -> None:
    """DoRA of output rows: m W' / ||W'||, summed as the difference that it makes to the base; the report says so."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    weight, a, b = torch.randn(320, 320), lora(name, (320, 320), 2, 2.0), lora(name, (320, 320), 1, 1.0)
    a[f"{name}.dora_scale"] = torch.rand(320, 1) + 15
    base = saved(tmp_path / "base.safetensors", {key: weight})
    files = {saved(tmp_path / "a.safetensors", a): 0.5, saved(tmp_path / "b.safetensors", b): 1.0}
    with pytest.raises(ValueError, match="depends on the weight"):
        api.combine(files, tmp_path / "c.safetensors", to="diff", model="sd15")
    report = api.combine(files, tmp_path / "c.safetensors", to="diff", model="sd15", base=[base])
    old = weight.double().numpy()
    new = old + of_lora(a, name)
    new *= a[f"{name}.dora_scale"].double().numpy() / np.linalg.norm(new, axis=1, keepdims=True)
    wanted = 0.5 * (new - old) + of_lora(b, name)
    assert off(wide(load_file(tmp_path / "c.safetensors"), name, "diff"), wanted) < 1e-5
    assert any("a.safetensors: 1 layers act on the weight" in note for note in report.notes)


# -- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (lora(Q, (24, 16), rank, 1.0) for rank in (2, 3))
    one, two = saved(tmp_path / "a=1.safetensors", a), saved(tmp_path / "b.safetensors", b)
    out = tmp_path / "c.safetensors"
    given = [str(one), f"{two}=-0.5", "--blocks", r"a=1:.*_q=0.25", "--out", str(out)]
    assert command.main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "combine" and [row["rank"] for row in report["layers"]] == [5]
    assert off(of_lora(load_file(out), Q), 0.25 * of_lora(a, Q) - 0.5 * of_lora(b, Q)) < 1e-6
    before = out.read_bytes()
    assert command.main(given) == 2 and out.read_bytes() == before  # it is there
    assert command.main([*given[:-1], str(two), "--overwrite"]) == 2  # it is an input
    assert (
        command.main([*given, "--overwrite", "--dim", "2", "--max_error", "1e-3"]) == 2 and out.read_bytes() == before
    )
    assert "--max_error" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a=1.safetensors", "b.safetensors", "c.safetensors"]
