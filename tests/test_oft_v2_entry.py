"""networks.oft_v2: the layers, block sizes and files of sd-scripts' module of that name, and that module itself where
SD_SCRIPTS_PATH names a checkout that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import draw, randomise, sd_unet, sdxl_unet, text_encoder
from torch import Tensor, nn
from toy_models import toy

import networks.lora
import networks.oft_v2
from networks.files.codec import decode
from networks.files.merge import merged_weight
from networks.tensors.geometry import Geometry

HOST = os.environ.get("SD_SCRIPTS_PATH", "")


def triangle(size: int) -> int:
    return size * (size - 1) // 2


@pytest.mark.parametrize(
    ("width", "dim", "size"),
    [
        (320, 32, 32), (640, 32, 32), (768, 32, 32), (1280, 32, 32), (320, 30, 32), (320, 36, 32), (320, 37, 40),
        (12, 5, 4), (7, 3, 1), (7, 5, 7), (320, 500, 320), (1024, 24, 16), (1024, 25, 32), (1, 4, 1),
    ],
)  # fmt: skip
def test_sizes_of_blocks(width: int, dim: int, size: int) -> None:
    """The nearest divisor, the smaller of two; by hand from the trainer's rule."""
    unet = sd_unet()
    network = networks.oft_v2.create_network(1.0, dim, None, None, None, unet)
    layout = type(network.adapted_layers[0].adapter).layout(
        Geometry.of(nn.Linear(width, 8)),
        dim,
        train_on_input=True,
        dim_is_size=True,  # type: ignore[arg-type]
    )
    assert layout.shapes == {"blocks": (width // size, size, size)}


def test_files_are_those_of_the_trainer(tmp_path: Path) -> None:
    """One tensor a layer and no alpha; the width of a convolution is channels times positions."""
    unet, encoders = sdxl_unet(), [text_encoder(), text_encoder(True)]
    network = networks.oft_v2.create_network(1.0, 4, 1.0, None, encoders, unet, enable_conv="True")
    network.apply_to(encoders, unet)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    file = load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[2] for key in file} == {"oft_R.weight"}
    assert {key.partition("_")[2].partition("_")[0] for key in file} == {
        "unet",
        "te1",
        "te2",
    }
    shape = {key.partition(".")[0]: tuple(t.shape) for key, t in file.items()}
    assert shape["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == (
        16 // 4,
        triangle(4),
    )
    kernel = next(row for row in network.plan.trained if row.geometry.has_kernel)
    assert shape[kernel.saved_name] == (kernel.shape[1] * 9 // 4, triangle(4))


def test_the_default_is_32(tmp_path: Path) -> None:
    network = networks.oft_v2.create_network(1.0, None, None, None, None, toy("sdxl", shrink=8)["unet"])
    assert {row.dim for row in network.plan.trained} == {32}
    linear = next(row for row in network.plan.trained if row.shape[1] % 32 == 0)
    assert linear.layout.shapes["blocks"] == (linear.shape[1] // 32, 32, 32)


def rotated(W: Tensor, triangles: Tensor, size: int, conv: bool) -> Tensor:
    """By hand: R = 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of each block of columns; W R^T, of convolutions W R."""
    flat, parts = W.flatten(1).double(), []
    for n in range(flat.shape[1] // size):
        Q = torch.zeros(size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size, 1)
        Q[rows, columns] = triangles[min(n, len(triangles) - 1)].double()
        Q = Q - Q.T
        R = torch.eye(size, dtype=torch.float64) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
        parts.append(flat[:, n * size : (n + 1) * size] @ (R if conv else R.T))
    return torch.cat(parts, 1).reshape(W.shape)


@pytest.mark.parametrize("share", [False, True])
def test_it_acts_as_the_trainer_turns_its_files(share: bool, tmp_path: Path) -> None:
    unet = sd_unet()
    arguments = {"block_share": "True"} if share else {}
    network = networks.oft_v2.create_network(1.0, 4, None, None, None, unet, enable_conv="True", **arguments)
    network.apply_to(None, unet, False, True)
    randomise(network, 0.02)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    file = load_file(tmp_path / "a.safetensors")
    for row, layer in network.layers:
        triangles = file[f"{row.saved_name}.oft_R.weight"]
        assert len(triangles) == (1 if share else row.geometry.columns // 4)
        W = layer.whole_weight().detach()
        wanted = rotated(W, triangles, 4, row.geometry.is_conv)
        torch.testing.assert_close(layer.new_weight(W).double(), wanted, rtol=1e-4, atol=1e-5)
    pictured = draw(unet).detach()
    network.detach()
    again, _ = networks.oft_v2.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, unet)
    again.apply_to(None, unet, False, True)
    torch.testing.assert_close(draw(unet), pictured)


def test_a_file_of_the_trainer_by_its_keys() -> None:
    triangles = 0.05 * torch.randn(8, triangle(4))
    saved = decode({"lora_unet_x.oft_R.weight": triangles})[0]["lora_unet_x"]
    W = torch.randn(6, 32)
    torch.testing.assert_close(
        merged_weight(saved, W).double(),
        rotated(W, triangles, 4, False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_what_goes_with_it_alone() -> None:
    unet = sd_unet()
    for option in ("dim_is_size", "block_share"):
        with pytest.raises(ValueError, match=f"{option} goes with train_on_input=True alone"):
            networks.lora.plan(4, 1, None, unet, algo="diag-oft", **{option: "True"})
    other = networks.oft_v2.plan(4, 1, None, unet, algo="lora")  # as any entry then
    assert other.trained and {row.algo for row in other.trained} == {"lora"}
    assert {row.part for row in networks.oft_v2.plan(4, 1, text_encoder(), unet).trained} == {"unet", "text_encoder"}


READS = """
import sys
sys.path[:0] = sys.argv[1:3]
from safetensors.torch import load_file, save_file
from tiny_parts import sd_unet
from networks.oft_v2 import create_network_from_weights
unet = sd_unet()
file = load_file(sys.argv[3])
network, _ = create_network_from_weights(1.0, sys.argv[3], None, None, unet, weights_sd=file)
network.merge_to(None, unet, file, None, None)
save_file({key: t.contiguous() for key, t in unet.state_dict().items()}, sys.argv[4])
"""


if HOST and (Path(HOST) / "networks" / "oft_v2.py").is_file():

    def test_the_trainers_module_reads_our_file(tmp_path: Path) -> None:
        unet = sd_unet()
        network = networks.oft_v2.create_network(1.0, 4, None, None, None, unet, enable_conv="True")
        network.apply_to(None, unet, False, True)
        randomise(network, 0.02)
        ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        network.save_weights(str(ours), None, {})
        network.detach()
        network.merge_to(None, unet)
        arguments = [
            HOST,
            str(Path(__file__).parent),
            str(ours),
            str(theirs),
        ]
        subprocess.run(
            [sys.executable, "-c", READS, *arguments],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
        )
        for key, tensor in load_file(theirs).items():
            torch.testing.assert_close(tensor, unet.state_dict()[key], rtol=1e-4, atol=1e-5)
