"""What all tools stand on: updates by an independent formula, files written piece by piece, layers under the names of
the file, and the base weights of layers whatever they are called."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from networks.files import writer
from networks.files.keys import FileKeys
from networks.tensors.updates import Update, total
from networks.tools.forms import Form, row_of
from networks.tools.metadata import HISTORY, history, told
from networks.tools.opened import Opened
from networks.tools.ranks import RankRule
from networks.tools.report import Report, Row


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# -- files in pieces


def pieces() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {f"l{i:03}.lora_up.weight": torch.randn(7, 31 + i).half() for i in range(90)}
    tensors |= {"l000.alpha": torch.tensor(3.0), "l001.dora_scale": torch.rand(7, 1), "z": torch.arange(3)}
    return tensors | {"large": torch.randn(900, 900)}  # past the first MiB, where the legacy hash looks


def test_a_file_in_pieces_is_the_file_in_one(tmp_path: Path) -> None:
    tensors, metadata = pieces(), {"ss_steps": "7", "title": "é"}
    whole = writer.write_tensors(tmp_path / "a.safetensors", tensors, torch.bfloat16, metadata)
    with writer.streamed(tmp_path / "b.safetensors", torch.bfloat16, metadata) as stream:
        for key, tensor in tensors.items():
            written = stream.add({key: tensor})
            assert torch.equal(written[key], tensor.to(written[key].dtype))
    with safe_open(whole, "pt") as one, safe_open(tmp_path / "b.safetensors", "pt") as other:
        assert set(one.keys()) == set(other.keys()) == set(tensors)
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in tensors)
        assert {**other.metadata(), "sshs_model_hash": "", "sshs_legacy_hash": ""} == {
            **metadata,
            "sshs_model_hash": "",
            "sshs_legacy_hash": "",
        }


def test_a_file_in_pieces_has_its_hashes_and_no_gaps(tmp_path: Path) -> None:
    import hashlib

    with writer.streamed(tmp_path / "b.safetensors", None, {"ss_steps": "7", "other": "x"}) as stream:
        stream.add(pieces())
    data = (tmp_path / "b.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    known = header.pop("__metadata__")
    offsets = sorted(entry["data_offsets"] for entry in header.values())
    assert offsets[0][0] == 0 and offsets[-1][1] == len(data) - start
    assert all(before[1] == after[0] for before, after in zip(offsets, offsets[1:], strict=False))
    sizes = {"I64": 8, "F32": 4, "F16": 2}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    assert known["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    training = json.dumps({"__metadata__": {"ss_steps": "7"}, **header}, separators=(",", ":")).encode()
    training += b" " * (-len(training) % 8)
    image = len(training).to_bytes(8, "little") + training + data[start:]
    assert known["sshs_legacy_hash"] == hashlib.sha256(image[0x100000:0x110000]).hexdigest()[:8]


def test_a_file_in_pieces_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    save_file({"old": torch.ones(1)}, target)
    before = target.read_bytes()
    with pytest.raises(KeyError), writer.streamed(target) as stream:
        stream.add({"new": torch.ones(2)})
        raise KeyError
    assert target.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


# -- updates


@pytest.mark.parametrize("whole", (False, True))
def test_an_update_as_numpy_has_it(whole: bool) -> None:
    torch.manual_seed(1)
    left, right = drawn(40, 6), drawn(6, 90)
    update = Update(left @ right) if whole else Update(left, right)
    M = (left @ right).numpy()
    u, s, vh = np.linalg.svd(M, full_matrices=False)
    assert math.isclose(update.norm(), float(np.linalg.norm(M)), rel_tol=1e-12)
    np.testing.assert_allclose(update.singular_values()[:6].numpy(), s[:6], rtol=1e-10)
    kept = update.decomposed(3)
    np.testing.assert_allclose((kept[0] * kept[1] @ kept[2]).numpy(), u[:, :3] * s[:3] @ vh[:3], atol=1e-9)
    other = Update(drawn(40, 2), drawn(2, 90))
    assert math.isclose(update.inner(other), float((M * other.matrix().numpy()).sum()), rel_tol=1e-10)
    tiny = update.minus(Update(left * (1 + 1e-13), right))  # a difference that rounding of squares would swallow
    assert math.isclose(tiny.norm(), 1e-13 * update.norm(), rel_tol=0.1)
    summed = total([update, other.times(-2.0), Update(drawn(40, 90) * 0 + 1)])
    np.testing.assert_allclose(summed.matrix().numpy(), M - 2 * other.matrix().numpy() + 1, atol=1e-9)


def test_a_large_matrix_has_the_singular_values_of_a_full_decomposition() -> None:
    torch.manual_seed(2)
    matrix = drawn(520, 700) * torch.logspace(0, -4, 700, dtype=torch.float64)
    u, s, vh = Update(matrix).decomposed()
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-7)
    np.testing.assert_allclose((u * s @ vh).numpy(), matrix.numpy(), atol=1e-9)


def test_a_form_says_the_error_of_what_stands_in_the_file() -> None:
    torch.manual_seed(3)
    shape, update = (24, 10, 3, 3), Update(drawn(24, 7), drawn(7, 90))
    for rule, dtype in (
        (None, torch.float32),
        (RankRule(3), torch.bfloat16),
        (RankRule(rule="energy", value=0.9),) * 2,
    ):
        form = Form("lora", rule, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float16)
        layer = form.layer("x", update, shape)
        down, up = (layer.tensors[f"lora_{side}.weight"].double() for side in ("down", "up"))
        assert down.shape[1:] == shape[1:] and up.shape[2:] == (1, 1) and layer.alpha == len(down)
        error = float((up.flatten(1) @ down.flatten(1) - update.matrix()).norm() / update.matrix().norm())
        row = row_of(layer, shape, update)
        assert row.error is not None and math.isclose(row.error, error, rel_tol=1e-6), (rule, row.error, error)
        assert row.rank == len(down)


# -- a file's own names, and what it acts on


def factors(prefix: str, O: int, I: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{prefix}.lora_down.weight": torch.randn(rank, I),
        f"{prefix}.lora_up.weight": torch.randn(O, rank),
        f"{prefix}.alpha": torch.tensor(1.0),
    }


def peft(prefix: str, O: int, I: int, rank: int = 2) -> dict[str, Tensor]:
    return {f"{prefix}.lora_A.weight": torch.randn(rank, I), f"{prefix}.lora_B.weight": torch.randn(O, rank)}


FILES = {
    "flat": lambda: factors("lora_unet_double_blocks_0_img_attn_qkv", 24, 8) | {"step": torch.tensor(3)},
    "dotted": lambda: peft("transformer.transformer_blocks.0.attn.to_q", 8, 8),
    "named adapter": lambda: {
        key.replace(".weight", ".default.weight"): tensor for key, tensor in peft("base_model.model.a.b", 8, 8).items()
    },
    "bias": lambda: factors("lora_unet_x", 4, 3) | {"lora_unet_x.diff_b": torch.randn(4)},
    "kohya with raw alpha": lambda: {
        **factors("lora_unet_x", 4, 3),
        "use_rslora_flag": torch.tensor(1.0),
        "use_dora_flag": torch.tensor(1.0),
        "lora_unet_x.dora_layer.weight": torch.rand(4),
    },
}


@pytest.mark.parametrize("name", FILES)
def test_layers_that_stay_keep_their_tensors_and_keys(tmp_path: Path, name: str) -> None:
    torch.manual_seed(4)
    tensors = FILES[name]()
    save_file(tensors, tmp_path / "a.safetensors")
    own = Opened(tmp_path / "a.safetensors").own
    keys = FileKeys(own)
    written = keys.rest() | {key: t for layer in own.layers.values() for key, t in keys.of(layer).items()}
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(written[key], tensor, atol=0, rtol=1e-6 if key.endswith("alpha") else 0)


def test_a_layer_acts_on_its_rows_of_the_base_weight(tmp_path: Path) -> None:
    """diffusers' to_k of a FLUX block is the second third of the original's qkv; `norm_out`'s halves are swapped."""
    torch.manual_seed(5)
    D = 6
    to_k, mlp = "transformer.single_transformer_blocks.0.attn.to_k", "transformer.single_transformer_blocks.0.proj_mlp"
    last = "transformer.norm_out.linear"
    weights = {
        "single_blocks.0.linear1.weight": torch.randn(7 * D, D),
        "single_blocks.0.linear2.weight": torch.randn(D, 5 * D),
        "final_layer.adaLN_modulation.1.weight": torch.randn(2 * D, D),
        "double_blocks.0.img_attn.qkv.weight": torch.randn(3 * D, D),
    }
    save_file(weights, tmp_path / "base.safetensors")
    save_file(peft(to_k, D, D) | peft(mlp, 4 * D, D) | peft(last, 2 * D, D), tmp_path / "a.safetensors")
    opened = Opened(tmp_path / "a.safetensors", base=[tmp_path / "base.safetensors"])
    linear1, final = weights["single_blocks.0.linear1.weight"], weights["final_layer.adaLN_modulation.1.weight"]
    wanted = {to_k: linear1[D : 2 * D], mlp: linear1[3 * D :], last: torch.cat([final[D:], final[:D]])}
    for path, rows in wanted.items():
        found = opened.weight(path.replace(".", "/"))
        assert found is not None and torch.equal(found, rows), path
        assert opened.shape(path.replace(".", "/")) == tuple(rows.shape)


def test_what_depends_on_the_base_weight_asks_for_it(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_x.weight": torch.randn(4), "lora_unet_x.on_input": torch.tensor(False)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=r"a\.safetensors: lora_unet_x: what ia3 adds .* --base CHECKPOINT"):
        Opened(tmp_path / "a.safetensors").update("lora_unet_x")


# -- words


def test_a_report_refuses_what_is_lost_and_what_is_too_far() -> None:
    report = Report("convert", ["a"], rows=[Row("x", "lora", 4, 0.3, 4.0), Row("y", "lora", 4, 0.0, 3.0)])
    assert math.isclose(report.error, 0.3 * 4 / 5)
    report.check(max_error=0.25)
    with pytest.raises(ValueError, match=r"0\.24 off .* --max_error 0\.2 .*0\.3, at x"):
        report.check(max_error=0.2)
    assert "half of the update is lost" not in " ".join(report.lines())
    assert "half of the update is lost" in " ".join(
        Report("convert", ["a"], rows=[Row("x", error=0.6, size=1.0, exact=False)]).lines()
    )
    report.dropped.append(("z", "has no place there"))
    report.check(allow_dropped=True)
    with pytest.raises(ValueError, match="z .1 has no place there.: nothing was written; --allow_dropped"):
        report.check()


def test_metadata_tell_what_was_done_and_drop_what_no_longer_holds() -> None:
    former = {"ss_network_module": "networks.loha", "ss_network_args": "{}", "ss_steps": "5", "sshs_model_hash": "ab"}
    once = told(former, "convert", {"to": "lora"}, "lora", [4, 8])
    assert (
        once["ss_steps"] == "5" and once["ss_network_module"] == "networks.lora" and once["ss_network_dim"] == "Dynamic"
    )
    assert not {"sshs_model_hash", "ss_network_args"} & once.keys()
    twice = told(once, "resize", {"dims": 4}, ranks=[4])
    assert twice["ss_network_dim"] == "4" and [one["command"] for one in history(twice)] == ["convert", "resize"]
    assert history({HISTORY: "[1, {"}) == [] and history({HISTORY: "3"}) == []
