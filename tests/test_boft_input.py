"""BOFT on the input side: files of PEFT and of sd-scripts' networks.boft turn a layer as those programs turn it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file
from tiny_parts import sd_unet
from torch import Tensor, nn

import networks.lora
from networks.files import codec
from networks.files.adapter_file import Naming, open_adapter
from networks.files.merged import merged_weight

NAME = "lora_unet_x"
LAYERS = {"Linear": lambda: nn.Linear(12, 30), "Conv2d": lambda: nn.Conv2d(12, 30, 3)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(new: Tensor, wanted: Tensor, base: Tensor, tolerance: float) -> None:
    assert float((new - wanted).norm()) < tolerance * float((wanted - base).norm())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_a_file_of_peft(kind: str, tmp_path: Path) -> None:
    """Its own merge; the factors of a convolution are [1, O] there."""
    model = nn.Sequential(LAYERS[kind]())
    base = model[0].weight.detach().clone()
    config = BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"boft_R", "boft_s"}
    (saved,) = open_adapter(tmp_path, Naming()).all_read().layers.values()
    close(merged_weight(saved, base), wrapped.merge_and_unload()[0].weight.detach(), base, 1e-5)


def sd_scripts(R: Tensor, s: Tensor, W: Tensor) -> Tensor:
    """networks.boft of sd-scripts: stages of PEFT's order, whatever their number."""
    stages, count, size, _ = R.shape
    n, one, turn = count * size, torch.eye(size, dtype=W.dtype), torch.eye(count * size, dtype=W.dtype)
    for i in range(stages):
        order = BOFTLayer.block_butterfly_perm(None, n, count // 2**i, size // 2, stages - 1)
        P = torch.eye(n, dtype=W.dtype)[order]
        skew = [(B - B.T) / 2 for B in R[i]]
        turn = P @ torch.block_diag(*((one - Q) @ torch.linalg.inv(one + Q) for Q in skew)) @ P.T @ turn
    return (s * (turn @ W.flatten(1).T).T).reshape(W.shape)


@pytest.mark.parametrize("shape", [(10, 48), (10, 16, 3, 1), (6, 16, 1, 1)], ids=str)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_file_of_sd_scripts(shape: tuple[int, ...], stages: int) -> None:
    W = torch.randn(*shape, dtype=torch.float64)
    size = 4 if W[0].numel() == 48 else 2
    R = torch.randn(stages, W[0].numel() // size, size, size, dtype=torch.float64)
    s = 1 + torch.randn(shape[0], 1, dtype=torch.float64) / 4
    layers, unknown = codec.decode({f"{NAME}.boft_R": R, f"{NAME}.boft_s": s})
    assert not unknown
    close(merged_weight(layers[NAME], W), sd_scripts(R, s, W), W, 1e-12)
    half = W + 0.5 * (sd_scripts(R, s, W) - W)
    close(merged_weight(layers[NAME], W, 0.5), half, W, 1e-12)


def test_a_network_of_it_trains_and_saves_the_same_keys(tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    unet = sd_unet()
    module = unet.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    O, I = module.weight.shape
    key = f"lora_unet_{layer.replace('.', '_')}"
    given = {f"{key}.boft_R": torch.randn(2, I // 4, 4, 4) / 4, f"{key}.boft_s": 1 + torch.randn(O, 1) / 8}
    W = module.weight.detach().clone()
    network, _ = networks.lora.create_network_from_weights(1.0, None, None, None, unet, weights_sd=given)
    network.apply_to(None, unet, False, True)
    x = torch.randn(3, I)
    wanted = sd_scripts(*(t.double() for t in (given[f"{key}.boft_R"], given[f"{key}.boft_s"], W)))
    torch.testing.assert_close(module(x), (x.double() @ wanted.T + module.bias).float(), rtol=1e-4, atol=1e-4)
    module(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    saved = load_file(tmp_path / "a.safetensors")
    assert saved.keys() == given.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(saved[name], tensor)


def test_blocks_that_go_with_no_number_of_stages_are_named() -> None:
    layers, _ = codec.decode({f"{NAME}.boft_R": torch.zeros(3, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"boft_R \(3, 3, 4, 4\) does not fit a weight of \(5, 12\)"):
        merged_weight(layers[NAME], torch.zeros(5, 12))
