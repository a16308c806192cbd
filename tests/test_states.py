"""States of real runs: what they go on with, what is refused, and what a run may write over."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import standin_network
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_training_runs import ROOT, arguments, rows, same, train, weights
from torch import Tensor

from kohya_trainer import train_options
from kohya_trainer.state import optimizer_state, state_files
from kohya_trainer.state.interrupts import Interrupts
from kohya_trainer.state.training_state import (
    Examples,
    Live,
    Saved,
    data_key,
    load_state,
    read_state,
    save_state,
    shared,
)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd, images."""
    folder = tmp_path_factory.mktemp("states")
    tiny_models.make_sd(folder / "sd")
    tiny_models.make_images(folder / "images", 5)
    tiny_models.make_images(folder / "other" / "images", 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def one_step(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run of one step. It is not to be changed."""
    folder = tmp_path_factory.mktemp("one step")
    assert train(assets, folder, *FAST, "--save_state", steps=1) == 0
    return folder / "last-state"


FAST = ["--network_train_unet_only", "--cache_latents", "--no_gradient_checkpointing"]


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-6) for k in one)


# ---- going on ----

STEPWISE = ["algo=dylora", "unit=1", "ggpo_sigma=0.5", "ggpo_beta=0.5"]


def test_a_state_goes_on_with_any_division_of_a_step(assets: Path, tmp_path: Path) -> None:
    """Batches, accumulations and processes that make as many examples: the same data, noise, blocks of DyLoRA and noise
    of GGPO. 5 images in steps of 4: the last step of an epoch has one, in one of its batches."""
    options = ["--optimizer_type=SGD", "--learning_rate=1", "--optimizer_args", "momentum=0.9"]
    options += [*FAST, "--save_every_n_steps=2", "--save_state", "--network_args", *STEPWISE]
    assert train(assets, tmp_path / "whole", *options, "--train_batch_size=4") == 0
    state = tmp_path / "whole" / "last-step00000002-state"
    more = [f"--resume={state}", "--train_batch_size=1", "--gradient_accumulation_steps=4"]
    assert train(assets, tmp_path / "cut", *options, *more) == 0
    assert close(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    state = tmp_path / "cut" / "last-step00000004-state"
    more = [f"--resume={state}", "--train_batch_size=2", "--gradient_accumulation_steps=2"]
    assert train(assets, tmp_path / "on", *options, *more, steps=6) == 0
    assert train(assets, tmp_path / "longer", *options, "--train_batch_size=4", steps=6) == 0
    assert close(weights(tmp_path / "on"), weights(tmp_path / "longer"))
    plain = [option for option in options if not option.startswith("ggpo")]
    assert train(assets, tmp_path / "plain", *plain, "--train_batch_size=4") == 0
    assert not close(weights(tmp_path / "whole"), weights(tmp_path / "plain"))


def test_another_number_of_examples_is_one_error(assets: Path, one_step: Path, tmp_path: Path, capsys: Any) -> None:
    more = [f"--resume={one_step}", "--train_batch_size=3", "--gradient_accumulation_steps=2"]
    assert train(assets, tmp_path, *more, steps=2) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "had 2 examples a step" in told and "6 examples a step" in told
    assert "--train_batch_size 3 x --gradient_accumulation_steps 2 x 1 processes" in told


def test_the_learning_rate_of_a_state_is_not_ignored(assets: Path, one_step: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(assets, tmp_path, *FAST, f"--resume={one_step}", "--learning_rate=1e-3", steps=2) == 2
    assert "had a learning rate of 0.01, not 0.001. Give the same" in capsys.readouterr().err.splitlines()[-1]


def test_killed_and_resumed_equals_uninterrupted(assets: Path, tmp_path: Path) -> None:
    """SIGKILL at a moment of its own, in a run that saves after every step over its own files."""
    options = [*FAST, "--network_dropout=0.3", "--lr_scheduler=cosine", "--save_every_n_steps=1", "--save_state"]
    options += ["--network_args", "ema_decay=0.9"]  # files have the average
    assert train(assets, tmp_path / "whole", *options, steps=12) == 0
    command = [sys.executable, str(ROOT / "scripts" / "train_network.py")]
    command += arguments(assets, tmp_path / "cut", *options, steps=12)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "cut" / "last-step00000004-state").is_dir():
        time.sleep(0.01)
    process.kill()
    process.wait()
    states = sorted((tmp_path / "cut").glob("*-state"))
    good = [state for state in states if (state / state_files.STATE_FILE).is_file()]
    assert len(good) >= 3 and len(states) - len(good) <= 1
    assert train(assets, tmp_path / "cut", *options, f"--resume={good[-1]}", steps=12) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert len(list((tmp_path / "cut").glob("*-state"))) == 13 and not list((tmp_path / "cut").glob(".*"))


# ---- the first layout ----

RAN: list[str] = []


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return RAN.append, ("it ran",)


def to_first_layout(state: Path) -> None:
    """Rewrite a state as an earlier version of the trainer wrote it, through accelerate: the adapter as a part of what
    was trained, the optimizer by numbers in a pickle, and pickles of the schedule and of generators, here ones that run
    code."""
    content, files = state_files.read(state)
    with open(files["optimizer"], "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]["optimizer"]
    whole = optimizer_state.unpack(load_file(files["optimizer"]), header)
    adapter = load_file(files["adapter"])
    for path in state.iterdir():
        path.unlink()
    save_file({f"network.{key}": value for key, value in adapter.items()}, state / "model.safetensors")
    names = [name for group in whole["groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in whole["groups"]]
    numbered = {numbers[name]: values for name, values in whole["state"].items()}
    torch.save({"state": numbered, "param_groups": groups}, state / "optimizer.bin")
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl"):
        (state / name).write_bytes(pickle.dumps(Bomb()))
    options = {**content["options"], "gradient_accumulation_steps": content["accumulation"]}
    options["train_batch_size"] = batch = content["examples"] // content["accumulation"]
    old = {"current_step": content["current_step"], "options": options, "data": content["data"], "batch": batch}
    (state / state_files.STATE_FILE).write_text(json.dumps(old, indent=1) + "\n")


def test_a_state_of_the_first_layout_goes_on(assets: Path, tmp_path: Path) -> None:
    """To the last bit, with the learning rates of the schedule, which is not in anything that is opened; into its own
    folder, too."""
    options = [*FAST, "--network_dropout=0.3", "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--save_state"]
    assert train(assets, tmp_path / "whole", *options, "--save_every_n_steps=3", steps=6) == 0
    state = tmp_path / "last-step00000003-state"
    (tmp_path / "whole" / state.name).rename(state)
    to_first_layout(state)
    again = [f"--resume={state}", "--save_every_n_steps=3"]
    assert train(assets, tmp_path, *options, *again, steps=6) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path)) and not RAN
    assert rows(tmp_path / "whole")[-3:] == rows(tmp_path)[-3:]


@pytest.mark.parametrize("what", ["optimizer.bin", "cut", "foreign"])
def test_a_damaged_or_strange_state_of_the_first_layout_is_one_sentence(
    assets: Path, one_step: Path, tmp_path: Path, capsys: Any, what: str
) -> None:
    state = tmp_path / "x-state"
    shutil.copytree(one_step, state)
    to_first_layout(state)
    path = state / "optimizer.bin"
    if what == "optimizer.bin":
        torch.save({"state": Bomb(), "param_groups": []}, path)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (state / "custom_checkpoint_1.pkl").write_bytes(pickle.dumps(Bomb()))
    capsys.readouterr()
    assert train(assets, tmp_path / "b", *FAST, f"--resume={state}", steps=2) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and not RAN and str(state) in told[0]
    assert ("can run code" if what == "foreign" else "damaged, or holds more than tensors") in told[0]


def saved(accumulation: int, in_steps: bool) -> Saved:
    return Saved(Path("x"), 1, {}, "", 12, accumulation, in_steps, "", {}, {}, False)


def test_the_order_of_a_run_is_kept() -> None:
    """With accumulation that of the first layout was by batches, and stays so while the accumulation does."""
    now = Examples(batch=2, accumulation=3, processes=2)
    assert saved(3, in_steps=True).batches_a_unit(now) == 3
    assert saved(3, in_steps=False).batches_a_unit(now) == 1
    assert saved(2, in_steps=False).batches_a_unit(now) == 3
    assert saved(2, in_steps=True).batches_a_unit(Examples(6, 2, 1)) == 2


# ---- what a run may write over ----


def test_only_files_of_the_same_run_are_written_over(
    assets: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def run(*options: str, steps: int = 2) -> int:
        standin_network.CALLS.clear()
        return train(assets, tmp_path, "--network_module=standin_network", "--save_state", *options, steps=steps)

    assert run() == 0
    before = weights(tmp_path)
    assert run() == 0 and same(weights(tmp_path), before)  # the same command
    assert run(f"--resume={tmp_path / 'last-state'}", steps=3) == 0  # the same run, further
    assert run(f"--resume={tmp_path / 'last-state'}", "--max_grad_norm=2", steps=4) == 0
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("kohya_trainer.model_folder.load_model", lambda *_: pytest.fail("too late"))
        for options in (
            ["--seed=2"],
            ["--learning_rate=1"],
            [f"--train_data_dir={assets / 'sd'}"][:0] + ["--network_dim=3"],
        ):
            assert run(*options) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert "from another run" in told and "--overwrite" in told and "--resume" in told
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    assert train(assets, other, "--network_module=standin_network", "--save_state", "--seed=2", steps=2) == 0
    assert run(f"--resume={other / 'last-state'}", "--seed=2", steps=3) == 2  # a resumed run, over another's files
    (tmp_path / "last-step00000009-state").mkdir()  # as a run that was killed in its first save leaves it
    assert run("--seed=2", "--overwrite") == 0
    assert run("--seed=2") == 0


def test_without_a_seed_each_run_is_another(assets: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--network_module=standin_network"]

    def run() -> int:
        given = [option for option in arguments(assets, tmp_path, *options, steps=1) if not option.startswith("--seed")]
        from kohya_trainer import train as trainer

        return trainer.main(given)

    assert run() == 0
    assert run() == 2
    assert "from another run" in capsys.readouterr().err


# ---- early refusals ----


@pytest.mark.parametrize(
    ("how", "options", "named"),
    [
        ("FSDP", ["--network_args", "ggpo_sigma=0.1", "ggpo_beta=0.1"], "ggpo_sigma: under FSDP2"),
        ("DEEPSPEED", ["--network_args", "ggpo_beta=0.1", "ggpo_sigma=0.1"], "ggpo_sigma: under DeepSpeed"),
        (
            "FSDP",
            ["--scale_weight_norms=1", "--network_module=networks.oft"],
            "--scale_weight_norms: the norm of diag-oft",
        ),
        ("FSDP", ["--scale_weight_norms=1", "--network_args", "algo=glora"], "--scale_weight_norms: the norm of glora"),
    ],
)
def test_what_a_divided_model_cannot_tell_is_refused_early(
    assets: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, how: str, options: list[str], named: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{how}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    monkeypatch.setattr("kohya_trainer.model_folder.load_model", lambda *_: pytest.fail("too late"))
    assert train(assets, tmp_path, *options) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step(number: signal.Signals) -> None:
    accelerator = SimpleNamespace(num_processes=1)
    former = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check(accelerator)
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check(accelerator)
        assert interrupts.orderly
        interrupts.orderly = False
        signal.raise_signal(number)
        with interrupts.held():  # a step half done: the second one waits, too
            signal.raise_signal(number)
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert not interrupts.orderly
    assert signal.getsignal(number) is former


class Broken(torch.optim.SGD):
    """Its third step ends half done."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.made = getattr(self, "made", 0) + 1
        super().step()
        if self.made == 3:
            raise RuntimeError("half done")


def test_a_step_half_done_is_no_state(assets: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(RuntimeError, match="half done"):
        train(assets, tmp_path, "--optimizer_type=test_states.Broken")
    assert {path.name for path in tmp_path.glob("last-interrupted*")} == {"last-interrupted.safetensors"}
    assert "stopped in step 3: there is a file, but no state" in capsys.readouterr().out


def test_the_scale_of_losses_goes_on(tmp_path: Path) -> None:
    """That of --mixed_precision fp16, which follows the run; and an optimizer of more than the network's parameters."""

    def live() -> Live:
        network, outside = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([{"params": [*network.parameters(), outside]}], lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        accelerator = SimpleNamespace(num_processes=1, is_main_process=True, scaler=scaler)
        groups = [group["params"] for group in optimizer.param_groups]
        return Live(accelerator, network, SimpleNamespace(optimizer=optimizer), schedule, groups)

    def step(one: Live) -> None:
        loss = sum(p.sum() for group in one.groups for p in group)
        one.accelerator.scaler.scale(loss).backward()
        one.accelerator.scaler.step(one.base)
        one.accelerator.scaler.update()
        one.base.zero_grad()
        one.schedule.step()

    args = train_options.build_parser().parse_args(["--seed=1"])
    data: Any = SimpleNamespace(items=[], prompts=[], sizes=[])
    one, other = live(), live()
    for _ in range(3):
        step(one)
    content = {"current_step": 3, "data": data_key(data), "run": "x", "in_steps": True}
    save_state(one, tmp_path / "x-state", args, content)
    args.resume = str(tmp_path / "x-state")
    assert load_state(other, read_state(args), data) == 3
    for _ in range(2):
        step(one)
        step(other)
    assert one.accelerator.scaler.state_dict() == other.accelerator.scaler.state_dict()
    assert one.accelerator.scaler.get_scale() == 4096.0
    assert one.schedule.get_last_lr() == other.schedule.get_last_lr() == [1 / 6]
    assert torch.equal(one.network.weight, other.network.weight)


# ---- several processes ----


def test_what_the_main_process_drew_is_everybodys(monkeypatch: Any) -> None:
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: [7 for _ in values])
    assert shared(SimpleNamespace(num_processes=2), 3) == 7
    assert shared(SimpleNamespace(num_processes=1), 3) == 3


def test_an_optimizer_which_no_state_can_hold_is_told_before_the_first_step(
    assets: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    class Strange(torch.optim.SGD):
        def __init__(self, groups: Any, lr: float) -> None:
            super().__init__(groups, lr=lr)
            self.param_groups[0]["rule"] = argparse.Namespace()

    monkeypatch.setattr(torch.optim, "Strange", Strange, raising=False)
    assert train(assets, tmp_path, "--optimizer_type=torch.optim.Strange") == 2
    assert "rule is a Namespace" in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())
