"""scripts/merge.py: forms in which checkpoints store weights, biases and norms in their places, broken numbers."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close, options_for, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks.algos import ALGOS
from networks.cli import merge as script
from networks.files import codec
from networks.files.checkpoint import Checkpoint
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.tensors.norms import layer_geometry

D, M = 16, 0.7
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lora(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """(keys of a file, update at multiplier M)."""
    up, down = torch.randn(rows, 2, dtype=torch.float64), torch.randn(2, columns, dtype=torch.float64)
    keys = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(3.0)}
    return keys, M * 1.5 * up @ down


def run(
    folder: Path,
    model: dict[str, Tensor],
    file: dict[str, Tensor],
    capsys: Any,
    metadata: dict[str, str] | None = None,
    multiplier: float = M,
) -> tuple[dict[str, Tensor] | None, str]:
    """(merged checkpoint or None, what was said). A failed merge leaves nothing behind."""
    save_file(model, folder / "model.safetensors", metadata)
    save_file(file, folder / "file.safetensors")
    before, out = sorted(folder.iterdir()), folder / "out.safetensors"
    code = script.main(
        [
            str(folder / "model.safetensors"),
            f"{folder / 'file.safetensors'}={multiplier}",
            "--out",
            str(out),
            "--strict",
        ]
    )
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "Traceback" not in said and (code == 0) == out.exists(), said
    assert code in (0, 2) and (code == 0 or sorted(folder.iterdir()) == before)
    return (load_file(out) if code == 0 else None), said


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# -- float8 with a scale


def json_tensor(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


MARKS: dict[str, tuple[str, dict[str, Tensor]]] = {  # name of the scale, what stands beside it
    "trainers": ("scale_weight", {}),
    "ComfyUI, older": (
        "scale_weight", {"scaled_fp8": torch.empty(2, dtype=FP8), "x.scale_input": torch.tensor(0.25)},
    ),
    "ComfyUI, newer": (
        "weight_scale",
        {"x.comfy_quant": json_tensor({"format": "float8_e4m3fn"}), "x.input_scale": torch.tensor(0.25)},
    ),
    "transformers": ("weight_scale_inv", {"x.activation_scale": torch.tensor(0.25)}),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (D,), (D, 1), (D, 2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("mark", MARKS)
def test_scaled_fp8_of_every_program_gets_new_scales(
    mark: str, shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each value within half a step of fp8, and all other tensors as they were."""
    name, others = MARKS[mark]
    scale = torch.rand(shape) * 1e-3 + 1e-4
    model = {"x.weight": (torch.randn(D, D) * 100).to(FP8), f"x.{name}": scale, "y.weight": torch.ones(2, 2), **others}
    file, dW = lora("lora_unet_x", D, D)
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said

    def dense(tensors: dict[str, Tensor]) -> Tensor:
        s = tensors[f"x.{name}"].double()
        blocks = s.reshape(-1, 1) if s.dim() < 2 else s.reshape(s.shape[:2])
        wide = blocks.repeat_interleave(D // blocks.shape[0], 0).repeat_interleave(D // blocks.shape[1], 1)
        return tensors["x.weight"].float().double() * wide

    wanted = dense(model) + dW
    assert {k: (t.dtype, t.shape) for k, t in merged.items()} == {k: (t.dtype, t.shape) for k, t in model.items()}
    for key in model.keys() - {"x.weight", f"x.{name}"}:
        assert torch.equal(raw(merged[key]), raw(model[key])), key
    finest = merged[f"x.{name}"].double().max() * 2**-10
    assert ((dense(merged) - wanted).abs() <= torch.maximum(wanted.abs() * 2**-4, finest) * 1.001).all()
    assert float((dense(merged) - dense(model)).norm()) > 0.9 * float(dW.norm())


def test_a_part_of_the_rows_of_a_scaled_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ComfyUI's Z-Image in fp8, one scale for q, k and v: those without an adapter stay, but for the new scale."""
    key = "model.diffusion_model.layers.0.attention.qkv"
    scale = torch.tensor(1e-3)
    model = {f"{key}.weight": (torch.randn(3 * D, D) * 100).to(FP8), f"{key}.scale_weight": scale}
    file, dW = lora("lora_unet_layers_0_attention_to_k", D, D)
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said
    wanted = model[f"{key}.weight"].float().double() * 1e-3
    wanted[D : 2 * D] += dW
    found = merged[f"{key}.weight"].float().double() * merged[f"{key}.scale_weight"].double()
    step = torch.maximum(wanted.abs() * 2**-4, merged[f"{key}.scale_weight"].double() * 2**-10) * 1.001
    assert ((found - wanted).abs() <= step).all()
    assert merged[f"{key}.scale_weight"] > 2 * scale


PACKED = torch.randint(0, 255, (D, D // 2), dtype=torch.uint8)
COMFY = {"format": "nvfp4"}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {  # tensors, metadata, words
    "nvfp4": (
        {"x.weight": PACKED, "x.weight_scale": torch.ones(D, 1).to(FP8), "x.weight_scale_2": torch.ones(()),
         "x.comfy_quant": json_tensor(COMFY)}, {}, "1 stored as nvfp4, e.g. x.weight",
    ),
    "nvfp4 by the header": (
        {"x.weight": PACKED, "x.weight_scale": torch.ones(D, 1).to(FP8)},
        {"_quantization_metadata": json.dumps({"layers": {"x": COMFY}})}, "stored as nvfp4",
    ),
    "nvfp4 by the header, without the prefix": (
        {"model.diffusion_model.x.weight": PACKED},
        {"_quantization_metadata": json.dumps({"layers": {"x": "nvfp4"}})}, "stored as nvfp4",
    ),
    "mxfp8": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.weight_scale": torch.ones(D, 1, dtype=torch.uint8),
         "x.comfy_quant": json_tensor({"format": "mxfp8"})}, {}, "stored as mxfp8",
    ),
    "mxfp8 without a mark": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.weight_scale": torch.ones(D, 1, dtype=torch.uint8)}, {},
        "stored as mxfp8 (F8_E4M3 with weight_scale in U8)",
    ),
    "int8": (
        {"x.weight": torch.ones(D, D, dtype=torch.int8), "x.weight_scale": torch.ones(()),
         "x.comfy_quant": json_tensor({"format": "int8_tensorwise"})}, {}, "stored as int8_tensorwise",
    ),
    "bitsandbytes": (
        {"x.weight": PACKED.reshape(-1, 1), "x.weight.absmax": torch.ones(4),
         "x.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)}, {},
        "stored as U8 with bitsandbytes__nf4",
    ),
    "two scales": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.weight_scale": torch.ones(()), "x.weight_scale_2": torch.ones(())},
        {}, "F8_E4M3 with weight_scale and weight_scale_2",
    ),
    "an unknown scale": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.scale": torch.ones(())}, {}, "F8_E4M3 with scale",
    ),
    "a scale of another shape": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.weight_scale": torch.ones(3, 1)}, {}, "weight_scale of shape [3, 1]",
    ),
    "a scale beside bf16": (
        {"x.weight": torch.ones(D, D).bfloat16(), "x.scale_weight": torch.tensor(0.5)}, {}, "BF16 with scale_weight",
    ),
    "a mark that is no JSON": (
        {"x.weight": torch.ones(D, D).to(FP8), "x.comfy_quant": torch.ones(3, dtype=torch.uint8)}, {},
        "what it says of its quantisation cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_again_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, metadata, words = REFUSED[case]
    merged, said = run(tmp_path, model, lora("lora_unet_x", D, D)[0], capsys, metadata)
    assert merged is None and words in said, said
    assert "merge into the checkpoint in bf16" in said or "no JSON" in case


def test_such_weights_are_in_nobodys_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they stay as they are, and where a scale is 1."""
    model = {"x.weight": torch.ones(D, D).bfloat16(), "x.scale_weight": torch.ones(1), "y.weight": PACKED,
             "y.comfy_quant": json_tensor(COMFY)}  # fmt: skip
    file, dW = lora("lora_unet_x", D, D)
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said
    assert torch.equal(merged["x.weight"], (1 + dW).to(torch.bfloat16))
    assert all(torch.equal(merged[key], model[key]) for key in model.keys() - {"x.weight"})


# -- biases and norms


def test_biases_of_fused_rows_and_swapped_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers' FLUX.1: query, key, value and MLP apart, shift and scale in the other order."""
    head, sizes = "single_transformer_blocks.3.", {"attn.to_q": D, "attn.to_k": D, "attn.to_v": D, "proj_mlp": 2 * D}
    model = {f"{head}{n}.{kind}": torch.randn(size, *more, dtype=torch.float64)
             for n, size in sizes.items() for kind, more in (("weight", (D,)), ("bias", ()))}  # fmt: skip
    model |= {f"norm_out.linear.{kind}": torch.randn(2 * D, *more, dtype=torch.float64)
              for kind, more in (("weight", (D,)), ("bias", ()))}  # fmt: skip
    names = {"lora_unet_single_blocks_3_linear1": 5 * D, "lora_unet_final_layer_adaLN_modulation_1": 2 * D}
    file = {f"{name}.{suffix}": torch.randn(rows, *more, dtype=torch.float64)
            for name, rows in names.items() for suffix, more in (("diff", (D,)), ("diff_b", ()))}  # fmt: skip
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said
    for suffix, kind in (("diff", "weight"), ("diff_b", "bias")):
        rows = file[f"lora_unet_single_blocks_3_linear1.{suffix}"].split(list(sizes.values()))
        for name, change in zip(sizes, rows, strict=True):
            key = f"{head}{name}.{kind}"
            assert_close(merged[key], model[key] + M * change, key)
        shift, scale = file[f"lora_unet_final_layer_adaLN_modulation_1.{suffix}"].chunk(2)
        key = f"norm_out.linear.{kind}"
        assert_close(merged[key], model[key] + M * torch.cat([scale, shift]), key)


def test_halves_are_swapped_in_the_last_block_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers' SD3: one name has six parts in every block, shift and scale in the other order in the last."""
    from diffusers.loaders.single_file_utils import swap_scale_shift

    rows = {0: 6 * D, 1: 2 * D}
    keys = {i: f"transformer_blocks.{i}.norm1_context.linear" for i in rows}
    model = {f"{keys[i]}.{kind}": torch.randn(n, *more, dtype=torch.float64)
             for i, n in rows.items() for kind, more in (("weight", (D,)), ("bias", ()))}  # fmt: skip
    name = "lora_unet_joint_blocks_{}_context_block_adaLN_modulation_1"
    file = {f"{name.format(i)}.{suffix}": torch.randn(n, *more, dtype=torch.float64)
            for i, n in rows.items() for suffix, more in (("diff", (D,)), ("diff_b", ()))}  # fmt: skip
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said
    for suffix, kind in (("diff", "weight"), ("diff_b", "bias")):
        first, last = (file[f"{name.format(i)}.{suffix}"] for i in rows)
        for i, change in enumerate((first, swap_scale_shift(last, dim=0))):
            key = f"{keys[i]}.{kind}"
            assert_close(merged[key], model[key] + M * change, key)


def test_norms_called_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, name = "double_blocks.0.img_attn.norm.query_norm", "lora_unet_double_blocks_0_img_attn_norm_query_norm"
    model = {f"{key}.scale": torch.randn(D, dtype=torch.float64)}
    file = {f"{name}.w_norm": torch.randn(D, dtype=torch.float64)}
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is not None, said
    assert_close(merged[f"{key}.scale"], model[f"{key}.scale"] + M * file[f"{name}.w_norm"], "scale")


WAN = {"the trainer's": ("norm3", "self_attn.q"), "diffusers'": ("norm2", "attn1.to_q")}


@pytest.mark.parametrize("layout", WAN)
@pytest.mark.parametrize("alone", [True, False])
def test_names_which_two_spellings_have_for_different_layers(
    layout: str, alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wan's norm3 is norm2 in diffusers: the other names of a checkpoint tell them apart, whatever the file has."""
    norm, query = WAN[layout]
    model = {f"blocks.0.{name}.weight": torch.randn(D, dtype=torch.float64) for name in ("norm2", "norm3")}
    model[f"blocks.0.{query}.weight"] = torch.randn(D, D, dtype=torch.float64)
    file = {"lora_unet_blocks_0_norm3.w_norm": torch.randn(D, dtype=torch.float64)}
    more, dW = lora("lora_unet_blocks_0_self_attn_q", D, D)
    merged, said = run(tmp_path, model, file if alone else file | more, capsys)
    assert merged is not None, said
    changes = {f"blocks.0.{norm}.weight": M * file["lora_unet_blocks_0_norm3.w_norm"]}
    changes |= {} if alone else {f"blocks.0.{query}.weight": dW}
    for key, before in model.items():
        assert_close(merged[key], before + changes.get(key, torch.zeros(())), key)


LACKING = {
    "a plain layer": ({"x.weight": (D, D)}, "lora_unet_x", "x.bias"),
    "OpenCLIP's projections": (
        {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3 * D, D)},
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_change_of_a_bias_that_is_not_there(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, name, bias = LACKING[case]
    model = {key: torch.randn(shape) for key, shape in shapes.items()}
    file = {f"{name}.diff": torch.zeros(D, D), f"{name}.diff_b": torch.ones(D)}
    merged, said = run(tmp_path, model, file, capsys)
    assert merged is None and f"{name} changes a bias" in said and f"has no {bias}" in said, said


# -- broken numbers

MODEL = {"x.weight": torch.ones(D, D), "x.bias": torch.ones(D), "n.weight": torch.ones(D), "n.bias": torch.ones(D)}
FILE = {
    "lora_unet_x.diff": torch.ones(D, D), "lora_unet_x.diff_b": torch.ones(D),
    "lora_unet_n.w_norm": torch.ones(D), "lora_unet_n.b_norm": torch.ones(D),
}  # fmt: skip
DORA = lora("lora_unet_x", D, D)[0] | {"lora_unet_x.dora_scale": torch.ones(D, 1)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [*FILE, *(key for key in DORA if not key.endswith("alpha"))])
def test_a_file_with_broken_numbers_is_refused(
    key: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {k: t.clone() for k, t in (FILE if key in FILE else DORA).items()}
    file[key].view(-1)[3] = value
    merged, said = run(tmp_path, MODEL, file, capsys)
    name, _, suffix = key.partition(".")
    assert merged is None and f"{name}: {suffix} has NaN or infinite values" in said, said
    assert "file.safetensors" in said


@pytest.mark.parametrize("key", MODEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, FP8], ids=str)
def test_a_checkpoint_with_broken_numbers_is_named(
    key: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {k: t.to(dtype) for k, t in MODEL.items()}
    broken = MODEL[key].clone()
    broken.view(-1)[3] = math.nan
    model[key] = broken.to(dtype)
    merged, said = run(tmp_path, model, FILE, capsys)
    assert merged is None and f"model.safetensors: {key}: it has NaN or infinite values" in said, said


@pytest.mark.parametrize("key", ["lora_unet_x.diff", "lora_unet_x.diff_b", "lora_unet_n.w_norm", "lora_unet_n.b_norm"])
def test_what_a_merge_would_make_infinite_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp16, which ends at 65504, and in fp32 itself."""
    merged, said = run(
        tmp_path, {k: t.half() for k, t in MODEL.items()}, {**FILE, key: torch.full_like(FILE[key], 1e5)}, capsys
    )
    target = key[10] + (".bias" if key.endswith(("diff_b", "b_norm")) else ".weight")
    assert merged is None and f"model.safetensors: {target}: the merged weight reaches" in said, said
    huge = {**FILE, key: torch.full_like(FILE[key], 1e8)}
    model = {k: torch.full_like(t, 3e38) for k, t in MODEL.items()}
    merged, said = run(tmp_path, model, huge, capsys, multiplier=3e30)
    assert merged is None and "has NaN or infinite values" in said and key.partition(".")[0] in said, said


# -- cost


def test_tensors_are_read_without_parsing_the_header_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, FP8, torch.float8_e5m2, torch.uint8)
    tensors = {f"{i}": (torch.randn(5, 3) * 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path / "m.safetensors")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the header was parsed again")

    monkeypatch.setattr("safetensors.safe_open", never)
    monkeypatch.setattr("networks.files.checkpoint.safe_open", never, raising=False)
    monkeypatch.setattr("json.loads", never)
    for key, tensor in tensors.items():
        found = checkpoint.tensor(key)
        assert found.dtype == tensor.dtype or not tensor.numel()
        assert found.shape == tensor.shape and torch.equal(raw(found), raw(tensor))
        raw(found).add_(1)  # in memory of its own
    assert torch.equal(checkpoint.tensor("1"), tensors["1"])


ALIVE = [
    (algo, dora) for algo in ALGOS for dora in (False, True) if not dora or "use_dora" in ALGOS[algo].spec.features
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("algo", "dora"), ALIVE)
def test_a_merged_weight_leaves_nothing_alive(algo: str, dora: bool) -> None:
    """Not even until Python next looks for cycles: weights are large."""
    base = (nn.LayerNorm(32) if algo == "norm" else nn.Linear(32, 32)).double().requires_grad_(False)
    adapter = ALGOS[algo](layer_geometry(base), 4, options_for(algo, {})).double()
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 0.75, dora="output" if dora else "")
    saved, unknown = codec.decode({key: t.detach().clone() for key, t in codec.encode([layer]).items()})
    assert not unknown
    W = torch.randn_like(base.weight)
    gc.collect()
    gc.disable()
    try:
        before = {
            id(o) for o in gc.get_objects() if isinstance(o, Tensor)
        }  # other tests' may have no memory to look at
        new = merged_weight(next(iter(saved.values())), W, 0.7, W.clone(), bias_too=True)
        assert not torch.equal(new, W)
        gone = [weakref.ref(W), weakref.ref(new)]
        storages = {W.data_ptr(), new.data_ptr()}
        del W, new
        made = [o for o in gc.get_objects() if isinstance(o, Tensor) and id(o) not in before]
        alive = [o for o in made if o.numel() and o.data_ptr() in storages]
        assert not alive and not any(reference() is not None for reference in gone)
    finally:
        gc.enable()
