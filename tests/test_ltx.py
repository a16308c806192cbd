"""LTX-2: which layers its trainer's presets train, the arguments of its layers with audio, and its classes."""

from __future__ import annotations

import pytest
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tiny_denoisers import MODELS
from torch import nn
from toy_models import toy

import networks.lora_ltx2
from networks.archs.detect import detect
from networks.args.parse import Problems
from networks.cli.plan import _release
from networks.cli.trainer_line import run_of_text
from networks.network.watching import time_reader
from networks.plan.plan import Plan

VIDEO, AUDIO = ("attn1", "attn2"), ("audio_attn1", "audio_attn2")
A2V, V2A = "audio_to_video_attn", "video_to_audio_attn"
EVERY = (*VIDEO, *AUDIO, A2V, V2A)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# Preset of the trainer -> attentions and feed-forward layers whose projections it trains in each block; in each of the
# two connectors, where these are trained, those that have such a name.
PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t2v": (EVERY, ()),
    "lycoris": (EVERY, ()),
    "v2v": (EVERY, ("ff", "audio_ff")),
    "av_ic": (EVERY, ("ff", "audio_ff")),
    "video_ref_only_av": (EVERY, ("ff", "audio_ff")),
    "video_sa": (("attn1",), ()),
    "video_sa_ff": (("attn1",), ("ff",)),
    "video_sa_ca_ff": (VIDEO, ("ff",)),
    "audio": (AUDIO, ("audio_ff",)),
    "audio_v2a": ((*AUDIO, V2A), ("audio_ff",)),
    "audio_ref_ic": ((*AUDIO, A2V, V2A), ("audio_ff",)),
}
MODEL = toy("ltx2", blocks=1)["dit"]


def plan(**arguments: str) -> Plan:
    return networks.lora_ltx2.plan(4, 2, None, MODEL, "musubi", **arguments)


def names(**arguments: str) -> set[str]:
    """The layers that are trained, by their dotted names."""
    return {row.dotted_name for row in plan(**arguments).trained}


def below(prefix: str, attentions: tuple[str, ...], forward: tuple[str, ...]) -> set[str]:
    own = {f"{attention}.{one}" for attention in attentions for one in PROJECTIONS}
    return {prefix + name for name in own | {f"{one}.net.{end}" for one in forward for end in ("0.proj", "2")}}


def test_presets_train_the_layers_of_the_trainers() -> None:
    """Without one it is t2v."""
    block = "model.transformer_blocks.0."
    connectors = [f"{name}.transformer_1d_blocks.0." for name in ("embeddings_connector", "audio_embeddings_connector")]
    assert names() == below(block, *PRESETS["t2v"])
    for preset, (attentions, forward) in PRESETS.items():
        inside = below(block, attentions, forward)
        assert names(lora_target_preset=preset) == inside, preset
        before = [
            below(one, *(tuple({"attn1", "ff"} & {*kind}) for kind in (attentions, forward))) for one in connectors
        ]
        assert names(lora_target_preset=preset, connector_lora="True") == inside.union(*before), preset
    whole = below(block, *PRESETS["v2v"]) | {f"{block}{attention}.to_gate_logits" for attention in EVERY}
    assert names(lora_target_preset="full") == whole


def test_include_patterns_stand_in_place_of_a_preset() -> None:
    """As its trainer has it, which sends the default with them. What exclude_patterns say holds beside a preset."""
    some = r"['.*\.ff\.net\.2$', '.*audio_attn1.to_q']"
    block = "model.transformer_blocks.0."
    for preset in ({}, {"lora_target_preset": "t2v"}, {"lora_target_preset": "audio"}):
        assert names(include_patterns=some, **preset) == {f"{block}ff.net.2", f"{block}audio_attn1.to_q"}
    assert names(exclude_patterns="['.*attn2.*']") == below(block, tuple(one for one in EVERY if one[-1] != "2"), ())
    out = next(row for row in plan(lora_target_preset="audio").rows if row.dotted_name == f"{block}attn1.to_q")
    assert out.reason == "not in lora_target_preset=audio"


def test_a_preset_of_ours_says_itself_what_is_trained() -> None:
    """Unless another one of the trainer's is asked for: then both do."""
    block = "model.transformer_blocks.0."
    for given in ({}, {"lora_target_preset": "t2v"}):
        assert names(preset="full-lin", **given) == names(lora_target_preset="full")
        assert names(preset="mlp-only", **given) == below(block, (), ("ff", "audio_ff"))
    assert names(preset="mlp-only", lora_target_preset="audio") == below(block, (), ("audio_ff",))


def test_layers_with_audio_have_dims_and_alphas_of_their_own() -> None:
    given = {"audio_dim": "2", "audio_alpha": "3", "cross_modal_dim": "6"}
    found = {row.dotted_name.split(".")[3]: (row.dim, row.alpha) for row in plan(**given).trained}
    assert found == dict.fromkeys(VIDEO, (4, 2)) | dict.fromkeys(AUDIO, (2, 3)) | dict.fromkeys((A2V, V2A), (6, 3))
    (told,) = plan(audio_dim="2", lora_target_preset="video_sa").warnings
    assert "audio_dim" in told and "no such layer is left" in told


def without_level(cls: str) -> nn.Module:
    """The same layers in a class that has no level `model`."""
    found = type(cls, (nn.Module,), {})()
    for path, module in MODEL.named_modules():
        *parents, last = path.removeprefix("model").removeprefix(".").split(".")
        at = found
        for name in parents:
            at = at.get_submodule(name)
        if last and last not in at._modules:
            at.add_module(last, module if hasattr(module, "weight") else type(module)())
    return found


def widest(model: nn.Module) -> set[str]:
    arguments = {"lora_target_preset": "full", "train_connectors": "True"}
    rows = networks.lora_ltx2.plan(4, 1, None, model, **arguments).trained
    return {row.saved_name for row in rows if ".1." not in row.dotted_name}


def diffusers_model() -> nn.Module:
    model = MODELS["ltx2"][0]()
    sizes = {f"{stream}_connector_{name}": 8 for stream in ("video", "audio") for name in ("attention_head_dim",)}
    sizes |= {f"{stream}_connector_{name}": 1 for stream in ("video", "audio") for name in ("num_layers",)}
    model.connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=1, video_gated_attn=True, audio_gated_attn=True, **sizes
    )
    return model


def test_every_class_is_saved_under_the_trainers_names() -> None:
    """The release's and ComfyUI's have no level `model`; ComfyUI and diffusers have other names for the connectors."""
    wanted = widest(MODEL)
    release, comfyui = without_level("LTXModel"), without_level("LTXAVModel")
    comfyui.add_module("video_embeddings_connector", comfyui._modules.pop("embeddings_connector"))
    for model in (release, comfyui, diffusers_model()):
        assert detect(model).name == "ltx2"
        assert widest(model) == wanted, type(model)
    assert len(wanted) == 34 + 14 and "lora_unet_embeddings_connector_transformer_1d_blocks_0_ff_net_2" in wanted


def test_diffusers_class_counts_time_in_thousands() -> None:
    for model, noise in ((MODEL, 1.0), (MODELS["ltx2"][0](), 1000.0)):
        read = time_reader(model, detect(model).timestep)
        times = [read((), {"timestep": noise * part}) for part in (1, 0.75, 0)]
        assert [float(time) for time in times if time is not None] == [0, 0.25, 1]


def test_options_of_its_trainer_that_do_nothing_here_are_refused() -> None:
    network = networks.lora_ltx2.create_arch_network(1.0, 4, 1, None, None, MODEL, neuron_dropout=None)
    nothing = {"audio_lr": None, "lr_args": None, "modality_group_controls": False, "lr_group_scheduler_args": []}
    groups, _ = network.prepare_optimizer_params(unet_lr=1e-3, **nothing)
    assert [group["lr"] for group in groups] == [1e-3]
    for value in (1e-5, 0.0):
        with pytest.raises(ValueError, match="--audio_lr: .*network_reg_lrs="):
            network.prepare_optimizer_params(unet_lr=1e-3, **nothing | {"audio_lr": value})


def test_the_script_of_its_trainer_hands_options_on() -> None:
    """Into the network's arguments, which go before them; its checkpoint has an option of its own."""
    problems = Problems("")
    line = "python ltx2_train_network.py --ltx_version 2.0 --ltx2_checkpoint m --network_module networks.lora_ltx2 "
    run = run_of_text(line + "--lora_target_preset v2v --train_connectors --network_args audio_dim=8", problems)
    assert not problems.messages and run.given["ltx2_checkpoint"] == "m"
    assert run.words == {"lora_target_preset": "v2v", "train_connectors": "True", "audio_dim": "8"}
    assert run.script is not None and _release(run.script, run, problems) == "ltx2"
