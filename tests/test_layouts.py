"""Adapter files as other programs lay them out, on every architecture.

tests/layouts/ARCH.txt has the names of its denoiser's layers, as data that no table of ours changes; ComfyUI's are held
to its classes where COMFYUI_PATH gives them, diffusers' to its conversions in test_diffusers_layouts.py:

    trainer's layer = the file's layers, in the order of the rows      `:3` = so many shares of the rows, `-` = no layer
    trainer's layers = the file's layer that is all of them            `~` = its halves of rows are in the other order
    *                                                                  all other layers have the trainer's names

Here each file is built key by key from such a list, with random factors, and loaded by a network of the trainer's model
and merged into its checkpoint; every weight is compared with a dense formula in float64. ENCODERS.txt has the names of
text encoders' layers.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from registry import dense_glora, dense_loha, dense_lokr, dense_lora
from registry_archs import SPECS, data_of, is_unet
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_models import toy

from networks.archs.places import COMFYUI, DIFFUSERS, places
from networks.cli import merge as script
from networks.files.checkpoint import Checkpoint

LISTS = Path(__file__).parent / "layouts"
R, ALPHA = 2, 3.0
Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """Layers that share their rows.

    Attributes:
        trainer, own: the trainer's and the file's, in the order of the rows, with the shares of each; one side has one
            layer, "-" stands for rows which the file leaves alone.
        swapped: the file's layer has its halves of rows in the other order.
    """

    trainer: tuple[tuple[str, int], ...]
    own: tuple[tuple[str, int], ...]
    swapped: bool = False


def _shares(text: str) -> tuple[tuple[str, int], ...]:
    pairs = (one.partition(":") for one in text.split(" + "))
    return tuple((name, int(share or 1)) for name, _, share in pairs)


def read_list(arch: str) -> dict[str, list[Line]]:
    """Section -> the lines of tests/layouts/ARCH.txt there."""
    found: dict[str, list[Line]] = {"trainer": [Line((("*", 1),), (("*", 1),))]}
    lines = found["trainer"]
    path = LISTS / f"{arch}.txt"
    for text in path.read_text(encoding="utf-8").splitlines():
        if text.startswith("["):
            lines = found.setdefault(text[1:-1], [])
        if text.startswith(("[", "@", "#")):
            continue
        trainer, _, own = text.partition(" = ")
        own = own or trainer
        lines.append(Line(_shares(trainer), _shares(own.removeprefix("~")), own.startswith("~")))
    return found


# -- factors of a layer's adapter, under the trainers' suffixes, and what they change


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def lora(shape: tuple[int, ...]) -> Factors:
    ones = [1] * (len(shape) - 2)
    return {"lora_down.weight": _random(R, *shape[1:]), "lora_up.weight": _random(shape[0], R, *ones)}


def loha(shape: tuple[int, ...]) -> Factors:
    sizes = {"a": (shape[0], R), "b": (R, math.prod(shape[1:]))}
    return {f"hada_w{n}_{end}": _random(*size) for n in (1, 2) for end, size in sizes.items()}


def lokr(shape: tuple[int, ...]) -> Factors:
    rows, columns = (2 if size % 2 == 0 else 1 for size in shape[:2])
    return {"lokr_w1": _random(rows, columns), "lokr_w2": _random(shape[0] // rows, shape[1] // columns, *shape[2:])}


def glora(shape: tuple[int, ...]) -> Factors:
    sizes = {"a1": (shape[1], R), "a2": (R, shape[1]), "b1": (shape[0], R), "b2": (R, shape[1])}
    return {f"{name}.weight": _random(*size) for name, size in sizes.items()}


def full(shape: tuple[int, ...]) -> Factors:
    return {"diff": _random(*shape)}


def dora(shape: tuple[int, ...]) -> Factors:
    return lora(shape) | {"dora_scale": _random(shape[0], *[1] * (len(shape) - 1)).abs() + 0.1}


Dense = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def _dora(t: Mapping[str, Tensor], base: Tensor) -> Tensor:
    merged = base + dense_lora(dict(t), base.shape) * ALPHA / R
    norm = merged.flatten(1).norm(dim=1).view(-1, *[1] * (base.dim() - 1))
    return merged / norm * t["dora_scale"] - base


KINDS: dict[str, tuple[Callable[[tuple[int, ...]], Factors], Dense]] = {
    "lora": (lora, lambda t, base: dense_lora(dict(t), base.shape) * ALPHA / R),
    "dora": (dora, _dora),
    "loha": (loha, lambda t, base: dense_loha(dict(t), base.shape) * ALPHA / R),
    "lokr": (lokr, lambda t, base: dense_lokr(dict(t), base.shape)),
    "glora": (glora, lambda t, base: dense_glora({**t, "base": base}, base.shape) * ALPHA / R),
    "full": (full, lambda t, base: t["diff"]),
}
LINEAR_ONLY = {"glora"}

# -- how a program writes the keys of a layer


KOHYA = {"lora_down.weight": "lora_down.weight", "lora_up.weight": "lora_up.weight", "alpha": "alpha"}
PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
DEFAULT = {"lora_down.weight": "lora_A.default.weight", "lora_up.weight": "lora_B.default.weight"}
XLABS = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}
OLDER = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}
COMPONENT = "COMPONENT."  # of diffusers' pipelines


def dotted(name: str) -> str:
    return name


def flat(name: str) -> str:
    return name.replace(".", "_")


def all_dots(name: str) -> str:
    return name.replace("_", ".")


def half_flat(name: str) -> str:
    """`blocks_36.cross_attn.o`"""
    return name.replace(".", "_", 1)


@dataclass(frozen=True)
class Form:
    """A way of writing a file.

    Attributes:
        section: of the lists; "trainer" = the trainer's names.
        root: before a name.
        spelt: how its dots are written.
        suffixes: the trainers' -> this program's; without `alpha` its files have none, and the first factor has the
            strength.
        kinds: beside LoRA.
        archs: where it is known; () = wherever the section is.
        but: architectures of which it has rows in another order, see test_rows_head_by_head.
    """

    section: str
    root: str
    spelt: Callable[[str], str] = dotted
    suffixes: Mapping[str, str] = field(default_factory=lambda: KOHYA)
    kinds: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    but: tuple[str, ...] = ()


EVERY = ("dora", "loha", "lokr", "glora", "full")
FORMS: dict[str, Form] = {
    "the trainers": Form("trainer", "PREFIX_", flat, kinds=EVERY),
    "the trainers, dotted": Form("trainer", "diffusion_model.", suffixes=PEFT, kinds=("dora",)),
    "the trainers, dotted, with alpha": Form("trainer", "diffusion_model.", kinds=EVERY),  # LightX2V, ai-toolkit
    "the trainers, bare": Form("trainer", "", suffixes=PEFT),
    "DiffSynth, bare": Form("trainer", "", suffixes=DEFAULT, but=("minimax_h3",)),
    "PEFT": Form("trainer", "base_model.model.", suffixes=PEFT, kinds=("dora",)),
    # UniAnimate-DiT; ComfyUI-WanVideoWrapper strips the same
    "DiffSynth": Form("trainer", "pipe.dit.", suffixes=DEFAULT, archs=("wan", "flux_2", "qwen_image")),
    # musubi-tuner's convert_lora.py, as in huggingface/diffusers issue 13203
    "musubi, converted": Form("trainer", "diffusion_model.", all_dots, PEFT),
    # VideoX-Fun; huggingface/diffusers and ComfyUI repair it
    "two underscores": Form("trainer", "lora_unet__", flat, archs=("wan", "zimage", "qwen_image")),
    # kijai/ComfyUI-WanVideoWrapper issue 869
    "half flat": Form("trainer", "lora_unet_", half_flat, archs=("wan",)),
    "diffusers": Form("diffusers", COMPONENT, suffixes=PEFT, kinds=("dora",)),
    "diffusers, with alpha": Form("diffusers", COMPONENT, kinds=EVERY),  # OneTrainer; SimpleTuner's LyCORIS
    "diffusers, bare": Form("diffusers", "", suffixes=PEFT),
    "diffusers, PEFT inside": Form("diffusers", f"{COMPONENT}base_model.model.", suffixes=PEFT),  # ComfyUI issue 4347
    "diffusers, PEFT": Form("diffusers", "base_model.model.", suffixes=PEFT),
    "diffusers, adapter name": Form("diffusers", COMPONENT, suffixes=DEFAULT),
    "diffusers, its own factors": Form("diffusers", COMPONENT, suffixes=OLDER),
    "LyCORIS": Form("diffusers", "lycoris_", flat, kinds=EVERY),  # SimpleTuner
    "diffusers, flat": Form("diffusers", "lora_unet_", flat, kinds=("dora", "lokr")),  # LCM-LoRA
    "OneTrainer": Form("diffusers", "lora_transformer_", flat),  # Nerogar/OneTrainer issue 967
    "OneTrainer, dotted": Form("diffusers", "lora_transformer."),
    "ComfyUI": Form("ComfyUI", "diffusion_model.", suffixes=PEFT, kinds=("dora",)),
    "ComfyUI, flat": Form("ComfyUI", "lora_unet_", flat, kinds=EVERY),
    "ComfyUI, fused": Form("ComfyUI fused", "diffusion_model.", kinds=EVERY),
    "release": Form("release", "lora_unet_", flat),  # bmaltais/kohya_ss issue 3105
    "release, OMI": Form("release", "unet."),
    "OMI": Form("OMI", "transformer."),  # Open-Model-Initiative/OMI-Model-Standards pull request 5
    "OMI of SDXL": Form("trainer", "unet.", archs=("sdxl",)),
    "XLabs": Form("XLabs", "", suffixes=XLABS),  # huggingface/diffusers issue 9914
    "XLabs, prefixed": Form("XLabs", "diffusion_model.", suffixes=XLABS),
    "DiffSynth's classes": Form("DiffSynth", "", suffixes=DEFAULT),  # modelscope/DiffSynth-Studio, FluxLoRAConverter
    # FramePack takes files of HunyuanVideo: musubi-tuner issue 293
    "HunyuanVideo": Form("HunyuanVideo", "lora_unet_", flat, kinds=("dora", "loha", "lokr", "full")),
    "HunyuanVideo, dotted": Form("HunyuanVideo", "transformer."),
    # Tencent-Hunyuan/HunyuanVideo-I2V issue 61
    "HunyuanVideo-I2V": Form("trainer", "Hunyuan_video_I2V_lora_", flat, archs=("hunyuan_video",)),
    # kohya-ss/sd-scripts issue 1463
    "diffusers, underscore behind": Form("diffusers", "lora_unet_", lambda name: f"{flat(name)}_", archs=("flux",)),
    # LucianoCirino/efficiency-nodes-comfyui issue 104, ComfyUI issue 1144
    "older diffusers": Form("older diffusers", "unet.", suffixes=XLABS),
    "older diffusers, bare": Form("older diffusers", "", suffixes=XLABS),
    "text conditioner": Form("text conditioner", "", suffixes=PEFT),  # of diffusers' pipeline for Anima
}


BIASED = ("the trainers, dotted", "diffusers", "ComfyUI")
WITH_NORMS = ("the trainers", "the trainers, dotted, with alpha", "diffusers, with alpha", "LyCORIS", "ComfyUI")


def _sections(arch: str) -> dict[str, list[Line]]:
    return read_list(arch) if (LISTS / f"{arch}.txt").is_file() else {}


CELLS = [
    (arch, name, kind)
    for arch in SPECS
    for name, form in FORMS.items()
    if form.section in _sections(arch) and (not form.archs or arch in form.archs) and arch not in form.but
    for kind in ("lora", *form.kinds)
]

# -- files


@dataclass(frozen=True)
class File:
    """A file that was made.

    Attributes:
        tensors: key -> tensor.
        changes: trainer's weight or bias -> its change, in float64.
    """

    tensors: dict[str, Tensor]
    changes: dict[str, Tensor]


def _swap(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _rest(model: nn.Module, lines: list[Line]) -> Iterator[Line]:
    """The lines, `*` as one for each layer that no line has."""
    named = {name for line in lines for name, _ in line.trainer}
    for line in lines:
        if line.trainer[0][0] != "*":
            yield line
            continue
        for name, module in model.named_modules():
            if name not in named and hasattr(module, "weight"):
                yield Line(((name, 1),), ((name, 1),))


def make(
    model: nn.Module,
    lines: list[Line],
    form: Form,
    kind: str,
    root: str,
    keep: str = ".*",
    bias: str = "",
    norm: str = "",
) -> File:
    """A file with an adapter for each line of a list.

    Args:
        kind: of KINDS.
        root: before every name.
        keep: regular expression on the file's names; the others are left out, also where they are a part of a line.
        bias: suffix of a change of the layer's bias; "" = there is none.
        norm: of a change of a normalisation layer's weight; "" = those are left out.
    """
    layers = dict(model.named_modules())
    file = File({}, {})
    for line in _rest(model, lines):
        names = [name for name, _ in line.trainer]
        own = tuple((name if re.fullmatch(keep, name) else "-", share) for name, share in line.own)
        if {name for name, _ in own} == {"-"} or not all(hasattr(layers.get(name), "weight") for name in names):
            continue
        there = [layers[name] for name in names]
        if isinstance(there[0], nn.LayerNorm):
            if norm:
                change = _random(*there[0].weight.shape)
                file.tensors[f"{root}{form.spelt(own[0][0])}.{norm}"] = change
                file.changes[f"{names[0]}.weight"] = change.double()
        elif kind not in LINEAR_ONLY or isinstance(there[0], nn.Linear):
            _add(file, there, replace(line, own=own), form, kind, root, bias)
    return file


def _add(file: File, layers: list[nn.Module], line: Line, form: Form, kind: str, root: str, bias: str) -> None:
    factors, dense = KINDS[kind]
    weights = [layer.get_parameter("weight").detach() for layer in layers]
    whole = torch.cat(weights).double()
    change, shift = torch.zeros_like(whole), torch.zeros(len(whole), dtype=torch.float64)
    total, at = sum(share for _, share in line.own), 0
    assert len(whole) % total == 0, line
    for own, share in line.own:
        rows = slice(at, at + len(whole) // total * share)
        at = rows.stop
        if own == "-":
            continue
        base = _swap(whole[rows]) if line.swapped else whole[rows]
        made = factors(tuple(base.shape))
        update = dense({key: value.double() for key, value in made.items()}, base)
        change[rows] = _swap(update) if line.swapped else update
        written = _written(made, form)
        if bias:
            written[bias] = _random(len(base))
            shift[rows] = (_swap(written[bias]) if line.swapped else written[bias]).double()
        file.tensors.update({f"{root}{form.spelt(own)}.{key}": value for key, value in written.items()})
    sizes = [len(weight) for weight in weights]
    for (name, _), weight, moved in zip(line.trainer, change.split(sizes), shift.split(sizes), strict=True):
        file.changes[f"{name}.weight"] = weight
        if bias:
            file.changes[f"{name}.bias"] = moved


def _written(made: Factors, form: Form) -> Factors:
    """Under the program's suffixes. Without an alpha the first factor has the strength."""
    made = dict(made)
    if "alpha" not in form.suffixes:
        made["lora_down.weight"] = made["lora_down.weight"] * ALPHA / R
    elif "diff" not in made:
        made["alpha"] = torch.tensor(ALPHA)
    if "lora_magnitude_vector" in form.suffixes.values() and "dora_scale" in made:
        made["dora_scale"] = made["dora_scale"].flatten()
    return {form.suffixes.get(key, key): value for key, value in made.items()}


def root_of(form: Form, arch: str) -> str:
    spec = SPECS[arch]
    root = form.root.replace("PREFIX", spec.denoiser.prefix)
    if is_unet(arch):
        root = root.replace("lora_transformer", "lora_unet")
    return root.replace(COMPONENT, "unet." if is_unet(arch) else "transformer.")


def models_of(arch: str) -> dict[str, nn.Module]:
    """The trainer's models at one block of each row, with the normalisation layers that have a weight."""
    models = toy(arch, blocks=1)
    for name, affine in data_of(arch).trainers_norms.items():
        if affine:
            at, (*parents, last) = models[SPECS[arch].denoiser.name], name.split(".")
            for parent in parents:
                if parent not in dict(at.named_children()):
                    at.add_module(parent, nn.Module())
                at = at.get_submodule(parent)
            norm = nn.LayerNorm(8)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.5, 1.5)
            at.add_module(last, norm)
    return models


def assert_changes(old: Mapping[str, Tensor], new: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    """Every tensor is what it was, changed as the file says."""
    left = [key for key, change in changes.items() if change.any() and torch.equal(new[key], old[key])]
    assert not left, f"unchanged: {left}"
    for key, before in old.items():
        wanted = before.double() + changes.get(key, 0.0)
        error = (new[key].double() - wanted).norm() / wanted.norm()
        assert error < (1e-6 if key in changes else 1e-12), f"{key}: {error}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def load(arch: str, models: Mapping[str, nn.Module], file: File, folder: Path, part: str = "") -> None:
    """Through a network, and compare every weight and bias."""
    spec, path = SPECS[arch], folder / "a.safetensors"
    save_file(file.tensors, path)
    denoiser = models[spec.denoiser.name]
    encoders = [models.get(one.name) for one in spec.text_encoders] if part else None
    changed = models[part or spec.denoiser.name]
    old = {key: value.clone() for key, value in changed.state_dict().items()}
    module = importlib.import_module(f"networks.{spec.entry}")
    network, tensors = module.create_network_from_weights(1.0, str(path), None, encoders, denoiser, None, True)
    network.merge_to(encoders, denoiser, tensors, torch.float32, "cpu")
    assert_changes(old, changed.state_dict(), file.changes)


def file_of(arch: str, model: nn.Module, name: str, kind: str, **options: str) -> File:
    form = FORMS[name]
    return make(model, read_list(arch)[form.section], form, kind, root_of(form, arch), **options)


# -- denoisers


@pytest.mark.sweep(16)
@pytest.mark.parametrize("arch,name,kind", CELLS)
def test_a_network_reads_every_layout(arch: str, name: str, kind: str, tmp_path: Path) -> None:
    models = models_of(arch)
    file = file_of(arch, models[SPECS[arch].denoiser.name], name, kind)
    assert len(file.changes) >= 2
    load(arch, models, file, tmp_path)


PARTS = {
    # diffusers' own training scripts
    "attention": r".*\.(to_(q|k|v|query|key|value)|to_out\.0|add_[qkv]_proj|to_add_out)",
    "queries and values": r".*\.to_(q|v|query|value)",  # PEFT's usual
}
PARTIAL = [
    (arch, part, name, kind)
    for arch, name, kind in CELLS
    if name in ("diffusers", "diffusers, with alpha", "LyCORIS", "OMI") and kind != "glora"
    for part in PARTS
]


@pytest.mark.sweep(24)
@pytest.mark.parametrize("arch,part,name,kind", PARTIAL)
def test_projections_may_be_missing(arch: str, part: str, name: str, kind: str, tmp_path: Path) -> None:
    """Rows without an adapter stay as they are."""
    models = models_of(arch)
    keep = r".*\.[02]" if name == "OMI" else PARTS[part]
    file = file_of(arch, models[SPECS[arch].denoiser.name], name, kind, keep=keep)
    assert file.changes
    load(arch, models, file, tmp_path)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("bias", ["diff_b", "lora_B.bias"])
@pytest.mark.parametrize("arch,name", [cell[:2] for cell in CELLS if cell[2] == "lora" and cell[1] in BIASED])
def test_changes_of_biases(arch: str, name: str, bias: str, tmp_path: Path) -> None:
    """LightX2V's `diff_b`, PEFT's `lora_bias`."""
    models = models_of(arch)
    load(arch, models, file_of(arch, models[SPECS[arch].denoiser.name], name, "lora", bias=bias), tmp_path)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("norm", ["w_norm", "diff"])
@pytest.mark.parametrize("arch,name", [cell[:2] for cell in CELLS if cell[2] == "lora" and cell[1] in WITH_NORMS])
def test_normalisation_layers(arch: str, name: str, norm: str, tmp_path: Path) -> None:
    """LyCORIS' `w_norm`, ComfyUI's `diff`, beside a LoRA of the other layers."""
    models = models_of(arch)
    file = file_of(arch, models[SPECS[arch].denoiser.name], name, "lora", norm=norm)
    load(arch, models, file, tmp_path)


@pytest.mark.sweep(16)
@pytest.mark.parametrize("arch,name,kind", [cell for cell in CELLS if cell[2] in ("lora", "lokr", "dora")])
def test_a_checkpoint_takes_every_layout(arch: str, name: str, kind: str, tmp_path: Path) -> None:
    model = models_of(arch)[SPECS[arch].denoiser.name]
    file = file_of(arch, model, name, kind)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    adapter, before, after = (tmp_path / f"{name}.safetensors" for name in ("adapter", "before", "after"))
    save_file(file.tensors, adapter)
    save_file({f"model.diffusion_model.{key}": value for key, value in old.items()}, before)
    assert script.main([str(before), str(adapter), "--out", str(after)]) == 0
    merged = Checkpoint(after)
    assert_changes(old, {key: merged.tensor(f"model.diffusion_model.{key}") for key in old}, file.changes)


@pytest.mark.parametrize("root", ["", "diffusion_model."])
def test_rows_head_by_head(root: str, tmp_path: Path) -> None:
    """DiffSynth's files of MiniMax-H3 have query, key and value of each head side by side, as the released shards; what
    tells them is the name of PEFT's adapter. Held to diffusers' conversion."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_minimax_h3_lora_to_diffusers as convert

    heads, models = 2, models_of("minimax_h3")
    attention = models["dit"].get_submodule("blocks.0.attn")
    attention.qkv_proj = nn.Linear(84, heads * 3 * 128)
    down, up = _random(R, 84), _random(heads * 3 * 128, R)
    name = f"{root}blocks.0.attn.qkv_proj"
    theirs = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    projections = [torch.cat([up[384 * h + at : 384 * h + at + 128] for h in range(heads)]) for at in (0, 128, 256)]
    converted = convert(dict(theirs))
    for letter, rows in zip("qkv", projections, strict=True):
        assert torch.equal(converted[f"transformer.transformer_blocks.0.attn.to_{letter}.lora_B.weight"], rows)
    change = torch.cat(projections).double() @ down.double()
    load("minimax_h3", models, File(theirs, {"blocks.0.attn.qkv_proj.weight": change}), tmp_path)
    plain = {key.replace(".default", ""): tensor for key, tensor in theirs.items()}
    change = up.double() @ down.double()
    load("minimax_h3", models, File(plain, {"blocks.0.attn.qkv_proj.weight": change}), tmp_path)
    cut = {key: t[:300].clone() if t is up else t for key, t in theirs.items()}
    with pytest.raises(ValueError, match="has 300 rows, which are no 3 projections of heads of 128"):
        load("minimax_h3", models, File(cut, {}), tmp_path)


# -- text encoders


def _encoders() -> list[tuple[str, str, str, str]]:
    """(architecture, part, section of the names, root), from ENCODERS.txt."""
    found, section = [], ""
    for text in (LISTS / "ENCODERS.txt").read_text(encoding="utf-8").splitlines():
        if text.startswith("["):
            section = text[1:-1]
        elif text.startswith("@"):
            arch, part, root = text[1:].split()
            found.append((arch, part, section, root))
    return found


@pytest.mark.sweep(6)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("arch,part,section,root", _encoders())
def test_text_encoders(arch: str, part: str, section: str, root: str, kind: str, tmp_path: Path) -> None:
    models = models_of(arch)
    form = Form(section, root, flat if root.endswith("_") else dotted)
    file = make(models[part], read_list("ENCODERS")[section], form, kind, root)
    assert len(file.changes) >= 3
    load(arch, models, file, tmp_path, part)


# -- what is written for another program


def _own(line: Line, arch: str, shapes: Mapping[str, tuple[int, ...]], program: str) -> list[tuple[str, str, int]]:
    """(trainer's layer, the program's, rows of the trainer's there), as the records have it."""
    spec, found = SPECS[arch], []
    for name, _ in line.trainer:
        rows, columns, *_ = shapes[name]
        for place in places(spec, spec.denoiser, name, rows, columns, program):
            path = place.path.removeprefix(f"{spec.denoiser.diffusers}.") if program == DIFFUSERS else place.path
            assert place.swapped == line.swapped, name
            found.append((name, path, place.stop - place.start))
    return found


WRITTEN = {"diffusers": DIFFUSERS, "ComfyUI": COMFYUI}


@pytest.mark.parametrize("arch,section", [(a, s) for a in SPECS for s in WRITTEN if s in _sections(a)])
def test_names_for_other_programs_are_those_of_the_lists(arch: str, section: str) -> None:
    """What is written for a program is what its list has, row by row."""
    models = models_of(arch)
    layers = dict(models[SPECS[arch].denoiser.name].named_modules())
    shapes = {name: (*layer.weight.shape, 1) for name, layer in layers.items() if hasattr(layer, "weight")}
    for line in _rest(models[SPECS[arch].denoiser.name], read_list(arch)[section]):
        rows = [shapes[name][0] for name, _ in line.trainer]
        if len(line.own) > 1:
            total = sum(share for _, share in line.own)
            wanted = [(line.trainer[0][0], own, rows[0] // total * share) for own, share in line.own]
        else:
            wanted = [(name, line.own[0][0], n) for (name, _), n in zip(line.trainer, rows, strict=True)]
        assert _own(line, arch, shapes, WRITTEN[section]) == wanted


# A file for ComfyUI has none of these layers, which the trainer's model has.
LACKING = {"hidream_o1": r"visual\.deepstack_merger_list\..*"}

if "COMFYUI_PATH" in os.environ:
    from readers import comfyui_program

    THERE = [arch for arch in SPECS if "ComfyUI" in _sections(arch) and comfyui_program.has(arch)]

    @pytest.mark.parametrize("arch", THERE)
    def test_the_lists_have_the_names_of_comfyuis_classes(arch: str) -> None:
        """Of the program itself, and what its loader takes beside."""
        known = {key.removeprefix("diffusion_model.").rpartition(".")[0] for key in comfyui_program.weights(arch)}
        known |= {key.removeprefix("diffusion_model.") for key in comfyui_program.key_map(arch)}
        for section in ("ComfyUI", "ComfyUI fused"):
            for line in read_list(arch).get(section, []):
                own = line.own[0][0]
                assert own == "*" or own in known or re.fullmatch(LACKING.get(arch, ""), own), line
