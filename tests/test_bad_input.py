"""What others have written ends in one sentence, in bounded time, and shown without its effects: arguments, files that
they name, headers, folders, states; and what is different under Windows. Adapters' tensors have a test of their own."""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import types
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from merge import main as merge_main
from PIL import Image
from resize import main as resize_main
from safetensors.torch import save
from show import main as show_main
from torch import nn
from toy_models import toy

import networks.lora
from kohya_trainer.data.caption_folder import PICTURES, CaptionedImage, load_pixels
from kohya_trainer.data.sound import read_sound
from kohya_trainer.drawing.requests import ImageRequest, parse_prompt_line, read_prompt_file
from kohya_trainer.families.ace_step import AceStep
from kohya_trainer.loss_log import LossLog
from kohya_trainer.model_folder import check_model_folder
from kohya_trainer.state import optimizer_state, state_files
from kohya_trainer.training_data import TrainingData
from networks.args.parse import Problems, parse
from networks.cli.args import main as args_main
from networks.cli.command_line import error_text, parse_arguments, program, run_program
from networks.cli.merge import split_multiplier
from networks.cli.plan import main as plan_main
from networks.files import outputs, reader
from networks.files.adapter_file import FileTensors, Naming, open_adapter
from networks.files.checkpoint import Checkpoint
from networks.foreign import expressions
from networks.foreign.texts import printable, read_text

ROOT = Path(__file__).resolve().parents[1]
ESCAPE = "\x1b[2J\x1b]0;title\x07\u202e\x9b"
FORGED = "ComfyUI 2099: exactly"
EVIL = f"x{ESCAPE}\n{FORGED}\r\n  - {FORGED}\u2028"
LONG = 2500  # characters; a message has no more


def refusal(call: Callable[[], Any]) -> str:
    """The one error for a user in which a call ends, soon."""
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        call()
    told = str(caught.value)
    assert time.monotonic() - start < 20, "it took long"
    assert len(told) < LONG and told.isprintable(), ascii(told[:LONG])
    return told


def argued(**raw: Any) -> Any:
    problems = Problems("networks.lora")
    args = parse(raw, "lora", problems)
    problems.raise_if_any()
    return args


# -- arguments

ARGUMENTS: dict[str, tuple[str, Any, str]] = {
    "a mapping from lists": ("network_reg_dims", "{[]:1}", "cannot be read; write it as"),
    "open brackets": ("exclude_patterns", "[" * 20_000, "regular expression"),
    "brackets in brackets": ("network_reg_dims", "[" * 5000 + "]" * 5000, "is not a"),
    "objects in objects": ("network_reg_dims", '{"a":' * 100_000, "cannot be read"),
    "groups in groups": ("only_patterns", "(" * 100_000, "too large or nested too deep"),
    "a user who is not there": ("exclude_patterns", "@~nosuchuser/x", "there is no such user"),
    "a preset of such a user": ("preset", "~nosuchuser/x.toml", "there is no such user"),
    "a file's name that is too long": ("exclude_patterns", "@" + "x" * 5000, "does not exist"),
    "a preset's name that is too long": ("preset", "x" * 5000, "is no preset and no TOML file"),
    "NUL in a file's name": ("exclude_patterns", "@a\0b", r"a\x00b, which does not exist"),
    "NUL in a preset": ("preset", "a\0b", r"preset=a\x00b is no preset"),
    "half a character": ("exclude_patterns", "@a\udcffb", "does not exist"),
    "no number at all": ("conv_dim", [1], "is not a whole number"),
    "infinite": ("conv_dim", "inf", "is not a whole number"),
    "part of one": ("conv_dim", "2.7", "is not a whole number"),
    "hundred thousand digits": ("conv_dim", "9" * 100_000, "is not a whole number"),
    "a thousand million blocks": ("blocks", "0-999999999", "no model has so many blocks"),
    "a million patterns": ("exclude_patterns", ",".join(map(str, range(100_000))), "the most: join them with |"),
    "megabytes": ("exclude_patterns", "x" * 10_000_000, "and 1,048,576 are the most"),
    "megabytes for a choice": ("algo", "x" * 1_000_000, "is none of"),
    "megabytes for a preset": ("preset", "x" * 10_000_000, "and 1,048,576 are the most"),
    "megabytes of a name": ("x" * 1_000_000, "1", "no argument is called"),
    "escapes in a value": ("algo", ESCAPE, r"algo=\x1b[2J"),
    "escapes in a name": (f"x{ESCAPE}", "1", r"no argument is called x\x1b[2J"),
    "escapes in an expression": ("exclude_patterns", "[\x1b", r"\x1b"),
}


@pytest.mark.parametrize("row", ARGUMENTS)
def test_an_argument_ends_in_one_sentence(row: str) -> None:
    name, value, words = ARGUMENTS[row]
    assert words in refusal(lambda: argued(**{name: value}))


def test_many_ranges_of_blocks_are_one_set() -> None:
    start = time.monotonic()
    blocks = argued(blocks=",".join(f"{i % 7}-9999" for i in range(20_000))).blocks
    assert blocks == tuple(range(10_000)) and time.monotonic() - start < 5
    assert argued(blocks="3,0-1, 1 - 2,9").blocks == (0, 1, 2, 3, 9)


@pytest.mark.parametrize(
    ("slow", "quick"),
    [
        ("(.*.*)*x!", "(.*attn.*)+"),
        (r"(?:[a-z_.0-9]+)+!", r"(blocks\.\d+\.)*.*"),
        (".*.*.*.*.*.*.*!", ".*a.*t.*t.*n.*"),
    ],
)
def test_an_expression_that_takes_for_ever_is_refused(slow: str, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.3)
    names = [f"double_blocks.{i}.img_attn.{kind}" for i in range(200) for kind in ("qkv_projection_of_it", "proj")]
    assert expressions.slow([quick, slow, quick + "x"], names) == slow
    assert expressions.slow([quick], names) is None


def test_a_call_is_told_of_a_slow_expression(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever a call takes them from: arguments, a preset of the user, PEFT's settings beside a file."""
    monkeypatch.setattr(expressions, "SECONDS", 0.3)
    unet, slow = toy("sdxl")["unet"], "(.*.*)*(.*.*)*x!"
    preset = tmp_path / "mine.toml"
    preset.write_text(f"exclude_name = ['{slow}']\n", encoding="utf-8")
    for arguments in ({"network_reg_lrs": f"unet:{slow}=1"}, {"preset": str(preset)}):
        told = refusal(lambda given=arguments: networks.lora.create_network(1.0, 4, 1.0, None, [], unet, **given))
        assert slow in told and "seconds on the names of this model" in told
    file = adapter(tmp_path / "a.safetensors", {}, "base_model.model.a_layer_with_a_long_name")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {slow: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "adapter_config.json" in refusal(lambda: open_adapter(file, Naming()))


# -- files that arguments name

SECRET = "hunter2=hunter3"
KINDS = ("exclude_patterns", "network_reg_dims", "blocks", "save_dims", "save_also", "down_lr_weight")


@pytest.mark.parametrize("ending", [".txt", ".toml", ".json", ""])
@pytest.mark.parametrize("name", KINDS)
def test_a_mistyped_file_is_not_shown(name: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = {".toml": f"'(hunter2' = '(hunter3'\n{SECRET}\n", ".json": '{"(hunter2": "(hunter3"}'}
    path = tmp_path / f"secrets{ending}"
    path.write_text(written.get(ending, f"# mine\n\n({SECRET}\n"), encoding="utf-8")
    told = refusal(lambda: argued(**{name: f"@{path}"}))
    assert "hunter" not in told + caplog.text and name in told


def test_a_file_is_quoted_by_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "layers.txt"
    path.write_bytes(b"\xef\xbb\xbf.*attn.*\r\n# no\r\n\r\n(oops\r\n")  # as an editor of Windows writes it
    assert f"line 4 of {path}" in refusal(lambda: argued(exclude_patterns=f"@{path}"))
    path.write_bytes(b"\xef\xbb\xbf.*attn.*\r\n# no\r\n\r\n.*mlp.*")
    assert argued(exclude_patterns=f"@{path}").exclude_patterns == (".*attn.*", ".*mlp.*")
    told = refusal(
        lambda: networks.lora.create_network(1, 4, 1, None, [], toy("sdxl")["unet"], only_patterns=f"@{path}")
    )
    assert "line 4" in told
    path.write_bytes(b"no.such.layer=4")
    unet = toy("sdxl")["unet"]
    told = refusal(lambda: networks.lora.create_network(1, 4, 1, None, [], unet, network_reg_dims=f"@{path}"))
    assert f"line 1 of {path} matches no layer" in told


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a gigabyte": ("a.txt", lambda path: (path.touch(), os.truncate(path, 1 << 30)), "more than 1 MiB"),
    "UTF-16": ("a.txt", lambda path: path.write_text("a", encoding="utf-16"), "is not UTF-8 text"),
    "TOML in TOML": ("a.toml", lambda path: path.write_text("a=" + "[" * 100_000), "nested too deep"),
    "no TOML": ("a.toml", lambda path: path.write_text("a=\x1b"), "cannot be read"),
    "JSON in JSON": ("a.json", lambda path: path.write_text("[" * 100_000), "nested too deep"),
    "no JSON": ("a.json", lambda path: path.write_text("{"), "cannot be read"),
    "a folder": ("a.txt", lambda path: path.mkdir(), "does not exist"),
}


@pytest.mark.parametrize("row", FILES)
def test_a_file_that_cannot_be_taken_is_named(row: str, tmp_path: Path) -> None:
    name, write, words = FILES[row]
    path = tmp_path / name
    write(path)
    told = refusal(lambda: argued(exclude_patterns=f"@{path}"))
    assert str(path) in told and words in told
    if path.is_file():
        assert str(path) in refusal(lambda: argued(preset=str(path)))
        parser = program("x")
        parser.add_argument("--config_file")
        assert str(path) in refusal(lambda: parse_arguments(parser, ["--config_file", str(path)]))


def test_presets_have_values_of_their_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text in ("enable_conv = 3", "exclude_name = 'x'", "exclude_name = [1]", "module_algo_map = [1]",
                 "use_fnmatch = ''",
                 "name_algo_map.x = 1", "name_algo_map.x.dim = [[1]]", f"'x{'y' * 10_000}' = 1", "lora_prefix = 1",
                 'exclude_name = ["\\u001b[31m("]', "unet_target_module = {}", "description = 1979-05-27"):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        assert str(path) in refusal(lambda: argued(preset=str(path)))


# -- headers and folders of models


def header(path: Path, content: bytes | dict[str, Any], data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}


HEADERS: dict[str, tuple[Any, ...]] = {
    "longer than the world": (b"{}", b"", 100 * 10**9),
    "deep": (b'{"__metadata__":' + b"[" * 100_000,),
    "no object": (b"[1]",),
    "no text": (b'{"\xff":1}',),
    "empty": (b"",),
    "metadata of numbers": ({"__metadata__": {"a": 5}, "x": entry()},),
    "metadata of metadata": ({"__metadata__": {"a": {"b": "c"}}, "x": entry()},),
    "a list of metadata": ({"__metadata__": ["a"], "x": entry()},),
    "a shape of text": ({"x": entry(shape="ab")},),
    "a negative shape": ({"x": entry(shape=[-2])},),
    "half a shape": ({"x": entry(shape=[2.5])},),
    "a shape beyond all": ({"x": entry(shape=[10**40])},),
    "offsets beyond all": ({"x": entry(data_offsets=[0, 10**40])},),
    "infinite offsets": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}',),
    "offsets of text": ({"x": entry(data_offsets=["a", "b"])},),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}},),
    "a number for a tensor": ({"x": 5},),
    "a name with escapes": ({f"lora_unet_x{ESCAPE}": entry()},),
    "a name with lines": ({EVIL: entry()},),
    "a name of megabytes": ({"x" * 1_000_000: entry()},),
}


@pytest.mark.parametrize("row", HEADERS)
def test_a_header_that_is_none_is_refused(row: str, tmp_path: Path) -> None:
    path = header(tmp_path / "a.safetensors", *HEADERS[row])
    for door in (reader.read_header, FileTensors, Checkpoint):
        told = refusal(lambda door=door: door(path))
        assert str(path) in told and ("damaged" in told or "is broken" in told)


def test_names_which_a_host_hands_over_are_those_of_files() -> None:
    assert "as no program writes" in refusal(lambda: FileTensors({f"lora_unet_x{ESCAPE}": torch.ones(1)}))


def test_more_tensors_than_an_adapter_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({f"stray.{i}": torch.ones(1) for i in range(9)}))
    monkeypatch.setattr(reader, "_MOST_TENSORS", 8)
    assert f"{path} has 9 tensors" in refusal(lambda: FileTensors(path))
    monkeypatch.setattr(reader, "_MOST_TENSORS", 9)
    assert len(FileTensors(path)) == 9


INDICES: dict[str, tuple[Any, str]] = {
    "deep": ("[" * 100_000, "names no files"),
    "a list": ([1], "names no files"),
    "a list of files": ({"weight_map": ["m-1.safetensors"]}, "names no files"),
    "nested": ({"weight_map": {"a": {"b": "m-1.safetensors"}}}, "names no files"),
    "the folder above": ({"weight_map": {"a": "../m-1.safetensors"}}, "is outside its folder"),
    "the root": ({"weight_map": {"a": "/m-1.safetensors"}}, "is outside its folder"),
    "a drive": ({"weight_map": {"a": "C:\\m-1.safetensors"}}, "is outside its folder"),
    "up by backslashes": ({"weight_map": {"a": "x\\..\\..\\m-1.safetensors"}}, "is outside its folder"),
    "a lost file": ({"weight_map": {"a": "m-3.safetensors"}}, "there is no file"),
    "NUL": ({"weight_map": {"a": "m\0.safetensors"}}, "there is no file"),
    "a long name": ({"weight_map": {"a": "m" * 1000 + ".safetensors"}}, "there is no file"),
    "the other file": (
        {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}},
        "but it is in m-1.safetensors",
    ),
    "a lost tensor": ({"weight_map": {"c": "m-1.safetensors"}}, "no file of it has that"),
    "a tensor in both": (
        {"weight_map": {"a": "m-1.safetensors", "b": "m-4.safetensors"}},
        "remove it from one of them",
    ),
}


@pytest.mark.parametrize("row", INDICES)
def test_an_index_that_is_wrong_is_refused(row: str, tmp_path: Path) -> None:
    content, words = INDICES[row]
    for name, keys in {"m-1": "a", "m-2": "b", "m-4": "ab"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(save({key: torch.ones(1) for key in keys}))
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "m.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        Checkpoint(tmp_path)
    told = error_text(caught.value)
    assert str(tmp_path) in told and words in told and told.isprintable() and len(told) < LONG


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[1]", '"x"', "{", '{"_class_name": ["\\u001b"]}', "\x00"])
def test_a_pipeline_whose_description_is_wrong(content: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    for call in (lambda: check_model_folder(tmp_path, "--ckpt"), lambda: plan_of(tmp_path)):
        assert str(tmp_path) in refusal(call)


def plan_of(folder: Path) -> None:
    from networks.models.skeleton import skeleton

    skeleton(str(folder))


# -- examples


def test_damaged_examples_are_told(tmp_path: Path) -> None:
    """Pictures and sounds that are cut off or have wrong bytes: they are read, or one sentence names them."""
    path, draws, told = tmp_path / "x", random.Random(0), 0
    kinds = {"png": picture("png"), "jpeg": picture("jpeg"), "wav": sound()}
    for (ending, good), _ in itertools.product(kinds.items(), range(40)):
        bad = bytearray(good[: draws.randrange(len(good))] if draws.random() < 0.5 else good)
        for place in draws.sample(range(min(60, len(bad))), min(len(bad), draws.choice((0, 1, 5)))):
            bad[place] = draws.randrange(256)
        file = path.with_suffix(f".{ending}")
        file.write_bytes(bad)
        try:
            if ending == "wav":
                read_sound(file, 8000)
            else:
                PICTURES.check(file)
                load_pixels(file, (16, 16))
        except ValueError as error:
            told += 1
            assert str(file) in str(error) and error_text(error).isprintable()
    assert told > 40


def picture(form: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(stream, form)
    return stream.getvalue()


def sound() -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(range(200)))
    return stream.getvalue()


# -- states

STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda content: content.pop("files"),
    "a list of files": lambda content: content.update(files=[1]),
    "a file's name alone": lambda content: content["files"].update(adapter="x"),
    "numbers": lambda content: content["files"].update(adapter=[1, 2]),
    "a file elsewhere": lambda content: content["files"]["adapter"].__setitem__(0, "../b-state/adapter-1.safetensors"),
    "half of its files": lambda content: content["files"].pop("optimizer"),
}


@pytest.mark.parametrize("row", STATES)
def test_a_state_that_says_something_else_is_refused(row: str, tmp_path: Path) -> None:
    """Also where the checksum is that of what it says."""
    for name in ("a-state", "b-state"):
        state_files.write(tmp_path / name, {"step": 1}, {kind: b"x" for kind in state_files.KINDS})
    path = tmp_path / "a-state" / state_files.STATE_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["checksum"]
    STATES[row](content)
    path.write_text(json.dumps({**content, "checksum": state_files._checksum(content)}), encoding="utf-8")
    assert str(path.parent) in refusal(lambda: state_files.read(path.parent))
    assert state_files.clean(path.parent) == []


@pytest.mark.parametrize(
    "text",
    ["[]", "[" * 100_000, "{", '{"dict": [["groups", 1]]}', '{"dtype": "load"}', '{"module": "os"}', '{"dtype": 3}'],
)
def test_an_optimizers_state_is_read_as_data_alone(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        optimizer_state.unpack({}, text)


# -- nothing of it acts on a terminal, and no line of it looks like ours


def adapter(path: Path, metadata: dict[str, str], name: str = "lora_unet_x") -> Path:
    down, up = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
    factors = {f"{name}.{down}.weight": torch.ones(2, 4), f"{name}.{up}.weight": torch.ones(4, 2)}
    path.write_bytes(save(factors, metadata))
    return path


METADATA = ("ss_network_module", "ss_network_args", "ss_sd_model_name", "ss_base_model_version", "networks_version",
            "modelspec.architecture", "networks_health", "ss_steps", EVIL)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "peft_type": EVIL,
    "lora_alpha": EVIL,
    "r": {EVIL: EVIL},
    "init_lora_weights": f"pissa{EVIL}",
    "rank_pattern": {f"({EVIL}": 1},
    "alpha_pattern": {EVIL: EVIL},
}


def harmless(capsys: pytest.CaptureFixture[str], told: str = "") -> str:
    """What was printed, and `told`, of which nothing acts on a terminal or is a line of a file's."""
    captured = capsys.readouterr()
    printed = f"{captured.out}{captured.err}{told}"
    lines = printed.replace("\r", "\n").split("\n")
    assert all(map(str.isprintable, lines)), ascii(printed)
    assert not any(line.strip() in (FORGED, f"- {FORGED}") for line in lines), printed
    return printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model of one layer for these adapters."""
    (tmp_path / "m.safetensors").write_bytes(save({"model.diffusion_model.x.weight": torch.ones(4, 4)}))
    return tmp_path


SHOWS = ((), ("--layers", "--metadata"), ("--as_args",), ("--json",))


def commands(folder: Path, file: Path) -> Iterator[int]:
    for more in SHOWS:
        yield show_main([str(file), *more])
    yield merge_main([str(folder / "m.safetensors"), str(file), "--out", str(folder / "o.safetensors"), "--overwrite"])
    yield resize_main([str(file), "--dims", "1", "--overwrite"])


def test_texts_of_adapters_are_escaped_by_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = adapter(folder / "a.safetensors", dict.fromkeys(METADATA, EVIL))
    assert list(commands(folder, file)) == [0, 0, 2, 0, 0, 0]
    assert harmless(capsys).count(r"\x1b[2J") > len(METADATA)
    file.write_bytes(save({f"lora_unet_{EVIL}.foo": torch.ones(1)}))
    assert set(commands(folder, file)) == {2}
    assert harmless(capsys).count(r"\x1b[2J") == len(SHOWS) + 2


@pytest.mark.parametrize("field", [*SETTINGS, "alpha", "lora_adapter_metadata", "in it"])
def test_what_settings_say_of_strength_is_escaped(field: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a file, in its header, and in what an error quotes of either."""
    inside = {"alpha": EVIL, "lora_adapter_metadata": EVIL, "in it": json.dumps({f"unet.{EVIL}": 1, "unet.r": EVIL})}
    metadata = {"lora_adapter_metadata" if field == "in it" else field: inside[field]} if field in inside else {}
    file = adapter(folder / "a.safetensors", metadata, "unet.x")
    if field in SETTINGS:
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, field: SETTINGS[field]}
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert show_main([str(file), "--layers"]) == (0 if field == "peft_type" else 2)
    harmless(capsys)


def test_texts_of_other_files_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    (tmp_path / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": f"../{EVIL}"}}), encoding="utf-8"
    )
    assert merge_main([str(tmp_path), "x.safetensors", "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": EVIL, "unet": [EVIL, EVIL]}), encoding="utf-8"
    )
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": EVIL}), encoding="utf-8")
    assert plan_main([str(tmp_path)]) == 2
    for main, argv in ((args_main, [EVIL]), (plan_main, [EVIL]), (plan_main, ["sdxl", "--network_module", EVIL]),
                       (show_main, [f"{EVIL}.safetensors"]),
                       (merge_main, [EVIL, f"{EVIL}=x", "--out", EVIL])):  # fmt: skip
        assert main(argv) == 2
    config = tmp_path / "c.toml"
    parser = program("x")
    parser.add_argument("--config_file")
    for text in (f"{json.dumps(EVIL)} = 1", f"debug = {json.dumps(EVIL)}"):
        config.write_text(text.replace("\\u2028", "\u2028"), encoding="utf-8")
        assert run_program(lambda args: 0, parser, ["--config_file", str(config)]) == 2
    request = ImageRequest("", "", 0, 8, 8, 1, 1.0)
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"a --{EVIL}", encoding="utf-8")
    for call in (lambda: check_model_folder(tmp_path, "--ckpt"), lambda: parse_prompt_line(f"x --s {EVIL}", request),
                 lambda: read_prompt_file(prompts, request, "--from_file"),
                 lambda: PICTURES.read_caption(prompts, ".nothing")):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            call()
        told.append(error_text(caught.value))
    harmless(capsys, "\n".join(told))


def test_a_log_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging, sys; from networks.cli.command_line import program, run_program\n"
        "run_program(lambda a: logging.getLogger('networks').warning('%s', 'a\\x1b[2J\\x9b\\nb') or 0, program(''), [])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr.decode().split() == ["a\\x1b[2J\\x9b", "b"]


def test_printable() -> None:
    assert printable("a\x1b\nb\u202e\udcff") == r"a\x1b\nb\u202e\udcff" and printable("ü→\u3000 字") == "ü→\u3000 字"
    short = printable("a" * 99 + "m" * 10_000 + "z" * 99, 200)
    assert short.startswith("a" * 99) and short.endswith("z" * 99) and "10,000" not in short and len(short) < 250
    assert "(9,998 more characters)" in short


def test_names_are_no_formulas(tmp_path: Path) -> None:
    with LossLog(tmp_path / "x.csv") as log:
        log.add(1, 1.0, 1e-4)
        log.draw(tmp_path / "x.png", "a$b_{ $\\frac")


# -- Windows

NAMES = ["con", "CON.safetensors", "nul", "aux.tar.safetensors", "com1.safetensors", "lpt9", "a.", "a ",
         "a:b.safetensors", "a?.safetensors", "a*b", 'a"b', "a<b", "a|b", "x/con/a.safetensors", "x./a.safetensors",
         "COM\xb9"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_windows_has_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.check_outputs([tmp_path / name])
    monkeypatch.setattr(outputs, "WINDOWS", True)
    assert "choose another name" in refusal(lambda: outputs.check_outputs([tmp_path / name]))
    with pytest.raises(OSError, match="choose another name"):
        outputs.replace(tmp_path / name, [b"x"], 1)
    assert not list(tmp_path.iterdir())


def test_names_that_windows_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "WINDOWS", True)
    for name in (
        "console.safetensors",
        "acon",
        ".a",
        "a.b c.safetensors",
        "com.safetensors",
        "com10",
        "字.safetensors",
    ):
        outputs.replace(tmp_path / name, [b"x"], 1)
    outputs.check_outputs([Path("..") / "x", Path("./x")])


def busy(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replacing fails so many times, as it does while another program has the file open. Returns the waits."""
    waits, left, real = list[float](), [times], os.replace

    def replace(source: Any, target: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        real(source, target)

    monkeypatch.setattr(outputs, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(outputs.time, "sleep", waits.append)
    return waits


def test_a_file_that_is_open_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    waits = busy(3, monkeypatch)
    outputs.replace(path, [b"new"], 3)
    assert path.read_bytes() == b"new" and len(waits) == 3 and sum(waits) < 5


def test_a_file_that_stays_open_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    waits = busy(100, monkeypatch)
    with pytest.raises(OSError, match="close the programs that have it open") as caught:
        outputs.replace(path, [b"new"], 3)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path] and sum(waits) < 10
    assert "is untouched" in error_text(caught.value)


def test_a_path_too_long_for_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part in which a file is made is longer than the file; Windows says that there is no such folder."""
    path = tmp_path / ("x" * 120 + ".safetensors")

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified")

    monkeypatch.setattr(outputs, "WINDOWS", True)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match="characters too long for Windows: choose a folder near the root"):
        outputs.replace(path, [b"x"], 1)


@pytest.mark.parametrize(
    ("item", "path", "strength"),
    [
        (r"C:\x\y.safetensors", r"C:\x\y.safetensors", 1.0),
        (r"C:\x\y.safetensors=0.5", r"C:\x\y.safetensors", 0.5),
        (r"C:y.safetensors=-1", "C:y.safetensors", -1.0),
        (r"\\server\share\y=1\a.safetensors=2", r"\\server\share\y=1\a.safetensors", 2.0),
        (r"D:\a=b\y.safetensors", r"D:\a=b\y.safetensors", 1.0),
        (r"D:\a=b\Y.SAFETENSORS", r"D:\a=b\Y.SAFETENSORS", 1.0),
    ],
)
def test_drive_letters_and_strengths(item: str, path: str, strength: float) -> None:
    assert split_multiplier(item) == (Path(path), strength)


def test_a_code_page_without_a_character_ends_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = adapter(tmp_path / "a.safetensors", {"ss_sd_model_name": "字→ü"})
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict") for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    codes = [show_main([str(file), "--metadata"]), show_main([str(tmp_path / "字.safetensors")])]
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode("cp1252") for stream in streams.values())  # type: ignore[attr-defined]
    assert codes == [0, 2] and r"\u5b57\u2192ü" in out and r"\u5b57.safetensors" in err


_TEXT = ("open", "read_text", "write_text", "fdopen", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile")
_NO_TEXT = ("os", "Image", "wave", "MergeInput", "self")  # whose `open` is of something else
_PROCESSES = ("run", "Popen", "check_output")


def _without_encoding(file: Path) -> Iterator[str]:
    """Calls that open text in whatever encoding the system prefers."""
    text = file.read_text(encoding="utf-8")
    if not any(f"{name}(" in text for name in (*_TEXT, *_PROCESSES)):
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        binary = any(
            set(mode) <= set("rwxab+") and "b" in mode for mode in (*modes, words.get("mode", "").strip("'\""))
        )
        texts = name in _TEXT and (owner or name == "open") and owner not in _NO_TEXT and not binary
        if name in ("NamedTemporaryFile", "TemporaryFile") and not modes and "mode" not in words:
            texts = False  # binary unless told otherwise
        processes = name in _PROCESSES and owner == "subprocess" and words.get("text") == "True"
        if (texts or processes) and "encoding" not in words:
            yield f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_text_is_opened_in_utf_8() -> None:
    """What a system prefers is cp1252 on most of them under Windows."""
    folders = ("networks", "kohya_networks", "kohya_trainer", "scripts")
    found = [line for name in folders for file in (ROOT / name).rglob("*.py") for line in _without_encoding(file)]
    assert not found, "\n".join(found)


def test_no_text_of_a_user_needs_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\xc3\xbc")
    assert read_text(path) == "a\nbü"


def test_processes_that_load_examples_get_no_models(tmp_path: Path) -> None:
    """Under Windows and macOS they are no copies of the process: what they have is pickled."""

    class Unmoved(AceStep):
        def __init__(self) -> None:
            self.pipeline = types.SimpleNamespace(sample_rate=8000, model=lambda: "not to be copied")

        sizes = lambda self, items, options: [(1, 20)]  # noqa: E731
        prompt_of = lambda self, item, size: ""  # noqa: E731

    path = tmp_path / "a.wav"
    path.write_bytes(sound())
    data = TrainingData([CaptionedImage(path, "")], Unmoved(), None)  # type: ignore[arg-type]
    data.conditions = {"": {}}
    there = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(there[0, 1.0]["data"], data[0, 1.0]["data"])
    assert there.family is None and data.family is not None and there[0, 1.0]["data"].shape == (2, 20)


# -- two copies of the package in one process


@pytest.fixture(scope="module")
def second() -> Iterator[Any]:
    """networks.lora once more, as a host has it which keeps a copy of the folder under a name of its own."""
    place = ROOT / "networks"
    spec = importlib.util.spec_from_file_location(
        "second", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["second"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    try:
        yield importlib.import_module("second.lora")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "second"]:
            del sys.modules[name]


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
def test_networks_of_two_copies_on_one_model_come_off(order: str, second: Any) -> None:
    unet: nn.Module = toy("sdxl")["unet"]
    made = []
    for module in (networks.lora, second):
        made.append(module.create_network(1.0, 4, 1.0, None, [], unet))
        made[-1].apply_to([], unet, False, True)
    assert type(made[0]) is not type(made[1])
    for network in made if order == "first in, first out" else reversed(made):
        network.detach()
    assert not [name for name, module in unet.named_modules() if "forward" in vars(module)]
