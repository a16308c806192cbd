"""What every command-line program of ours shares: nearest names, network arguments, TOML files, clean errors.

Nothing heavy is imported here, so a program that only reports a misspelt option starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from .._errors import ITEM
from ..args.coerce import finite
from ..args.coerce import nearest as nearest_name
from ..args.coerce import read_toml as parse_toml
from ..files.outputs import check_outputs as check_outputs
from ..files.outputs import write_atomically as write_atomically
from ..foreign.texts import is_file, printable, read_text
from .terminal import fitted, folded

USER_ERROR = 2  # exit code of every mistake that the user can mend
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
CUT_OFF = 141  # 128 + SIGPIPE


class FittedHelp(argparse.RawDescriptionHelpFormatter):
    """Help whose description keeps its commands and fits the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(fitted(text), width, indent)


class OnOff(argparse.Action):
    """A switch that is on or off by default: `--name` and `--no_name`; in a config file, true and false."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = None, help: str = "") -> None:
        names = [option_strings[0].replace("--", "--no_", 1), option_strings[0]]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[-1])


class AlsoAlone(argparse.Action):
    """A switch that can be given alone, or with a value behind `=`, several times: a list, "" for alone."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values])


def add_allow_missing(parser: argparse.ArgumentParser) -> None:
    """The leave to go on with a file of which much has no place: for all of it, or for some parts."""
    parser.add_argument(
        "--allow_missing", action=AlsoAlone, metavar="PART",
        help="go on although a whole part, a whole kind of layers or more than a tenth of a file's layers have no "
        "place; with a part (lora_te2) for that part alone, may be repeated",
    )  # fmt: skip


def program(description: str | None) -> argparse.ArgumentParser:
    """The parser of a program whose module is described so; with --debug, see `run_program`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=FittedHelp)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def finite_number(text: str) -> float:
    """The `type` of every option that takes a number: neither NaN nor infinite."""
    try:
        return finite(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The switch of every program that may find its output there already, see `check_outputs`."""
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists; never an input")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the known name closest to `name`, or an empty string."""
    return nearest_name(name, known, " Did you mean {}?")


def parse_network_args(items: Sequence[str] | None, option: str = "--network_args") -> dict[str, str]:
    """Split `key=value` items at their first `=`; both sides stay raw strings, later duplicates win.

    Raises ValueError for an item without `=`.
    """
    result: dict[str, str] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f'{option} "{item}" is not of the form key=value. Write it as "{item}=VALUE" or remove it.'
            )
        if key.strip() in result:
            raise ValueError(f"{option} has {key.strip()} twice. Remove one.")
        result[key.strip()] = value.strip()
    return result


def import_network_module(name: str) -> ModuleType:
    """Import the module that `--network_module` names.

    Raises ValueError when there is none of that name, with the nearest one of the same package.
    """
    if name.startswith("."):
        raise ValueError(f"--network_module {name} begins with a dot. Write the whole name, for example networks.lora.")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module exists; something that it needs does not
    else:
        if not hasattr(module, "create_network"):
            raise ValueError(
                f"--network_module {name} is no network module: it has no create_network. Try networks.lora."
            )
        return module
    parent = name.rpartition(".")[0] or "networks"
    try:
        package = importlib.import_module(parent)
    except ModuleNotFoundError:
        known = []
    else:
        known = [
            f"{parent}.{item.name}" for item in pkgutil.iter_modules(getattr(package, "__path__", [])) if not item.ispkg
        ]
    raise ValueError(
        f"--network_module {name}: no module of this name.{nearest(name, known)} "
        "It is the import name of a Python module, for example networks.lora."
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError when it is missing or is not TOML."""
    if not is_file(path):
        raise ValueError(f"--config_file {path}: there is no such file. Check the path.")
    text = read_text(path)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ValueError(f"--config_file {path} is not valid TOML: {error}. Mend that line.") from error


def config_arguments(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Turn a TOML file into command-line arguments, so that both are checked by the same parser.

    All sections are flattened: their names are for the reader only. `true` sets a flag, `false` leaves it unset.
    Raises ValueError for a key that is no option, naming the nearest one.
    """
    flat: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        flat.update(value if isinstance(value, dict) else {key: value})
    options = {action.dest: action for action in parser._actions if action.option_strings}
    arguments: list[str] = []
    for key, value in flat.items():
        if key not in options or key in ("help", "config_file"):
            raise ValueError(f'--config_file {path}: unknown key "{key}".{nearest(key, options)} Rename or remove it.')
        try:
            arguments += _as_written(options[key], value)
        except ValueError as error:
            raise ValueError(f"--config_file {path}: {key} {error}") from None
    return arguments


def _as_written(action: argparse.Action, value: Any) -> list[str]:
    """A TOML value as it stands on a command line.

    Raises:
        ValueError: the option takes another kind of value.
    """
    option = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"takes true or false, not {value!r}.")
        return [option] if value else [action.option_strings[0]] if isinstance(action, OnOff) else []
    several = action.nargs is not None
    if isinstance(value, (bool, dict)) or (isinstance(value, list) and not several):
        raise ValueError(f"takes a single value, not {value!r}.")
    if not several:
        return [f"{option}={value}"]
    return [option, *map(str, value if isinstance(value, list) else [value])]


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}. --help lists all options.")


def _with_underscores(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Options that were written with hyphens, as we write them."""
    known = {name: action for action in parser._actions for name in action.option_strings}
    found = []
    for item in argv:
        name, equals, value = item.partition("=")
        spelled = "--" + name[2:].replace("-", "_")
        action = known.get(spelled) if name.startswith("--") else None
        equals = "=" if isinstance(action, AlsoAlone) else equals
        found.append(f"{spelled}{equals}{value}" if action is not None else item)
    return found


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, preceded by what its `--config_file` holds. Raises ValueError for an unknown option."""
    setattr(parser, "error", _refuse)  # noqa: B010 - argparse's own prints the whole usage and leaves
    argv = _with_underscores(parser, argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [name for action in parser._actions for name in action.option_strings]
        name = unknown[0].partition("=")[0]
        raise ValueError(f"unknown option or value {name}.{nearest(name, options)} --help lists all options.")
    if getattr(args, "config_file", None):
        return parser.parse_args([*config_arguments(parser, Path(args.config_file)), *argv])
    return args


def check_weights_file(path: str, option: str) -> None:
    """Raise ValueError when `path` is no complete .safetensors file; only its header is read."""
    from ..files.reader import read_header

    try:
        read_header(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def check_output_folder(folder: Path, option: str = "--output_dir") -> None:
    """Create `folder` and prove that a file can be written there. Raises ValueError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{option} {folder}: cannot write there ({reason}). Choose another folder.") from error


def told_time(seconds: float) -> str:
    """`3.2 s`, `48 s`, `2 min 5 s`, `1 h 4 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def say(text: str, error: bool = False) -> None:
    """Print one line, of which a part may be text of a file; on a terminal in as many as it needs there."""
    stream, line = sys.stderr if error else sys.stdout, printable(text, 0)
    print("\n".join(folded(line)) if stream.isatty() else line, file=stream)


class _Log(logging.Formatter):
    """Lines as they are, with escapes for what a terminal obeys."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line, 0) for line in super().formatMessage(record).split("\n"))


def _prepare_output() -> None:
    """The log goes to stderr, and characters that a terminal lacks (code pages of Windows) do not end a program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Log("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class Terminated(KeyboardInterrupt):
    """The system or another program asks this one to end: what Ctrl-C cleans up is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


# which end a process at once unless it looks after them; SIGHUP: its terminal is closed, SIGBREAK: both under Windows
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise Terminated where a signal would end the process at once. What others look after, they go on to."""
    former: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        for each in former:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break off the clean-up
        raise Terminated(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDINGS:
                if signal.getsignal(number) == signal.SIG_DFL:
                    former[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def run_program(body: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Parse `argv` and run `body`; a user's mistake becomes one line on stderr and exit code 2, a signal that ends the
    process one line and 128 + its number, after the clean-up.

    `--debug` (every program of ours has it) shows the traceback instead.
    """
    _prepare_output()
    set_log_level(logging.INFO)
    try:
        with ending_cleanly():
            return body(parse_arguments(parser, argv))
    except Terminated as stop:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"ended by {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        for line in f"error: {error_text(error)}".splitlines():
            say(line, error=True)
        return USER_ERROR


class Stages:
    """Says on a terminal, from the first moment, which of its stages a command is in; nothing is left of it at the end,
    and where stderr is no terminal nothing is said.

    Args:
        names: of the stages; inside a `with` the first begins, `next` goes on to the one after.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.at, self.shown = names, 0, sys.stderr.isatty()

    def __enter__(self) -> Stages:
        self._show()
        return self

    def __next__(self) -> None:
        self.at += 1
        self._show()

    def __exit__(self, *error: object) -> None:
        self._write("")

    def _show(self) -> None:
        self._write(f"[{'#' * self.at}{'.' * (len(self.names) - self.at)}] {self.names[self.at]} ...")

    def _write(self, text: str) -> None:
        if self.shown:
            print(f"\r{text:40}\r{text}", end="", file=sys.stderr, flush=True)


def set_log_level(level: int) -> None:
    """Of all our modules; each logs under the name by which it was imported first."""
    for name in ("networks", "kohya_networks"):
        logging.getLogger(name).setLevel(level)


def error_text(error: Exception) -> str:
    """An error for people: without the system's number, and with what to do about a full disk or a missing library."""
    if isinstance(error, ModuleNotFoundError):
        return f'{error}. Install what the trainer needs: pip install "kohya-networks[train]"'
    if not isinstance(error, OSError) or not error.strerror:
        return ITEM.join(printable(part) for part in str(error).split(ITEM))
    where = f"{error.filename}: " if error.filename and str(error.filename) not in error.strerror else ""
    full = error.errno == errno.ENOSPC and "free" not in error.strerror
    return printable(f"{where}{error.strerror}{'. Free some space; no earlier file was touched.' if full else ''}")
