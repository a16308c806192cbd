"""diffusers' classes of the trainers' models: which rows of which trainer's layer each of their layers holds.

The judge is diffusers' own conversion of checkpoints: the trainers' weights are handed to it with every row numbered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from registry_archs import RELEASED, SPECS, data_of, is_unet, release_of
from test_arch_names import trainer_plan
from tiny_parts import randomise
from torch import Tensor, nn
from toy_models import Recorded, recorded

import networks.lora
from networks.models.skeleton import skeleton
from networks.plan.walk import candidates

CASES = [arch for arch in RELEASED if not is_unet(arch)]  # the UNets are in test_arch_names.py
CONVERTED = [arch for arch in CASES if data_of(arch).conversion]


def linears(arch: str) -> list[Recorded]:
    """The layers of the trainer's denoiser."""
    part = SPECS[arch].denoiser.name
    return [entry for entry in recorded(arch) if entry.part == part and entry.shape]


def meta_model(arch: str) -> nn.Module:
    return skeleton(release_of(arch)).unet


def found(arch: str, model: nn.Module) -> dict[str, Any]:
    return {c.trainer_name: c for c in candidates(SPECS[arch].denoiser, model)}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("arch", CASES)
def test_the_same_layers_are_trained_under_the_same_names(arch: str) -> None:
    model, spec = meta_model(arch), SPECS[arch]
    plan = importlib.import_module(f"networks.{spec.entry}").plan
    ours = {row.saved_name: row.shape for row in plan(4, 1, None, model).trained}
    theirs = {entry.saved: entry.shape for entry in linears(arch)}
    assert ours.items() <= theirs.items() and len(ours) in spec.usual
    switched_on = {switch.argument: str(switch.trained_if) for switch in spec.switches}
    widest = {row.saved_name for row in plan(4, 1, None, model, **switched_on).trained}
    theirs_widest = trainer_plan(arch, **switched_on).trained
    assert widest == {row.saved_name for row in theirs_widest if row.part == spec.denoiser.name}


@pytest.mark.parametrize("arch", [arch for arch in CASES if SPECS[arch].extra_dims])
def test_layers_outside_the_blocks_have_the_trainers_names(arch: str) -> None:
    """So that in_dims, emb_dims and embedder_dims work on these classes too."""
    spec, names = SPECS[arch], found(arch, meta_model(arch))
    for _, expressions in spec.extra_dims:
        wanted = {entry.dotted for entry in linears(arch) if spec.extra_of(entry.dotted)}
        assert expressions and wanted <= names.keys()


@pytest.mark.parametrize("arch", CONVERTED)
def test_rows_are_where_diffusers_conversion_puts_them(arch: str) -> None:
    convert, start, tagged = data_of(arch).conversion, 0, {}
    of_adapter = convert.startswith("_")  # diffusers converts only adapters of this model: their trained layers
    for entry in linears(arch):
        if of_adapter and entry.saved == "-":
            continue
        rows = torch.arange(start, start + entry.shape[0], dtype=torch.float64)
        tagged[entry.dotted], start = rows[:, None], start + entry.shape[0]
    converted = (converted_adapter if of_adapter else converted_checkpoint)(convert, tagged)
    seen = 0
    for name, candidate in found(arch, meta_model(arch)).items():
        if name not in tagged or name.startswith(
            "llm_adapter."
        ):  # in diffusers a model of its own, as the plan adds it
            continue
        own = candidate.own_names or (candidate.dotted_name,)
        whole = torch.full_like(tagged[name], -1)
        for dotted, (_, pieces) in zip(own, candidate.bases, strict=True):
            rows, at = converted[f"{dotted}.weight"], 0
            for first, last in pieces or ((0, len(whole)),):
                whole[first:last] = rows[at : at + last - first]
                at += last - first
            assert at == len(rows), dotted
        assert torch.equal(whole, tagged[name]), name
        seen += 1
    assert seen >= min(SPECS[arch].usual)


def converted_checkpoint(function: str, tagged: dict[str, Tensor]) -> dict[str, Tensor]:
    convert: Callable[..., dict[str, Tensor]] = getattr(single_file_utils, function)
    return convert(_Lenient({f"{name}.weight": rows.clone() for name, rows in tagged.items()}), config={})


def converted_adapter(function: str, tagged: dict[str, Tensor]) -> dict[str, Tensor]:
    convert: Callable[..., dict[str, Tensor]] = getattr(lora_conversion_utils, function)
    down = {f"{name}.lora_A.weight": torch.ones(1, 1) for name in tagged}
    found = convert(down | {f"{name}.lora_B.weight": rows.clone() for name, rows in tagged.items()})
    ends = "transformer.", ".lora_B.weight"
    return {f"{k.removeprefix(ends[0]).removesuffix(ends[1])}.weight": v for k, v in found.items()}


class _Lenient(dict):  # type: ignore[type-arg]
    """A checkpoint in which everything that we do not record (biases, norms, embeddings) is there, too."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.rows = {name: len(tensor) for name, tensor in tensors.items()}

    def pop(self, key: str, *default: Any) -> Any:
        if key in self or default:
            return super().pop(key, *default)
        return torch.zeros(self.rows.get(key.replace(".bias", ".weight"), 12))


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_a_file_trained_on_diffusers_classes_is_the_trainers(algo: str, tmp_path: Path) -> None:
    """FLUX.1, tiny: update of the fused layer, as the trainer's class would apply it, on each of diffusers' layers."""
    torch.manual_seed(0)
    options = {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 6, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    model = diffusers.FluxTransformer2DModel(**options)
    x = {
        "hidden_states": torch.randn(1, 5, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 6),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(5, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    plain = model(**x).sample.detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    network = networks.lora.create_network(1.0, 2, 1, None, None, model, algo=algo)
    network.apply_to(None, model, False, True)
    randomise(network)
    network.train()
    y = model(**x).sample
    y.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert not torch.allclose(y, plain)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.detach()
    assert torch.equal(model(**x).sample, plain)
    loaded, tensors = networks.lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, None, model, for_inference=True
    )
    loaded.merge_to(None, model, tensors, torch.float32, "cpu")
    torch.testing.assert_close(model(**x).sample, y.detach(), atol=1e-4, rtol=1e-3)
    layer = next(layer for row, layer in loaded.layers if row.saved_name.endswith("linear1"))
    delta = layer.adapter.delta().detach() * layer.scale
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        name = f"single_transformer_blocks.0.{name}.weight"
        rows = delta[16 * i : 16 * (i + 1) if i < 3 else None]
        torch.testing.assert_close(model.get_parameter(name) - weights[name], rows, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", [arch for arch in CONVERTED if not data_of(arch).conversion.startswith("_")])
def test_normalisation_layers_are_where_diffusers_conversion_puts_them(arch: str) -> None:
    model = meta_model(arch)
    layers = [c for c in candidates(SPECS[arch].denoiser, model, norms=True) if c.geometry.family == "norm"]
    trained = {c.trainer_name: c for c in layers if c.geometry.affine and c.inside}
    assert len(trained) > 20
    last = data_of(arch).norm_tensor
    tagged = {f"{entry.dotted}.weight": torch.zeros(entry.shape[0], 1) for entry in linears(arch)}
    tagged |= {
        f"{name}.{last}": torch.full(c.geometry.weight_shape, float(i)) for i, (name, c) in enumerate(trained.items())
    }
    converted = getattr(single_file_utils, data_of(arch).conversion)(_Lenient(dict(tagged)), config={})
    for name, c in trained.items():
        assert torch.equal(converted[f"{c.dotted_name}.weight"], tagged[f"{name}.{last}"]), name
    if arch == "wan":  # one of its three has a weight, under another number
        assert trained["blocks.0.norm3"].dotted_name == "blocks.0.norm2"
