"""Saved files: hand-written keys, exact strength, atomic writing, and every kind of bad file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from tiny_parts import draw, randomise, sd_unet, sdxl_unet, text_encoder
from torch import Tensor

import networks.loha
import networks.lokr
import networks.lora
from networks.files import reader, writer

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
ENTRIES = {"lora": networks.lora, "loha": networks.loha, "lokr": networks.lokr}


def trained(algo: str, unet: Any, dim: int = 4, alpha: float = 2, **kwargs: Any) -> Any:
    named = {} if algo in ENTRIES else {"algo": algo}
    network = ENTRIES.get(algo, networks.lora).create_network(1.0, dim, alpha, None, None, unet, **named, **kwargs)
    network.apply_to(None, unet)
    randomise(network)
    return network.eval()


def shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    return {k.removeprefix(name + "."): tuple(v.shape) for k, v in load_file(path).items() if k.startswith(name + ".")}


KEYS: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = [
    (
        "lora",
        {},
        {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "alpha": ()},
        {"lora_down.weight": (2, 16, 3, 3), "lora_up.weight": (16, 2, 1, 1), "alpha": ()},
    ),
    (
        "lora",
        {"use_tucker": True, "use_scalar": True},
        {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "alpha": ()},
        {
            "lora_down.weight": (2, 16, 1, 1),
            "lora_mid.weight": (2, 2, 3, 3),
            "lora_up.weight": (16, 2, 1, 1),
            "alpha": (),
        },
    ),
    (
        "loha",
        {},
        {"hada_w1_a": (16, 4), "hada_w1_b": (4, 16), "hada_w2_a": (16, 4), "hada_w2_b": (4, 16), "alpha": ()},
        {"hada_w1_a": (16, 2), "hada_w1_b": (2, 144), "hada_w2_a": (16, 2), "hada_w2_b": (2, 144), "alpha": ()},
    ),
    (
        "loha",
        {"use_tucker": True},
        {"hada_w1_a": (16, 4), "hada_w1_b": (4, 16), "hada_w2_a": (16, 4), "hada_w2_b": (4, 16), "alpha": ()},
        {
            "hada_w1_a": (2, 16),
            "hada_w1_b": (2, 16),
            "hada_w2_a": (2, 16),
            "hada_w2_b": (2, 16),
            "hada_t1": (2, 2, 3, 3),
            "hada_t2": (2, 2, 3, 3),
            "alpha": (),
        },
    ),
    (
        "lokr",
        {"factor": 2},
        {"lokr_w1": (2, 2), "lokr_w2": (8, 8), "alpha": ()},
        {"lokr_w1": (2, 2), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 72), "alpha": ()},
    ),
    (
        "lokr",
        {"factor": 2, "use_tucker": True},
        {"lokr_w1": (2, 2), "lokr_w2": (8, 8), "alpha": ()},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 8), "lokr_t2": (2, 2, 3, 3), "alpha": ()},
    ),
    (
        "glora",
        {"use_scalar": True},
        {"a1.weight": (16, 4), "a2.weight": (4, 16), "b1.weight": (16, 4), "b2.weight": (4, 16), "alpha": ()},
        {
            "a1.weight": (16, 2, 1, 1),
            "a2.weight": (2, 16, 1, 1),
            "b1.weight": (16, 2, 1, 1),
            "b2.weight": (2, 16, 3, 3),
            "alpha": (),
        },
    ),
    (
        "lokr",
        {"full_matrix": True},
        {"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()},
        {"lokr_w1": (4, 4), "lokr_w2": (4, 4, 3, 3), "alpha": ()},
    ),
]


@pytest.mark.parametrize("algo,kwargs,linear,conv", KEYS)
def test_keys_and_shapes(tmp_path: Path, algo: str, kwargs: Any, linear: Any, conv: Any) -> None:
    network = trained(algo, sd_unet(), conv_dim=2, **kwargs)
    file = tmp_path / "a.safetensors"
    network.save_weights(file, torch.float16, {})
    assert shapes(file, Q) == linear and shapes(file, CONV) == conv
    for key, tensor in load_file(file).items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)


@pytest.mark.parametrize("kwargs,alpha", [({}, 2.0), ({"rs_lora": True}, 4.0)])
def test_plain_alpha_over_rank_is_the_strength(tmp_path: Path, kwargs: Any, alpha: float) -> None:
    """alpha 2, dim 4: RS-LoRA's 2 / sqrt(4) is alpha 4 in the file."""
    unet = sd_unet()
    network = trained("lora", unet, **kwargs)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    t = load_file(tmp_path / "a.safetensors")
    assert float(t[f"{Q}.alpha"]) == pytest.approx(alpha)
    layer = next(layer for layer in network.unet_loras if layer.lora_name == Q)
    by_hand = float(t[f"{Q}.alpha"]) / 4 * t[f"{Q}.lora_up.weight"] @ t[f"{Q}.lora_down.weight"]
    weight = layer.base.weight.detach()
    torch.testing.assert_close(layer.new_weight(weight) - weight, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algo,kwargs,_linear,_conv", KEYS)
def test_a_file_alone_rebuilds_the_network(tmp_path: Path, algo: str, kwargs: Any, _linear: Any, _conv: Any) -> None:
    unet = sd_unet()
    base = draw(unet)
    network = trained(algo, unet, conv_dim=2, **kwargs)
    wanted = draw(unet)
    assert not torch.allclose(wanted, base)
    file = tmp_path / "a.safetensors"
    network.save_weights(file, None, {})
    network.detach()
    # Any entry reads any algorithm, and no argument has to be repeated.
    again, tensors = networks.lora.create_network_from_weights(1.0, str(file), None, None, unet, for_inference=True)
    again.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted)
    assert not again.load_state_dict(tensors, True).missing_keys
    again.save_weights(tmp_path / "b.safetensors", None, {})
    first, second = load_file(file), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_alpha_of_a_file_changes_the_scale(tmp_path: Path) -> None:
    unet = sd_unet()
    network = trained("lora", unet, alpha=2)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    wanted = draw(unet)
    network.detach()
    other = ENTRIES["lora"].create_network(1.0, 4, 32, None, None, unet)
    other.apply_to(None, unet)
    other.load_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(draw(unet), wanted)
    other.save_weights(tmp_path / "b.safetensors", None, {})
    assert float(load_file(tmp_path / "b.safetensors")[f"{Q}.alpha"]) == 2


def test_alpha_missing_and_alpha_zero_mean_scale_1(tmp_path: Path) -> None:
    unet = sd_unet()
    network = trained("lora", unet, dim=4, alpha=4)
    wanted = draw(unet)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    for change in ({}, {k: torch.zeros(()) for k in tensors if k.endswith(".alpha")}):
        plain = {k: v for k, v in tensors.items() if not k.endswith(".alpha")} | change
        again, _ = networks.lora.create_network_from_weights(1.0, None, None, None, unet, plain)
        again.apply_to(None, unet)
        torch.testing.assert_close(draw(unet), wanted)
        again.detach()


def test_sdxl_files_under_diffusers_names_load() -> None:
    unet = sdxl_unet()
    network = trained("lora", unet)
    tensors: dict[str, Tensor] = {}
    for row, layer in network.layers:
        for suffix, value in layer.adapter.pack().items():
            tensors[f"{row.own_saved_name}.{suffix}"] = value
        tensors[f"{row.own_saved_name}.alpha"] = torch.tensor(layer.alpha)
    assert any("down_blocks" in key for key in tensors)
    wanted = draw_sdxl(unet)
    network.detach()
    again, _ = networks.lora.create_network_from_weights(1.0, None, None, None, unet, tensors)
    again.apply_to(None, unet)
    torch.testing.assert_close(draw_sdxl(unet), wanted)
    assert all(
        "input_blocks" in n or "output_blocks" in n or "middle_block" in n
        for n in (x.lora_name for x in again.unet_loras)
    )


def draw_sdxl(unet: Any) -> Tensor:
    torch.manual_seed(5)
    extra = {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 16), added_cond_kwargs=extra).sample


def test_linear_and_1x1_files_stand_for_each_other(tmp_path: Path) -> None:
    """SD 2 has Linear projections in diffusers and 1x1 convolutions in the trainer."""
    unet = sd_unet()
    network = trained("lora", unet)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    wanted = draw(unet)
    network.detach()
    flat = {k: v.flatten(1) if v.dim() == 4 else v for k, v in load_file(tmp_path / "a.safetensors").items()}
    again, _ = networks.lora.create_network_from_weights(1.0, None, None, None, unet, flat)
    again.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted)


def test_metadata_and_hashes(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    given = {"ss_network_dim": "4", "modelspec.title": "x"}
    trained("lora", sd_unet()).save_weights(file, None, given)
    assert given == {"ss_network_dim": "4", "modelspec.title": "x"}  # the host's live dictionary
    header = reader.read_header(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert header.metadata.items() >= given.items()
    assert header.metadata["networks_dialect"] == "portable"
    assert start % 8 == 0


def test_legacy_hash_is_that_of_the_file_with_training_metadata(tmp_path: Path) -> None:
    tensors = {"a.w": torch.arange(600_000, dtype=torch.float32), "b.w": torch.ones(3)}
    writer.write_tensors(tmp_path / "a.safetensors", tensors, None, {"ss_x": "1", "other": "2"})
    save_file(tensors, tmp_path / "b.safetensors", {"ss_x": "1"})
    image = (tmp_path / "b.safetensors").read_bytes()
    wanted = hashlib.sha256(image[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert reader.read_header(tmp_path / "a.safetensors").metadata["sshs_legacy_hash"] == wanted


def test_values_out_of_range_are_kept_and_lost_ones_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"big.w": torch.tensor([1e6]), "small.w": torch.tensor([1e-12]), "bad.w": torch.tensor([float("nan")])}
    with caplog.at_level(logging.WARNING):
        writer.write_tensors(tmp_path / "a.safetensors", tensors, torch.float16)
    saved = load_file(tmp_path / "a.safetensors")
    assert saved["big.w"].dtype == torch.float32 and float(saved["big.w"]) == 1e6
    assert "bad.w" in caplog.text and "small.w" in caplog.text and "fp32" in caplog.text


@pytest.mark.parametrize("code,words", [(errno.ENOSPC, "no space"), (errno.EACCES, "not allowed")])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    file = tmp_path / "a.safetensors"
    writer.write_tensors(file, {"a.w": torch.ones(4)})
    before = file.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)  # the last step before the new file takes its place
    with pytest.raises(OSError, match=words) as caught:
        writer.write_tensors(file, {"a.w": torch.zeros(4)})
    assert "untouched" in str(caught.value)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    """A real limit in the middle of the data, where the system has one (not on Windows); a folder that is a file."""
    if os.name == "posix":
        code = (
            "import resource, sys, torch\n"
            "from networks.files.writer import write_tensors\n"
            "write_tensors(sys.argv[1], {'a.w': torch.ones(4)})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try: write_tensors(sys.argv[1], {'a.w': torch.zeros(100_000)})\n"
            "except OSError as error: print(error)\n"
        )
        (tmp_path / "limit").mkdir()
        small = tmp_path / "limit" / "a.safetensors"
        command = [sys.executable, "-c", code, str(small)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        assert "cannot write" in done.stdout and "untouched" in done.stdout
        assert load_file(small)["a.w"].tolist() == [1] * 4 and os.listdir(small.parent) == ["a.safetensors"]
    file = tmp_path / "folder" / "a.safetensors"
    (tmp_path / "folder").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="cannot write|not allowed"):
        writer.write_tensors(file, {"a.w": torch.ones(1)})


def test_other_endings_are_written_as_safetensors(tmp_path: Path) -> None:
    written = writer.write_tensors(tmp_path / "a.pt", {"a.w": torch.ones(1)})
    assert written.name == "a.pt.safetensors" and os.listdir(tmp_path) == [written.name]


def load(file: Path) -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 2, None, text_encoder(), unet)
    network.apply_to(None, unet, False, True)
    network.load_weights(str(file))


def damaged(file: Path) -> None:
    trained("lora", sd_unet()).save_weights(file, None, {})


def test_bad_paths(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    damaged(file)
    data = file.read_bytes()
    with pytest.raises(ValueError, match="is a folder.*a.safetensors"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no file.*beside it: a.safetensors"):
        load(tmp_path / "b.safetensors")
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            load(tmp_path / "cut.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a header" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "junk.safetensors")
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="convert it to safetensors"):
        load(tmp_path / "a.pt")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 8)}
    flux |= {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 4)}
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="nothing for this network.*double_blocks.*choose a file of this architecture"):
        load(tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="no layer of .*flux.safetensors belongs to this model.*double_blocks"):
        networks.lora.create_network_from_weights(1.0, str(tmp_path / "flux.safetensors"), None, None, sd_unet())
    save_file({"model.diffusion_model.x.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no adapter that we know"):
        networks.lora.create_network_from_weights(1.0, str(tmp_path / "model.safetensors"), None, None, sd_unet())
    trained("lora", sd_unet(), dim=8).save_weights(tmp_path / "rank8.safetensors", None, {})
    with pytest.raises(ValueError, match="--dim_from_weights"):
        load(tmp_path / "rank8.safetensors")
    trained("loha", sd_unet()).save_weights(tmp_path / "loha.safetensors", None, {})
    with pytest.raises(ValueError, match="the file has loha, this network has lora"):
        load(tmp_path / "loha.safetensors")


def test_layers_of_an_unknown_form_are_refused(tmp_path: Path) -> None:
    """Half a layer read as plain LoRA would load at another strength."""
    damaged(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    strange, half = "a form which this version does not know", "without lora_up.weight: the layer is incomplete"
    for change, words in (({f"{Q}.lora_other": torch.ones(16, 1)}, strange), ({f"{Q}.lora_up.weight": None}, half)):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=f"b.safetensors.*{words}"):
            networks.lora.create_network_from_weights(1.0, str(tmp_path / "b.safetensors"), None, None, sd_unet())
    save_file({k: v.to(torch.int8) if k.startswith(Q) else v for k, v in tensors.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="not floating point"):
        load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("length", [109, 1 << 20, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path, length: int) -> None:
    """Nor asked for: that much memory is not to be had."""
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(ValueError, match="damaged or incomplete: its first bytes are no safetensors header"):
        reader.read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("missing", [1, 40])
def test_a_file_that_is_cut_off_is_known_by_its_header(tmp_path: Path, missing: int) -> None:
    """Before a model is loaded for it, and where weights are read one by one."""
    file = tmp_path / "a.safetensors"
    save_file({"a.w": torch.ones(5), "b.w": torch.ones(5)}, file)
    size = file.stat().st_size
    assert reader.read_header(file).shapes == {"a.w": (5,), "b.w": (5,)}
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.raises(ValueError, match=f"incomplete: it should have {size} bytes but has {size - missing}; copy or"):
        reader.read_header(file)


def test_a_header_of_more_than_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    """However large the file is: this one has a hole."""
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write(((1 << 30) + 1).to_bytes(8, "little"))
        stream.truncate(3 << 29)
    with pytest.raises(ValueError, match="its first bytes are no safetensors header"):
        reader.read_header(file)


@pytest.mark.parametrize("header", ["[]", "3", "null", '{"a":1}', '{"a":{}}', '{"a":{"data_offsets":["x","y"]}}'])
def test_headers_that_are_json_but_no_header(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match="damaged or incomplete"):
        reader.read_header(tmp_path / "a.safetensors")


def test_ctrl_c_in_a_save_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write_tensors(tmp_path / "a.safetensors", {"a.w": torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_a_partly_matching_file_says_what_was_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.safetensors"
    damaged(file)
    tensors = load_file(file)
    kept = {k: v for k, v in tensors.items() if not k.startswith(Q)}
    kept |= {k.replace(Q, "lora_unet_elsewhere"): v for k, v in tensors.items() if k.startswith(Q)}
    save_file(kept, file)
    load(file)
    kind = Q.rsplit("_0_", 1)[1]
    assert f"1 layers of this network are not in it (1 lora_unet: 1 {kind}; e.g. {Q})" in caplog.text
    assert "1 of its layers have no place here (1 lora_unet: 1 elsewhere; e.g. lora_unet_elsewhere)" in caplog.text


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    """One misfit layer: no other layer may have been taken over before the error."""
    unet = sd_unet()
    network = trained("lora", unet)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    tensors = {k: torch.zeros_like(v) for k, v in network_file(network, tmp_path).items()}
    last = [k for k in tensors if k.endswith("lora_up.weight")][-1]
    tensors[last] = torch.zeros(3, 3)
    with pytest.raises(ValueError):
        network.load_state_dict(tensors)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def network_file(network: Any, folder: Path) -> dict[str, Tensor]:
    network.save_weights(folder / "x.safetensors", None, {})
    return load_file(folder / "x.safetensors")


def test_header_is_json_that_the_library_reads(tmp_path: Path) -> None:
    writer.write_tensors(tmp_path / "ü.safetensors", {"a.w": torch.ones(1)}, None, {"ss_title": "größer 🙂"})
    assert reader.read_tensors(tmp_path / "ü.safetensors")[1]["ss_title"] == "größer 🙂"
    assert json.loads(json.dumps(reader.read_header(tmp_path / "ü.safetensors").shapes)) == {"a.w": [1]}


def test_bytes_are_those_of_safetensors() -> None:
    """Order, names of dtypes and bytes, whatever the tensors are."""
    dtypes = (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64,
    )  # fmt: skip
    shapes = {"é": (3,), "b.weight": (2, 3), "a": (), "none": (0, 4), "B": (1,)}
    whole = {
        f"{key}{i}": torch.ones(shape).to(dtype) for key, shape in shapes.items() for i, dtype in enumerate(dtypes)
    }
    for tensors in (whole, {"none": torch.zeros(0, 3)}, dict[str, torch.Tensor]()):
        data = serialize(tensors)
        length = int.from_bytes(data[:8], "little")
        header, payload = writer.content(tensors)
        known = json.loads(header[8:])
        del known["__metadata__"]
        assert list(known.items()) == list(json.loads(data[8 : 8 + length]).items())
        assert bytes(payload) == data[8 + length :]
