"""Interrupting and resuming: accelerate saves weights, optimizer and schedule; a small file says where the run was.

The order of the data, the noise and the dropouts follow from seed and step, so that nothing else needs to be kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from .command_line import write_atomically
from .losses import DECIDES_LOSS
from .training_data import TrainingData, seed_of

STATE_FILE = "train_state.json"
# what decides a step; another value would be another run
SAME = (
    "seed train_batch_size gradient_accumulation_steps network_module network_dim network_alpha network_args "
    "optimizer_type optimizer_args lr_scheduler lr_warmup_steps mixed_precision"
).split() + [*DECIDES_LOSS]


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAME}


def _data(data: TrainingData) -> str:
    rows = zip(data.items, data.prompts, data.sizes, strict=True)
    return f"{seed_of([(item.path.name, prompt, size) for item, prompt, size in rows]):x}"


def read_state(args: argparse.Namespace) -> dict[str, Any]:
    """Before anything is loaded: take the seed of the run and compare its options. Raises ValueError."""
    folder = Path(args.resume)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        options, step = dict(state["options"]), int(state["current_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {folder}: {STATE_FILE} is missing or damaged. Give a NAME-...-state.") from error
    if args.seed is None:
        args.seed = options["seed"]
    for name, value in _run(args).items():
        if options.get(name) != value:
            raise ValueError(
                f"--resume {folder}: that run had --{name} {options.get(name)}, not {value}. Give the same."
            )
    if step >= args.max_train_steps:
        raise ValueError(f"--resume {folder} is at step {step}: raise --max_train_steps {args.max_train_steps}.")
    return state


def save_state(accelerator: Any, folder: Path, args: argparse.Namespace, data: TrainingData, step: int) -> None:
    """Write the folder anew; the file that makes it a state comes last, so that half a state is none."""
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        batch = args.train_batch_size * accelerator.num_processes
        content = {"current_step": step, "options": _run(args), "data": _data(data), "batch": batch}
        text = json.dumps(content, indent=1)
        write_atomically(folder / STATE_FILE, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    accelerator.wait_for_everyone()


def load_state(accelerator: Any, args: argparse.Namespace, data: TrainingData) -> int:
    """Put the state into what accelerate prepared; returns the step. Raises ValueError when it is another run's."""
    state = read_state(args)
    if state["data"] != _data(data):
        raise ValueError(f"--resume {args.resume}: the training data, captions or sizes are not those of that run.")
    batch = args.train_batch_size * accelerator.num_processes
    if state["batch"] != batch:
        raise ValueError(
            f"--resume {args.resume}: that run had {state['batch']} examples a step over all processes, not {batch}. "
            "Change --train_batch_size or the number of processes."
        )
    try:
        accelerator.load_state(args.resume)
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"--resume {args.resume} does not fit: {str(error).strip().splitlines()[0]}") from error
    return int(state["current_step"])


class Interrupts:
    """Ctrl-C, or a polite end of the process, waits for the end of the step; a second one does not."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self, accelerator: Any) -> None:
        """Raise KeyboardInterrupt if one was asked for, in any process: all of them stop after the same step."""
        asked = self.asked
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=accelerator.device)
            asked = bool(accelerator.reduce(flag, reduction="sum") > 0)
        if asked:
            self.asked = False
            raise KeyboardInterrupt
