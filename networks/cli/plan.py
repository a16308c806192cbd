"""What would be trained: one row per layer of a model, before anything is loaded or paid for.

    kohya-networks plan sdxl --network_module networks.lokr --network_dim 8 --network_args factor=8 conv_dim=4
    kohya-networks plan wan --host musubi --network_module networks.lora_wan

MODEL is a released model by name (sdxl, flux, wan, ...; --help lists them), a diffusers folder, or a checkpoint, of
which only the header is read. No weights are needed.
With --why NAME (a dotted or saved name, a part of one, or a regular expression) it says for each such layer what every
rule of selection answers, and which argument gives its dim, alpha and learning rate.
The options are the trainer's; where the two trainers differ in their defaults, --host says whose are meant, and
musubi-tuner trains no text encoder. Rows that begin with a reason are left out.

Your own command line is checked and planned without starting the trainer:

    kohya-networks plan -- accelerate launch sdxl_train_network.py ... --network_module networks.lokr ...
    kohya-networks plan --command_file train.sh        (or .ps1, .bat: written for bash, PowerShell or cmd.exe)
    kohya-networks plan wan_train_network.py --config settings.toml

The script says which model it is; where its checkpoint is on this machine, the header of that. MODEL goes before both.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..args.coerce import coerce, named, nearest
from ..args.parse import Problems
from ..args.table import BY_NAME
from ..hosts.trainer_scripts import MUSUBI, SCRIPTS, SD_SCRIPTS, WHOLE_MODEL, Script
from ..models.releases import RELEASES, arch_of, others_of
from .args import STANDS_FOR, Module
from .command_line import (
    Stages,
    finite_number,
    import_network_module,
    parse_network_args,
    program,
    run_program,
    set_log_level,
)
from .terminal import columns_of_output, folded
from .trainer_line import TrainerRun, is_given, run_of_settings, run_of_text, run_of_words

if TYPE_CHECKING:
    from ..models.skeleton import Skeleton

HOSTS = {SD_SCRIPTS: "sd_scripts", MUSUBI: "musubi"}
_ONLY = ("network_train_unet_only", "network_train_text_encoder_only")


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"{', '.join(RELEASES)}; a diffusers folder; a checkpoint"
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings as the trainers' --config_file takes them")
    parser.add_argument("--command_file", metavar="FILE", help="a script of yours that starts the trainer")
    parser.add_argument("--host", choices=HOSTS, help=f"the trainer; default: {SD_SCRIPTS}")
    parser.add_argument("--network_module", default="networks.lora", help="default: %(default)s")
    parser.add_argument("--network_dim", type=int, help="rank; the module's default is 4")
    parser.add_argument(
        "--network_alpha", type=finite_number, default=1.0, help="default: %(default)s, as in the trainers"
    )
    parser.add_argument("--network_dropout", type=finite_number)
    parser.add_argument("--network_args", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--network_train_unet_only", action="store_true")
    parser.add_argument("--network_train_text_encoder_only", action="store_true")
    parser.add_argument("--trained", action="store_true", help="leave out the rows of layers that are not trained")
    parser.add_argument("--why", metavar="NAME", help="explain these layers instead: every rule, every value")
    parser.add_argument(
        "--readers", action="store_true", help="also which programs will not read the files whole and exactly"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    own, words = _divided(sys.argv[1:] if argv is None else list(argv))
    parser = build_parser()
    parser.set_defaults(words=words)
    collects = gc.isenabled()
    gc.disable()  # looking for garbage while torch is imported would be a seventh of the time that a plan takes
    try:
        return run_program(show, parser, own)
    finally:
        if collects:
            gc.enable()


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the trainer's command line behind `--`."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def explained(layers: Sequence[Any], as_json: bool) -> str:
    """What --why prints of the answers of `Plan.why`."""
    return json.dumps([layer.to_json() for layer in layers], indent=1) if as_json else "\n\n".join(map(str, layers))


def show(args: argparse.Namespace) -> int:
    set_log_level(logging.WARNING)  # the plan says it all, and stdout may be JSON
    problems = Problems("plan")
    run = _run(args, problems)
    problems.where = run.name or str(run.given["network_module"])
    with Stages(("loading torch", "reading the model", "planning", "writing")) as stage:
        entry = _entry(run)
        next(stage)
        model = _model(args.model, run, problems)
        next(stage)
        plan = _rated(_planned(entry, model, run, problems), model, run, problems)
        if args.why is not None:
            text = _fitting(explained(plan.why(args.why), args.json).splitlines())
        else:
            next(stage)
            text = _printed(plan.only_trained() if args.trained else plan, model, run, args)
    print(text)
    return 0


def _printed(plan: Any, model: Skeleton, run: TrainerRun, args: argparse.Namespace) -> str:
    if args.json:
        return json.dumps(plan.to_json() | {"model": _named(model), "run": _as_json(run)}, indent=1)
    named = replace(plan, title=_title(plan.title, model))
    lines = [*run.notes, *named.to_text(columns_of_output()).splitlines()]
    lines += [f"warning: {text}" for text in plan.warnings] + (plan.readers() if args.readers else [])
    return _fitting(lines)


def _fitting(lines: Sequence[str]) -> str:
    """In as many lines as a terminal needs."""
    columns = columns_of_output()
    return "\n".join(piece for line in lines for piece in (folded(line, columns) if columns else [line]))


# -- what is asked


def _run(args: argparse.Namespace, problems: Problems) -> TrainerRun:
    """What the user means to start, by options of ours, a command line, or a file."""
    if args.model and not args.words and _is_line(args.model):
        args.model, args.words = None, [args.model]
    if sum((bool(args.words), args.command_file is not None, args.config is not None)) > 1:
        raise ValueError("a command line, --command_file and --config are three ways to say what is trained: give one")
    if args.words:
        one = len(args.words) == 1
        return run_of_text(args.words[0], problems) if one else run_of_words(args.words, problems)
    if args.command_file is not None:
        return run_of_text(_text_of(Path(args.command_file)), problems, args.command_file)
    if args.config is not None:
        return _with_script(run_of_settings(args.config, _script(args), args.host or "", problems))
    if args.model is None:
        known = ", ".join(RELEASES)
        raise ValueError(
            f"give MODEL ({known}, a diffusers folder or a checkpoint), or a trainer's command line behind --"
        )
    return _of_options(args)


def _is_line(text: str) -> bool:
    return " " in text.strip() and (".py" in text or " -m " in text) and not Path(text).exists()


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # PowerShell writes the mark
    except UnicodeDecodeError:
        raise ValueError(f"--command_file {path} is no text in UTF-8: save it as such") from None


def _script(args: argparse.Namespace) -> str:
    """The script that MODEL names beside --config; "" where it names a model or nothing."""
    name = (args.model or "").replace("\\", "/").rpartition("/")[2]
    if not name.endswith(".py"):
        return ""
    if name in WHOLE_MODEL:
        raise ValueError(f"{name} trains the model itself and takes no network; there are {', '.join(SCRIPTS)}")
    if name not in SCRIPTS:
        raise ValueError(
            f"{name} is no script that trains a network{nearest(name, SCRIPTS)}; there are {', '.join(SCRIPTS)}"
        )
    args.model = None
    return name


def _of_options(args: argparse.Namespace) -> TrainerRun:
    run = TrainerRun("", args.host or SD_SCRIPTS, words=parse_network_args(args.network_args))
    names = ("network_module", "network_dim", "network_alpha", "network_dropout", *_ONLY)
    run.given = {name: value for name in names if is_given(value := getattr(args, name))}
    return run


def _with_script(run: TrainerRun) -> TrainerRun:
    """Settings that name no script: the one which trains the models of their module."""
    if run.script is None:
        try:
            archs = Module.of(str(run.given["network_module"])).archs
        except (ValueError, KeyError):  # told later
            archs = ()
        own = (one for one in SCRIPTS.values() if one.host == run.host and one.release)
        run.script = next((one for one in own if arch_of(RELEASES[one.release]).name in archs), None)
    return run


# -- whose network, on which model


def _entry(run: TrainerRun) -> Any:
    """The entry of ours which the module is, or stands for.

    Raises:
        ValueError: there is no such module, or it is another package's.
    """
    name = str(run.given.get("network_module", "networks.lora"))
    ours = STANDS_FOR.get(name, name.removeprefix("musubi_tuner."))
    if name != ours:
        run.notes.append(f"--network_module {name} is another package's module; planned is {ours}, which stands for it")
    module = import_network_module(ours)
    entry = getattr(getattr(module, "plan", None), "__self__", None)
    if not hasattr(entry, "planned"):
        raise ValueError(
            f"--network_module {name} is another package's ({getattr(module, '__file__', None)}), and only ours can be "
            "planned: networks.lora, networks.lycoris; `kohya-networks args` has all"
        )
    return entry


def _model(asked: str | None, run: TrainerRun, problems: Problems) -> Skeleton:
    """The model without weights.

    Raises:
        ValueError: nothing says which it is, or what is said names none.
    """
    from ..models.skeleton import skeleton

    if asked is not None:
        return skeleton(asked)
    script = run.script or Script(run.host, "")
    option = script.checkpoint
    path = str(run.given.get(option, ""))
    if path and Path(path).exists() and (Path(path).is_dir() or path.endswith(".safetensors")):
        archs = dict.fromkeys(arch_of(RELEASES[name]) for name in script.releases)
        model = skeleton(path, [one.name for arch in archs for one in arch.releases])
        run.notes.append(f"{run.name}, {run.host}: the model is {model.title}")
        _check_model(model, run, problems)
        return model
    release = _release(script, run, problems)
    if not release:
        raise ValueError(
            f"{run.name}: what it trains is not known without the model ({option} {path or 'is not given'}); give a "
            "released one (kohya-networks plan --help lists them), a checkpoint or a diffusers folder as MODEL, or "
            "start the trainer with --network_args dry_run=True"
        )
    why = f"--{option} {path} is not on this machine" if path else f"no --{option} is given"
    run.notes.append(f"{run.name}, {run.host}: {why}, so this is planned for {RELEASES[release].title} ({release})")
    return skeleton(release)


def _release(script: Script, run: TrainerRun, problems: Problems) -> str:
    """The released model that a script trains with these options; "" = not known."""
    if script.needs and script.needs not in run.given:
        problems.add(f"--{script.needs} is missing, without which {run.name} does not start")
    for option, releases in script.choices.items():
        value = "" if run.given.get(option) is True else str(run.given.get(option, "-"))
        if value in releases:
            return releases[value]
        if value != "-":
            problems.add(f"--{option} {value} is none of {', '.join(releases)}{nearest(value, releases)}")
    return script.release


def _check_model(model: Skeleton, run: TrainerRun, problems: Problems) -> None:
    """The script must be the one for a model that was found."""
    from ..archs.detect import detect

    wanted = {arch_of(RELEASES[name]).name for name in (run.script.releases if run.script else ())}
    arch = detect(model.unet)
    if wanted and arch.name not in wanted:
        problems.add(f"{run.name} does not train {arch.title}, which {model.title} is: start the script for it")


# -- the plan


def _planned(entry: Any, model: Skeleton, run: TrainerRun, problems: Problems) -> Any:
    """Of the parts that the run trains.

    Raises:
        ValueError: all that is wrong with it.
    """
    from ..hosts.trainer_options import remarks

    given, encoders = run.given, model.text_encoders if run.host == SD_SCRIPTS else []
    if given.get("network_train_text_encoder_only") and not encoders:
        problems.add(f"--network_train_text_encoder_only: nothing is left, {run.host} trains no text encoder here")
    raw = {"neuron_dropout": given.get("network_dropout") or None, **run.words}
    if "scale_weight_norms" in given:
        _number("scale_weight_norms", given["scale_weight_norms"], problems)
    dim, alpha = given.get("network_dim"), given.get("network_alpha", 1.0)
    tensors, source = _deciding(run, problems), str(given.get("network_weights"))
    plan = entry.planned(HOSTS[run.host], dim, alpha, encoders, model.unet, raw, problems, tensors, source)
    _check_values(entry, model, run, plan, problems)
    keeps = str(run.words.get("adapter_dtype", "host")) != "host"
    plan = replace(plan, warnings=(*plan.warnings, *remarks(plan, argparse.Namespace(**given), keeps)))
    if given.get("network_train_unet_only"):
        plan = plan.keep([row.part for row in plan.rows if not row.part.startswith("text_encoder")])
    if given.get("network_train_text_encoder_only"):
        plan = plan.keep([row.part for row in plan.rows if row.part.startswith("text_encoder")])
    return plan


def _deciding(run: TrainerRun, problems: Problems) -> Mapping[str, Any] | None:
    """The file that decides dims, alphas and forms; None without one."""
    from ..files.adapter_file import FileTensors

    given = run.given
    for file in given.get("base_weights", []):
        run.notes.append(f"--base_weights {file} is merged into the model before, and changes nothing in the plan")
    file = given.get("network_weights")
    if file is None or not given.get("dim_from_weights"):
        return None
    try:
        return FileTensors(str(file))
    except (ValueError, OSError) as error:
        problems.add(f"--network_weights {error}")
        return None


def _check_values(entry: Any, model: Skeleton, run: TrainerRun, plan: Any, problems: Problems) -> None:
    """A file from whose values training goes on must have the shapes of the plan.

    Raises:
        ValueError: it has others, or is for another model.
    """
    from ..files.adapter_file import FileTensors

    file = str(run.given.get("network_weights") or "")
    if not file or run.given.get("dim_from_weights"):
        return
    if not Path(file).exists():
        run.notes.append(f"--network_weights {file} is not on this machine: not checked")
        return
    encoders = model.text_encoders if run.host == SD_SCRIPTS else []
    raw = {"allow_missing": run.words["allow_missing"]} if "allow_missing" in run.words else {}
    found = entry.planned(HOSTS[run.host], None, None, encoders, model.unet, raw, problems, FileTensors(file), file)
    theirs = {row.saved_name: row for row in found.trained}
    both = [(row, theirs[row.saved_name]) for row in plan.trained if row.saved_name in theirs]
    if other := [(row, one) for row, one in both if row.layout.shapes != one.layout.shapes]:
        _check_forms(other, file, run, problems)
    new = len(plan.trained) - len(both)
    run.notes.append(
        f"--network_weights {file}: training goes on from its values" + f", {new} layers start anew" * bool(new)
    )


def _check_forms(other: Sequence[tuple[Any, Any]], file: str, run: TrainerRun, problems: Problems) -> None:
    """Layers of a file may have other ranks than here if that is asked for, and no other form.

    Raises:
        ValueError: they have.
    """
    resizes = coerce(BY_NAME["resume_resize"], run.words.get("resume_resize", False))
    if resizes and all(row.algo == one.algo for row, one in other):
        run.notes.append(f"--network_weights {file}: {len(other)} layers get other ranks as they are loaded")
        return
    row, one = other[0]
    problems.add(
        f"--network_weights {file}: {len(other)} layers have another form in it, such as {row.saved_name}, {one.algo} "
        f"of dim {one.dim}, here {row.algo} of dim {row.dim}: write its options (kohya-networks show {file} "
        "--as_args), or --dim_from_weights; resume_resize=True gives a file of another dim these ranks"
    )
    problems.raise_if_any()


def _rated(plan: Any, model: Skeleton, run: TrainerRun, problems: Problems) -> Any:
    """The learning rate of each part, as far as the run gives them; a part with 0 is not trained.

    Raises:
        ValueError: one is no number, or nothing is left.
    """
    from ..archs.detect import detect
    from ..hosts.sd_scripts import part_rates

    given = {name: run.given.get(name) for name in ("text_encoder_lr", "unet_lr", "learning_rate")}
    if all(value is None for value in given.values()):
        return plan
    numbers = {
        name: [_number(name, one, problems) for one in value]
        if isinstance(value, list)
        else _number(name, value, problems)
        for name, value in given.items()
    }
    problems.raise_if_any()
    rates = part_rates(detect(model.unet), *numbers.values())  # type: ignore[arg-type]
    parts = list(dict.fromkeys(row.part for row in plan.trained))
    run.notes.append("learning rates: " + ", ".join(f"{part} {_rate(rates[part])}" for part in parts))
    left = [part for part in parts if rates[part] != 0]
    if not left:
        raise ValueError(f"{run.name}: nothing to train, every learning rate is 0; give --learning_rate")
    return plan.keep(left) if len(left) < len(parts) else plan


def _rate(rate: float | None) -> str:
    return "the trainer's default" if rate is None else f"{rate:g}" if rate else "0 (not trained)"


def _number(name: str, value: Any, problems: Problems) -> float | None:
    try:
        return None if value is None else named(f"--{name}", value, 0)
    except ValueError as error:
        problems.add(str(error))
        return None


# -- what is said of it


def _title(title: str, model: Skeleton) -> str:
    """With the release and size that is shown, and the other ones."""
    if model.release is None:
        return f"{title}: {model.title}"
    listed = ", ".join(f"{one.name} ({one.title})" for one in others_of(model.release))
    own = f"{title}: {model.title}" if model.title != title else title
    return f"{own} ({model.release.name})" + (f"; other sizes: {listed}" if listed else "")


def _named(model: Skeleton) -> dict[str, Any]:
    release = model.release
    others = {one.name: one.title for one in others_of(release)} if release else {}
    return {"title": model.title, "release": release.name if release else None, "others": others}


def _as_json(run: TrainerRun) -> dict[str, Any]:
    return {"script": run.name, "host": run.host, "options": run.given, "others": run.others, "notes": run.notes}
