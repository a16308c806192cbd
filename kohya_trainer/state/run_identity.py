"""Which run made a file: a run writes over its own files, and over another's only when it is told to."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from networks.foreign.texts import read_json

from ..data.caption_folder import CaptionedImage
from ..training_data import seed_of
from .state_files import SERIES, STATE_FILE

KEY = "networks_run"  # in the metadata of a file
# options that decide how a run goes about it and what it tells, not what it learns
NEUTRAL = frozenset(
    "output_dir output_name overwrite resume config_file debug logging_dir training_comment save_precision save_state "
    "save_every_n_steps sample_prompts sample_every_n_steps sample_at_first validation_data_dir validate_every_n_steps "
    "max_data_loader_n_workers persistent_data_loader_workers pin_memory offload_encoders cache_latents "
    "cache_latents_to_disk cache_text_encoder_outputs_to_disk".split()
)
FILES = frozenset(  # known by their names
    "pretrained_model_name_or_path train_data_dir network_weights base_weights prior_data_dir".split()
)
LATER = frozenset(("prior_data_dir", "prior_prompt", "prior_loss_weight"))  # not given, as if there were none


def identity(args: argparse.Namespace, images: Sequence[CaptionedImage], processes: int) -> str:
    """Of a run, the same for the same command anywhere. The seed must be known."""
    values = {name: value for name, value in vars(args).items() if name not in NEUTRAL}
    values = {name: value for name, value in values.items() if name not in LATER or value is not None}
    for name in FILES & values.keys():
        given = values[name]
        values[name] = [Path(path).name for path in ([given] if isinstance(given, str) else given or ())]
    rows = [(image.path.name, image.path.stat().st_size, image.caption) for image in images]
    return f"{seed_of(sorted(values.items()), rows, processes):016x}"


def check_outputs(args: argparse.Namespace, run: str) -> None:
    """Raise ValueError when --output_dir holds files of this name from another run, unless --overwrite."""
    for path, owner in () if args.overwrite else outputs(Path(args.output_dir), args.output_name):
        if owner != run and not (not owner and _beside(path, args)):
            raise ValueError(
                f"--output_name {args.output_name}: {path} is there already, from another run. Choose another name, "
                "--resume that run from its state, or write over it with --overwrite."
            )


def outputs(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """What runs of a name have saved: each file and state, and which run made it; "" = unknown."""
    saved = re.compile(rf"{re.escape(name)}{SERIES}(?:\.safetensors|-state)")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if saved.fullmatch(path.name) and path.is_file():
            yield path, _of_file(path)
        elif saved.fullmatch(path.name) and (path / STATE_FILE).is_file():  # else it has become no state
            yield path, _of_state(path)


def _beside(path: Path, args: argparse.Namespace) -> bool:
    """Whether this run goes on with a state of that series, from a version which did not write whose it is."""
    if not args.resume:
        return False
    folder = Path(args.resume).resolve()
    series = re.fullmatch(rf"{re.escape(args.output_name)}{SERIES}-state", folder.name)
    return bool(series) and folder.parent == path.resolve().parent


def _of_file(path: Path) -> str:
    from networks.files.reader import read_header

    try:
        return read_header(path).metadata.get(KEY, "")
    except ValueError:
        return ""


def _of_state(folder: Path) -> str:
    try:
        return str(read_json(folder / STATE_FILE).get("run", ""))
    except (ValueError, AttributeError):
        return ""
