"""The commands that write adapter files and checkpoints, when something goes wrong: a full disk, an end in the middle,
an output in the way, inputs that are damaged. One sentence, no part of a file, nothing hidden, inputs as they were."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_overwrite import LINKS, contents
from torch import Tensor

from networks.cli.commands import COMMANDS

RANK = 4
MODEL_FOLDER = str(Path(__file__).parents[1] / "scripts" / "emoji" / "model")
LAYERS = {
    f"down_blocks.1.attentions.0.transformer_blocks.0.{path}": shape
    for path, shape in {"attn1.to_q": (128, 128), "attn2.to_k": (128, 128), "ff.net.2": (128, 512)}.items()
}


def lora(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for path, (rows, columns) in LAYERS.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        found[f"{name}.lora_up.weight"] = torch.randn(rows, RANK, generator=draws)
        found[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=draws)
        found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


def checkpoint(change: float = 0.0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(9)
    more = {"conv_in.weight": torch.ones(64, 27, 3, 3), "conv_out.bias": torch.ones(27)}
    tensors = {f"{path}.weight": torch.randn(shape, generator=draws) for path, shape in LAYERS.items()}
    return {key: t + change * torch.randn(t.shape, generator=draws) for key, t in tensors.items()} | more


@dataclass(frozen=True)
class Call:
    """A call of a command.

    Attributes:
        inputs: file name -> tensors.
        options: all but the inputs, in their order before these, and the output.
    """

    inputs: dict[str, dict[str, Tensor]]
    options: tuple[str, ...] = ()


A, B, MODEL = {"a.safetensors": lora(1)}, {"b.safetensors": lora(2)}, {"m.safetensors": checkpoint()}
LATER = {"l.safetensors": {key: t if "alpha" in key else 1.25 * t for key, t in lora(1).items()}}
HALF = {"h.safetensors": {key: t for key, t in lora(3).items() if "to_q.lora_down" not in key}}
CALLS = {
    "convert": Call(A, ("--to", "diff")),
    "combine": Call({**A, **B}, ("--model", MODEL_FOLDER)),
    "average": Call({**A, **LATER}, ("--steps", "1,2", "--decay", "0.5")),
    "extract": Call({"t.safetensors": checkpoint(0.1), **MODEL}, ("--model", MODEL_FOLDER, "--dim", "2")),
    "resize": Call(A, ("--dims", "2")),
    "merge": Call({**MODEL, **A}),
    "rescue": Call(HALF, ("--model", MODEL_FOLDER, "--allow_dropped")),
}
every_command = pytest.mark.parametrize("command", CALLS)


class Place:
    """A folder with the inputs of a command, and its calls there."""

    def __init__(self, folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.command, self.capsys = folder, command, capsys
        self.call, self.out = CALLS[command], folder / "out.safetensors"
        self.inputs = [folder / name for name in self.call.inputs]
        for path, tensors in zip(self.inputs, self.call.inputs.values(), strict=True):
            save_file(tensors, path)
        self.main: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command].module, "networks.cli").main

    def run(self, *more: str, out: Path | None = None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.capsys.readouterr()
        code = self.main([*map(str, self.inputs), *self.call.options, "--out", str(out or self.out), *more])
        return code, *self.capsys.readouterr()

    def refused(self, *more: str, out: Path | None = None, codes: tuple[int, ...] = (1, 2)) -> str:
        """What it says in one line; nothing has changed."""
        before = contents(self.folder)
        code, said, told = self.run(*more, out=out)
        assert contents(self.folder) == before, told
        last = told.splitlines()[-1] if told else ""
        assert code in codes and last.startswith("error: ") and len(last) < 2500 and "Traceback" not in told, (
            code,
            told,
        )
        assert not said or "--json" not in more, said
        return last


@pytest.fixture
def place(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, command, capsys)


# -- the output


@every_command
def test_a_file_is_written_and_its_inputs_stay(place: Place) -> None:
    before = contents(place.folder)
    code, _, told = place.run()
    after = contents(place.folder)
    assert code == 0 and set(after) == {*before, place.out.name}, told
    assert {name: after[name] for name in before} == before
    assert all(t.isfinite().all() for t in load_file(place.out).values())


@every_command
def test_json_is_alone_on_stdout(place: Place) -> None:
    code, said, told = place.run("--json")
    found = json.loads(said)
    assert code == 0, told
    assert found["command"] == place.command and found["out"] == str(place.out)
    assert place.refused("--json")  # the file is there now


@every_command
def test_what_is_in_the_way_stays(place: Place) -> None:
    for link in LINKS.values():
        for target in place.inputs:
            link(place.out, target)
            for more in ((), ("--overwrite",)):
                assert "is read" in place.refused(*more)
            place.out.unlink()
            place.out.with_name("between").unlink(missing_ok=True)
    (place.folder / "x").mkdir()
    for target in place.inputs:
        for spelled in (target, place.folder / "x" / ".." / target.name, Path(os.path.relpath(target))):
            assert "is read" in place.refused("--overwrite", out=spelled)
    place.out.write_text("the user's")
    assert "--overwrite" in place.refused()
    place.out.unlink()
    place.out.mkdir()
    (place.out / "notes.txt").write_text("the user's")
    for more in ((), ("--overwrite",)):
        place.refused(*more)
    place.refused(out=place.inputs[0] / "below a file.safetensors")


# -- the disk


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, after: int, fail: Callable[[], Any]) -> Iterator[list[int]]:
    """Every file that is opened for writing, whose bytes together end in `fail` beyond so many; how many there were."""
    written, real = [0], Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            written[0] += len(memoryview(data).cast("B"))
            if written[0] > after:
                fail()
            count: int = self.file.write(data)
            return count

    def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = real(path, mode, *more, **named)
        return Full(file) if "b" in mode and set(mode) & set("wxa+") else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        yield written


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


@every_command
def test_a_full_disk_and_an_interruption_leave_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, 1 << 40, full_disk) as written:
        assert place.run()[0] == 0
    whole = place.out.read_bytes()
    for share in (0.0, 0.4, 0.8):  # of the bytes: what waits, and the file itself
        for there in (True, False):
            if there:
                place.out.write_bytes(whole)
            with failing(monkeypatch, int(share * written[0]), full_disk):
                said = place.refused("--overwrite", codes=(2,))
            assert "no space" in said and ("untouched" if there else "nothing was left behind") in said, said
            before = contents(place.folder)
            with failing(monkeypatch, int(share * written[0]), interrupt):
                code, _, said = place.run("--overwrite")
            assert code == 130 and "interrupted" in said and contents(place.folder) == before
            place.out.unlink(missing_ok=True)


@every_command
def test_a_folder_that_may_not_be_written_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *more: Any, **named: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "not allowed to write" in place.refused(codes=(2,))


if hasattr(os, "fork"):

    @every_command
    def test_a_killed_one_leaves_no_file_and_the_next_tidies_up(
        place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = set(contents(place.folder))
        child = os.fork()
        if not child:
            with failing(monkeypatch, 1000, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                place.run()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert all(name in before or name.startswith(".out.safetensors") for name in contents(place.folder))
        assert set(contents(place.folder)) > before, "it was killed before it wrote"
        assert place.run()[0] == 0 and "left there by a program that was ended" in caplog.text
        assert set(contents(place.folder)) == {*before, place.out.name}


# -- the inputs


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    return save(tensors)


def _first(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> bytes:
    key = next(key for key, t in tensors.items() if t.dim() == 2)
    return _bytes({**tensors, key: change(tensors[key]).contiguous()})


def _nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("nan"))


DAMAGED: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    "empty": lambda tensors: b"",
    "text": lambda tensors: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "cut in the data": lambda tensors: _bytes(tensors)[:-100],
    "cut in the header": lambda tensors: _bytes(tensors)[:200],
    "header of nonsense": lambda tensors: (64).to_bytes(8, "little") + b"\xff" * 64,
    "no tensors": lambda tensors: _bytes({}),
    "no such layers": lambda tensors: _bytes({"x.y": torch.ones(3)}),
    "no dimensions": lambda tensors: _first(tensors, lambda t: t.sum()),
    "no values": lambda tensors: _first(tensors, lambda t: t[:0]),
    "another shape": lambda tensors: _first(tensors, lambda t: t[:-1, :-1]),
    "whole numbers": lambda tensors: _first(tensors, lambda t: t.long()),
    "not finite": lambda tensors: _first(tensors, _nan),
}


@every_command
def test_damaged_inputs_end_in_one_sentence(place: Place) -> None:
    wrong = []
    for path, tensors in zip(place.inputs, place.call.inputs.values(), strict=True):
        sound = path.read_bytes()
        for name, damage in DAMAGED.items():
            path.write_bytes(damage(tensors))
            if place.command == "rescue" and place.run()[0] == 0:  # that is what it is for
                assert all(t.isfinite().all() for t in load_file(place.out).values()), name
                place.out.unlink()
                continue
            try:
                said = place.refused()
                if not any(given.name in said for given in place.inputs):
                    wrong.append(f"{name} {path.name}: no file is named in {said}")
            except AssertionError as error:
                wrong.append(f"{name} {path.name}: {str(error)[:400]}")
            place.out.unlink(missing_ok=True)
        path.unlink()
        assert path.name in place.refused()
        path.mkdir()
        place.refused()
        path.rmdir()
        path.write_bytes(sound)
    assert not wrong, "\n".join(wrong)


@every_command
def test_flipped_bytes_of_a_header_are_refused_or_do_no_harm(place: Place) -> None:
    draws = random.Random(place.command)
    for path in place.inputs:
        sound = path.read_bytes()
        length = 8 + int.from_bytes(sound[:8], "little")
        for _ in range(12):
            at = draws.randrange(length)
            path.write_bytes(sound[:at] + bytes([draws.randrange(256)]) + sound[at + 1 :])
            before = contents(place.folder)
            code, _, told = place.run("--overwrite")
            assert code in (0, 1, 2) and "Traceback" not in told, (at, told)
            if code:
                assert contents(place.folder) == before and told.splitlines()[-1].startswith("error: "), (at, told)
            else:
                load_file(place.out)
                place.out.unlink()
        path.write_bytes(sound)


# -- the options

COMMON = {"--json", "--device", "--out", "--overwrite", "--debug"}


@every_command
def test_help_is_complete(command: str) -> None:
    parser: argparse.ArgumentParser = importlib.import_module(COMMANDS[command].module, "networks.cli").build_parser()
    options = {name: action for action in parser._actions for name in action.option_strings}
    assert set(options) >= COMMON
    unexplained = [action.dest for action in parser._actions if not action.help and action.option_strings]
    assert not unexplained and parser.description
    assert f"kohya-networks {command} " in parser.description, "an example"
    told = parser.format_help()
    assert all(len(line) <= 130 for line in parser.description.splitlines()) and "--help" in told
