"""Every algorithm in our trainer on the embedded emoji model: the held-out loss falls, and the file has it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from registry import data_of

from kohya_trainer import train as trainer
from networks.algos import ALGOS

EMOJI = Path(__file__).resolve().parents[1] / "scripts" / "emoji"
PICTURES, STEPS, DIM = 4, 4, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `style` and `heldout` with a few of the demo's pictures."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pictures")
    for kind in ("style", "heldout"):
        (folder / kind).mkdir()
        for picture in sorted((EMOJI / kind).glob("*.png"))[:PICTURES]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, folder / kind)
    return folder


def held_out_losses(pictures: Path, output: Path, steps: int, *more: str) -> list[float]:
    """Of a run with `more` arguments: at step 0, and after the last step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    code = trainer.main(
        [
            f"--pretrained_model_name_or_path={EMOJI / 'model'}",
            f"--train_data_dir={pictures / 'style'}",
            f"--validation_data_dir={pictures / 'heldout'}",
            f"--validate_every_n_steps={steps}",
            f"--max_train_steps={steps}",
            f"--train_batch_size={PICTURES}",
            "--network_module=networks.lora",
            "--network_train_unet_only",
            "--cache_latents",
            "--no_gradient_checkpointing",
            "--seed=1",
            f"--output_dir={output}",
            "--output_name=a",
            *more,
        ]
    )
    assert code == 0
    with (output / "a-loss.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("algo", ALGOS)
def test_loss_falls_and_the_file_has_it(algo: str, pictures: Path, tmp_path: Path) -> None:
    rate = f"--learning_rate={data_of(algo).learning_rate}"
    form = [rate, f"--network_dim={DIM}", f"--network_alpha={DIM}", "--network_args", f"algo={algo}"]
    before, after = held_out_losses(pictures, tmp_path / "first", STEPS, *form)
    assert after < 0.999 * before, f"{before} to {after}: tests/registry.py can give {algo} another learning_rate"
    file = tmp_path / "first" / "a.safetensors"
    # On from the file alone: before its first step it has the loss of the last one.
    from_file = [rate, f"--network_weights={file}", "--dim_from_weights", "--network_args", f"algo={algo}"]
    again = held_out_losses(pictures, tmp_path / "second", 1, *from_file)
    assert again[0] == pytest.approx(after, rel=1e-5)
