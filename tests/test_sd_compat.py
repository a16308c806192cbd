"""What sd-scripts' own files import from the modules that ours replace."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_parts import sd_unet
from torch import Tensor, nn

ENTRIES = (
    "lora", "loha", "lokr", "lora_fa", "lora_flux", "lora_sd3", "lora_lumina", "lora_hunyuan_image", "lora_anima",
)  # fmt: skip
CLIP = ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"]
T5 = ["T5Attention", "T5DenseGatedActDense"]
SD = {
    "UNET_TARGET_REPLACE_MODULE": ["Transformer2DModel"],
    "UNET_TARGET_REPLACE_MODULE_CONV2D_3X3": ["ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "TEXT_ENCODER_TARGET_REPLACE_MODULE": CLIP,
    "LORA_PREFIX_UNET": "lora_unet",
    "LORA_PREFIX_TEXT_ENCODER": "lora_te",
    "LORA_PREFIX_TEXT_ENCODER1": "lora_te1",
    "LORA_PREFIX_TEXT_ENCODER2": "lora_te2",
    "NUM_OF_BLOCKS": 12,
    "NUM_OF_MID_BLOCKS": 1,
    "SDXL_NUM_OF_BLOCKS": 9,
    "SDXL_NUM_OF_MID_BLOCKS": 3,
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "lora": SD,
    "loha": SD,
    "lokr": SD,
    "lora_fa": SD,
    "lora_flux": {
        "FLUX_TARGET_REPLACE_MODULE_DOUBLE": ["DoubleStreamBlock"],
        "FLUX_TARGET_REPLACE_MODULE_SINGLE": ["SingleStreamBlock"],
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": CLIP + T5,
        "LORA_PREFIX_FLUX": "lora_unet",
        "LORA_PREFIX_TEXT_ENCODER_CLIP": "lora_te1",
        "LORA_PREFIX_TEXT_ENCODER_T5": "lora_te3",
    },
    "lora_sd3": {
        "SD3_TARGET_REPLACE_MODULE": ["SingleDiTBlock"],
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": CLIP + T5,
        "LORA_PREFIX_SD3": "lora_unet",
        "LORA_PREFIX_TEXT_ENCODER_CLIP_L": "lora_te1",
        "LORA_PREFIX_TEXT_ENCODER_CLIP_G": "lora_te2",
        "LORA_PREFIX_TEXT_ENCODER_T5": "lora_te3",
    },
    "lora_lumina": {
        "LUMINA_TARGET_REPLACE_MODULE": ["JointTransformerBlock", "FinalLayer"],
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": [
            "Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP",
        ],
        "LORA_PREFIX_LUMINA": "lora_unet",
        "LORA_PREFIX_TEXT_ENCODER": "lora_te",
    },
    "lora_hunyuan_image": {
        "TARGET_REPLACE_MODULE_DOUBLE": ["MMDoubleStreamBlock"],
        "TARGET_REPLACE_MODULE_SINGLE": ["MMSingleStreamBlock"],
        "LORA_PREFIX_HUNYUAN_IMAGE_DIT": "lora_unet",
    },
    "lora_anima": {
        "ANIMA_TARGET_REPLACE_MODULE": ["Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"],
        "ANIMA_ADAPTER_TARGET_REPLACE_MODULE": ["LLMAdapterTransformerBlock"],
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": [
            "Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2",
        ],
        "LORA_PREFIX_ANIMA": "lora_unet",
        "LORA_PREFIX_TEXT_ENCODER": "lora_te",
    },
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_names(entry: str) -> None:
    module = importlib.import_module(f"networks.{entry}")
    for name, value in CONSTANTS[entry].items():
        found = getattr(module.LoRANetwork, name)
        if isinstance(value, list):  # classes of diffusers may follow those of the trainer
            found = found[: len(value)]
        assert found == value, name
    assert issubclass(module.LoRAInfModule, module.LoRAModule)
    assert module.create_network and module.create_network_from_weights
    assert callable(module.merge_weights_to_tensor)


def test_each_entry_makes_networks_of_its_own_class() -> None:
    lora, lokr = (importlib.import_module(f"networks.{name}") for name in ("lora", "lokr"))
    network = lora.create_network(1.0, 4, 1, None, None, sd_unet())
    assert isinstance(network, lora.LoRANetwork) and not isinstance(network, lokr.LoRANetwork)
    assert pickle.loads(pickle.dumps(lora.LoRANetwork)) is lora.LoRANetwork
    assert type(copy.deepcopy(network)) is lora.LoRANetwork


LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (3, 10)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
}


def randomised(layer: nn.Module, **options: Any) -> Any:
    from networks.lora_flux import LoRAModule

    module = LoRAModule("lora_unet_x", layer, multiplier=0.7, lora_dim=4, alpha=2, **options)
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    return module


def update(layer: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The change of the output by the rule of plain LoRA: strength times alpha / rank times up after down."""
    down, up = (state[f"lora_{side}.weight"].to(x.dtype) for side in ("down", "up"))
    if isinstance(layer, nn.Conv2d):
        change = F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)
    else:
        change = x @ down.T @ up.T
    return change * 0.7 * float(state["alpha"]) / down.shape[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_single_layer(kind: str) -> None:
    """Keys, output, switching off, and loading back."""
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    base = layer(x)
    module = randomised(layer).double()
    state = module.state_dict()
    assert {key: value.shape[0] for key, value in state.items() if value.dim()} == {
        "lora_down.weight": 4,
        "lora_up.weight": 6,
    }
    assert float(state["alpha"]) == 2
    module.apply_to()
    torch.testing.assert_close(layer(x), base + update(layer, state, x), rtol=1e-9, atol=1e-9)
    module.enabled = False
    assert torch.equal(layer(x), base)
    module.enabled, module.multiplier = True, 0.0
    assert torch.equal(layer(x), base)
    module.detach()
    other = randomised(make().double()).double()
    other.load_state_dict({**state, "alpha": torch.tensor(8.0)})
    assert other.scale == 2.0 and torch.equal(other.state_dict()["lora_up.weight"], state["lora_up.weight"])
    assert other.load_state_dict({}, strict=False).missing_keys == ["lora_down.weight", "lora_up.weight"]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_single_layer_for_inference(kind: str) -> None:
    from networks.lora_flux import LoRAInfModule

    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    base, before = layer(x), layer.weight.detach().clone()
    state = randomised(layer).state_dict()
    module = LoRAInfModule("lora_unet_x", layer, 0.7, 4, 1, dropout=0.9)
    module.merge_to(state, None, None)
    torch.testing.assert_close(layer(x), base + update(layer, state, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.get_weight().double(), layer.weight - before, rtol=1e-6, atol=1e-6)
    half = module.get_weight(0.35)
    torch.testing.assert_close(2 * half, module.get_weight())


def test_a_network_of_another_program(tmp_path: Path) -> None:
    """Built from our layers as sd-scripts' classes build theirs: saved and loaded as children of a plain module."""

    class Theirs(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            for number, layer in enumerate(layers):
                self.add_module(f"lora_unet_{number}", randomised(layer))

    network = Theirs([nn.Linear(10, 6), nn.Linear(6, 10)])
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    keys = {f"lora_unet_{n}.{suffix}" for n in (0, 1) for suffix in ("lora_down.weight", "lora_up.weight", "alpha")}
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == keys
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    network.load_state_dict(tensors)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("option", [{"split_dims": [3, 3]}, {"ggpo_beta": 0.1, "ggpo_sigma": 0.1}, {"unit": 2}])
def test_options_of_a_whole_network_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"lora_unet_x: {next(iter(option))} needs a network of ours"):
        randomised(nn.Linear(10, 6), **option)
    with pytest.raises(ValueError, match="Embedding is neither"):
        randomised(nn.Embedding(3, 4))
