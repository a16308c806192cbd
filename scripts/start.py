"""Sets up an environment beside the checkout and runs things in it: `python scripts/start.py demo`, `test` or `check`.

Standard library only, on Linux, macOS and Windows. The first run makes a virtual environment (`<checkout>-venv` beside
the checkout, or where KOHYA_NETWORKS_VENV says) with the versions of constraints.txt; later runs reuse it and install
nothing. The package is installed as a link to this checkout, so what runs is always the code that stands here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
# Pip's last diffusers for 3.10 lacks pipelines that the tests run, and goes with no torchao that peft goes with.
OLDEST_OF_TESTS = (3, 11)
MARKER = "kohya-networks.json"  # in the environment: what it was made from
INPUTS = ("constraints.txt", "setup.cfg", "pyproject.toml")

# command -> (what it does, what Python runs)
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "demo": (
        "train an adapter on the embedded model and draw before/after pictures",
        [str(ROOT / "scripts" / "demo.py")],
    ),
    "test": ("run all tests (further arguments go to pytest)", ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]),
    "check": ("format, lint, types, generated docs and tests", [str(ROOT / "scripts" / "check.py")]),
}

# what pip prints when something outside of us is wrong -> what to do about it
REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("no space left", "errno 28", "not enough space"),
        "The disk is full. Free some 3 GB (10 GB with a GPU build of torch).",
    ),
    (
        (
            "name resolution",
            "getaddrinfo failed",
            "nodename nor servname",
            "failed to establish a new connection",
            "network is unreachable",
            "read timed out",
            "connection refused",
            "connection reset",
            "max retries exceeded",
        ),
        "The package index cannot be reached. Check the network (pip reads its proxy and index settings as usual), "
        "then run this command again: it goes on where it stopped.",
    ),
    (
        ("no matching distribution", "could not find a version"),
        "A pinned version has no file for this Python or system. Use Python 3.11 to 3.13 on a 64-bit system.",
    ),
)


class SetupError(Exception):
    """Something that the user can mend; its text says how."""


def usage() -> str:
    """The help text."""
    lines = [f"  {name:6} {text}" for name, (text, _) in COMMANDS.items()]
    return "usage: python scripts/start.py COMMAND [arguments of the command]\n\n" + "\n".join(lines)


def environment_folder() -> Path:
    """Where the virtual environment is, or will be."""
    chosen = os.environ.get("KOHYA_NETWORKS_VENV")
    return Path(chosen).resolve() if chosen else ROOT.with_name(f"{ROOT.name}-venv")


def environment_python(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def fingerprint() -> str:
    """A hash of everything that decides what is installed, the checkout's place included."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in INPUTS:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()


def is_current(folder: Path) -> bool:
    """Whether the environment is complete, was made from these very inputs, and its Python still starts."""
    try:
        made_from = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return False
    return made_from == fingerprint() and starts(environment_python(folder))


def starts(python: Path) -> bool:
    """Whether this interpreter exists, runs, is not too old and has pip."""
    code = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def pinned_torch() -> str:
    """The line of constraints.txt that names torch, for example `torch==2.13.0`."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.split(";")[0].strip()
    raise SetupError("constraints.txt names no torch==VERSION. Restore it from version control.")


def install_commands(python: Path) -> list[tuple[str, list[str]]]:
    """What is installed, as (text, command).

    torch comes first and alone: pip then takes the build that its settings point to, before another package can ask
    for a different one. The package is linked in setuptools' compat mode, a plain path entry: the default editable
    mode lets a trainer's own `networks` folder win.
    """
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    package = ["-c", str(ROOT / "constraints.txt"), "--config-settings", "editable_mode=compat", "-e"]
    return [
        (f"installing {pinned_torch()} (the largest part)", [*pip, pinned_torch()]),
        (
            "installing the package and its extras at the versions of constraints.txt",
            [*pip, *package, f"{ROOT}[train,test]"],
        ),
    ]


def make_environment(folder: Path) -> None:
    """Create the virtual environment. Raises SetupError when something else is there or venv is missing."""
    python = environment_python(folder)
    if starts(python):
        return
    if folder.exists() and not folder.is_dir():
        raise SetupError(f"{folder} is a file. Move it away, or set KOHYA_NETWORKS_VENV to another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise SetupError(
            f"{folder} exists and is not a virtual environment. Move it away, or set KOHYA_NETWORKS_VENV otherwise."
        )
    say(f"making a virtual environment in {folder}")
    result = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode or not starts(python):
        output = result.stdout + result.stderr
        if "ensurepip" in output or "No module named" in output:
            hint = "This Python lacks its venv module. On Debian and Ubuntu: apt install python3-venv. Then try again."
        else:
            hint = remedy(output)
        raise SetupError(f"python -m venv {folder} failed.\n{output.strip()}\n{hint}".rstrip())


def remedy(output: str) -> str:
    """What to do about a failed command, or an empty string when its output tells nothing."""
    lower = output.lower()
    return next((text for signs, text in REMEDIES if any(sign in lower for sign in signs)), "")


def run_logged(command: list[str], log: Path) -> None:
    """Run a command; its output goes to a log file, its last line to the terminal. Raises SetupError when it fails."""
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )

        def read() -> None:
            for line in process.stdout or ():
                file.write(line)
                if line.strip():
                    lines.append(line.strip())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            show_progress(reader, lines)
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            reader.join()
            code = process.wait()
    if code:
        tail = "\n".join(lines[-12:])
        hint = remedy("\n".join(lines[-60:]))
        raise SetupError(
            f"this failed (exit {code}): {' '.join(command)}\n{tail}\n{hint}\nThe whole output is in {log}"
        )


def show_progress(reader: threading.Thread, lines: list[str]) -> None:
    """Until the reader ends: on a terminal the last line and the seconds so far, elsewhere a line every minute."""
    start, live = time.monotonic(), sys.stdout.isatty()
    shown = start
    while reader.is_alive():
        reader.join(0.5)
        now = time.monotonic()
        last = lines[-1] if lines else ""
        if live:
            width = max(40, shutil.get_terminal_size().columns) - 1
            print("\r" + f"  {now - start:4.0f} s  {last}"[:width].ljust(width), end="", flush=True)
        elif now - shown > 60:
            shown = now
            say(f"  {now - start:4.0f} s  {last}")
    print("\r" * live + f"  done in {time.monotonic() - start:.0f} s".ljust(100 * live), flush=True)


def say(text: str) -> None:
    """Print at once, so that the order beside the child processes' output is right."""
    print(text, flush=True)


def prepare(folder: Path) -> Path:
    """Make the environment ready and return its interpreter. A finished one is reused without any install."""
    python = environment_python(folder)
    if is_current(folder):
        say(f"using the environment in {folder}")
        return python
    make_environment(folder)
    (folder / MARKER).unlink(missing_ok=True)
    log = folder / "install.log"
    for text, command in install_commands(python):
        say(text)
        run_logged(command, log)
    temporary = folder / f"{MARKER}.part"
    temporary.write_text(json.dumps({"fingerprint": fingerprint()}), encoding="utf-8")
    os.replace(temporary, folder / MARKER)
    return python


def child_environment(command: str) -> dict[str, str]:
    """Environment variables of the command: this checkout's package first on the path, UTF-8 everywhere."""
    variables = dict(os.environ)
    rest = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([rest] if rest else [])])
    variables["PYTHONUTF8"] = "1"
    # Threads that spin while they wait stop each other as soon as anything else wants a core: steps of 0.3 s took 25 s.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if command != "demo":  # the tests' models are tiny, and several processes run them
        variables.setdefault("OMP_NUM_THREADS", "1")
    return variables


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code, or 2 for a mistake or a failed set-up."""
    if argv[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        problem = f"unknown command {argv[0]}" if argv else "no command"
        print(f"error: {problem}\n\n{usage()}", file=sys.stderr)
        return 2
    command, extra = argv[0], argv[1:]
    try:
        if sys.version_info < OLDEST:
            raise SetupError(
                f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed. Start it with that one."
            )
        if sys.version_info < OLDEST_OF_TESTS and command != "demo":
            raise SetupError(
                f"{command} needs Python 3.11 or newer, since there is no current diffusers for "
                f"{sys.version.split()[0]}; the package and the demo run on it."
            )
        python = prepare(environment_folder())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. {remedy(str(error))}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    call = [str(python), *COMMANDS[command][1], *extra]
    say(f"running {' '.join(call)}")
    return wait_for(subprocess.Popen(call, cwd=ROOT, env=child_environment(command)))


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a command, which ends in its own way when this program is asked to end."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # these reach us alone; those that are ignored (nohup) stay so
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, frame: process.send_signal(number))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # it got that, too
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
