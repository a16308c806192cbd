"""Targets, saved names and block numbers against lists recorded from the trainers' own models and modules.

tests/names/<arch>.txt has every Linear, convolution and container of the trainer's full-size model, with the saved name
and block number that the trainer's own network module gives it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_models import CONVOLUTIONS, Recorded, recorded

import networks.lora
from networks.archs import ARCHS
from networks.archs.detect import detect, unwrap
from networks.models.skeleton import skeleton
from networks.plan.plan import Plan

BUILT_IN = {"sd": "sd15", "sdxl": "sdxl"}
# Denoiser layers trained by default, and under the arguments of WIDEST; text encoder layers under
# those: the counts that users of the trainers know.
COUNTS = {
    "sd": (192, 278, 72),
    "sdxl": (722, 788, 264),
    "flux": (304, 312, 72 + 168),
    "chroma": (228, 230, 168),
    "sd3": (263, 271, 72 + 192 + 168),
    "lumina": (180, 184, 182),
    "hunyuan_image": (320, 320, 0),
    "anima": (280, 514, 196),
    "wan": (480, 480, 0),
    "qwen_image": (720, 840, 0),
    "hunyuan_video": (240, 320, 0),
    "hv_1_5": (756, 756, 0),
    "framepack": (440, 520, 0),
    "flux_2": (160, 160, 0),
    "zimage": (210, 270, 0),
    "kandinsky": (624, 688, 0),
    "krea2": (264, 264, 0),
    "ideogram4": (170, 204, 0),
    "hidream_o1": (255, 372, 0),
    "ace_step": (192, 264, 0),
}
WIDEST = {
    "sd": {"conv_dim": "2"},
    "sdxl": {"conv_dim": "2"},
    "flux": {"in_dims": "[2,2,2,2,2]", "train_t5xxl": "True"},
    "chroma": {"in_dims": "[2,0,0,0,2]", "train_t5xxl": "true"},
    "sd3": {"emb_dims": "2,2,2,2,2,2", "train_t5xxl": "1"},
    "lumina": {"embedder_dims": "[2, 2, 2]"},
    "hunyuan_image": {},
    "anima": {"train_llm_adapter": "True", "include_patterns": "['.*']"},
    "wan": {},
    "qwen_image": {"exclude_mod": "False"},
    "hunyuan_video": {"exclude_mod": "False"},
    "hv_1_5": {},
    "framepack": {"exclude_mod": "False"},
    "flux_2": {},
    "zimage": {"exclude_mod": "False", "include_refiner": "True"},
    "kandinsky": {"exclude_mod": "False"},
    "krea2": {},
    "ideogram4": {"exclude_mod": "False"},
    "hidream_o1": {"conv_dim": "2"},
    "ace_step": {"train_mlp": "True"},
}


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
    spec = next(spec for spec in ARCHS if spec.name == arch)
    for name, value, _ in spec.denoiser.tasks if tasks else ():
        setattr(roots[spec.denoiser.name], name, value)
    encoders = [roots.get(part.name) for part in spec.text_encoders]
    return networks.lora.plan(4, 1, encoders, roots[spec.denoiser.name], **kwargs)


def saved_names(plan: Plan) -> list[str]:
    return [row.saved_name for row in plan.trained]


@pytest.mark.parametrize("arch", COUNTS)
def test_trainer_model(arch: str) -> None:
    wanted = {entry.saved: entry for entry in recorded(arch) if entry.saved != "-"}
    plan = trainer_plan(arch, tasks=True, **WIDEST[arch])
    assert sorted(saved_names(plan)) == sorted(wanted)
    spec = next(spec for spec in ARCHS if spec.name == arch)
    for row in plan.trained:
        entry = wanted[row.saved_name]
        assert (row.part, row.dotted_name, row.shape) == (entry.part, entry.dotted, entry.shape)
        if entry.block != "-":
            assert row.block == int(entry.block), row.dotted_name
    default, widest, text = COUNTS[arch]
    assert len(wanted) == widest + text
    plain = trainer_plan(arch)
    assert sum(row.part == spec.denoiser.name for row in plain.trained) == default
    assert default in spec.usual and not plain.warnings
    assert not any(row.geometry.has_kernel for row in plain.trained)


@pytest.mark.parametrize("arch", BUILT_IN)
def test_diffusers_model_is_saved_under_the_same_names(arch: str) -> None:
    wanted = {entry.saved: entry.shape for entry in recorded(arch) if entry.saved != "-"}
    model = skeleton(BUILT_IN[arch])
    plan = networks.lora.plan(4, 1, model.text_encoders, model.unet, conv_dim="2")
    assert sorted(saved_names(plan)) == sorted(wanted)
    for row in plan.trained:
        assert row.shape == wanted[row.saved_name], row.dotted_name


@pytest.mark.parametrize("arch", COUNTS)
def test_names_survive_transformers_5(arch: str) -> None:
    """CLIPTextModel without its text_model level."""
    assert saved_names(trainer_plan(arch, drop="text_model.")) == saved_names(trainer_plan(arch))


@pytest.mark.parametrize("arch", BUILT_IN)
def test_block_selection_is_the_same_for_both_classes(arch: str) -> None:
    model = skeleton(BUILT_IN[arch])
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


def test_every_architecture_is_recorded_and_told_apart() -> None:
    assert {arch.name for arch in ARCHS} == set(COUNTS)
    for arch in ARCHS:
        assert detect(trainer_models(arch.name)[arch.denoiser.name]) is arch
        if arch.name in BUILT_IN:
            assert detect(skeleton(BUILT_IN[arch.name]).unet) is arch
    with pytest.raises(ValueError, match="class Linear; known: .*UNet2DConditionModel"):
        detect(nn.Linear(2, 2))


def test_renaming_is_unambiguous() -> None:
    for arch in ARCHS:
        for part in (arch.denoiser, *arch.text_encoders):
            olds = [old for old, _ in part.rename]
            assert len(olds) == len(set(olds))
            for i, old in enumerate(olds):
                assert not any(old.startswith(earlier) and old != earlier for earlier in olds[:i]), old
