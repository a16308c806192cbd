"""scripts/merge.py: adapter files into checkpoints by keys alone, against formulas written down here."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.archs.sd import SD
from networks.cli import merge as script
from networks.files import weight_names
from networks.files.checkpoint import Checkpoint
from networks.files.merge import CheckpointMerge, MergeInput

D = 16
ALPHA, RANK = 3.0, 4
UPDATES: dict[str, float] = {}

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lora(name: str, rows: int, columns: int, kernel: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], Tensor]:
    """(keys of a file, update at multiplier 1 in float64)."""
    up, down = torch.randn(rows, RANK), torch.randn(RANK, columns, *kernel)
    tensors = {
        f"{name}.lora_up.weight": up.reshape(rows, RANK, *[1] * len(kernel)),
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(ALPHA),
    }
    return tensors, torch.einsum("or,r...->o...", up.double(), down.double()) * ALPHA / RANK


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    code = script.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert float((actual.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


# -- names


def test_a_trainers_file_with_two_adapters_at_their_multipliers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(3 * D, D),
        "double_blocks.0.img_attn.qkv.bias": torch.randn(3 * D),
        "img_in.weight": torch.randn(D, 8, dtype=torch.bfloat16),
        "scale": torch.tensor(2),
    }
    save_file(model, tmp_path / "m.safetensors", metadata={"note": "kept", **dict.fromkeys(HASHES, "stale")})
    first, dW = lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * D, D)
    w1, w2 = torch.randn(4, 4), torch.randn(12, 4)
    second = {
        "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": w1,
        "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": w2,
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(7.0),
        **{k.replace("img_attn_qkv", "not_here"): t for k, t in first.items()},
    }
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    code, said = run(
        capsys, tmp_path / "m.safetensors", tmp_path / "a.safetensors", f"{tmp_path / 'b.safetensors'}=-0.5",
        "--out", tmp_path / "new" / "out.safetensors", "--allow_missing",
    )  # fmt: skip
    assert code == 0, said
    assert "a.safetensors at 1: 1 layers matched" in said and "b.safetensors at -0.5: 1 layers matched" in said
    assert (
        "left out, b.safetensors has it, the checkpoint has no such weight: 1, lora_unet_double_blocks_0_not_here"
        in said
    )
    merged = load_file(tmp_path / "new" / "out.safetensors")
    key = "double_blocks.0.img_attn.qkv.weight"
    close(merged[key], model[key].double() + dW - 0.5 * torch.kron(w1.double(), w2.double()))
    for name in model.keys() - {key}:
        assert torch.equal(merged[name], model[name]) and merged[name].dtype == model[name].dtype
    with safe_open(tmp_path / "new" / "out.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["note"] == "kept"
    data = (tmp_path / "new" / "out.safetensors").read_bytes()
    whole = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(b"").hexdigest()[:8]  # of 64 KiB at 1 MiB, which this file has not
    assert [metadata[key] for key in HASHES] == [whole, legacy, f"0x{whole}"]
    assert json.loads(metadata["networks_merged"]) == [
        {"file": "a.safetensors", "multiplier": 1.0}, {"file": "b.safetensors", "multiplier": -0.5},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("double_blocks.0.img_attn.qkv", "lycoris_double_blocks_0_img_attn_qkv"),
        ("layers.0.self_attn.q_proj", "lycoris_layers_0_self_attn_q_proj"),  # of ACE-Step, whose own prefix it is
    ],
)
def test_the_prefix_of_lycoris(key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {f"{key}.weight": torch.randn(3 * D, D)}
    save_file(model, tmp_path / "m.safetensors")
    tensors, dW = lora(name, 3 * D, D)
    save_file(tensors, tmp_path / "a.safetensors")
    code, said = run(
        capsys, tmp_path / "m.safetensors", tmp_path / "a.safetensors", "--out", tmp_path / "out.safetensors"
    )
    assert code == 0, said
    close(load_file(tmp_path / "out.safetensors")[f"{key}.weight"], model[f"{key}.weight"].double() + dW)


def test_a_sharded_diffusers_folder_whose_projections_the_trainer_has_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FLUX.1: q, k, v and MLP in one layer of the file, here in two shards; shift and scale swapped in the last."""
    folder, head = tmp_path / "transformer", "single_transformer_blocks.3."
    rows = {"attn.to_q": D, "attn.to_k": D, "attn.to_v": D, "proj_mlp": 4 * D}
    model = {f"{head}{name}.weight": torch.randn(n, D) for name, n in rows.items()}
    model["norm_out.linear.weight"] = torch.randn(2 * D, D)
    folder.mkdir()
    shards = {"x-1.safetensors": list(model)[:2], "x-2.safetensors": list(model)[2:]}
    for name, keys in shards.items():
        save_file({key: model[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    fused, dW = lora("lora_unet_single_blocks_3_linear1", 7 * D, D)
    last, dM = lora("lora_unet_final_layer_adaLN_modulation_1", 2 * D, D)
    save_file(fused | last, tmp_path / "a.safetensors")
    out = tmp_path / "merged"
    code, said = run(capsys, folder, f"{tmp_path / 'a.safetensors'}=0.5", "--out", out, "--strict")
    assert code == 0 and "2 layers matched" in said, said
    assert sorted(p.name for p in out.iterdir()) == sorted([*shards, "x.safetensors.index.json", "config.json"])
    merged = {key: tensor for name in shards for key, tensor in load_file(out / name).items()}
    at = 0
    for name, n in rows.items():
        close(merged[f"{head}{name}.weight"], model[f"{head}{name}.weight"].double() + 0.5 * dW[at : at + n])
        at += n
    close(merged["norm_out.linear.weight"], model["norm_out.linear.weight"].double() + 0.5 * dM.roll(D, 0))


def test_every_layer_of_sd_has_its_key_in_a_released_file() -> None:
    """Against diffusers' own conversion of such files: both must name the same weight."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    lines = (Path(__file__).parent / "names" / "sd.txt").read_text().splitlines()
    own = [row[1] for row in (line.split("\t") for line in lines) if row[0] == "unet" and "x" in row[3]]
    own = [name for name in own if name.startswith(("down_blocks.", "mid_block.", "up_blocks."))]
    assert len(own) > 200
    plain = re.compile(r"\\(.)")
    pairs = [(plain.sub(r"\1", r.own.removesuffix("(.*)")), r.trainer.removesuffix(r"\1")) for r in SD.denoiser.release]
    back = [(old, new) for new, old in pairs]
    released = {}
    for name in own:
        old, new = next((old, new) for old, new in back if name.startswith(old))
        released[f"model.diffusion_model.{new}{name[len(old) :]}.weight"] = torch.empty(0), name
    extra = ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    checkpoint: dict[str, Any] = {}
    for number, key in enumerate(released):
        checkpoint[key] = torch.tensor(float(number))
        checkpoint[key.replace(".weight", ".bias")] = torch.tensor(-1.0)
    for key in extra:
        for kind in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{key}.{kind}"] = torch.tensor(-1.0)
    config = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "layers_per_block": 2,
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "addition_embed_type": None,
        "class_embed_type": None,
    }  # fmt: skip
    converted = convert_ldm_unet_checkpoint(dict(checkpoint), config)
    names = {number: key.removesuffix(".weight") for key, t in converted.items() if (number := int(t)) >= 0}
    assert [names[number] for number in range(len(released))] == own
    ups = [new for i in range(3) for new, old in pairs if old == f"up_blocks.{i}.upsamplers.0.conv"]
    assert ups == ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]  # as released
    targets = weight_names.find(released, {f"lora_unet_{name}".replace(".", "_") for name in own})
    assert {target.keys: name for name, target in targets.items()} == {
        (key,): f"lora_unet_{name}".replace(".", "_") for key, (_, name) in released.items()
    }


def test_text_encoders_in_one_file_and_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "text_model.encoder.layers.0.mlp.fc1"
    te1, dW1 = lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", D, D)
    te2, dW2 = lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", D, D)
    save_file(te1 | te2, tmp_path / "a.safetensors")
    whole = {f"text_encoders.clip_l.transformer.{layer}.weight": torch.randn(D, D),
             f"text_encoders.clip_g.transformer.{layer}.weight": torch.randn(D, D)}  # fmt: skip
    save_file(whole, tmp_path / "m.safetensors")
    assert (
        run(capsys, tmp_path / "m.safetensors", tmp_path / "a.safetensors", "--out", tmp_path / "o.safetensors")[0] == 0
    )
    merged = load_file(tmp_path / "o.safetensors")
    for key, dW in zip(whole, (dW1, dW2), strict=True):
        close(merged[key], whole[key].double() + dW)

    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    own = {f"{layer}.weight": torch.randn(D, D)}
    save_file(own, folder / "model.safetensors")
    code, said = run(capsys, folder, tmp_path / "a.safetensors", "--out", tmp_path / "o2")
    assert code == 2 and "lora_te1 or lora_te2" in said and "--prefix" in said and not (tmp_path / "o2").exists()
    code, said = run(capsys, folder, tmp_path / "a.safetensors", "--out", tmp_path / "o2", "--prefix", "lora_te2")
    assert code == 0, said
    close(load_file(tmp_path / "o2" / "model.safetensors")[f"{layer}.weight"], own[f"{layer}.weight"].double() + dW2)


# -- numbers


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2))
def test_dtypes_stay_and_values_are_rounded_once(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    W = torch.randn(D, D, 3, 3).to(dtype)
    save_file({"conv.weight": W}, tmp_path / "m.safetensors")
    tensors, dW = lora("lora_unet_conv", D, D, (3, 3))
    save_file(tensors, tmp_path / "a.safetensors")
    assert (
        run(capsys, tmp_path / "m.safetensors", tmp_path / "a.safetensors", "--out", tmp_path / "o.safetensors")[0] == 0
    )
    merged = load_file(tmp_path / "o.safetensors")["conv.weight"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = W.to(wide).double() + dW
    assert merged.dtype == dtype and merged.shape == W.shape
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float8_e5m2: 2**-3}.get(dtype, 0.0)  # half of one
    assert ((merged.to(wide) - wanted).abs() <= wanted.abs() * step * (1 + 1e-5) + 1e-6 * wanted.abs().max()).all()


def test_multiplier_0_copies_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"x.weight": torch.randn(D, D).to(torch.float8_e4m3fn), "x.scale_weight": torch.rand(D, 1)}
    save_file(model, tmp_path / "m.safetensors")
    save_file(lora("lora_unet_x", D, D)[0], tmp_path / "a.safetensors")
    run(capsys, tmp_path / "m.safetensors", f"{tmp_path / 'a.safetensors'}=0", "--out", tmp_path / "o.safetensors")
    files = [(tmp_path / name).read_bytes() for name in ("m.safetensors", "o.safetensors")]
    payloads = [data[8 + int.from_bytes(data[:8], "little") :] for data in files]
    assert payloads[0] == payloads[1]


def test_a_merge_that_rounding_eats_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.weight": torch.randn(D, D).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    save_file(lora("lora_unet_x", D, D)[0], tmp_path / "a.safetensors")
    call = (tmp_path / "m.safetensors", f"{tmp_path / 'a.safetensors'}=0.001", "--out", tmp_path / "o.safetensors")
    assert "rounding kept" in run(capsys, *call)[1]


def test_memory_stays_near_one_layer(tmp_path: Path) -> None:
    odd = 37  # a width that no other tensor of this process has
    save_file({f"b.{i}.weight": torch.randn(odd, odd) for i in range(5)}, tmp_path / "m.safetensors")
    tensors: dict[str, Tensor] = {}
    for i in range(5):
        tensors |= lora(f"lora_unet_b_{i}", odd, odd)[0]
    save_file(tensors, tmp_path / "a.safetensors")
    counts = []

    def progress(key: str, size: int) -> None:
        gc.collect()
        alive = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape == (odd, odd)]
        counts.append(len({t.untyped_storage().data_ptr() for t in alive}))

    plan = CheckpointMerge(Checkpoint(tmp_path / "m.safetensors"), [MergeInput.open(tmp_path / "a.safetensors", 1.0)])
    plan.write(tmp_path / "o.safetensors", progress)
    assert counts == [0] * 5  # what is written is gone


# -- mistakes


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint of two weights whose header says something else than it should."""
    save_file({"blocks.0.attn.to_q.weight": torch.randn(D, D), "x.weight": torch.randn(D)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def _damaged(tmp_path: Path, a: Path, o: Path) -> dict[str, tuple[list[Any], str]]:
    """The same for what is not as it was written."""
    key, found = "blocks.0.attn.to_q.weight", dict[str, tuple[list[Any], str]]()
    headers: dict[str, tuple[str, Any, str]] = {
        "overlap": ("data_offsets", [4, 4 + 4 * D * D], "do not follow those before it"),
        "longer than its shape": ("shape", [D, D - 1], f"{key}, F32 of [{D}, {D - 1}], has {4 * D * D} bytes"),
        "negative shape": ("shape", [-D, -D], "a shape is no list of numbers"),
        "no dtype": ("dtype", None, f"{key} has no dtype"),
    }
    for number, (name, (field, value, words)) in enumerate(headers.items()):
        path = with_header(tmp_path / f"h{number}.safetensors", lambda h, f=field, v=value: h[key].update({f: v}))
        found[name] = ([path, a, "--out", o], words)
    for number, (name, weight, words) in enumerate((
        ("integers", torch.ones(D, D, dtype=torch.int64), "stored as I64"),
        ("bits", torch.ones(D, D, dtype=torch.bool), "stored as BOOL"),
        ("empty", torch.ones(0, D), "of shape [0, 16] is no weight"),
        ("a number", torch.ones(()), "of shape [] is no weight"),
    )):  # fmt: skip
        save_file({key: weight}, tmp_path / f"w{number}.safetensors")
        found[name] = ([tmp_path / f"w{number}.safetensors", a, "--out", o], words)
    indices = {
        "index": ("{", "names no files of weights"), "list as index": ("[]", "names no files of weights"),
        "no map": ("{}", "names no files of weights"),
        "numbers": ('{"weight_map": {"a": 5}}', "names no files of weights"),
        "lost shard": ('{"weight_map": {"a": "lost.safetensors"}}', "there is no file"),
    }  # fmt: skip
    for name, (text, words) in indices.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: torch.ones(D, D)}, folder / "x.safetensors")
        (folder / "x.safetensors.index.json").write_text(text, encoding="utf-8")
        found[name] = ([folder, a, "--out", tmp_path / "o"], words)
    return found


DAMAGED = (
    "overlap", "longer than its shape", "negative shape", "no dtype", "integers", "bits", "empty", "a number",
    "index", "list as index", "no map", "numbers", "lost shard",
)  # fmt: skip


def _cases(tmp_path: Path) -> dict[str, tuple[list[Any], str]]:
    """Arguments, and what the message must say."""
    m, a, o = tmp_path / "m.safetensors", tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    save_file({"blocks.0.attn.to_q.weight": torch.randn(D, D)}, m)
    save_file(lora("lora_unet_blocks_0_attn_to_q", D, D)[0], a)
    foreign, wrong, unknown = (tmp_path / f"{name}.safetensors" for name in ("foreign", "wrong", "unknown"))
    save_file(lora("lora_unet_block_0_attention_to_q", D, D)[0], foreign)
    save_file(lora("lora_unet_blocks_0_attn_to_q", D, D + 1)[0], wrong)
    save_file({"lora_unet_blocks_0_attn_to_q.strange": torch.ones(2)}, unknown)
    packed, pipeline, full = tmp_path / "packed.safetensors", tmp_path / "pipeline", tmp_path / "full"
    save_file({"blocks.0.attn.to_q.weight": torch.ones(D * D // 2, 1, dtype=torch.uint8)}, packed)
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    save_file({"x.weight": torch.ones(1, 1)}, pipeline / "unet" / "d.safetensors")
    full.mkdir()
    (full / "something").write_text("")
    return {
        "none matches": ([m, foreign, "--out", o], "whose weights are called like blocks.0.attn.to_q.weight"),
        "does not fit": ([m, wrong, "--out", o], "blocks.0.attn.to_q.weight"),
        "no adapter": ([m, unknown, "--out", o], "strange"),
        "a model as adapter": ([m, m, "--out", o], "no adapter that we know"),
        "over itself": ([m, a, "--out", m], "is read, and writing it would destroy it"),
        "quantised": ([packed, a, "--out", o], "stored as U8"),
        "pipeline": ([pipeline, a, "--out", o], "one component, unet"),
        "full folder": ([pipeline / "unet", a, "--out", full], "not an empty folder"),
        "ending": ([m, a, "--out", tmp_path / "o.ckpt"], "ends in .safetensors"),
        "multiplier": ([m, f"{a}=much", "--out", o], "'much' is no multiplier"),
        "missing": ([tmp_path / "mm.safetensors", a, "--out", o], "there is no file"),
        **_damaged(tmp_path, a, o),
    }


@pytest.mark.parametrize(
    "case",
    ("none matches", "does not fit", "no adapter", "a model as adapter", "over itself", "quantised", "pipeline",
     "full folder", "ending", "multiplier", "missing", *DAMAGED),
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing_behind(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, words = _cases(tmp_path)[case]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, said = run(capsys, *argv)
    assert code == 2 and words in said and "Traceback" not in said, said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    save_file({f"b.{i}.weight": torch.randn(D, D) for i in range(3)}, tmp_path / "m.safetensors")
    save_file(lora("lora_unet_b_1", D, D)[0], tmp_path / "a.safetensors")
    plan = CheckpointMerge(Checkpoint(tmp_path / "m.safetensors"), [MergeInput.open(tmp_path / "a.safetensors", 1.0)])

    def progress(key: str, size: int) -> None:
        if key == "b.1.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.write(tmp_path / "o.safetensors", progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "m.safetensors"]
