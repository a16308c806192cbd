"""scripts/merge.py with the file of every algorithm: the merged checkpoint computes what the attached network does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close
from quantised_layers import FLOAT8
from safetensors.torch import load_file, save_file
from test_oft_entries import rotated
from tiny_parts import inputs, sd_unet
from tiny_parts import randomise as randomise_network
from torch import Tensor, nn

import networks.lora
import networks.oft
from networks.algos import ALGOS
from networks.cli import merge as script

MORE: dict[str, tuple[Any, dict[str, str]]] = {
    "oft entry": (networks.oft, {"enable_all_linear": "True"}),
    "oft input": (networks.lora, {"algo": "diag-oft", "train_on_input": "True", "constraint": "0.0078125"}),
    "oft rescaled": (networks.lora, {"algo": "diag-oft", "rescaled": "True"}),
    "ia3 input": (networks.lora, {"algo": "ia3", "train_on_input": "True"}),
    "lokr whole": (networks.lora, {"algo": "lokr", "full_matrix": "True"}),
    "loha DoRA": (networks.lora, {"algo": "loha", "use_dora": "True", "conv_dim": "4"}),
    "norms too": (networks.lora, {"train_norm": "True"}),
}
CASES = {algo: (networks.lora, {"algo": algo}) for algo in ALGOS} | MORE

TIMED = {algo for algo, cls in ALGOS.items() if cls.spec.timed}  # they act by the timestep while they are attached


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def trained(case: str, unet: nn.Module) -> Any:
    entry, options = CASES[case]
    network = entry.create_network(0.7, 16, 8, None, None, unet, **options)
    network.apply_to(None, unet, False, True)
    randomise_network(network, 0.03)
    return network.eval()


def merged(model: dict[str, Tensor], network: Any, folder: Path) -> dict[str, Tensor]:
    """The checkpoint with the network's file, by the script."""
    save_file(model, folder / "model.safetensors")
    network.save_weights(str(folder / "adapter.safetensors"), None, {})
    paths = [str(folder / name) for name in ("model.safetensors", "adapter.safetensors=0.7", "merged.safetensors")]
    assert script.main([*paths[:2], "--out", paths[2], "--strict"]) == 0
    return load_file(folder / "merged.safetensors")


@torch.no_grad()
def draw(unet: nn.Module) -> Tensor:
    latents, times, text = inputs()
    return unet(latents.double(), times, text.double()).sample


@pytest.mark.parametrize("case", sorted(CASES.keys() - TIMED))
def test_a_merged_checkpoint_computes_what_the_network_does(case: str, tmp_path: Path) -> None:
    unet = sd_unet().double()
    plain, state = draw(unet), {key: t.clone() for key, t in unet.state_dict().items()}
    network = trained(case, unet).double()
    live = draw(unet)
    network.detach()
    assert float((live - plain).norm()) > 1e-6 * float(plain.norm())
    found = merged(state, network, tmp_path)
    assert found.keys() == state.keys()
    unet.load_state_dict(found)
    assert_close(draw(unet) - plain, live - plain, case, 1e-7)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if "norm" not in case])
def test_into_fp8_weights_they_are_rounded_once(case: str, scaled: bool, tmp_path: Path) -> None:
    """The weights that the layers stand for, with the network's own change, within half a step of fp8."""
    unet, fp8 = sd_unet(), FLOAT8["e4m3fn"]
    network = trained(case, unet)
    network.detach()
    state = {key: t.clone() for key, t in unet.state_dict().items()}
    wanted: dict[str, Tensor] = {}
    for row, layer in network.layers:
        key, W = f"{row.dotted_name}.weight", layer.base.weight.detach()
        scale = W.abs().amax() / 448 if scaled else torch.tensor(1.0)
        state[key] = (W / scale).to(fp8)
        if scaled:
            state[f"{row.dotted_name}.scale_weight"] = scale.reshape(1)
        wanted[key] = layer.new_weight(state[key].float() * scale).detach().double()
    found = merged(state, network, tmp_path)
    for key, expected in wanted.items():
        scale = found[key.replace("weight", "scale_weight")].double() if scaled else 1.0
        step = torch.maximum(expected.abs() * 2**-4, torch.full_like(expected, 2**-10) * scale) * 1.001
        assert ((found[key].float().double() * scale - expected).abs() <= step).all(), key
        assert found[key].dtype == fp8


def test_a_split_rotation_into_a_checkpoint_that_has_the_projections_apart(tmp_path: Path) -> None:
    """A file of sd-scripts' oft_flux on diffusers' FLUX.1: each projection has a rotation and a limit of its own."""
    head, sizes = "single_transformer_blocks.3.", {"attn.to_q": 16, "attn.to_k": 16, "attn.to_v": 16, "proj_mlp": 64}
    model = {f"{head}{name}.weight": torch.randn(size, 16) for name, size in sizes.items()}
    blocks = [torch.randn(4, size // 4, size // 4) * 0.2 for size in sizes.values()]
    file = {f"oft_unet_single_blocks_3_linear1.oft_blocks.{i}": t for i, t in enumerate(blocks)}
    file["oft_unet_single_blocks_3_linear1.alpha"] = torch.tensor(0.03)
    save_file(model, tmp_path / "model.safetensors")
    save_file(file, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = [str(tmp_path / "model.safetensors"), f"{tmp_path / 'adapter.safetensors'}=0.5", "--out", str(out)]
    assert script.main([*arguments, "--strict"]) == 0
    found = load_file(out)
    for (name, W), B in zip(model.items(), blocks, strict=True):
        alpha = float(torch.tensor(0.03))
        assert_close(found[name].double(), rotated(B.double(), W.double(), alpha, 0.5), name, 1e-6)
