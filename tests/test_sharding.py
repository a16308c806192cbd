"""The frozen model divided over two processes, as `accelerate launch` configures it, and the adapter whole in each."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_flow_models
import tiny_models
import torch
from test_training_runs import arguments, launch, rows, same, train, weights
from torch import nn

from kohya_trainer.sharding import Fsdp, blocks, divide, take_sharding

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Folders sd, music, images and sounds."""
    folder = tmp_path_factory.mktemp("sharding")
    tiny_models.make_sd(folder / "sd")
    tiny_models.make_images(folder / "images", 5)
    torch.manual_seed(0)
    tiny_flow_models.make_ace_step(folder / "music")
    tiny_flow_models.make_sounds(folder / "sounds")
    return folder


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-7) for k in one)


HOWS = [
    (["--use_fsdp", "--fsdp_version=1"], "FSDP1: the first process keeps 0.4 of 0.8 MB of the model"),
    (["--use_fsdp", "--fsdp_version=2"], "FSDP2: the first process keeps 0.4 of 0.8 MB of the model"),
]
if importlib.util.find_spec("deepspeed"):  # no requirement of ours: it builds an extension with a C++ compiler
    HOWS += [
        (["--use_deepspeed", "--zero_stage=1"], "You are using ZeRO with an untested optimizer"),
        (["--use_deepspeed", "--zero_stage=2"], "You are using ZeRO with an untested optimizer"),
        (["--use_deepspeed", "--zero_stage=3"], "ZeRO 3: the first process keeps 0.4 of 0.8 MB of the model"),
    ]


@pytest.mark.long
@pytest.mark.parametrize(("how", "sign"), HOWS, ids=lambda value: "-".join(value) if isinstance(value, list) else "")
def test_two_processes_that_share_the_model_are_one_with_the_doubled_batch(assets, tmp_path, how, sign):
    """With DoRA, which reads base weights in every pass, a limit of the norms, which acts on what the optimizer steps
    from, an average, which counts its steps, samples in the middle, and a state to go on from with either number of
    processes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --s 2 --d 1\n")
    options = ["--optimizer_type=SGD", "--learning_rate=1", "--optimizer_args", "momentum=0.9"]
    options += ["--save_every_n_steps=2", "--save_state", "--scale_weight_norms=0.01"]
    options += [f"--sample_prompts={prompts}", "--sample_every_n_steps=2"]
    options += ["--network_args", "use_dora=True", "ema_decay=0.5"]
    said = launch(2, arguments(assets, tmp_path / "two", *options), *how)
    assert sign in said
    assert train(assets, tmp_path / "one", *options, "--train_batch_size=4") == 0
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert any(bool(one[key].any()) for key in one if key.startswith("lora_unet") and key.endswith("lora_up.weight"))
    assert close(one, two)
    for first, second in zip(rows(tmp_path / "one")[2:], rows(tmp_path / "two")[2:], strict=True):
        assert float(first[1]) == pytest.approx(float(second[1]), rel=1e-5)
    names = {path.name for path in (tmp_path / "one" / "sample").iterdir()}
    assert len(names) == 2 and names == {path.name for path in (tmp_path / "two" / "sample").iterdir()}
    for name in ("one", "two"):
        folder = tmp_path / name / "last-step00000002-state"
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".safetensors"]
        launch(2, arguments(assets, tmp_path / f"{name} on", *options, f"--resume={folder}"), *how)
    assert same(weights(tmp_path / "two on"), two) and close(weights(tmp_path / "one on"), one)
    state = tmp_path / "two" / "last-step00000002-state"
    assert train(assets, tmp_path / "back", *options, f"--resume={state}", "--train_batch_size=4") == 0
    assert close(weights(tmp_path / "back"), one)


@pytest.mark.long
def test_music_and_fsdp(assets, tmp_path):
    """Its transformer gets tensors whose strides FSDP changes in one of two passes through a checkpointed block."""
    options = [f"--pretrained_model_name_or_path={assets / 'music'}", f"--train_data_dir={assets / 'sounds'}"]
    options += ["--optimizer_type=SGD", "--learning_rate=1"]
    launch(2, arguments(assets, tmp_path / "two", *options, "--train_batch_size=1"), "--use_fsdp", "--fsdp_version=2")
    assert train(assets, tmp_path / "one", *options, "--train_batch_size=2") == 0
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"))


def fsdp(version: int = 2, names: list[str] | None = None) -> Fsdp:
    return Fsdp(SimpleNamespace(fsdp_version=version, transformer_cls_names_to_wrap=names))


def test_the_environment_is_taken(monkeypatch):
    """accelerate itself shall not divide the adapter."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert take_sharding() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding = take_sharding()
    assert sharding is not None and sharding.title == "FSDP2" and take_sharding() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert take_sharding() is None and os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    sharding = take_sharding()
    assert sharding is not None and sharding.title == "ZeRO 3" and take_sharding() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        sharding.check(argparse.Namespace(quantize=None, fp8_base=False))


@pytest.mark.parametrize(
    ("version", "quantize", "fp8", "message"),
    [(2, "nf4", False, "--quantize nf4.*FSDP2 cannot divide"), (1, None, True, "--fp8_base.*configure FSDP2")],
)
def test_weights_that_cannot_be_divided_are_refused(version, quantize, fp8, message):
    fsdp(version).check(argparse.Namespace(quantize=None, fp8_base=version == 2))
    with pytest.raises(ValueError, match=message):
        fsdp(version).check(argparse.Namespace(quantize=quantize, fp8_base=fp8))


def test_processes_must_keep_step():
    family = SimpleNamespace(one_call=False, title="ACE-Step")
    with pytest.raises(ValueError, match="ACE-Step takes captions.*Give 1"):
        divide(fsdp(), family, torch.device("cpu"), 2)


def test_what_is_divided():
    """The outermost numbered parts, or the classes that accelerate's configuration names."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])), nn.Linear(1, 1)])
    assert list(blocks(model)) == list(model.blocks)
    with pytest.raises(ValueError, match="no Linea.*Did you mean Linear"):
        fsdp(names=["Linea"]).divide(model, torch.device("cpu"))


WEIGHTS = """
import sys, torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from networks.tensors import base_weight

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
first, second = (torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(2))
before, seen = second.weight.clone(), []
second.register_forward_pre_hook(lambda part, _: seen.append(base_weight.read(part).clone()))
wrapper = FullyShardedDataParallel(first, device_id=torch.device("cpu"), use_orig_params=True)
fully_shard(second, reshard_after_forward=True)
second(torch.ones(1, 4))
assert torch.equal(seen[0], before)
for layer in (first, second):
    try:
        base_weight.read(layer)
    except ValueError as error:
        assert "not here (sharded" in str(error)
    else:
        raise AssertionError("read")
print("as it should be", flush=True)
"""


def test_a_divided_weight_is_not_read(tmp_path):
    """It is whole inside the part's own pass, and said to be elsewhere at any other time."""
    command = [sys.executable, "-c", WEIGHTS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert "as it should be" in done.stdout, done.stderr
