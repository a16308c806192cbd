"""Saved names on the trainers' classes and on diffusers', against lists written by hand; never by our own reader, which
would take back what a wrong rule has done."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from registry_archs import RELEASED, SPECS, data_of, is_unet, release_of
from test_arch_names import trainer_models
from torch import nn

import networks.lora
from networks.archs.names import shares
from networks.files import weight_names
from networks.models.skeleton import skeleton
from networks.plan.walk import candidates

BLOCK = re.compile(r"((?:^|\.)\w*(?:blocks|layers|refiner))\.(\d+)\.")


def trainers_model(arch: str) -> nn.Module:
    """With the normalisation layers of the first blocks."""
    spec = SPECS[arch]
    root = trainer_models(arch)[spec.denoiser.name]
    for name, value, _ in spec.denoiser.tasks:
        setattr(root, name, value)
    for dotted_name, affine in data_of(arch).trainers_norms.items():
        at, (*parents, last) = root, dotted_name.split(".")
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, nn.LayerNorm(8, elementwise_affine=affine, device="meta"))
    return root


def diffusers_model(arch: str) -> nn.Module:
    return skeleton(release_of(arch)).unet


def every_layer(arch: str, model: nn.Module) -> list[Any]:
    return list(candidates(SPECS[arch].denoiser, model, norms=True))


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", SPECS)
def test_the_trainers_class_keeps_its_names(arch: str) -> None:
    model, spec = trainers_model(arch), SPECS[arch]
    arguments = {key: text for key, text in data_of(arch).widest.items() if key != "train_t5xxl"}
    arguments |= {"conv_dim": "2"} if arch in ("sd", "sdxl") else {}
    plan = networks.lora.plan(4, 1, None, model, train_norm="True", **arguments)
    for row in plan.rows:
        assert row.saved_name == f"{spec.denoiser.prefix}_{row.dotted_name}".replace(".", "_")
    trained = {row.saved_name for row in plan.trained if row.algo == "norm"}
    written = {f"{spec.denoiser.prefix}_{name}".replace(".", "_") for name in data_of(arch).trainers_norms}
    lacks, more = sorted(trained - written), sorted(written - trained)
    assert trained == written, f"`norms` in the data of {arch} lacks {lacks}; below no container are {more}"
    assert {row.geometry.affine for row in plan.trained if row.algo == "norm"} == set(
        data_of(arch).trainers_norms.values()
    )


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", [arch for arch in RELEASED if not is_unet(arch)])
def test_diffusers_class_has_the_trainers_names(arch: str) -> None:
    """All of them: other blocks are as the first."""
    spec, model = SPECS[arch], diffusers_model(arch)
    arguments = {switch.argument: str(switch.trained_if) for switch in spec.switches}
    arguments |= {name: data_of(arch).widest[name] for name, _ in spec.extra_dims}
    arguments |= data_of(arch).widest if spec.target_presets else {}
    plan = importlib.import_module(f"networks.{spec.entry}").plan(4, 1, None, model, train_norm="True", **arguments)
    own = {c.saved_name: c.own_names or (c.dotted_name,) for c in every_layer(arch, model)}
    wanted, seen = data_of(arch).pairs, set()
    if not wanted and not spec.denoiser.layouts and not spec.denoiser.rename:
        assert all(row.saved_name.endswith("_".join(own[row.saved_name]).replace(".", "_")) for row in plan.trained)
        return
    for row in plan.trained:
        block = BLOCK.search(own[row.saved_name][0])
        first = tuple(BLOCK.sub(r"\1.0.", name) for name in own[row.saved_name])
        assert first in wanted, f"write `{' + '.join(first)} = its name in the trainer's class` in its `diffusers`"
        trainer = wanted[first]
        if block:
            trainer = BLOCK.sub(rf"\g<1>.{block[2]}.", trainer)
        assert row.saved_name == f"{spec.denoiser.prefix}_{trainer}".replace(".", "_"), own[row.saved_name]
        seen.add(first)
    assert seen == wanted.keys(), "every line is of a layer"


@pytest.mark.parametrize("arch", [arch for arch in RELEASED if is_unet(arch)])
def test_normalisation_layers_of_unets(arch: str) -> None:
    found = {(c.dotted_name,): c.trainer_name for c in every_layer(arch, diffusers_model(arch))}
    for own, trainer in data_of(arch).pairs.items():
        assert found[own] == trainer


@pytest.mark.sweep(4)
@pytest.mark.parametrize("arch", SPECS)
def test_no_name_is_translated_into_that_of_another_layer(arch: str) -> None:
    """By brute force over all layers of both classes. A swap, of the other library's class alone, is written down."""
    models = {"trainer": trainers_model(arch)}
    if arch in RELEASED:
        models["diffusers"] = diffusers_model(arch)
    for whose, model in models.items():
        layers = every_layer(arch, model)
        assert len({c.saved_name for c in layers}) == len(layers)
        names = {name for name, _ in model.named_modules()}
        moved = {c.dotted_name for c in layers if c.trainer_name != c.dotted_name and c.trainer_name in names}
        ends = {name.rpartition(".")[2] for name in moved}
        assert ends == (data_of(arch).swaps if whose == "diffusers" else set())
        part = SPECS[arch].denoiser.among(names)
        assert whose == "diffusers" or all(part.trainer_name(name) == name for name in names)


# -- where only keys are known, those of the whole file decide

TRAINERS_KEYS = ["blocks.0.self_attn.q", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.norm3"]
THEIR_KEYS = ["blocks.0.attn1.to_q", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.norm3"]


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer."])
def test_a_checkpoint_is_read_by_all_of_its_keys(prefix: str) -> None:
    names = {f"lora_unet_blocks_0_{name}" for name in ("self_attn_q", "norm1", "norm2", "norm3")}
    for keys, order in ((TRAINERS_KEYS, (0, 1, 2, 3)), (THEIR_KEYS, (0, 1, 3, 2))):
        found = weight_names.find([f"{prefix}{key}.weight" for key in keys], names)
        wanted = ["self_attn_q", "norm1", "norm2", "norm3"]
        assert {name: target.keys for name, target in found.items()} == {
            f"lora_unet_blocks_0_{wanted[to]}": (f"{prefix}{key}.weight",) for key, to in zip(keys, order, strict=True)
        }


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_a_file_is_read_by_all_of_its_names(prefix: str) -> None:
    for keys, order in ((TRAINERS_KEYS, (1, 2, 3)), (THEIR_KEYS, (1, 3, 2))):
        read = shares([f"{prefix}{key}" for key in keys], SPECS["wan"])
        found = [share.name for key in keys[1:] for share in read[f"{prefix}{key}"]]
        assert found == [f"lora_unet_blocks_0_norm{i}" for i in order]
