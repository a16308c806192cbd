"""The reference trainer on tiny models of the real classes: its calls, its files, resume, and bad input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import standin_network
import tiny_models
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from kohya_trainer import train as trainer

NETWORK = "networks.lora"


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Folders sd, v (v-prediction), sdxl, images and held_out."""
    torch.set_num_threads(1)  # more threads than free cores make tiny models crawl
    folder = tmp_path_factory.mktemp("assets")
    tiny_models.make_sd(folder / "sd")
    tiny_models.make_v_prediction(folder / "sd", folder / "v")
    tiny_models.make_sdxl(folder / "sdxl")
    tiny_models.make_images(folder / "images", 4)
    tiny_models.make_images(folder / "held_out", 2, seed=1)
    return folder


@pytest.fixture
def calls():
    """The stand-in network's record, emptied."""
    standin_network.CALLS.clear()
    return standin_network.CALLS


def train(assets: Path, output: Path, *more: str, model: str = "sd", network: str = NETWORK, steps: int = 2) -> int:
    """Run the trainer; later options win over these."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a test may run several
    return trainer.main(
        [
            f"--pretrained_model_name_or_path={assets / model}",
            f"--train_data_dir={assets / 'images'}",
            f"--output_dir={output}",
            f"--network_module={network}",
            f"--max_train_steps={steps}",
            "--train_batch_size=2",
            "--network_dim=4",
            "--learning_rate=1e-2",
            "--seed=1",
            "--debug",
            *more,
        ]
    )


def read_log(output: Path, name: str = "last") -> list[dict[str, str]]:
    with (output / f"{name}-loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(calls) -> list[str]:
    return [name for name, *_ in calls]


def find(calls, wanted: str):
    return next((args, kwargs) for name, args, kwargs in calls if name == wanted)


# ---- what it calls ----


@pytest.mark.parametrize(
    "stop,said", [("help=True", "networks.lora on Stable"), ("dry_run=True", "nothing is trained")]
)
def test_a_call_that_only_asks_ends_the_run_and_leaves_no_file(assets, tmp_path, capsys, stop, said):
    with pytest.raises(SystemExit) as ended:
        train(assets, tmp_path / "out", "--network_args", stop)
    assert ended.value.code == 0 and said in capsys.readouterr().out
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_calls_come_in_sd_scripts_order(assets, tmp_path, calls):
    options = ["--network_dropout=0.1", "--gradient_checkpointing", "--scale_weight_norms=1", "--unet_lr=1e-3"]
    options += ["--text_encoder_lr", "1e-4", "--network_args", "regex=x=y", "a=True"]
    assert train(assets, tmp_path, *options, network="standin_network", steps=1) == 0
    expected = ["create_network", "prepare_network", "apply_to", "enable_gradient_checkpointing"]
    expected += ["prepare_optimizer_params_with_multiple_te_lrs", "prepare_grad_etc", "on_epoch_start", "on_step_start"]
    expected += ["get_trainable_params", "apply_max_norm_regularization", "save_weights"]
    assert names(calls) == expected
    args, kwargs = find(calls, "create_network")
    assert args[:3] == (1.0, 4, 1)
    assert [type(part).__name__ for part in args[3:]] == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"]
    assert kwargs == {"neuron_dropout": 0.1, "dropout": 0.1, "a": "True", "regex": "x=y"}
    assert find(calls, "apply_to")[0][2:] == (True, True)
    assert find(calls, "prepare_optimizer_params_with_multiple_te_lrs")[0] == ([1e-4], 1e-3, 1e-2)
    path, dtype, metadata = find(calls, "save_weights")[0]
    assert (path, dtype) == (str(tmp_path / "last.safetensors"), None)
    assert json.loads(metadata["ss_network_args"]) == {"a": "True", "regex": "x=y"}
    assert (metadata["ss_steps"], metadata["ss_base_model_version"], metadata["ss_v2"]) == ("1", "sd_v1", "False")
    assert all(type(value) is str for value in metadata.values())


def test_sdxl_passes_both_text_encoders(assets, tmp_path, calls):
    assert train(assets, tmp_path, model="sdxl", network="standin_network", steps=1) == 0
    encoders = find(calls, "create_network")[0][4]
    assert [type(encoder).__name__ for encoder in encoders] == ["CLIPTextModel", "CLIPTextModelWithProjection"]


def test_dim_from_weights_calls(assets, tmp_path, calls):
    assert train(assets, tmp_path, network="standin_network", steps=1) == 0
    calls.clear()
    file = tmp_path / "last.safetensors"
    options = ["--dim_from_weights", f"--network_weights={file}", "--network_dropout=0.1", "--network_args", "a=b"]
    options.insert(0, "--overwrite")
    assert train(assets, tmp_path, *options, network="standin_network", steps=1) == 0
    assert names(calls)[:4] == ["create_network_from_weights", "prepare_network", "apply_to", "load_weights"]
    args, kwargs = find(calls, "create_network_from_weights")
    assert args[:2] == (1, str(file)) and kwargs == {"for_inference": False, "a": "b", "dropout": 0.1}


@pytest.mark.parametrize(
    ("option", "flags"),
    [("--network_train_unet_only", (False, True)), ("--network_train_text_encoder_only", (True, False))],
)
def test_part_flags(assets, tmp_path, calls, option, flags):
    assert train(assets, tmp_path, option, network="standin_network", steps=1) == 0
    assert find(calls, "apply_to")[0][2:] == flags


# ---- what it makes ----


@pytest.mark.parametrize("model", ["v", "sdxl"])
def test_trains_and_writes_everything(assets, tmp_path, model):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\na red square --s 2\na blue square --s 2 --d 7 --l 1.5\n")
    options = [f"--validation_data_dir={assets / 'held_out'}", "--save_every_n_steps=2", "--output_name=x"]
    options += [f"--sample_prompts={prompts}", "--sample_every_n_steps=4", "--sample_at_first", "--save_precision=fp16"]
    options += ["--validate_every_n_steps=2", "--cache_latents", "--gradient_accumulation_steps=2"]
    assert train(assets, tmp_path, *options, model=model, steps=4) == 0
    rows = read_log(tmp_path, "x")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [bool(row["loss"]) for row in rows] == [False, True, True, True, True]
    held_out = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]
    assert json.loads((tmp_path / "x-plan.json").read_text()) and (tmp_path / "x-plan.txt").read_text().strip()
    assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == [
        f"x_{step:06d}_{number:02d}.png" for step in (0, 4) for number in (0, 1)
    ]
    assert (tmp_path / "x-loss.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "x.safetensors",
        "x-step00000002.safetensors",
        "x-step00000004.safetensors",
    }
    weights = load_file(tmp_path / "x.safetensors")
    assert any(
        value.dtype == torch.float16 and value.abs().max() > 0 for name, value in weights.items() if "up" in name
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == ("sdxl_base_v1-0" if model == "sdxl" else "sd_v1")
    assert not [path for path in tmp_path.rglob(".*")]  # no temporary file is left


def test_same_seed_same_file(assets, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train(assets, tmp_path / name, f"--seed={seed}", "--noise_offset=0.1", "--min_snr_gamma=5") == 0
    first, second, other = (load_file(tmp_path / name / "last.safetensors") for name in "abc")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    metadata = []
    for name in "ab":
        with safe_open(tmp_path / name / "last.safetensors", "pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_resume_goes_on_where_it_ended(assets, tmp_path, model):
    held_out = f"--validation_data_dir={assets / 'held_out'}"
    assert train(assets, tmp_path / "a", held_out, model=model) == 0
    file = tmp_path / "a" / "last.safetensors"
    ended = float(read_log(tmp_path / "a")[-1]["val_loss"])
    for name, option in (("b", []), ("c", ["--dim_from_weights", "--network_dim=1"])):
        options = [held_out, f"--network_weights={file}", "--learning_rate=1e-12", *option]
        assert train(assets, tmp_path / name, *options, model=model, steps=1) == 0
        started = [float(row["val_loss"]) for row in read_log(tmp_path / name) if row["val_loss"]]
        assert started == pytest.approx([ended, ended], rel=1e-6)
        old, new = load_file(file), load_file(tmp_path / name / "last.safetensors")
        assert old.keys() == new.keys()
        assert all(torch.allclose(old[key], new[key], rtol=1e-6, atol=1e-9) for key in old)


def test_base_weights_are_merged_before_training(assets, tmp_path):
    held_out = f"--validation_data_dir={assets / 'held_out'}"
    assert train(assets, tmp_path / "a", held_out) == 0
    ended = float(read_log(tmp_path / "a")[-1]["val_loss"])
    started = {}
    for multiplier in ("1", "0"):
        options = [held_out, "--base_weights", str(tmp_path / "a" / "last.safetensors")]
        options += ["--base_weights_multiplier", multiplier]
        assert train(assets, tmp_path / multiplier, *options, steps=1) == 0
        started[multiplier] = float(read_log(tmp_path / multiplier)[0]["val_loss"])
    assert started["1"] == pytest.approx(ended, rel=1e-5)
    assert started["0"] == float(read_log(tmp_path / "a")[0]["val_loss"])


# bitsandbytes is among the test requirements on Linux only.
EIGHT_BIT = ["AdamW8bit"] if sys.platform == "linux" else []


@pytest.mark.parametrize("optimizer", ["sgd", "torch.optim.Adagrad", *EIGHT_BIT])
def test_optimizers(assets, tmp_path, optimizer):
    assert train(assets, tmp_path, f"--optimizer_type={optimizer}", "--optimizer_args", "weight_decay=0.01") == 0


@pytest.mark.sweep(2)
@pytest.mark.parametrize("option", ["--mixed_precision=bf16", "--gradient_checkpointing", "--sdpa"])
def test_ways_to_compute_agree(assets, tmp_path, option):
    """The same weights after some steps, of the text encoders too: gradients agree, and reach every adapter."""
    saved = []
    for name, options in (("a", []), ("b", [option])):
        rates = ["--learning_rate=1e-2", "--optimizer_type=SGD"]  # proportional to the gradient, unlike Adam
        assert train(assets, tmp_path / name, *rates, *options, model="sdxl", steps=3) == 0
        saved.append(load_file(tmp_path / name / "last.safetensors"))
    first, second = saved
    ups = [key for key in first if key.endswith("lora_up.weight")]
    for prefix in ("lora_unet", "lora_te1", "lora_te2"):
        assert any(key.startswith(prefix) and bool(second[key].any()) for key in ups), prefix
    one, two = (torch.cat([tensors[key].flatten() for key in ups]) for tensors in (first, second))
    assert float((one - two).norm() / one.norm()) < (0.1 if "bf16" in option else 1e-3)


def test_config_file(assets, tmp_path, calls):
    config = tmp_path / "x.toml"
    config.write_text(
        '[model]\nnetwork_module = "standin_network"\n[training]\nmax_train_steps = 3\nnetwork_args = ["a=1", "b=2"]\n'
        "cache_latents = true\ngradient_checkpointing = false\ntext_encoder_lr = 1e-4\nnetwork_dim = 8\n"
    )
    options = [f"--pretrained_model_name_or_path={assets / 'sd'}", f"--train_data_dir={assets / 'images'}"]
    options += [f"--output_dir={tmp_path}", f"--config_file={config}", "--max_train_steps=1"]
    assert trainer.main(options) == 0
    args, kwargs = find(calls, "create_network")
    assert args[1] == 8 and (kwargs["a"], kwargs["b"]) == ("1", "2")
    assert find(calls, "prepare_optimizer_params_with_multiple_te_lrs")[0][0] == [1e-4]
    assert "enable_gradient_checkpointing" not in names(calls)
    assert len(read_log(tmp_path)) == 2  # the command line's one step, after step 0


# ---- what goes wrong ----


def broken_file(folder: Path, content: bytes) -> Path:
    path = folder / "broken.safetensors"
    path.write_bytes(content)
    return path


def test_ctrl_c_saves_what_was_trained(assets, tmp_path, calls):
    assert train(assets, tmp_path, "--network_args", "fail=interrupt", network="standin_network", steps=9) == 130
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"last-interrupted.safetensors"}
    assert len(read_log(tmp_path)) == 2


def test_full_disk_leaves_the_earlier_file(assets, tmp_path, calls, capsys):
    assert train(assets, tmp_path, network="standin_network", steps=1) == 0
    before = (tmp_path / "last.safetensors").read_bytes()
    options = ["--overwrite", "--network_args", "fail=full_disk"]
    assert train(assets, tmp_path, *options, network="standin_network", steps=1) == 2
    told = capsys.readouterr().err.splitlines()[-1]  # a traceback comes before, with --debug
    assert told.startswith("error: ") and "No space left" in told and "Free some space" in told and "Errno" not in told
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_leave_the_earlier_file(assets, tmp_path, capsys):
    """The last step may break them after the last look at the loss."""
    assert train(assets, tmp_path, steps=1) == 0
    before = (tmp_path / "last.safetensors").read_bytes()
    options = ["--learning_rate=1e38", "--optimizer_type=SGD", "--optimizer_args", "weight_decay=1e38"]
    assert train(assets, tmp_path, "--overwrite", *options, steps=1) == 2
    assert "Lower --learning_rate" in capsys.readouterr().err
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(assets, tmp_path, capsys):
    assert train(assets, tmp_path, "--learning_rate=1e30", "--max_grad_norm=0", "--optimizer_type=SGD", steps=5) == 2
    assert "Lower --learning_rate" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


BAD_INPUT = {
    "no model": (["--pretrained_model_name_or_path={tmp}/none"], "does not exist"),
    "no index": (["--pretrained_model_name_or_path={assets}/sd/unet"], "no model_index.json"),
    "parent of a model": (["--pretrained_model_name_or_path={assets}"], "Its subfolder sd has one"),
    "no data": (["--train_data_dir={tmp}/none"], "does not exist"),
    "no images": (["--train_data_dir={assets}/sd"], "holds no images"),
    "parent of images": (["--train_data_dir={assets}"], "Its subfolders have some"),
    "no captions": (["--caption_extension=.caption"], "4 of 4 images have no caption file"),
    "no held-out images": (["--validation_data_dir={assets}/sd"], "--validation_data_dir"),
    "output is a file": (["--output_dir={assets}/images/0.png/x"], "cannot write there"),
    "name is a path": (["--output_name=a/b"], "--output_dir"),
    "args without =": (["--network_args", "conv_dim"], '"conv_dim=VALUE"'),
    "misspelt option": (["--network_wieghts=x"], "Did you mean --network_weights?"),
    "misspelt module": (["--network_module=networks.lorra"], "Did you mean networks.lora?"),
    "weights missing": (["--network_weights={tmp}/none.safetensors"], "--network_weights: there is no file"),
    "weights are a folder": (["--network_weights={assets}"], "is a folder, not a weight file"),
    "dims from nothing": (["--dim_from_weights"], "needs --network_weights"),
    "argument twice": (["--network_args", "conv_dim=4", "conv_dim=8"], "has conv_dim twice"),
    "value of another type": (["--network_dim=x"], "invalid int value"),
    "negative rate": (["--unet_lr=-1"], "--unet_lr -1.0: it must be a number of at least 0"),
    "rate that is no number": (["--text_encoder_lr", "nan"], "--text_encoder_lr: 'nan' is not a finite number"),
    "weight that is no number": (["--scale_weight_norms=nan"], "--scale_weight_norms: 'nan' is not a finite number"),
    "module of another kind": (["--network_module=os"], "is no network module"),
    "empty name": (["--output_name="], "--output_name is empty"),
    "both parts only": (["--network_train_unet_only", "--network_train_text_encoder_only"], "nothing to train"),
    "unknown optimizer": (["--optimizer_type=Adamm"], "Use AdamW"),
    "unknown optimizer argument": (["--optimizer_args", "fuced=True"], "Check --optimizer_args"),
    "optimizer value": (["--optimizer_args", "fused=true"], "Did you mean True?"),
    "bad size": (["--resolution=33"], "multiples of 4. Try 32 x 32"),
    "no size": (["--resolution=big"], "WIDTH,HEIGHT"),
    "zero steps": (["--max_train_steps=0"], "at least 1"),
    "no config": (["--config_file={tmp}/none.toml"], "no such file"),
    "no prompts": (["--sample_prompts={tmp}/none.txt"], "no such file"),
    "samples without prompts": (["--sample_every_n_steps=1"], "Add it"),
    "misspelt network argument": (["--network_args", "conv_dimm=4"], "conv_dim"),
    "misspelt value": (["--network_args", "conv_dim=4", "use_tucker=Ture"], "use_tucker"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_before_anything_is_written(assets, tmp_path, capsys, case):
    options, message = BAD_INPUT[case]
    output = tmp_path / "out"
    filled = [option.format(tmp=tmp_path, assets=assets) for option in options]
    plain = [option for option in filled if option != "--debug"]
    arguments = [f"--pretrained_model_name_or_path={assets / 'sd'}", f"--train_data_dir={assets / 'images'}"]
    arguments += [f"--output_dir={output}", f"--network_module={NETWORK}", "--max_train_steps=1", *plain]
    assert trainer.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.count("error: ") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("networkdim = 4\n", "Did you mean network_dim?"),
        ("[a]\nnetwork_dim = [4]\n", "single value"),
        ('cache_latents = "yes"\n', "true or false"),
        ("network_dim = = 4\n", "not valid TOML"),
    ],
)
def test_bad_config_file(tmp_path, capsys, text, message):
    (tmp_path / "x.toml").write_text(text)
    assert trainer.main([f"--config_file={tmp_path / 'x.toml'}"]) == 2
    assert message in capsys.readouterr().err


def test_truncated_and_foreign_weights(assets, tmp_path, capsys):
    assert train(assets, tmp_path / "a", steps=1) == 0
    good = (tmp_path / "a" / "last.safetensors").read_bytes()
    for content in (good[: len(good) // 2], good[:4], b""):
        file = broken_file(tmp_path, content)
        for more in ([], ["--dim_from_weights"]):
            assert train(assets, tmp_path / "b", f"--network_weights={file}", *more, steps=1) == 2
            assert str(file) in capsys.readouterr().err.splitlines()[-1]
    assert train(assets, tmp_path / "x", model="sdxl", steps=1) == 0
    capsys.readouterr()
    foreign = tmp_path / "x" / "last.safetensors"
    assert train(assets, tmp_path / "b", f"--network_weights={foreign}", steps=1) == 2
    assert str(foreign) in capsys.readouterr().err
    assert not list((tmp_path / "b").glob("*.safetensors"))
