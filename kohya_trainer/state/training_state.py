"""Training states: one holds the adapter, the optimizer's state, and what the run was.

The order of the data, the noise, the dropouts and the learning rate follow from seed and step, so that nothing else
needs to be kept. A state goes on with any number of processes, as long as a step has as many examples.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from networks.foreign.texts import printable
from networks.hosts.zero_masters import is_partitioned

from ..losses import DECIDES_LOSS
from ..training_data import TrainingData, seed_of
from . import optimizer_state, partitioned, state_files
from .optimizer_state import Groups, Whole
from .state_files import STATE_FILE

# what decides a step; another value would be another run
SAME = (
    "seed network_module network_dim network_alpha network_args optimizer_type optimizer_args lr_scheduler "
    "lr_warmup_steps mixed_precision"
).split() + [*DECIDES_LOSS]
OF_STEP = "step_state/"  # before the names of tensors which are no part of the network's own state


def _run(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAME}


def data_key(data: TrainingData, kept: TrainingData | None = None) -> str:
    """Of the examples, their captions and sizes, and of those on which the model goes on as it is."""
    rows = zip(data.items, data.prompts, data.sizes, strict=True)
    own = f"{seed_of([(item.path.name, prompt, size) for item, prompt, size in rows]):x}"
    return own if kept is None else f"{own} {data_key(kept)}"


@dataclass(frozen=True)
class Examples:
    """How the examples of a step are divided."""

    batch: int
    accumulation: int
    processes: int

    @property
    def count(self) -> int:
        return self.batch * self.accumulation * self.processes

    def __str__(self) -> str:
        return (
            f"{self.count} examples a step (--train_batch_size {self.batch} x --gradient_accumulation_steps "
            f"{self.accumulation} x {self.processes} processes)"
        )


@dataclass(frozen=True)
class Saved:
    """A state that was read, before the run that goes on with it is loaded.

    Attributes:
        step: after which it was taken.
        examples: in a step of that run.
        accumulation: batches of a process in a step of that run.
        in_steps: whether its data are ordered by steps; those of the first layout are by batches.
        run: which run it is, see run_identity; "" = unknown.
        files: by kind.
        first: whether accelerate wrote it, for an earlier version of the trainer.
    """

    folder: Path
    step: int
    options: Mapping[str, Any]
    data: str
    examples: int
    accumulation: int
    in_steps: bool
    run: str
    scaler: Mapping[str, float]
    files: Mapping[str, Path]
    first: bool

    def check(self, args: argparse.Namespace) -> None:
        """Raise ValueError when the options are another run's."""
        for name, value in _run(args).items():
            then = self.options.get(name)
            if then != value:
                raise ValueError(f"--resume {self.folder}: that run had --{name} {then}, not {value}. Give the same.")
        if self.step >= args.max_train_steps:
            raise ValueError(
                f"--resume {self.folder} is at step {self.step}: raise --max_train_steps {args.max_train_steps}."
            )

    def batches_a_unit(self, now: Examples) -> int:
        """How many batches the order of the data keeps together: those of a step, or one where that run had one.

        Raises:
            ValueError: a step has another number of examples, which would be another run.
        """
        if now.count != self.examples:
            raise ValueError(
                f"--resume {self.folder}: that run had {self.examples} examples a step, this one has {now}. Make the "
                "product the same."
            )
        return now.accumulation if self.in_steps or now.accumulation != self.accumulation else 1


def read_state(args: argparse.Namespace) -> Saved:
    """Before anything is loaded: read what the state says, take its seed, compare options. Raises ValueError."""
    folder = Path(args.resume)
    try:
        content, files = state_files.read(folder)
    except ValueError as error:
        raise ValueError(f"--resume {error}") from error
    try:
        saved = _saved(folder, content, files)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"--resume {folder}: {STATE_FILE} is damaged. Give a NAME-...-state.") from error
    if args.seed is None:
        args.seed = saved.options["seed"]
    saved.check(args)
    return saved


def _saved(folder: Path, content: Mapping[str, Any], files: Mapping[str, Path]) -> Saved:
    options, first = dict(content["options"]), "layout" not in content
    accumulation = int(options["gradient_accumulation_steps"] if first else content["accumulation"])
    examples = int(content["batch"]) * accumulation if first else int(content["examples"])
    in_steps = accumulation == 1 if first else bool(content["in_steps"])
    more = (str(content.get("run", "")), dict(content.get("scaler") or {}), dict(files), first)
    step, data = int(content["current_step"]), str(content["data"])
    if min(step, examples - 1, accumulation - 1) < 0:
        raise ValueError("numbers that no run has")
    return Saved(folder, step, options, data, examples, accumulation, in_steps, *more)


@dataclass
class Live:
    """What a run has and a state keeps.

    Attributes:
        optimizer: as accelerate wraps it.
        groups: the parameters as they were given to it, group by group.
    """

    accelerator: Any
    network: Any
    optimizer: Any
    schedule: Any
    groups: Groups

    def __post_init__(self) -> None:
        own = {parameter: name for name, parameter in self.network.named_parameters()}
        every = [parameter for group in self.groups for parameter in group]
        self.names = {p: own.get(p, f"parameter {number}") for number, p in enumerate(every)}
        self.partitioned = any(is_partitioned(p) for group in self.groups for p in group)
        inner = self.optimizer.optimizer
        self.base: torch.optim.Optimizer = inner.optimizer if self.partitioned else inner

    def read_optimizer(self) -> Whole:
        """The whole state of the optimizer. Every process takes part."""
        read = partitioned.read if self.partitioned else optimizer_state.read
        return read(self.base, self.groups, self.names)

    def check(self, optimizer_type: str) -> None:
        """Raise ValueError when an optimizer has what no state can hold; before the first step."""
        try:
            optimizer_state.pack(self.read_optimizer())
        except KeyError as error:
            raise ValueError(
                "--full_bf16: without ZeRO, DeepSpeed keeps the optimizer in a form that no training state could hold. "
                "Configure zero_stage 1 or 2, or remove it."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"--optimizer_type {optimizer_type}: no training state could hold what it has ({error}). Choose "
                "another, or leave that out of --optimizer_args."
            ) from error

    def write_optimizer(self, whole: Whole) -> None:
        """The inverse. Raises ValueError when it is another optimizer's."""
        optimizer_state.check(whole, self.base, self.groups, self.names)
        if self.partitioned:
            partitioned.write(self.base, self.groups, self.names, whole)
        else:
            optimizer_state.write(self.base, whole)

    def go_to(self, step: int) -> None:
        """The learning rates of a step: all our schedules are functions of it."""
        self.schedule.last_epoch = step - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no step of the optimizer went before
            self.schedule.step()


def save_state(live: Live, folder: Path, args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Put a state in the place of an earlier one, which remains until it is complete. Every process takes part.

    Args:
        content: current_step, data, run, in_steps.

    Raises:
        OSError: it cannot be written; the earlier one is untouched.
    """
    whole, problem = live.read_optimizer(), None
    if live.accelerator.is_main_process:
        examples = Examples(args.train_batch_size, args.gradient_accumulation_steps, live.accelerator.num_processes)
        scaler = live.accelerator.scaler
        more = {
            "options": _run(args),
            "examples": examples.count,
            "accumulation": examples.accumulation,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        try:
            state_files.write(folder, {**content, **more}, _files(live.network, whole))
        except OSError as error:
            problem = (error.errno, error.strerror)
    problem = shared(live.accelerator, problem)
    if problem is not None:
        raise OSError(*problem)


def _files(network: Any, whole: Whole) -> dict[str, bytes]:
    own = {key: optimizer_state.alone(value) for key, value in network.state_dict().items()}
    if hasattr(network, "step_state"):
        own |= {OF_STEP + key: optimizer_state.alone(value) for key, value in network.step_state().items()}
    tensors, text = optimizer_state.pack(whole)
    return {"adapter": serialize(own), "optimizer": serialize(tensors, {"optimizer": text})}


def shared(accelerator: Any, value: Any) -> Any:
    """What the main process has, in all of them."""
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes == 1:
        return value
    found = broadcast_object_list([value])
    return found[0]


def load_state(live: Live, saved: Saved, data: TrainingData, kept: TrainingData | None = None) -> int:
    """Put a state into a run; returns its step.

    Args:
        live: what the run has.
        saved: the state.
        data, kept: what it learns from, and what it keeps, as for `data_key`.

    Raises:
        ValueError: the state is another run's.
    """
    if saved.data != data_key(data, kept):
        raise ValueError(f"--resume {saved.folder}: the training data, captions or sizes are not those of that run.")
    with _told(f"--resume {saved.folder}"):
        own = _tensors(saved.files["adapter"])[0]
        of_step = {key.removeprefix(OF_STEP): own.pop(key) for key in [*own] if key.startswith(OF_STEP)}
        if saved.first:  # named in accelerate's wrappers
            own = {re.sub(r"^(module\.)*network\.", "", key): value for key, value in own.items()}
        live.network.load_state_dict(own)
        if hasattr(live.network, "load_step_state"):
            live.network.load_step_state(of_step)
        live.write_optimizer(_first_optimizer(live, saved) if saved.first else _optimizer(saved))
        scaler, numbers = live.accelerator.scaler, _first_scaler(saved) if saved.first else saved.scaler
        if scaler is not None and numbers:
            scaler.load_state_dict(dict(numbers))
    if saved.step:
        live.go_to(saved.step)
    return saved.step


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of what does not fit become one sentence."""
    try:
        yield
    except (
        RuntimeError, OSError, KeyError, IndexError, ValueError, TypeError, AttributeError, SafetensorError
    ) as error:  # fmt: skip
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} does not fit: {printable(first, 400)}") from error


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt", device="cpu") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})


def _optimizer(saved: Saved) -> Whole:
    tensors, metadata = _tensors(saved.files["optimizer"])
    return optimizer_state.unpack(tensors, metadata["optimizer"])


def _first_optimizer(live: Live, saved: Saved) -> Whole:
    return optimizer_state.named(_first(saved.files["optimizer"]), live.groups, live.names)


def _first_scaler(saved: Saved) -> Mapping[str, float]:
    path = saved.folder / state_files.FIRST_SCALER
    return _first(path) if path.is_file() else {}


def _first(path: Path) -> dict[str, Any]:
    """A file of a state of the first layout. It is a pickle in a zip; `weights_only` reads it with torch's restricted
    reader, which knows tensors, numbers and containers alone, refuses anything else, and runs no code."""
    import pickle

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path.name} is damaged, or holds more than tensors and numbers. Take another state"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no state. Take another")
    return found
