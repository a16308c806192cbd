"""What records of architectures say beyond names: numbers of blocks, marks of a trainer, namesakes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_models import recorded, toy

import networks.lora
import networks.lora_flux_2
import networks.lora_hidream_o1
from networks.archs import ARCHS
from networks.archs.detect import detect, recognised
from networks.archs.spec import Switch
from networks.files.adapter_file import FileTensors
from networks.models.adapters import model_of

PACKAGE = Path(__file__).resolve().parents[1] / "networks"
SPECS = {spec.name: spec for spec in ARCHS}


@pytest.mark.parametrize("arch", SPECS)
def test_the_entry_of_a_record_stands_for_it(arch: str) -> None:
    entry = SPECS[arch].entry
    assert (PACKAGE / f"{entry}.py").is_file(), f"networks/{entry}.py is missing: write it as networks/lora_wan.py is"
    asserted = importlib.import_module(f"networks.{entry}").plan.__self__.archs
    assert not asserted or arch in asserted, f"networks/{entry}.py is for {asserted}; write {arch!r} there, too"


def test_single_blocks_are_numbered_behind_as_many_double_blocks_as_there_are() -> None:
    model = toy("flux_2")["dit"]
    del model.get_submodule("single_blocks")._modules["1"]
    for wanted in (2, 1):
        plan = networks.lora_flux_2.plan(4, 1, None, model, blocks=f"{wanted}")
        assert {row.dotted_name.rpartition(".")[0] for row in plan.trained} == {"single_blocks.0"}
        assert {row.block for row in plan.trained} == {wanted}
        with pytest.raises(ValueError, match=f"FLUX.2 has the blocks 0 to {wanted}"):
            networks.lora_flux_2.plan(4, 1, None, model, blocks=f"{wanted + 1}")
        del model.get_submodule("double_blocks")._modules[f"{wanted - 1}"]


def test_an_unfitted_record_has_no_number_for_them() -> None:
    with pytest.raises(AssertionError, match="fit the record"):
        SPECS["flux_2"].block_of("single_blocks.0.linear1")
    assert SPECS["flux_2"].fit(["double_blocks.4.x", "single_blocks.0.y"]).block_of("single_blocks.3.y") == 8


def test_hidream_trains_its_eyes_where_the_trainer_says_so() -> None:
    model = toy("hidream_o1")["dit"]
    text = {row.dotted_name for row in networks.lora_hidream_o1.plan(4, 1, None, model).trained}
    model.hidream_o1_task = "i2i"  # type: ignore[assignment]
    both = {row.dotted_name for row in networks.lora_hidream_o1.plan(4, 1, None, model).trained}
    assert text < both and all(name.startswith("model.visual.") for name in both - text)
    assert not any(name.startswith(("model.visual.", "model.t_embedder1", "lm_head")) for name in text)
    model.hidream_o1_task = "t2i"  # type: ignore[assignment]
    assert {row.dotted_name for row in networks.lora_hidream_o1.plan(4, 1, None, model).trained} == text


def test_hidream_from_a_single_file_is_no_unusual_model() -> None:
    """The trainer drops the mergers which such files lack; the toy has all layers of its kinds but fewer blocks."""
    every = {e.dotted for e in recorded("hidream_o1") if e.cls == "Linear" and not e.dotted.endswith("lm_head")}
    targets = {name for name in every if not name.startswith("model.t_embedder1")}
    single = {name for name in targets if "deepstack_merger_list" not in name}
    text = {name for name in single if not name.startswith("model.visual")}
    assert SPECS["hidream_o1"].usual == {len(text), len(single), len(targets)}


def test_a_language_model_of_the_same_class_is_not_taken_for_it() -> None:
    model = toy("hidream_o1")["dit"]
    del model.get_submodule("model")._modules["x_embedder"]
    assert recognised(model) is None


def test_the_same_block_classes_under_another_root_are_another_architecture() -> None:
    for arch in ("hunyuan_video", "hunyuan_image", "hv_1_5", "framepack", "flux", "flux_2"):
        assert detect(toy(arch)["dit"]).name == arch


def test_of_two_models_with_the_layers_of_a_file_its_metadata_say_which() -> None:
    """Mage-Flow has the blocks of Qwen-Image, in the same sizes, and fewer of them."""
    name = "lora_unet_transformer_blocks_0_img_mlp_net_2"
    file = FileTensors(
        {f"{name}.lora_down.weight": torch.ones(1, 12288), f"{name}.lora_up.weight": torch.ones(3072, 1)}
    )
    with pytest.raises(ValueError, match="may be for Mage-Flow or Qwen-Image: say which"):
        model_of(file)
    file.metadata["ss_base_model_version"] = "mage_flow_edit"
    assert model_of(file).title == "Mage-Flow"


def test_a_switch_without_the_argument_follows_the_host() -> None:
    switch = Switch("x", ".*", trained_if=True, default=True, per_host=(("there", False),))
    assert (switch.trains(None, "here"), switch.trains(None, "there")) == (True, False)
    assert (switch.trains(True, "there"), switch.trains(False, "here")) == (True, False)
    assert not replace(switch, trained_if=False).trains(True, "here")


def test_hunyuan_video_1_5_layer_by_layer() -> None:
    """Its conversion is no part of diffusers' package; these pairs are those of the script in its repository."""
    pairs = {
        "norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear",
        "attn.to_q": "img_attn_q", "attn.to_k": "img_attn_k", "attn.to_v": "img_attn_v",
        "attn.add_q_proj": "txt_attn_q", "attn.add_k_proj": "txt_attn_k", "attn.add_v_proj": "txt_attn_v",
        "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
        "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
        "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
    }  # fmt: skip
    part = SPECS["hv_1_5"].denoiser
    for own, theirs in pairs.items():
        assert part.trainer_name(f"transformer_blocks.53.{own}") == f"double_blocks.53.{theirs}"
    assert part.trainer_name("context_embedder.proj_in") == "txt_in.input_embedder"


def test_krea_2_trains_every_linear() -> None:
    model = toy("krea2")["dit"]
    plan = networks.lora.plan(4, 1, None, model)
    assert len(plan.trained) == sum(isinstance(module, nn.Linear) for module in model.modules())
