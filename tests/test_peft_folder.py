"""save_format=peft: the folder beside the file, read by PEFT and by diffusers themselves, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import randomise, sd_unet, text_encoder
from torch import Tensor, nn

import networks.lora

KINDS: dict[str, tuple[dict[str, str], str]] = {
    "lora": ({"use_rslora": "True"}, "LORA"),
    "dora": ({"use_dora": "True"}, "LORA"),
    "ranks": ({"network_reg_dims": "{'.*to_k.*': 3}", "network_reg_alphas": "{'.*to_k.*': 2}"}, "LORA"),
    "dylora": ({"algo": "dylora"}, "LORA"),
    "tlora": ({"algo": "tlora"}, "LORA"),
    "glora": ({"algo": "glora"}, "LORA"),
    "loha": ({"algo": "loha"}, "LOHA"),
    "loha dora": ({"algo": "loha", "use_dora": "True"}, "LORA"),
    "lokr": ({"algo": "lokr"}, "LOKR"),
    "lokr factor": ({"algo": "lokr", "factor": "4"}, "LOKR"),
    "lokr whole": ({"algo": "lokr", "full_matrix": "True"}, "LOKR"),
    "lokr both": ({"algo": "lokr", "decompose_both": "True"}, "LOKR"),
}
OF_LINEARS = r".*attn[12]\.to_(q|k|v|out\.0)|.*ff\.net\..*"


def flux() -> nn.Module:
    """Its single blocks' proj_out ends as the name of a layer outside the blocks does."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        pooled_projection_dim=16, in_channels=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def network_of(model: nn.Module, dim: int = 2, **kwargs: str) -> Any:
    network = networks.lora.create_network(1.0, dim, 1, None, None, model, **kwargs)
    network.apply_to(None, model, False, True)
    randomise(network)
    return network.double()


def new_weights(network: Any) -> dict[str, Tensor]:
    """The model's own layer -> W', in float64."""
    paths = {module: name for root in network._roots.values() for name, module in root.named_modules()}
    found = {}
    for layer in network.adapted_layers:
        weight = layer.new_weight(layer.whole_weight().double()).detach()
        found |= {paths[site.module]: site.select_rows(weight) for site in layer.sites}
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, weight in wanted.items():
        torch.testing.assert_close(
            found[f"{name}.weight"], weight, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("make", "name"),
    [(make, name) for make in (sd_unet, flux) for name in KINDS if (make, name) != (flux, "lokr whole")],
)
def test_peft_loads_it(make: Any, name: str, tmp_path: Path) -> None:
    kwargs, kind = KINDS[name]
    model = make().double().requires_grad_(False)
    small = {} if make is flux else {"only_patterns": OF_LINEARS}
    network = network_of(model, 1 if "loha" in name else 2, save_format="peft", **small, **kwargs)
    wanted = new_weights(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    folder = tmp_path / "a-peft"
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a-peft"}
    settings = json.loads((folder / "adapter_config.json").read_text())
    fused = make is flux and kind != "LORA" and name.startswith("lokr")  # rows of a Kronecker product may be none
    assert settings["peft_type"] == ("LORA" if fused else kind)
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    loaded = peft.PeftModel.from_pretrained(make().double(), folder)
    assert_same(dict(loaded.merge_and_unload().named_parameters()), wanted)
    portable = load_file(tmp_path / "a.safetensors")
    assert all(key.startswith("lora_unet_") for key in portable)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": "True"}, {"algo": "lokr"}], ids=str)
def test_convolutions(kwargs: dict[str, str], tmp_path: Path) -> None:
    model = sd_unet().double().requires_grad_(False)
    only = r".*(conv1|conv_shortcut|proj_in|downsamplers\.0\.conv)"
    network = network_of(model, 1, save_format="peft", conv_dim="1", only_patterns=only, **kwargs)
    wanted = new_weights(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    loaded = peft.PeftModel.from_pretrained(sd_unet().double(), tmp_path / "a-peft")
    assert_same(dict(loaded.merge_and_unload().named_parameters()), wanted)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": "True"}, {"network_reg_dims": "{'.*to_k.*': 3}"}], ids=str)
def test_diffusers_loads_it(kwargs: dict[str, str], tmp_path: Path) -> None:
    """By `load_lora_adapter`, which looks at the tensors alone."""
    model = flux().double().requires_grad_(False)
    network = network_of(model, save_format="peft", **kwargs)
    wanted = new_weights(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    twin: Any = flux().double()
    twin.load_lora_adapter(tmp_path / "a-peft", prefix="base_model.model", weight_name="adapter_model.safetensors")
    twin.fuse_lora()
    found = {name.replace(".base_layer.", "."): p for name, p in twin.named_parameters()}
    assert_same(found, wanted)


def test_text_encoders_have_folders_of_their_own(tmp_path: Path) -> None:
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 2, 1, None, encoder, unet, save_also="peft")
    network.apply_to(encoder, unet, True, True)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    files = {str(path.relative_to(tmp_path)).replace("\\", "/") for path in tmp_path.rglob("*.*") if path.is_file()}
    config, tensors = "adapter_config.json", "adapter_model.safetensors"
    below = {f"a-peft/{stem}{name}" for stem in ("", "text_encoder/") for name in (config, tensors)}
    assert files == {"a.safetensors", *below}
    layers = {key.partition(".lora_")[0] for key in load_file(tmp_path / "a-peft" / "text_encoder" / tensors)}
    assert "base_model.model.text_model.encoder.layers.0.self_attn.q_proj" in layers


def test_kronecker_factors_of_several_numbers_are_loras(tmp_path: Path) -> None:
    """PEFT makes all factors from one number: factors that no number gives are a LoRA."""
    model = sd_unet().double().requires_grad_(False)
    network = network_of(
        model, 1, save_format="peft", algo="lokr", unbalanced_factorization="True", only_patterns=r".*ff\.net\..*"
    )
    wanted = new_weights(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    assert json.loads((tmp_path / "a-peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = peft.PeftModel.from_pretrained(sd_unet().double(), tmp_path / "a-peft")
    assert_same(dict(loaded.merge_and_unload().named_parameters()), wanted)
