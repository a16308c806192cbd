"""Writing: whole or not at all, through links, beside other writers, after dead ones, and when the process is ended."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kohya_trainer.state.interrupts import Interrupts
from networks.cli.command_line import Terminated, run_program
from networks.files import outputs
from networks.files.outputs import check_outputs, replace, whole, write_atomically

ROOT = Path(__file__).resolve().parents[1]
POSIX = os.name == "posix"


def by_chunks(file: Path, text: str) -> None:
    replace(file, (text[:1].encode(), memoryview(text[1:].encode())), len(text))


def by_program(file: Path, text: str) -> None:
    """As pictures and tables are written: the part has the name of the file, whose ending decides the format."""

    def make(part: Path) -> None:
        assert part.name == file.resolve().name
        part.write_text(text)

    write_atomically(file, make)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def age(path: Path, seconds: float) -> None:
    for each in [*path.rglob("*"), path]:
        os.utime(each, (time.time() - seconds,) * 2)


every_way = pytest.mark.parametrize("write", [by_chunks, by_program])


# -- links


@every_way
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.txt", tmp_path / "b.txt"
    target.write_text("old")
    (tmp_path / "between.txt").symlink_to(Path("elsewhere") / "a.txt")
    link.symlink_to("between.txt")
    write(link, "new")
    assert link.is_symlink() and (tmp_path / "between.txt").is_symlink() and target.read_text() == "new"
    assert names(tmp_path) == ["b.txt", "between.txt", "elsewhere", "elsewhere/a.txt"]
    target.unlink()
    write(link, "again")  # it points to a file that does not exist, in a folder that does
    assert link.is_symlink() and target.read_text() == "again" and not target.is_symlink()


@every_way
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    (tmp_path / "lost.txt").symlink_to(tmp_path / "no folder" / "a.txt")
    (tmp_path / "circle.txt").symlink_to("round.txt")
    (tmp_path / "round.txt").symlink_to("circle.txt")
    for name in ("lost.txt", "circle.txt"):
        with pytest.raises(OSError, match=f"{name} is a link to .* mend or remove the link"):
            write(tmp_path / name, "new")
        with pytest.raises(ValueError, match=f"{name} is a link to"):
            check_outputs([tmp_path / name])
    assert names(tmp_path) == ["circle.txt", "lost.txt", "round.txt"]


def test_a_folder_is_written_through_its_link(tmp_path: Path) -> None:
    for name in ("empty", "earlier"):
        (tmp_path / name).mkdir()
        (tmp_path / f"to {name}").symlink_to(name)
    (tmp_path / "earlier" / "a").write_text("old")
    for name in ("empty", "earlier"):
        with whole(tmp_path / f"to {name}") as part:
            part.mkdir()
            (part / "a").write_text("new")
        assert (tmp_path / f"to {name}").is_symlink() and (tmp_path / name / "a").read_text() == "new"
    assert names(tmp_path) == ["earlier", "earlier/a", "empty", "empty/a", "to earlier", "to empty"]


# -- what fails


class Faults:
    """Makes the n-th call of everything that writes fail; the clean-up after it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left, self.failed = number, ""
        discard = outputs._discard

        def cleaned(part: Path, lock: int) -> bool:
            left, self.left = self.left, 0
            try:
                return discard(part, lock)
            finally:
                self.left = left

        monkeypatch.setattr(outputs, "_discard", cleaned)
        for name in ("mkdir", "open", "write", "fsync", "replace", "rename", "listdir"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        opened, faults = Path.open, self

        def open_(path: Path, *args: Any, **kwargs: Any) -> Any:
            stream = faults.counted("Path.open", opened)(path, *args, **kwargs)

            class Stream:
                """A file of which each write may fail."""

                def __enter__(self) -> Stream:
                    return self

                def __exit__(self, *args: Any) -> None:
                    stream.close()

                def __getattr__(self, name: str) -> Any:
                    call = getattr(stream, name)
                    return faults.counted(name, call) if name in ("write", "flush") else call

            return Stream()

        monkeypatch.setattr(Path, "open", open_)

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **kwargs)

        return checked


def _file(place: Path, text: str) -> None:
    by_chunks(place, text)


def _folder(place: Path, text: str) -> None:
    with whole(place) as part:
        part.mkdir()
        outputs.write(part / "a", [text.encode()])


@pytest.mark.parametrize("make", [_file, _folder])
def test_an_error_in_any_call_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, str], None]
) -> None:
    """Every call in turn; where it fails after the new one is in its place, that is whole."""
    place = tmp_path / "out"
    content = place if make is _file else place / "a"
    make(place, "old")
    before, met = names(tmp_path), set()
    for number in itertools.count(1):
        error = None
        with monkeypatch.context() as patch:
            faults = Faults(patch, number)
            try:
                make(place, "new")
            except OSError as raised:
                error = str(raised)
        met.add(faults.failed)
        if error is not None:
            assert str(place) in error and "untouched" in error, (faults.failed, error)
        assert content.read_text() == ("old" if error else "new"), faults.failed
        assert names(tmp_path) == before, faults.failed
        make(place, "old")
        if not faults.failed:
            break
    assert met >= {"mkdir", "open", "write", "fsync", "Path.open", "replace"} | (
        {"rename"} if make is _folder else set()
    )


def test_ctrl_c_between_two_renames_puts_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "out", "old")

    def interrupted(old: Path, new: Path) -> None:
        assert not new.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "old" and names(tmp_path) == ["out", "out/a"]


# -- several writers, and dead ones

WRITER = """
import sys
from pathlib import Path
from networks.files.outputs import replace

def chunks():
    yield b"half"
    print("writing", flush=True)
    sys.stdin.readline()
    yield b" whole"

replace(Path(sys.argv[1]), chunks(), 10)
"""


def start_writing(file: Path) -> subprocess.Popen[str]:
    """Another process that has written half a file."""
    command = [sys.executable, "-c", WRITER, str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@every_way
def test_a_killed_writers_part_goes_before_the_next_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable[[Path, str], None]
) -> None:
    file = tmp_path / "a.txt"
    write(file, "old")
    process = start_writing(file)
    process.kill()
    process.wait()
    assert file.read_text() == "old" and len(names(tmp_path)) > 1
    with caplog.at_level(logging.INFO):
        write(file, "new")
    assert file.read_text() == "new" and names(tmp_path) == ["a.txt"]
    assert len(caplog.records) == 1 and ".a.txt.part" in caplog.text and "was ended as it wrote" in caplog.text
    caplog.clear()
    write(file, "again")
    assert not caplog.records


def test_a_living_writers_part_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However old it is; and a dead one beside it goes."""
    file = tmp_path / "a.txt"
    living = start_writing(file)
    dead = start_writing(file)
    dead.kill()
    dead.wait()
    age(tmp_path / ".a.txt.part", 10 * outputs.LONG)
    by_chunks(file, "between")
    assert file.read_text() == "between"
    assert names(tmp_path) == [".a.txt.part", ".a.txt.part/.a.txt.part.lock", ".a.txt.part/a.txt.part", "a.txt"]
    living.communicate("\n")
    assert living.returncode == 0 and file.read_text() == "half whole" and names(tmp_path) == ["a.txt"]
    assert len(caplog.records) == 1 and ".a.txt.2.part" in caplog.text


def test_threads_that_write_one_name_at_once(tmp_path: Path) -> None:
    file, problems = tmp_path / "a.txt", []

    def work(text: str) -> None:
        for _ in range(20):
            try:
                by_chunks(file, text)
            except OSError as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(letter * 1000,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and names(tmp_path) == ["a.txt"] and len(set(file.read_text())) == 1


def test_a_part_that_another_writers_late_clean_up_takes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock: the next number is taken."""
    opened, taken = os.open, []

    def late(path: Path, *args: Any, **kwargs: Any) -> int:
        if not taken:
            taken.append(Path(path).parent)
            Path(path).parent.rmdir()
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    by_chunks(tmp_path / "a.txt", "new")
    assert taken == [tmp_path / ".a.txt.part"] and names(tmp_path) == ["a.txt"]


def left(file: Path, host: str | None = None) -> Path:
    """A part without a writer."""
    part = file.with_name(f".{file.name}.part")
    part.mkdir()
    (part / file.name).write_text("half")
    if host is not None:
        (part / f"{part.name}.lock").write_text(host)
    return part


@pytest.mark.parametrize("case", ["another machine", "no lock yet", "no locks here", "someone else's"])
def test_where_no_lock_can_tell_time_does(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    own = outputs._host().decode()
    part = left(file, {"another machine": "elsewhere", "no locks here": own, "someone else's": own}.get(case))
    if case == "no locks here":
        monkeypatch.setattr(outputs, "_locked", lambda lock: None)
    if case == "someone else's":
        (part / "mine").write_text("")
        (part / f"{part.name}.lock").unlink()
    by_chunks(file, "new")
    assert part.is_dir()
    age(part, outputs.LONG + 60)
    by_chunks(file, "new")
    assert part.exists() == (case == "someone else's")


def test_parts_of_earlier_versions_go_when_they_are_old(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, folder = tmp_path / "a.b.txt", tmp_path / "merged"
    old = [tmp_path / ".a.b.txt.x7_k2b9q.part", tmp_path / ".a.b.4711.txt"]
    for path in old:
        path.write_text("half")
    shutil.copytree(tmp_path, tmp_path.parent / "copy", dirs_exist_ok=True)
    (tmp_path / ".merged.ab12cd34" / "merged").mkdir(parents=True)
    old.append(tmp_path / ".merged.ab12cd34")
    users = [".a.b.txt.notes", ".a.b.txt.mine.part", ".a.b.note.txt", ".a.txt.x7_k2b9q.part", ".a.b.txt", ".a.b.5.png"]
    for name in users:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".merged.original").mkdir()
    (tmp_path / ".merged.original" / "mine").write_text("")
    for path in tmp_path.iterdir():
        age(path, outputs.LONG - 60)
    by_chunks(file, "new")
    _folder(folder, "new")
    assert all(path.exists() for path in old) and not caplog.records
    for path in tmp_path.iterdir():
        age(path, outputs.LONG + 60)
    by_chunks(file, "new")
    _folder(folder, "new")
    assert not any(path.exists() for path in old)
    assert all((tmp_path / name).exists() for name in [*users, ".merged.original/mine"])
    assert len(caplog.records) == 2 and all(path.name in caplog.text for path in old)


def test_a_folder_whose_writer_died_between_the_renames_comes_back(tmp_path: Path) -> None:
    _folder(tmp_path / "out", "old")
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / f"{part.name}.lock").write_bytes(outputs._host())
    (tmp_path / "out").rename(part / "out.before")
    with pytest.raises(ValueError, match="stop"), whole(tmp_path / "out"):
        raise ValueError("stop")
    assert (tmp_path / "out" / "a").read_text() == "old" and names(tmp_path) == ["out", "out/a"]


def test_a_large_folder_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("")
    monkeypatch.setattr(outputs, "_LARGE", 10)
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(str(folder)) or listdir(folder))
    for number in range(5):
        by_chunks(tmp_path / f"{number}.txt", "new")
    assert listed.count(str(tmp_path)) == 1
    left(tmp_path / "3.txt", outputs._host().decode())  # since then
    by_chunks(tmp_path / "3.txt", "new")
    assert listed.count(str(tmp_path)) == 1 and not [name for name in names(tmp_path) if name.startswith(".")]


# -- signals

PROGRAM = """
import argparse, signal, sys, time
from pathlib import Path
from networks.files.outputs import replace
from networks.cli.command_line import run_program

def body(args):
    def chunks():
        yield b"half"
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))
        yield b" whole"
    replace(Path(sys.argv[1]), chunks(), 10)
    return 0

if len(sys.argv) > 3:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(run_program(body, argparse.ArgumentParser(), []))
"""


AS_USUAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
    signal.signal(getattr(signal, name), signal.SIG_DFL)
"""


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """A program of ours that has begun to write, with signals as they usually are: one in the background of a script
    has some ignored, and so have all that it starts."""
    command = [sys.executable, "-c", AS_USUAL + code, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "scripts")))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, text=True, **streams)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "writing\n":
        assert line, process.communicate()
    return process


@pytest.mark.skipif(not POSIX, reason="Windows has no such signals between processes")
@pytest.mark.parametrize(
    "number,status,line",
    [
        (signal.SIGTERM, 143, "ended by SIGTERM\n"),
        ("SIGHUP", 129, "ended by SIGHUP\n"),
        ("SIGINT", 130, "interrupted\n"),
    ],
)
def test_a_signal_cleans_up(number: Any, status: int, line: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    process = start(PROGRAM, file, 60)
    process.send_signal(getattr(signal, number) if isinstance(number, str) else number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, line)
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not POSIX, reason="Windows has no such signals between processes")
def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    process = start(PROGRAM, tmp_path / "a.txt", 0.3, "ignore")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "") and (tmp_path / "a.txt").read_text() == "half whole"


MERGE = """
import contextlib, sys, time
from networks.cli import merge

@contextlib.contextmanager
def slow(total):
    def step(key, size):
        print("writing", flush=True)
        time.sleep(60)
    yield step

merge.progress_bar = slow
sys.exit(merge.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not POSIX, reason="Windows has no such signals between processes")
def test_the_end_of_a_merge_leaves_nothing_and_its_death_a_part_that_the_next_removes(tmp_path: Path) -> None:
    """A checkpoint of 100 MB, of which a tenth is written when the signal comes."""
    import torch
    from safetensors.torch import save_file

    from networks.cli import merge

    save_file({f"b.{i}.weight": torch.zeros(2500, 1000) for i in range(10)}, tmp_path / "m.safetensors")
    factors = {"lora_up.weight": torch.ones(2500, 1), "lora_down.weight": torch.ones(1, 1000)}
    save_file({f"lora_unet_b_3.{key}": t for key, t in factors.items()}, tmp_path / "a.safetensors")
    inputs = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = [str(tmp_path / name) for name in ("m.safetensors", "a.safetensors")]
    arguments += ["--out", str(tmp_path / "o.safetensors")]
    process = start(MERGE, *arguments)
    assert any(path.stat().st_size > 5e6 for path in tmp_path.glob(".*/o.safetensors.part"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143 and said == "ended by SIGTERM\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == inputs
    process = start(MERGE, *arguments)
    process.kill()
    process.wait()
    assert (tmp_path / ".o.safetensors.part").is_dir()
    assert merge.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "m.safetensors", "o.safetensors"}


CHILD = "import os, sys, signal, time; print('writing', flush=True); time.sleep(60)"


@pytest.mark.skipif(not POSIX, reason="Windows has no such signals between processes")
@pytest.mark.parametrize("program", ["start", "demo"])
def test_a_program_that_runs_others_ends_them_too(program: str, tmp_path: Path) -> None:
    if program == "start":
        code = "import start, subprocess, sys; sys.exit(start.wait_for(subprocess.Popen(sys.argv[1:])))"
    else:
        code = (
            "import argparse, demo, sys\nfrom networks.cli.command_line import run_program\n"
            "demo.ROOT, demo.sys.executable, arguments = demo.Path('/'), sys.argv[1], sys.argv[2:]\n"
            "demo.subprocess.list2cmdline = lambda command: ''\n"
            "call = demo.subprocess.Popen\ndemo.subprocess.Popen = lambda command: call([sys.executable, *arguments])\n"
            "sys.exit(run_program(lambda args: demo.run('x', []), argparse.ArgumentParser(), []))"
        )
    process = start(code, sys.executable, "-c", PROGRAM, tmp_path / "a.txt", 60)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # the pipes close when the child is gone, too
    assert process.returncode == 143 and "ended by SIGTERM" in said
    assert names(tmp_path) == []


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_handlers_are_given_back_and_none_is_installed_in_another_thread() -> None:
    before, seen = handlers(), []
    import argparse

    def body(args: argparse.Namespace) -> int:
        seen.append(handlers()[1])
        return 0

    assert run_program(body, argparse.ArgumentParser(), []) == 0
    thread = threading.Thread(target=run_program, args=(body, argparse.ArgumentParser(), []))
    thread.start()
    thread.join()
    assert seen[0] != before[1] and seen[1] == before[1] and handlers() == before


@pytest.mark.skipif(not POSIX, reason="Windows has no such signals between processes")
def test_the_trainers_own_way_to_stop_goes_before_and_gives_ours_back(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    def body(args: argparse.Namespace) -> int:
        with Interrupts() as signals:
            os.kill(os.getpid(), signal.SIGTERM)  # waits for the end of the step
            assert signals.asked
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise Terminated(signal.SIGTERM)

    assert run_program(body, argparse.ArgumentParser(), []) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"


def test_the_plug_in_installs_no_handler() -> None:
    """Only programs of ours do; the rest of the package runs inside others."""
    users = {file.name for file in (ROOT / "networks").rglob("*.py") if "import signal" in file.read_text("utf-8")}
    assert users == {"command_line.py"}
    code = (
        "import signal; before = [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "import networks.cli.command_line\n"
        "assert before == [signal.getsignal(n) for n in signal.valid_signals()]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
