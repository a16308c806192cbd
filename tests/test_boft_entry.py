"""networks.boft: the layers, block sizes and files of sd-scripts' module of that name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import draw, randomise, sd_unet, text_encoder

import networks.boft


def test_files_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Rotations [stages, blocks, size, size] of the columns and a factor for each row, nothing else."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.boft.create_network(1.0, None, 1.0, None, encoder, unet, enable_conv="True")
    network.apply_to(encoder, unet)
    randomise(network, 0.02)
    pictured = draw(unet).detach()
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    file = load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[2] for key in file} == {"boft_R", "boft_s"}
    assert {row.part for row in network.plan.trained} == {"unet", "text_encoder"}
    for row in network.plan.trained:
        columns = row.shape[1] * (row.geometry.kernel_size if row.geometry.has_kernel else 1)
        assert file[f"{row.saved_name}.boft_R"].shape == (1, columns // 4, 4, 4), row.saved_name
        assert file[f"{row.saved_name}.boft_s"].shape == (row.shape[0], 1)
    again, _ = networks.boft.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, encoder, unet)
    again.apply_to(encoder, unet)
    torch.testing.assert_close(draw(unet), pictured)


@pytest.mark.parametrize(("stages", "blocks"), [("1", 4), ("2", 4), ("3", 4)])
def test_stages(stages: str, blocks: int) -> None:
    """By the trainer's name for their number."""
    plan = networks.boft.plan(4, 1, None, sd_unet(), boft_n_butterfly_factor=stages)
    row = next(row for row in plan.trained if row.shape[1] == 16)
    assert row.layout.shapes["blocks"] == (int(stages), blocks, 4, 4)
    assert all(len(row.layout.shapes["blocks"]) == 4 for row in plan.trained)
