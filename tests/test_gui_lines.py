"""Every command line that the GUI of kohya_ss can write for LoRA and LyCORIS, with what must happen.

Facts of the GUI: which arguments it writes for which kind of network, in which order and with which neutral values; all
presets and tick boxes. It strips quotes, writes some arguments twice, and some which the trainer's module never reads.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lycoris.kohya
import lycoris.logging
import pytest
import torch
from torch import nn
from toy_models import toy

import networks.loha
import networks.lycoris
from networks.plan.plan import Plan

# -- lines for `lycoris.kohya`

PRESETS = ("attn-mlp", "attn-only", "full", "full-lin", "unet-transformer-only", "unet-convblock-only")
LINES = {  # in the order of the GUI
    "boft": "preset conv_dim conv_alpha module_dropout use_tucker rank_dropout rank_dropout_scale algo train_norm",
    "diag-oft": "preset conv_dim conv_alpha module_dropout use_tucker rank_dropout rank_dropout_scale constraint "
    "rescaled algo train_norm",
    "dylora": "preset conv_dim conv_alpha use_tucker block_size rank_dropout module_dropout algo train_norm",
    "glora": "preset conv_dim conv_alpha use_tucker rank_dropout module_dropout rank_dropout_scale algo train_norm",
    "ia3": "preset conv_dim conv_alpha train_on_input algo",
    "locon": "preset conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout use_tucker "
    "use_scalar rank_dropout_scale algo train_norm",
    "loha": "preset conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout use_tucker "
    "use_scalar rank_dropout_scale algo train_norm",
    "lokr": "preset conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout factor use_cp "
    "use_scalar decompose_both rank_dropout_scale algo train_norm",
    "full": "preset rank_dropout module_dropout rank_dropout_scale algo train_norm",
}
# What a fresh form writes, and another value of each box and slider.
BOXES = {
    "conv_dim": ("1", "2"),
    "conv_alpha": ("1", "4"),
    "use_tucker": ("False", "True"),
    "use_cp": ("False", "True"),
    "rank_dropout": ("0", "0.1"),
    "rank_dropout_scale": ("False", "True"),
    "module_dropout": ("0.0", "0.1"),
    "bypass_mode": ("False", "True"),
    "dora_wd": ("False", "True"),
    "use_scalar": ("False", "True"),
    "train_norm": ("False", "True"),
    "decompose_both": ("False", "True"),
    "factor": ("-1", "4"),
    "constraint": ("0.0", "0.001"),
    "rescaled": ("False", "True"),
    "block_size": ("1", "2"),
    "train_on_input": ("True", "False"),
}
DIMS = {"boft": 42, "lokr": 1}  # which fit the small models; 4 otherwise
MODELS = ("sd", "flux")


def written(line: Iterable[str]) -> dict[str, str]:
    """As the trainer takes a line to pieces: the last of an argument that stands there twice counts."""
    found: dict[str, str] = {}
    for argument in line:
        key, value = argument.replace('"', "").split("=")
        found[key] = value
    return found


def lines(algo: str, preset: str, dim: int) -> Iterator[dict[str, str]]:
    """The fresh form, all boxes ticked, and for each two boxes one without the other: 10 lines for up to 16 boxes.
    Then a conv_dim of 0, with and without an alpha."""
    boxes = [key for key in dict.fromkeys(LINES[algo].split()) if key in BOXES]
    bits = range(len(boxes).bit_length())
    ticked = [set(), set(boxes)]
    ticked += [{box for i, box in enumerate(boxes) if (i >> bit & 1) == value} for bit in bits for value in (0, 1)]
    for ticks in ticked:
        yield _line(algo, preset, {box: BOXES[box][box in ticks] for box in boxes}, dim)
    for alpha in ("1", "4") if "conv_dim" in boxes else ():
        usual = {box: BOXES[box][0] for box in boxes}
        yield _line(algo, preset, {**usual, "conv_dim": "0", "conv_alpha": alpha}, dim)


def _line(algo: str, preset: str, values: Mapping[str, str], dim: int) -> dict[str, str]:
    conv_dim = values.get("conv_dim")
    if conv_dim != "0" and algo in ("boft", "dylora"):  # which refuse a size that does not fit, here and in LyCORIS
        conv_dim = str(dim)
    chosen = {**values, "conv_dim": conv_dim, "preset": preset, "algo": f'"{algo}"'}
    return written(f"{key}={chosen[key]}" for key in LINES[algo].split())


class CrossAttention(nn.Module):
    """As sd-scripts' own UNet calls its attention, by which LyCORIS finds it."""


@functools.cache
def models(name: str) -> tuple[Any, nn.Module]:
    """Text encoders and denoiser, as the trainer hands them over; with normalisation layers on Stable Diffusion."""
    parts = toy(name, blocks=1, shrink=32)
    encoders = [part for key, part in parts.items() if key.startswith("text_encoder")]
    denoiser = next(part for key, part in parts.items() if not key.startswith("text_encoder"))
    if name != "sd":
        return encoders, denoiser
    for path in ("mid_block", "down_blocks.0.attentions.1", "up_blocks.0.resnets"):  # of each kind some are left
        parent, _, last = path.rpartition(".")
        delattr(denoiser.get_submodule(parent), last)
    for path, module in list(denoiser.named_modules()):
        if path.endswith((".attn1", ".attn2")):
            module.__class__ = CrossAttention
        if type(module).__name__ in ("Transformer2DModel", "ResnetBlock2D"):
            module.norm1 = nn.GroupNorm(1, 4)
    return encoders[0], denoiser


def idle(line: Mapping[str, str], model: str, dim: int, dropout: float) -> set[str]:
    """What the line has that acts on nothing there; LyCORIS' default written out asks for nothing."""
    algo, preset, convolutions = line["algo"], line["preset"], model == "sd"
    default = str(dim) if preset == "full" else "0"
    kernels = convolutions and preset in ("full", "unet-convblock-only") and line.get("conv_dim") != "0"
    dropped = float(line.get("rank_dropout", 0)) > 0
    no_rank = algo in ("full", "boft", "diag-oft", "ia3")
    tucker = "True" in (line.get("use_tucker"), line.get("use_cp"))
    found = {
        "conv_dim": line.get("conv_dim", "0") not in ("0", default) and not kernels,
        "conv_alpha": line.get("conv_alpha", "1") != "1" and (not kernels or no_rank),
        "use_tucker": tucker and (algo not in ("locon", "loha", "lokr") or not kernels),
        "rank_dropout": dropped and no_rank,
        "dropout": dropout > 0 and no_rank,
        "rank_dropout_scale": line.get("rank_dropout_scale") == "True" and (not dropped or no_rank),
        "dora_wd": line.get("dora_wd") == "True" and (dropped or dropout > 0),
        "train_norm": line.get("train_norm") == "True" and (not convolutions or preset == "attn-only"),
    }
    return {name for name, on in found.items() if on}


def told(plan: Plan) -> set[str]:
    """The arguments that the one warning line names."""
    found = [line for line in plan.warnings if "without effect here" in line]
    assert len(found) < 2, found
    names = ("conv_dim", "conv_alpha", "rank_dropout", "dropout", "rank_dropout_scale", "dora_wd", "train_norm")
    named = {name for name in names if found and re.search(rf"[:,] {name}(=\w+)? \(", found[0])}
    tucker = found and re.search(r"[:,] (use_tucker|use_cp)(=\w+)? \(", found[0])
    return named | ({"use_tucker"} if tucker else set())


@pytest.mark.sweep(12)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algo", LINES)
def test_lines_for_lycoris(algo: str, preset: str, model: str) -> None:
    """They run, with at most one warning line, which names what acts on nothing."""
    dim = DIMS.get(algo, 4)
    encoders, denoiser = models(model)
    for line in lines(algo, preset, dim):
        for dropout in (0, 0.1) if line["algo"] in ("ia3", "locon") else (0,):
            call = {"neuron_dropout": dropout, **line, "dropout": dropout}
            if model == "flux" and preset == "unet-convblock-only":
                with pytest.raises(ValueError, match="unet-convblock-only is for sd, sdxl"):
                    networks.lycoris.plan(dim, 1, encoders, denoiser, **call)
                continue
            network = networks.lycoris.create_network(1.0, dim, 1, None, encoders, denoiser, **call)
            plan = network.plan
            assert told(plan) == idle(line, model, dim, dropout), (line, dropout, plan.warnings)


# What `lycoris.kohya` has whatever a line says.
FIXED: dict[str, dict[str, Any]] = {"ia3": {"train_on_input": False}, "lokr": {"decompose_both": True}}


@pytest.mark.reference
@pytest.mark.sweep(12)
@pytest.mark.parametrize(
    "preset,model", [(p, m) for p in PRESETS for m in MODELS if m == "sd" or p not in ("attn-only", PRESETS[-1])]
)  # of those LyCORIS finds no layer of FLUX.1's denoiser
@pytest.mark.parametrize("algo", LINES)
def test_trained_as_in_lycoris(algo: str, preset: str, model: str) -> None:
    """The same layers, dims, scales and parameters; where LyCORIS does not go by the line, a note says so."""
    dim, fixed = DIMS.get(algo, 4), FIXED.get(algo, {})
    encoders, denoiser = models(model)
    fresh, ticked, *more = lines(algo, preset, dim)
    for line in (fresh, ticked, *(line for line in more[-2:] if line.get("conv_dim") == "0")):
        call = {**line, **({"rank_dropout": "0"} if "rank_dropout" in line else {})}  # with which DoRA is off here
        own = networks.lycoris.plan(dim, 2, encoders, denoiser, **call)
        notes = [
            note for note in own.notes if note.startswith("as written here, whereas lycoris.kohya goes its own way: ")
        ]
        expected = {f"{k}={call[k]} (there {v})" for k, v in fixed.items() if call[k] != str(v)}
        assert bool(notes) == bool(expected) and all(one in notes[0] for one in expected), (call, notes)
        rows = networks.lycoris.plan(dim, 2, encoders, denoiser, **{**call, **fixed}).trained
        lycoris.logging.logger.setLevel("CRITICAL")
        with torch.no_grad():
            theirs = lycoris.kohya.create_network(1.0, dim, 2.0, None, encoders, denoiser, False, **call)
        modules = {module.lora_name: module for module in theirs.loras}
        assert {row.saved_name for row in rows} == modules.keys(), call
        for row in rows:
            module = modules[row.saved_name]
            assert sum(p.numel() for p in module.parameters()) == row.parameters, (call, row.saved_name)
            if hasattr(module, "scale") and row.rank_axis:
                assert (module.lora_dim, module.scale) == (row.dim, pytest.approx(row.scale)), (call, row.saved_name)


@pytest.mark.parametrize("line,words", [
    ({"algo": "boft", "network_dim": 8, "conv_dim": "8"}, "network_dim=10 or more"),
    ({"algo": "boft", "network_dim": 12, "conv_dim": "1"}, "use .*=10 or more"),
    ({"rank_dropout": "1"}, "rank_dropout=1 is too large; it must stay below 1"),
    ({"use_tuker": "True"}, "no argument is called use_tuker; did you mean use_tucker"),
    ({"constrain": "1e-3", "constraint": "1e-4", "algo": "diag-oft"}, "contradicts"),
])  # fmt: skip
def test_lines_that_cannot_be(line: dict[str, Any], words: str) -> None:
    """The first two LyCORIS refuses, too; the others train nothing, or something else, without a word there."""
    with pytest.raises(ValueError, match=words):
        networks.lycoris.plan(line.pop("network_dim", 4), 1, *models("sd"), **line)


def test_of_two_spellings_the_one_that_asks_for_something_counts() -> None:
    """As the form has a box for each; under the names of the trainers it is a contradiction."""
    for line in ({"use_tucker": "True", "use_cp": "False"}, {"use_tucker": "False", "use_cp": "True"}):
        plan = networks.lycoris.plan(4, 1, *models("sd"), algo="loha", conv_dim="2", **line)
        assert {row.options["use_tucker"] for row in plan.trained} == {True}
        with pytest.raises(ValueError, match="contradicts"):
            networks.loha.plan(4, 1, *models("sd"), conv_dim="2", **line)
    plan = networks.lycoris.plan(4, 1, *models("sd"), algo="diag-oft", constraint="0.0", constrain="1e-3")
    assert {row.options["constraint"] for row in plan.trained} == {1e-3}


@pytest.mark.parametrize("algo,dim,boxes", [
    ("lokr", 100000, {"conv_dim": "100000", "factor": "6"}),
    ("lokr", 100000, {"conv_dim": "100000", "factor": "6", "use_cp": "True", "decompose_both": "True",
                      "train_norm": "True", "rank_dropout_scale": "True"}),
    ("lokr", 64, {"conv_dim": "64", "conv_alpha": "64", "rank_dropout": "0.1", "module_dropout": "0.1",
                  "use_cp": "True"}),
    ("ia3", 1024, {}),
    ("loha", 32, {"conv_dim": "8", "conv_alpha": "4", "use_cp": "True"}),
])  # fmt: skip
def test_what_comes_with_the_gui(algo: str, dim: int, boxes: dict[str, str]) -> None:
    """Its presets of settings."""
    usual = {box: values[0] for box, values in BOXES.items()}
    assert networks.lycoris.plan(dim, 1, *models("sd"), dropout=0.3, **_line(algo, "full", {**usual, **boxes}, dim))


# -- lines for the trainer's own modules

DROPOUTS = {"rank_dropout": "0.1", "module_dropout": "0.1"}
RATIO, RATIOS = {"loraplus_lr_ratio": "16"}, {"loraplus_unet_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}
EXTRAS = ({}, DROPOUTS, RATIO, RATIOS)
CONVOLUTIONS = {"conv_dim": "1", "conv_alpha": "1"}
FACTORS = {
    "down_lr_weight": "0,0.5,1",
    "mid_lr_weight": "0.5",
    "up_lr_weight": "1,1,0",
    "block_lr_zero_threshold": "0.1",
}
BLOCKS = {"block_dims": "2", "block_alphas": "1", "conv_block_dims": "3", "conv_block_alphas": "1"}
KINDS = dict.fromkeys(("img_attn_dim", "img_mlp_dim", "single_dim", "txt_attn_dim", "txt_mlp_dim"), "4")
MODULATION = dict.fromkeys(("img_mod_dim", "txt_mod_dim", "single_mod_dim"), "4")
NOISE = {"ggpo_beta": "0.01", "ggpo_sigma": "0.03"}
ENCODERS = "loraplus_text_encoder_lr_ratio"

Row = tuple[str, str, dict[str, str], str]  # module, model, line, what is told to act on nothing


def blocks(model: str, count: int) -> dict[str, str]:
    return {name: ",".join([value] * count) for name, value in BLOCKS.items()}


ROWS: list[Row] = [
    *(("lora", model, line, "") for model, count in (("sd", 25), ("sdxl", 23))
      for line in (*EXTRAS, FACTORS, blocks(model, count), {**CONVOLUTIONS, **DROPOUTS})),
    *((module, "sd", {**CONVOLUTIONS, **blocks("sd", 25)}, "conv_alpha") for module in ("lora", "dylora")),
    *(("lora_fa", "sd", extra, "") for extra in (*EXTRAS, FACTORS, blocks("sd", 25))),
    *(("dylora", "sd", {**CONVOLUTIONS, **extra, "unit": "1"}, "") for extra in (*EXTRAS, FACTORS)),
    *(("lora_sd3", "sd3", extra, "") for extra in EXTRAS),
    ("lora_sd3", "sd3", CONVOLUTIONS, "conv_dim conv_alpha"),
    *((module, model, extra, "") for module in ("loha", "lokr") for model in ("sdxl", "anima") for extra in EXTRAS),
    *((module, *row) for module in ("loha", "lokr")
      for row in (("sdxl", {**CONVOLUTIONS, "use_tucker": "True"}, ""), ("sdxl", {"use_tucker": "True"}, "use_tucker"),
                  ("anima", CONVOLUTIONS, "conv_dim conv_alpha"),
                  ("anima", {**CONVOLUTIONS, "use_tucker": "True"}, "conv_dim conv_alpha use_tucker"))),
    *(("lokr", model, {"factor": "4"}, "") for model in ("sdxl", "anima")),
    *(("lora_flux", model, extra, ENCODERS if model == "chroma" and extra is RATIOS else "")
      for model in ("flux", "chroma")
      for extra in (*EXTRAS, KINDS, NOISE, {"split_qkv": "True"}, {"train_blocks": "single"},
                    {"train_double_block_indices": "0", "train_single_block_indices": "0"})),
    ("lora_flux", "flux", {**MODULATION, "in_dims": "[4,2,2,2,4]"}, ""),
    ("lora_flux", "flux", {"train_t5xxl": "True"}, ""),
    ("lora_flux", "chroma", MODULATION, "img_mod_dim txt_mod_dim single_mod_dim"),
    *(("oft_flux", "flux", {**extra, "enable_all_linear": "True"}, " ".join(extra)) for extra in ({}, RATIO, RATIOS)),
    *(("lora_hunyuan_image", "hunyuan_image", extra, ENCODERS if extra is RATIOS else "") for extra in EXTRAS),
    *((module, model, extra, "") for module, model in (("lora_anima", "anima"), ("lora_lumina", "lumina"))
      for extra in EXTRAS),
]  # fmt: skip


@pytest.mark.parametrize("module", sorted({row[0] for row in ROWS}))
def test_lines_for_the_modules_of_the_trainer(module: str) -> None:
    """They run with ours of these names, with at most one warning line, which names what acts on nothing."""
    entry = importlib.import_module(f"networks.{module}")
    for _, model, line, expected in (row for row in ROWS if row[0] == module):
        plan = entry.plan(4, 1, *models(model), neuron_dropout=0, **line, dropout=0)
        found = [text for text in plan.warnings if "without effect here" in text]
        assert bool(found) == bool(expected) and len(found) < 2, (model, line, plan.warnings)
        for name in expected.split():
            assert re.search(rf"[:,] {name}(=\w+)? \(", found[0]), (model, line, found)


@pytest.mark.parametrize("name", ["lora", "lora_sd3"])
def test_a_list_of_another_model_is_a_mistake(name: str) -> None:
    """The form has these boxes on every model, and the trainer's module drops what is in them."""
    model, words = ("sdxl", "has 25 values, but") if name == "lora" else ("sd3", "down_lr_weight has no effect on")
    line = blocks("sd", 25) if name == "lora" else FACTORS
    with pytest.raises(ValueError, match=words):
        importlib.import_module(f"networks.{name}").plan(4, 1, *models(model), **line)


# -- the arguments of LyCORIS' document

FACTORED = {"lora", "locon", "loha", "lokr", "dylora", "glora", "tlora"}
ALGORITHMS = [*sorted(FACTORED), "full", "diag-oft", "boft", "ia3"]
ACTS: dict[str, tuple[str, set[str]]] = {  # a value, and where it acts
    "conv_dim": ("4", {*ALGORITHMS}),
    "module_dropout": ("0.1", {*ALGORITHMS}),
    "train_norm": ("True", {*ALGORITHMS}),
    "dropout": ("0.1", FACTORED),
    "rank_dropout": ("0.1", FACTORED),
    "loraplus_lr_ratio": ("4", FACTORED),
    "dora_wd": ("True", FACTORED),
    "bypass_mode": ("True", FACTORED - {"tlora"}),
    "use_scalar": ("True", FACTORED - {"dylora", "tlora"}),
    "use_tucker": ("True", {"lora", "locon", "loha", "lokr"}),
    "use_conv_cp": ("True", {"lora", "locon", "loha", "lokr"}),
    "factor": ("2", {"lokr"}),
    "decompose_both": ("True", {"lokr"}),
    "full_matrix": ("True", {"lokr"}),
    "unbalanced_factorization": ("True", {"lokr"}),
    "block_size": ("2", {"dylora"}),
    "rescaled": ("True", {"diag-oft", "boft"}),
    "constraint": ("0.001", {"diag-oft", "boft"}),
    "sig_type": ("last", {"tlora"}),
    "use_data_init": ("False", {"tlora"}),
    "mask_group_id": ("1", {"tlora"}),
    "wd_on_output": ("False", set()),  # without dora_wd
    "rank_dropout_scale": ("True", set()),  # without rank_dropout
    "train_t5xxl": ("True", set()),  # on this model
    "train_llm_adapter": ("True", set()),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_argument_of_lycoris_with_every_algorithm(algo: str) -> None:
    """It passes everywhere; where it acts on nothing, one line says so. A misspelt one is a mistake everywhere."""
    dim = DIMS.get(algo, 4)
    call = {"algo": algo, **({"conv_dim": str(dim)} if algo == "boft" else {})}
    for name, (value, acting) in ACTS.items():
        if algo == "boft" and name == "conv_dim":
            continue
        plan = networks.lycoris.plan(dim, 1, *models("sd"), **call, **{name: value})
        found = [text for text in plan.warnings if "without effect here" in text]
        assert [bool(re.search(rf": {name}(=\S+)? \(", text)) for text in found] == [True] * (algo not in acting), name
    with pytest.raises(ValueError, match="no argument is called dropot; did you mean dropout"):
        networks.lycoris.plan(dim, 1, *models("sd"), **call, dropot="0.1")
