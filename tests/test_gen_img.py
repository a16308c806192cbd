"""The reference generator: same image in any batch, strengths, merging, prompt options, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from kohya_trainer import generate as generator
from kohya_trainer import train as trainer
from kohya_trainer.drawing.requests import ImageRequest, batches, parse_prompt_line

NETWORK = "networks.lora"


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Folders sd and sdxl, and an adapter for each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gen")
    tiny_models.make_sd(folder / "sd")
    tiny_models.make_sdxl(folder / "sdxl")
    tiny_models.make_images(folder / "images", 2)
    for model in ("sd", "sdxl"):
        code = trainer.main(
            [
                f"--pretrained_model_name_or_path={folder / model}",
                f"--train_data_dir={folder / 'images'}",
                f"--output_dir={folder}",
                f"--output_name={model}",
                f"--network_module={NETWORK}",
                "--network_dim=4",
                "--max_train_steps=3",
                "--learning_rate=0.2",
                "--seed=1",
            ]
        )
        assert code == 0
    return folder


def generate(assets: Path, output: Path, *more: str, model: str = "sd") -> int:
    return generator.main([f"--ckpt={assets / model}", f"--outdir={output}", "--steps=3", "--seed=5", "--debug", *more])


def with_network(assets: Path, model: str = "sd") -> list[str]:
    return ["--network_module", NETWORK, "--network_weights", str(assets / f"{model}.safetensors")]


def read(folder: Path) -> np.ndarray:
    """Images (N, H, W, 3), 0..255."""
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("im_*.png"))])


@pytest.mark.parametrize("sampler", [None, "euler_a"])
def test_an_image_does_not_depend_on_its_batch(assets, tmp_path, sampler):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --d 9\na red square --n blue\n")
    options = [f"--from_file={prompts}", "--images_per_prompt=2", *([f"--sampler={sampler}"] if sampler else [])]
    for size in ("1", "4"):
        assert generate(assets, tmp_path / size, f"--batch_size={size}", *options) == 0
    one, four = read(tmp_path / "1"), read(tmp_path / "4")
    assert one.shape == (6, 32, 32, 3)
    assert np.abs(one - four).max() <= 1  # a product's last bits may depend on the batch
    assert all(np.abs(one[0] - other).max() > 4 for other in one[1:])


def test_png_says_how_it_was_made(assets, tmp_path):
    prompt = "a cat --d 3 --w 40 --h 32 --l 2 --s 2 --n dog"
    assert generate(assets, tmp_path, "--prompt", prompt, "--network_mul", "0.5", *with_network(assets)) == 0
    image = Image.open(tmp_path / "im_000000.png")
    assert image.size == (40, 32)
    expected = {"prompt": "a cat", "negative-prompt": "dog", "seed": "3", "scale": "2.0", "steps": "2"}
    assert {key: image.text[key] for key in expected} == expected
    assert image.text["network-mul"] == "0.5" and image.text["network-0"] == "sd.safetensors"


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_applied_merged_and_pre_calculated_agree(assets, tmp_path, model):
    prompts, network = tmp_path / "prompts.txt", with_network(assets, model)
    prompts.write_text("a cat --am 0\na cat --am 1\na cat --am 0.5\na cat --am 0\n")
    assert generate(assets, tmp_path / "base", "--prompt=a cat", model=model) == 0
    for name in ("apply", "pre_calc"):
        flag = [] if name == "apply" else ["--network_pre_calc"]
        assert generate(assets, tmp_path / name, f"--from_file={prompts}", *network, *flag, model=model) == 0
    assert generate(assets, tmp_path / "merge", "--prompt=a cat", *network, "--network_merge", model=model) == 0
    base, applied, merged, calculated = (read(tmp_path / name) for name in ("base", "apply", "merge", "pre_calc"))
    assert (applied[0] == base[0]).all() and (applied[3] == base[0]).all()  # strength 0 is the base model, exactly
    assert np.abs(applied[1] - base[0]).max() > 8 and np.abs(applied[1] - applied[2]).max() > 4
    assert np.abs(merged[0] - applied[1]).max() <= 1
    assert np.abs(calculated - applied).max() <= 1
    assert (calculated[3] == calculated[0]).all()  # restored


def test_two_networks_add_up(assets, tmp_path):
    file = str(assets / "sd.safetensors")
    network = ["--network_module", NETWORK, NETWORK, "--network_weights", file, file]
    assert generate(assets, tmp_path / "a", "--prompt=a cat --am 0.25,0.5", *network) == 0
    assert generate(assets, tmp_path / "b", "--prompt=a cat", "--network_mul=0.75", *with_network(assets)) == 0
    assert np.abs(read(tmp_path / "a") - read(tmp_path / "b")).max() <= 1


def test_sheets_of_strengths_and_seeds(assets, tmp_path):
    """Two networks at 0.25 and 0.5 of each strength, two seeds; strength 0 is the base model to the last bit."""
    file = str(assets / "sd.safetensors")
    network = ["--network_module", NETWORK, NETWORK, "--network_weights", file, file, "--network_mul", "0.25", "0.5"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    code = generator.main(
        [f"--ckpt={assets / 'sd'}", f"--outdir={tmp_path / 'a'}", f"--from_file={prompts}", "--steps=3", *network]
        + ["--strengths", "0", "2", "--seeds", "5", "6", "--batch_size=3"]
    )
    assert code == 0
    images = read(tmp_path / "a")
    assert len(images) == 8 and len(list((tmp_path / "a").glob("grid_*.png"))) == 2
    assert generate(assets, tmp_path / "base", "--prompt=a cat") == 0
    assert generate(assets, tmp_path / "strong", "--prompt=a cat", "--network_mul=1.5", *with_network(assets)) == 0
    assert np.abs(images[0] - read(tmp_path / "base")[0]).max() <= 1
    assert np.abs(images[2] - read(tmp_path / "strong")[0]).max() <= 1
    sheet = np.asarray(Image.open(tmp_path / "a" / "grid_000001.png").convert("RGB")).astype(int)
    for image in images[4:]:
        big = image.repeat(3, 0).repeat(3, 1)  # 32 pixels are shown as 96
        windows = np.lib.stride_tricks.sliding_window_view(sheet, big.shape)[:, :, 0]
        at = np.argwhere((windows[..., 0, 0, :] == big[0, 0]).all(-1))
        assert any((sheet[y : y + 96, x : x + 96] == big).all() for y, x in at)


def test_with_and_without(assets, tmp_path):
    assert generate(assets, tmp_path, "--prompt=a cat", "--compare", *with_network(assets), "--network_pre_calc") == 0
    without, drawn = read(tmp_path)
    assert generate(assets, tmp_path / "base", "--prompt=a cat") == 0
    assert (without == read(tmp_path / "base")[0]).all() and np.abs(drawn - without).max() > 8


DEFAULTS = ImageRequest("", "bad", 1, 64, 32, 20, 7.5)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", {"prompt": "a cat"}),
        ("a -- cat--like --d 4", {"prompt": "a -- cat--like", "seed": 4}),
        ("--n ugly, bad --l 2.5 --s 4", {"prompt": "", "negative": "ugly, bad", "scale": 2.5, "steps": 4}),
        ("x --w 8 --h 16 --am 0.5,1", {"prompt": "x", "width": 8, "height": 16, "multipliers": (0.5, 1.0)}),
    ],
)
def test_prompt_line(line, expected):
    request = parse_prompt_line(line, DEFAULTS)
    assert {key: getattr(request, key) for key in expected} == expected
    kept = {key: value for key, value in vars(DEFAULTS).items() if key not in expected and key != "prompt"}
    assert {key: getattr(request, key) for key in kept} == kept


def test_batches_keep_order_and_settings():
    lines = ["a", "b", "c", "d --s 3", "e --s 3", "f"]
    requests = [parse_prompt_line(line, DEFAULTS) for line in lines]
    assert ["".join(item.prompt for item in batch) for batch in batches(requests, 2)] == ["ab", "c", "de", "f"]


BAD_INPUT = {
    "no model": (["--ckpt={tmp}/none", "--prompt=x"], "does not exist"),
    "no prompt": ([], "either --prompt"),
    "two prompts": (["--prompt=x", "--from_file=y"], "either --prompt"),
    "no prompt file": (["--from_file={tmp}/none"], "no such file"),
    "prompt option": (["--prompt=x --steps 3"], "unknown option --steps"),
    "prompt value": (["--prompt=x --s many"], "Give a number"),
    "size": (["--prompt=x", "--W=33"], "multiples of 4"),
    "weights missing": (["--prompt=x", "--network_module", NETWORK], "1 --network_module but 0"),
    "weights are a folder": (["--prompt=x", "--network_module", NETWORK, "--network_weights={assets}"], "is a folder"),
    "args without =": (
        ["--prompt=x", "--network_module", NETWORK, "--network_weights={assets}/sd.safetensors", "--network_args", "a"],
        '"a=VALUE"',
    ),
    "too many strengths": (["--prompt=x", "--network_mul", "1", "2"], "2 values for 0"),
    "sheet of nothing": (["--prompt=x", "--compare"], "Add --network_module"),
    "seeds and seed": (["--prompt=x", "--seeds", "1", "2", "--seed=1"], "takes the place"),
    "no seconds": (["--prompt=x --sec 0"], "--sec above 0"),
    "strengths of nothing": (["--prompt=x --am 1"], "1 values for 0 networks"),
    "other model's weights": (
        ["--prompt=x", "--network_module", NETWORK, "--network_weights={assets}/sdxl.safetensors"],
        "of this architecture",
    ),
    "output is a file": (["--prompt=x", "--outdir={assets}/sd.safetensors"], "cannot write there"),
    "misspelt option": (["--prompt=x", "--network_mull=1"], "Did you mean --network_mul?"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message(assets, tmp_path, capsys, case):
    options, message = BAD_INPUT[case]
    filled = [option.format(tmp=tmp_path, assets=assets) for option in options]
    assert generator.main([f"--ckpt={assets / 'sd'}", f"--outdir={tmp_path}", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("error: ") == 1
    assert not list(tmp_path.glob("*.png"))
