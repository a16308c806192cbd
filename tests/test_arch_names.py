"""Targets, saved names and block numbers against lists recorded from the trainers' own models and modules.

tests/names/<arch>.txt has every Linear, convolution and container of the trainer's full-size model, with the saved name
and block number that the trainer's own network module gives it.
"""

from __future__ import annotations

import pytest
import torch
from names import NAMES, names_of
from registry_archs import SPECS, data_of, is_unet, release_of
from torch import nn
from toy_models import CONVOLUTIONS, Recorded, recorded

import networks.lora
from networks.archs import ARCHS
from networks.archs.detect import detect, is_of, recognised, unwrap
from networks.models.skeleton import skeleton
from networks.plan.plan import Plan

UNETS = [arch for arch in SPECS if is_unet(arch)]


def trainer_models(arch: str, drop: str = "") -> dict[str, nn.Module]:
    """The recorded module trees on the meta device; `drop` removes a level of the names."""
    roots: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for entry in recorded(arch):
            if entry.dotted == ".":
                roots[entry.part] = type(entry.cls, (nn.Module,), {})()
                continue
            at = roots[entry.part]
            *parents, last = entry.dotted.removeprefix(drop).split(".")
            for name in parents:
                if name not in dict(at.named_children()):
                    at.add_module(name, nn.Module())
                at = at.get_submodule(name)
            at.add_module(last, leaf(entry))
    return roots


def leaf(entry: Recorded) -> nn.Module:
    if entry.cls == "Linear":
        return nn.Linear(entry.shape[1], entry.shape[0])
    if entry.cls in CONVOLUTIONS:
        convolution: nn.Module = CONVOLUTIONS[entry.cls](entry.shape[1], entry.shape[0], entry.shape[2:])
        return convolution
    return type(entry.cls, (nn.Module,), {})()


def trainer_plan(arch: str, drop: str = "", tasks: bool = False, **kwargs: str) -> Plan:
    """`tasks`: with the trainer's mark on the model that adds layers, where there is one."""
    roots = trainer_models(arch, drop)
    spec = SPECS[arch]
    for name, value, _ in spec.denoiser.tasks if tasks else ():
        setattr(roots[spec.denoiser.name], name, value)
    encoders = [roots.get(part.name) for part in spec.text_encoders]
    return networks.lora.plan(4, 1, encoders, roots[spec.denoiser.name], **kwargs)


def saved_names(plan: Plan) -> list[str]:
    return [row.saved_name for row in plan.trained]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", SPECS)
def test_trainer_model(arch: str) -> None:
    wanted = {entry.saved: entry for entry in recorded(arch) if entry.saved != "-"}
    plan = trainer_plan(arch, tasks=True, **data_of(arch).widest)
    assert sorted(saved_names(plan)) == sorted(wanted)
    spec = SPECS[arch]
    for row in plan.trained:
        entry = wanted[row.saved_name]
        assert (row.part, row.dotted_name, row.shape) == (entry.part, entry.dotted, entry.shape)
        if entry.block != "-":
            assert row.block == int(entry.block), row.dotted_name
    plain = trainer_plan(arch)
    default, *widest = (
        sum((row.part == spec.denoiser.name) is denoiser for row in rows)
        for rows, denoiser in ((plain.trained, True), (plan.trained, True), (plan.trained, False))
    )
    assert data_of(arch).counts == (default, *widest), "look whether the trainer trains as many, then write them"
    assert default in spec.usual, f"is {default} usual? then the record says so"
    assert not plain.warnings
    assert not any(row.geometry.has_kernel for row in plain.trained)


@pytest.mark.parametrize("arch", UNETS)
def test_diffusers_model_is_saved_under_the_same_names(arch: str) -> None:
    """And printed under the same dotted ones."""
    wanted = {entry.saved: entry for entry in recorded(arch) if entry.saved != "-"}
    model = skeleton(release_of(arch))
    plan = networks.lora.plan(4, 1, model.text_encoders, model.unet, conv_dim="2")
    assert sorted(saved_names(plan)) == sorted(wanted)
    for row in plan.trained:
        entry = wanted[row.saved_name]
        assert row.shape == entry.shape, row.dotted_name
        assert row.shown_name == (entry.dotted if row.part == "unet" else f"{entry.part}:{entry.dotted}")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", SPECS)
def test_names_survive_transformers_5(arch: str) -> None:
    """CLIPTextModel without its text_model level."""
    assert saved_names(trainer_plan(arch, drop="text_model.")) == saved_names(trainer_plan(arch))


@pytest.mark.parametrize("arch", UNETS)
def test_block_selection_is_the_same_for_both_classes(arch: str) -> None:
    model = skeleton(release_of(arch))
    for blocks in ("1-8", "11,12", "13-24" if arch == "sd" else "13-22"):
        ours = networks.lora.plan(4, 1, None, model.unet, blocks=blocks, conv_dim="1")
        theirs = networks.lora.plan(4, 1, None, trainer_models(arch)["unet"], blocks=blocks, conv_dim="1")
        assert sorted(saved_names(ours)) == sorted(saved_names(theirs)) != []


def test_patterns_match_the_names_of_both_classes() -> None:
    unet = skeleton("sdxl").unet
    own = networks.lora.plan(4, 1, None, unet, only_patterns="down_blocks.1.attentions.0.*")
    trainer = networks.lora.plan(4, 1, None, unet, only_patterns="input_blocks.4.1.*")
    assert saved_names(own) == saved_names(trainer) != []


def test_wrappers_do_not_reach_names_or_detection() -> None:
    unet = skeleton("sd15").unet
    wanted = saved_names(networks.lora.plan(4, 1, None, unet))

    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    class InferUNet:  # of sd-scripts' gen_img: not a Module, passes everything on
        def __init__(self, unet: nn.Module) -> None:
            self.delegate = unet

        def __getattr__(self, name: str) -> object:
            return getattr(self.delegate, name)

    for wrapped in (DistributedDataParallel(unet), torch.compile(unet), InferUNet(unet)):
        assert unwrap(wrapped) is unet
        assert saved_names(networks.lora.plan(4, 1, None, wrapped)) == wanted
    block = unet.down_blocks[0].attentions[0]
    unet.down_blocks[0].attentions[0] = torch.compile(block)
    assert saved_names(networks.lora.plan(4, 1, None, unet)) == wanted


@pytest.mark.sweep(2)
@pytest.mark.parametrize("arch", SPECS)
def test_an_architecture_is_told_from_all_others(arch: str) -> None:
    """In whatever order they are asked."""
    spec = SPECS[arch]
    models = [trainer_models(arch)[spec.denoiser.name], *(skeleton(release.name).unet for release in spec.releases)]
    for model in models:
        assert detect(model) is spec and [other for other in ARCHS if is_of(other, model, type(model).__name__)] == [
            spec
        ]


def test_a_model_of_no_architecture() -> None:
    assert recognised(nn.Linear(2, 2)) is None and detect(nn.Linear(2, 2)).title == "Linear"


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", SPECS)
def test_names_are_recorded_as_they_were(arch: str) -> None:
    """scripts/names.py, given the model that the file describes, writes the same file."""
    path = NAMES / f"{arch}.txt"
    assert names_of(SPECS[arch], data_of(arch), trainer_models(arch)) == path.read_text(encoding="utf-8")


def test_renaming_is_unambiguous() -> None:
    for arch in ARCHS:
        for part in (arch.denoiser, *arch.text_encoders):
            olds = [old for old, _ in part.rename]
            assert len(olds) == len(set(olds))
            for i, old in enumerate(olds):
                assert not any(old.startswith(earlier) and old != earlier for earlier in olds[:i]), old
