"""What a trainer's own command line, or its --config_file, says of the network: read as the trainer reads it.

The shell's part is done by `shell_text`. Options which are the trainer's own affair are counted and left alone.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..args.parse import Problems
from ..args.table import BY_NAME
from ..hosts.trainer_scripts import MUSUBI, SCRIPTS, SD_SCRIPTS, WHOLE_MODEL, Script
from .command_line import nearest, read_toml
from .shell_text import Command, commands, shell_of

ONE, MANY, SWITCH = "a single value", "values", "no value"
# Options that make a network: how many values each takes.
NETWORK = {
    "network_module": ONE, "network_dim": ONE, "network_alpha": ONE, "network_dropout": ONE, "network_args": MANY,
    "network_weights": ONE, "dim_from_weights": SWITCH, "scale_weight_norms": ONE, "base_weights": MANY,
    "base_weights_multiplier": MANY, "learning_rate": ONE, "config_file": ONE,
}  # fmt: skip
SD_SCRIPTS_ALONE = {
    "unet_lr": ONE, "text_encoder_lr": MANY, "network_train_unet_only": SWITCH,
    "network_train_text_encoder_only": SWITCH,
}  # fmt: skip
_UNET_ALONE = {name: kind for name, kind in SD_SCRIPTS_ALONE.items() if name != "text_encoder_lr"}
# Options of the trainers' own which a network has something to say to.
BESIDE = {"optimizer_type": ONE, "full_bf16": SWITCH, "full_fp16": SWITCH, "dit_high_noise": ONE, "turbo_dit": ONE}
# Options of the trainers' own whose names are like those.
NAMESAKES = re.compile(
    r"(fp8_)?text_encoder(\d|_clip|_cpu|_dtype|_qwen)?|network_weights_(ema|proj)|controlnet_model_.*"
)
LIKE = 0.75  # how near a name must be to one of those, of 1, to be meant as it
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]|%[A-Za-z_]\w*%")
_DASHES = "–—−‐‑"  # what a page makes of hyphens
OURS = Script(SD_SCRIPTS, "")  # the trainer beside this package; its models are folders


@dataclass
class TrainerRun:
    """A run that a user means to start.

    Attributes:
        name: of the script, or of the file with its settings.
        host: the trainer.
        script: what is known of it; None = that does not say which it is.
        given: option -> value; a list for options that take several, True for switches.
        words: network argument -> its text.
        others: how many options are none of ours.
        notes: what to say of it, one sentence each.
    """

    name: str
    host: str
    script: Script | None = None
    given: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    others: int = 0
    notes: list[str] = field(default_factory=list)


def run_of_words(words: Sequence[str], problems: Problems) -> TrainerRun:
    """Of a command line that a shell has divided.

    Raises:
        ValueError: it starts no script that trains a network.
    """
    name, script, rest = _started(words)
    run = TrainerRun(name, script.host, script)
    options, known = _options(rest, problems), _known(script)
    taken = _taken(options, known, run, problems)
    if "config_file" in taken:
        path = _with_suffix(str(taken["config_file"]))
        _settings(path, run, problems)
        run.notes.append(f"the settings of {path} count, except for what the command line says itself")
    run.given |= taken
    _finish(run, problems)
    return run


def run_of_text(text: str, problems: Problems, file_name: str = "") -> TrainerRun:
    """Of a text that is written for a shell, one line or a whole script.

    Args:
        file_name: where it stands; "" = it was typed.

    Raises:
        ValueError: none or several of its commands start a script that trains a network, or a quotation stays open.
    """
    shell = shell_of(text, file_name, os.name == "nt")
    found, broken = _joined(commands(text, shell, os.environ))
    starting = [command for command in found if _script_in(command.words)]
    where = file_name or "this line"
    if len(starting) > 1:
        lines = ", ".join(str(command.line) for command in starting)
        raise ValueError(f"{where} starts {len(starting)} trainings, in lines {lines}: give one of them, behind --")
    command = starting[0] if starting else _likeliest(found, where)
    run = run_of_words(command.words, problems)
    if broken:
        told = f"line {broken[0]} begins with an option: for {shell.name} the line before it must end in {shell.sign}"
        problems.add(told) if file_name else run.notes.append(told)
    for name, value in _unset(run.given):
        problems.add(f"--{name} has {value}, a variable which {where} does not set: write its value ({shell.name})")
    return run


def _unset(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(option, its value) where a variable of a shell is left."""
    items = ((name, item) for name, value in given.items() for item in (value if isinstance(value, list) else [value]))
    return [(name, item) for name, item in items if isinstance(item, str) and _VARIABLE.search(item)]


def _joined(found: Iterable[Command]) -> tuple[list[Command], list[int]]:
    """Commands, those that begin with an option put behind the one before; and the numbers of their lines."""
    whole: list[Command] = []
    broken = []
    for command in found:
        if whole and command.words[0].startswith("--"):
            whole[-1].words += command.words
            broken.append(command.line)
        else:
            whole.append(command)
    return whole, broken


def run_of_settings(path: str, script: str, host: str, problems: Problems) -> TrainerRun:
    """Of a trainer's --config_file.

    Args:
        script: the script which it is for; "" = not known.
        host: the trainer, where no script says it; "" = not known either.

    Raises:
        ValueError: the file is not there, or is no TOML.
    """
    path = _with_suffix(path)
    run = TrainerRun(script or path, host, SCRIPTS.get(script))
    _settings(path, run, problems)
    run.host = run.script.host if run.script else host or (MUSUBI if "dit" in run.given else SD_SCRIPTS)
    _finish(run, problems)
    return run


# -- which script


def _likeliest(found: Sequence[Command], where: str) -> Command:
    """The longest command, for the reason why it is none."""
    if not found:
        raise ValueError(f"{where} holds no command")
    return max(found, key=lambda command: len(command.words))


def _base(word: str) -> str:
    return re.split(r"[\\/]", word)[-1]


def _programs(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(position, file name) of all words that may be a Python program, also behind -m."""
    for position, word in enumerate(words):
        if position and words[position - 1] == "-m":
            yield position, f"{word.rpartition('.')[2]}.py"
        elif word.endswith(".py"):
            yield position, _base(word)


def _script_in(words: Sequence[str]) -> int | None:
    """The position of the script that trains a network; None without one."""
    own = next((i for i, pair in enumerate(pairwise(words)) if _is_ours(*pair)), None)
    if own is not None:
        return own + 1
    return next((position for position, name in _programs(words) if name in SCRIPTS), None)


def _is_ours(program: str, command: str) -> bool:
    names = ("kohya-networks", "kohya-networks.exe", "kohya_networks.cli", "networks.cli")
    own = re.fullmatch(r"(.*[\\/])?scripts[\\/]train_network\.py", command)
    return (
        (_base(program) in names and command == "train")
        or (program == "-m" and command == "kohya_trainer.train")
        or bool(own)
    )


def _started(words: Sequence[str]) -> tuple[str, Script, Sequence[str]]:
    """(name of the script, what is known of it, what stands behind it).

    Raises:
        ValueError: there is none that trains a network.
    """
    position = _script_in(words)
    if position is not None:
        name = next((name for place, name in _programs(words) if place == position), "")
        ours = position and _is_ours(words[position - 1], words[position])
        return (
            ("kohya-networks train", OURS, words[position + 1 :])
            if ours
            else (name, SCRIPTS[name], words[position + 1 :])
        )
    programs = [name for _, name in _programs(words)]
    if not programs:
        raise ValueError(f"no script of a trainer is started here ({' '.join(words[:4])} ...). {_scripts()}")
    whole = next((name for name in programs if name in WHOLE_MODEL), None)
    if whole:
        raise ValueError(f"{whole} trains the model itself and takes no network. {_scripts()}")
    hint = nearest(programs[-1], SCRIPTS) or f" {_scripts()}"
    raise ValueError(f"{programs[-1]} is no script that trains a network.{hint}")


def _scripts() -> str:
    return f"The scripts that train one are {', '.join(SCRIPTS)}"


def _known(script: Script) -> dict[str, str]:
    """Options that count for a script's network -> how many values each takes."""
    own = {} if script.host != SD_SCRIPTS else _UNET_ALONE if script.unet_only else SD_SCRIPTS_ALONE
    chosen = {name: SWITCH if "" in values else ONE for name, values in script.choices.items()}
    handed = {name: ONE if valued else SWITCH for name, valued in script.network_args.items()}
    return {**NETWORK, **own, **BESIDE, script.checkpoint: ONE, **chosen, **handed}


# -- the options of a line


@dataclass(frozen=True)
class _Option:
    """As it was written.

    Attributes:
        name: without dashes.
        values: behind it.
        joined: whether its value stands behind `=`, which takes that one alone.
    """

    name: str
    values: list[str]
    joined: bool = False


def _options(words: Sequence[str], problems: Problems) -> list[_Option]:
    found: list[_Option] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append(_Option(name, [value] if equals else [], bool(equals)))
        elif word[0:1] and word[0] in _DASHES:
            name, equals, value = word.lstrip(_DASHES + "-").partition("=")
            problems.add(f"{word} begins with a dash of print, which is no hyphen: write --{name}{equals}{value}")
            found.append(_Option(name, [value] if equals else [], bool(equals)))
        elif word in ("\\", "`", "^"):
            problems.add(f"{word} is where a line goes on in another shell: here it is one more word. Write one line")
        elif found:
            found[-1].values.append(word)
        else:
            problems.add(f"{word} stands before the first option, and the script takes nothing there: remove it")
    return found


def _taken(options: Sequence[_Option], known: Mapping[str, str], run: TrainerRun, problems: Problems) -> dict[str, Any]:
    """The options of ours, by name."""
    taken: dict[str, Any] = {}
    for option in options:
        name = _meant(option.name, known, run, problems)
        if name is None:
            continue
        if name in taken and known[name] is MANY:
            problems.add(
                f"--{name} stands there twice, and the trainer takes the last alone: put all values behind one"
            )
        taken[name] = _value(name, known[name], option, problems)
    return taken


def _meant(written: str, known: Mapping[str, str], run: TrainerRun, problems: Problems) -> str | None:
    """The option of ours that a name on the command line stands for; the trainers take unique beginnings, too."""
    if written in known:
        return written
    longer = [name for name in known if name.startswith(written)]
    if len(longer) == 1 and written.startswith("network"):
        run.notes.append(f"--{written} is taken as --{longer[0]}, as by the trainer")
        return longer[0]
    problem = _misspelt(written, known, run, lambda name: f"--{name}")
    if problem:
        problems.add(problem)
    else:
        run.others += 1
    return None


def _misspelt(written: str, known: Iterable[str], run: TrainerRun, shown: Callable[[str], str]) -> str:
    """What is wrong with the name of an option which may be one of ours; "" if it is the trainer's own affair.

    Args:
        shown: how names of options are written there.
    """
    name = written.replace("-", "_")
    if name in known:
        return f"{shown(written)} is not known to the trainer: write {shown(name)}"
    if run.script is not None and name in SD_SCRIPTS_ALONE:
        return f"{run.name} has no {shown(name)}, which is an option of {SD_SCRIPTS}: remove it"
    if name in BY_NAME:
        return (
            f"{shown(written)} is no option but a network argument: write it into {shown('network_args')}, {name}=VALUE"
        )
    if NAMESAKES.fullmatch(name):
        return ""
    own = [one for one in known if one in NETWORK or one in SD_SCRIPTS_ALONE]
    near = difflib.get_close_matches(name, own, n=1, cutoff=LIKE)
    if near:
        return f"no option is called {shown(written)}; did you mean {shown(near[0])}?"
    return (
        f"no option is called {shown(written)}; there are {', '.join(map(shown, NETWORK))}" if _is_network(name) else ""
    )


def _is_network(name: str) -> bool:
    return name.startswith("network_")


def _value(name: str, kind: str, option: _Option, problems: Problems) -> Any:
    values = option.values
    if option.joined and len(values) > 1:
        problems.add(f"--{name}={values[0]} takes that one value: write --{name} {' '.join(values)}, without the =")
    elif kind is SWITCH and values:
        problems.add(f"--{name} takes no value: remove {' '.join(values)}")
    elif kind is ONE and len(values) != 1:
        problems.add(f"--{name} takes a single value" + (f", not {' '.join(values)}" if values else ": give one"))
    if kind is MANY:
        return values
    return True if kind is SWITCH else values[0] if values else None


# -- the settings of a file


def _with_suffix(path: str) -> str:
    return path if path.endswith(".toml") else f"{path}.toml"  # as both trainers do


def _settings(path: str, run: TrainerRun, problems: Problems) -> None:
    """Take over a trainer's configuration file: sections are for the reader, keys that the trainer does not know are
    passed over by it without a word."""
    flat: dict[str, Any] = {}
    for key, value in read_toml(Path(path)).items():
        flat.update(value if isinstance(value, dict) else {key: value})
    scripts = [run.script] if run.script else [OURS, *SCRIPTS.values()]
    known = {name: kind for script in scripts for name, kind in _known(script).items()}
    for key, value in flat.items():
        if key in known:
            run.given[key] = _setting(key, known[key], value, f"{path}: ", problems)
            continue
        problem = _misspelt(key, known, run, str)
        run.others += not problem
        if problem:
            problems.add(f"{path}: {problem}")


def _setting(name: str, kind: str, value: Any, where: str, problems: Problems) -> Any:
    """A TOML value, as the trainer takes it over."""
    several = isinstance(value, list) or (name == "text_encoder_lr" and isinstance(value, (int, float)))
    fits = {MANY: several, SWITCH: isinstance(value, bool), ONE: not isinstance(value, (list, dict))}
    if not fits[kind]:
        wanted = {MANY: 'a list: ["NAME=VALUE", ...]', SWITCH: "true or false", ONE: "a single value"}[kind]
        problems.add(f"{where}{name} = {value!r} is not {wanted}")
    return value if fits[kind] else None


# -- what follows from them


def is_given(value: Any) -> bool:
    """Whether an option counts as given; a learning rate of 0 does."""
    return value is not None and value is not False and value != ""


def _finish(run: TrainerRun, problems: Problems) -> None:
    """Checks that need all options; the network arguments by name."""
    given = run.given = {name: value for name, value in run.given.items() if is_given(value)}
    _of_script(run, problems)
    if not given.get("network_module"):
        problems.add("--network_module is missing, without which the trainer makes no network: networks.lora is one")
    if given.get("dim_from_weights") and not given.get("network_weights"):
        problems.add("--dim_from_weights is given without --network_weights, the file that decides: give both")
    if given.get("dim_from_weights") and run.host == MUSUBI:
        problems.add(
            "--dim_from_weights does not work in musubi-tuner, which opens the switch as if it were the file: leave it "
            "out, and give --network_dim as `kohya-networks show FILE --as_args` says it"
        )
    if given.get("network_train_unet_only") and given.get("network_train_text_encoder_only"):
        problems.add("--network_train_unet_only and --network_train_text_encoder_only leave nothing: give one of them")
    run.words = _network_args(given.get("network_args", []), run.host, problems)
    handed = run.script.network_args if run.script else ()
    run.words = {name: str(given[name]) for name in handed if name in given} | run.words


def _of_script(run: TrainerRun, problems: Problems) -> None:
    """What a script does without being asked."""
    given, script = run.given, run.script
    if script is None:
        return
    if script.module and not given.get("network_module"):
        given["network_module"] = script.module
        run.notes.append(f"{run.name} has a network module of its own, {script.module}, where none is named")
    if script.alone and given["network_module"] != script.module:
        problems.add(
            f"{run.name} takes no other --network_module than {script.module}: write that, and start it with "
            "kohya-networks launch, where it is ours"
        )
    if script.unet_only:
        if given.pop("network_train_text_encoder_only", False):
            problems.add(f"{run.name} trains no text encoder: remove --network_train_text_encoder_only")
        given["network_train_unet_only"] = True


def _network_args(items: Sequence[Any], host: str, problems: Problems) -> dict[str, str]:
    """NAME=VALUE of each; the trainers take the last of two alike without a word."""
    found: dict[str, str] = {}
    for item in map(str, items):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name:
            problems.add(f'network_args: "{item}" is not of the form NAME=VALUE, without blanks around the =')
        elif host == MUSUBI and "=" in value:
            problems.add(
                f"network_args: {item} has a second =, at which musubi-tuner stops: write {{'regex': value}} for such "
                "pairs, FILE:0.5 for files, or @file.toml"
            )
        elif found.setdefault(name, value) != value:
            problems.add(f"network_args: {name} is given twice, and the trainer takes the last: remove one")
    return found
