"""The folder of a state: whole at every instant, whatever ends its writer; damage is told; it holds no pickle."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kohya_trainer.state import state_files

ROOT = Path(__file__).resolve().parents[1]
CALLS = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "open", "chmod")


def save(folder: Path, step: int) -> None:
    """A state whose files tell its step."""
    files = {kind: f"{kind} {step} ".encode() * 50 for kind in state_files.KINDS}
    state_files.write(folder, {"current_step": step, "rates": [1e-4, float("inf")], "none": None}, files)


def whole(folder: Path) -> int:
    """The step of a state, all of whose files are that step's."""
    content, files = state_files.read(folder)
    step = content["current_step"]
    assert content["rates"] == [1e-4, float("inf")] and content["none"] is None
    assert files.keys() == set(state_files.KINDS)
    for kind, path in files.items():
        assert path.read_bytes() == f"{kind} {step} ".encode() * 50
    return step


def first_layout(folder: Path) -> Path:
    """The folder of an earlier version: what accelerate wrote, and what the trainer did."""
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"):
        (folder / name).write_bytes(b"x")
    (folder / state_files.STATE_FILE).write_text('{"current_step": 1}')
    return folder


class Killed(BaseException):
    """The process is no more."""


@contextmanager
def ending_at(number: int, how: Callable[[], BaseException], again: bool) -> Iterator[list[str]]:
    """The call of this number among all that change the disk ends in an error; `again`, all later ones do."""
    made: list[str] = []

    def count(name: str) -> None:
        made.append(name)
        if len(made) - 1 == number or (again and len(made) > number):
            raise how()

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            count("half a write")  # what was written before it is on the disk
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        fdopen = os.fdopen
        patch.setattr(os, "fdopen", lambda *args, **kwargs: File(fdopen(*args, **kwargs)))
        yield made


def instants(prepare: Callable[[], Path], how: Callable[[], BaseException], again: bool) -> Iterator[tuple[Path, bool]]:
    """The state's folder after a save that ended at each of its calls in turn, and whether the save said so."""
    number, reached = 0, True
    while reached:
        folder = prepare()
        told = False
        with ending_at(number, how, again) as made:
            try:
                save(folder, 2)
            except (Killed, OSError):
                told = True
        reached = len(made) > number
        number += 1
        if reached:
            yield folder, told
    assert number > 10


@pytest.mark.parametrize("before", ["nothing", "a state", "a state of the first layout"])
def test_killed_at_any_call_a_whole_state_is_left(tmp_path: Path, before: str) -> None:
    folders = (tmp_path / f"{number}" / "x-state" for number in range(1000))

    def prepare() -> Path:
        folder = next(folders)
        folder.parent.mkdir()
        if before == "a state":
            save(folder, 1)
        elif before != "nothing":
            first_layout(folder)
        return folder

    steps = []
    for folder, _ in instants(prepare, Killed, again=True):
        if before == "nothing" and not (folder / state_files.STATE_FILE).exists():
            steps.append(1)
        else:
            steps.append(state_files.read(folder)[0]["current_step"])
            assert before == "a state of the first layout" and steps[-1] == 1 or whole(folder) == steps[-1]
        left = state_files.clean_series(folder.parent, "x")
        assert all(name.startswith("x-state/") for name in left)
        save(folder, 3)  # the next writer, whatever the one before has left
        assert whole(folder) == 3 and len(list(folder.iterdir())) == 3
        assert not state_files.clean_series(folder.parent, "x")
    assert steps == sorted(steps) and set(steps) == {1, 2}


@pytest.mark.parametrize("error", [28, 5, 13])
def test_an_error_at_any_call_leaves_the_earlier_state_and_nothing_else(tmp_path: Path, error: int) -> None:
    folders = (tmp_path / f"{number}" / "x-state" for number in range(1000))

    def prepare() -> Path:
        folder = next(folders)
        folder.parent.mkdir()
        save(folder, 1)
        return folder

    results = []
    for folder, told in instants(prepare, lambda: OSError(error, os.strerror(error)), again=False):
        step = whole(folder)
        results.append((step, told))
        if told and step == 1:
            assert len(list(folder.iterdir())) == 3 and len(list(folder.parent.iterdir())) == 1
    assert (1, True) in results and (1, False) not in results


LOOP = """
import sys, itertools
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from test_state_files import save
for step in itertools.count(1):
    save(Path(sys.argv[1]), step)
    print(step, flush=True)
"""


def test_a_killed_process_leaves_a_whole_state(tmp_path: Path) -> None:
    """SIGKILL at moments of its own, three times at once: most of the time is that of their start."""
    folders = [tmp_path / f"{number}-state" for number in range(3)]
    writers = [
        subprocess.Popen([sys.executable, "-c", LOOP, str(folder), str(ROOT)], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    draws = random.Random(0)
    for writer, folder in zip(writers, folders, strict=True):
        assert writer.stdout is not None
        while writer.stdout.readline() != "3\n":
            assert writer.poll() is None
        time.sleep(draws.uniform(0, 0.05))
        writer.kill()
        last = [3, *map(int, writer.stdout)][-1]
        writer.wait()
        assert whole(folder) in (last, last + 1)
        save(folder, 7)
        assert whole(folder) == 7 and len(list(folder.iterdir())) == 3


def test_every_flipped_bit_is_one_sentence(tmp_path: Path) -> None:
    folder, draws = tmp_path / "x-state", random.Random(0)
    save(folder, 1)
    content = state_files.read(folder)[0]
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in draws.sample(range(8 * len(good)), 300):
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            path.write_bytes(bad)
            try:
                assert state_files.read(folder)[0] == content  # between the words of JSON
            except ValueError as error:
                told = str(error)
                assert str(folder) in told and "Give" in told or "Take another state" in told, told
        for cut in (good[:-2], good[: len(good) // 2], b""):
            path.write_bytes(cut)
            with pytest.raises(ValueError, match="x-state"):
                state_files.read(folder)
        path.write_bytes(good)
    whole(folder)


def test_what_ended_writers_left_is_named_and_goes(tmp_path: Path) -> None:
    """Of the series of this name alone; a folder that has become no state goes, too."""
    state = tmp_path / "a.b-state"
    save(state, 1)
    own = [state / "adapter-7.safetensors", state / ".optimizer-7.safetensors.k3s.part"]
    own += [tmp_path / "a.b-step00000003-state" / ".adapter-1.safetensors.zz.part"]
    foreign = [tmp_path / "aXb-state" / "adapter-1.safetensors", tmp_path / "a.b-c-state" / "adapter-1.safetensors"]
    foreign += [state / "notes.txt"]
    for path in (*own, *foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert set(state_files.clean_series(tmp_path, "a.b")) == {f"{path.parent.name}/{path.name}" for path in own}
    assert not any(path.exists() for path in own) and all(path.exists() for path in foreign)
    assert whole(state) == 1 and not (tmp_path / "a.b-step00000003-state").exists()


@pytest.mark.parametrize("name", ["custom_checkpoint_1.pkl", "scheduler.bin", "a/b.pt", "optimizer.PKL"])
@pytest.mark.parametrize("layout", ["first", "own"])
def test_a_state_with_foreign_pickles_is_refused(tmp_path: Path, name: str, layout: str) -> None:
    folder = tmp_path / "x-state"
    first_layout(folder) if layout == "first" else save(folder, 1)
    state_files.read(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="can run code"):
        state_files.read(folder)


def test_a_state_of_a_later_version_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "x-state"
    save(folder, 1)
    path = folder / state_files.STATE_FILE
    content = json.loads(path.read_text())
    del content["checksum"]
    content["layout"] = 3
    path.write_text(json.dumps({**content, "checksum": state_files._checksum(content)}))
    with pytest.raises(ValueError, match="later version"):
        state_files.read(folder)
    assert not state_files.clean(folder)
