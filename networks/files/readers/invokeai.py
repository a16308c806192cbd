"""InvokeAI: it takes a file for one of its base models by names, suffixes and shapes, then looks for each layer there.

What it does not recognise it keeps as a model of an unknown kind; a form that it does not know refuses the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ...archs import ARCHS
from ...archs.places import DIFFUSERS, places
from ...archs.spec import Part
from ..codec import SavedLayer
from .contract import Fate, Given, Reading
from .trainers import Change, off, plain, suffixes_of

UNKNOWN = "it does not recognise the file, and keeps it as a model of an unknown kind"
FORMAT = "Unsupported lora format"
OWN = "own"  # the trainer's names; others are DIFFUSERS
FLAT = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
UP, DOWN = "lora_up.weight", "lora_down.weight"
A, B = "lora_A.weight", "lora_B.weight"
PAIRS = frozenset({A, B, DOWN, UP})
FACTORS = PAIRS | {"dora_scale", "alpha"}  # suffixes which it divides from dotted names
LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})


@dataclass(frozen=True)
class File:
    """What it sees of a file.

    Attributes:
        layers: name -> suffixes, as they stand there.
    """

    given: Given
    layers: Mapping[str, set[str]]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.given.tensors)

    def starts(self, *beginnings: str) -> bool:
        return any(key.startswith(beginnings) for key in self.keys)

    def ends(self, *endings: str) -> bool:
        return any(key.endswith(endings) for key in self.keys)

    def has(self, expression: str) -> bool:
        return any(re.search(expression, key) for key in self.keys)

    def sizes(self, layer: str, axis: int) -> int | None:
        """Inputs (axis 1) or outputs (0) of a LoRA or LoKr layer, as its factors show them."""
        own = {key[len(layer) + 1 :]: t for key, t in self.given.tensors.items() if key.startswith(f"{layer}.")}
        if axis == 1 and (DOWN in own or A in own):
            return int(own.get(DOWN, own.get(A)).shape[1])  # type: ignore[union-attr]
        if axis == 0 and (UP in own or B in own):
            return int(own.get(UP, own.get(B)).shape[0])  # type: ignore[union-attr]
        half = "_a" if axis == 0 else "_b"
        for first, second in (("lokr_w1", "lokr_w2"), (f"lokr_w1{half}", f"lokr_w2{half}")):
            if first in own and second in own:
                return int(own[first].shape[axis] * own[second].shape[axis])
        return None


@dataclass(frozen=True)
class Names:
    """Names under which it finds layers of a model.

    Attributes:
        forms: what stands before them; with a dot at the end, or nothing, before dotted names.
        layout: whose names they are.
        only: regular expression on the trainer's dotted name; "" = all layers.
        endings: suffixes which it divides from dotted names; () = any. Another one without a dot is taken for a part of
            the name, and the file is refused.
        suffixes: which a layer may have; () = any.
        encoder: which text encoder's, from 0; None = the denoiser's.
    """

    forms: tuple[str, ...]
    layout: str = OWN
    only: str = ""
    endings: frozenset[str] = frozenset()
    suffixes: frozenset[str] = frozenset()
    encoder: int | None = None

    def of(self, given: Given) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All of them for a model, with the shape of the trainer's layer."""
        arch = given.arch
        part = arch.denoiser if self.encoder is None else arch.text_encoders[self.encoder]
        for name, shape in given.shapes.get(part.name, {}).items():
            if not self.only or re.fullmatch(self.only, name):
                for found in [name] if self.layout == OWN else _diffusers(given, part, name, shape):
                    yield from ((_spelt(form, found), shape) for form in self.forms)


def _spelt(form: str, name: str) -> str:
    return form + (name if form[-1:] in ("", ".") else name.replace(".", "_"))


def _diffusers(given: Given, part: Part, name: str, shape: tuple[int, ...]) -> list[str]:
    there = places(given.arch, part, name, shape[0], shape[-1] if len(shape) < 2 else shape[1])
    return [place.path.removeprefix(f"{part.diffusers}.") for place in there]


@dataclass(frozen=True)
class Base:
    """One of its base models.

    Attributes:
        is_one: whether it takes a file for one of this.
        names: under which it finds layers.
        refuses: why it cannot read the names of a file after all, in its own words; "" = it can.
        pairs: it knows lora_A and lora_B beside lora_down and lora_up.
        alphas: it takes the alpha beside those two.
        divided: regular expression on a file's names -> of these layers, which it divides, it leaves out those that
            have none of these suffixes.
        plain: the suffix at which it drops the magnitudes of a layer; "" = it does not.
    """

    is_one: Callable[[File], bool]
    names: tuple[Names, ...]
    refuses: Callable[[File], str] = lambda file: ""
    pairs: bool = True
    alphas: bool = False
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plain: str = ""


# -- Stable Diffusion


_SHOWS_WIDTH = r"lora_unet_.*(_attn2_to_[kv]\.|time_emb_proj\.lora_down)|lora_te[12]?_.*_self_attn_"


def _tokens(file: File) -> int | None:
    """Width of the text, or of both texts, that the first layers show which tell it."""
    halves: dict[str, int | None] = {"lora_te1": None, "lora_te2": None}
    for key, tensor in file.given.tensors.items():
        if not re.match(_SHOWS_WIDTH, key):
            continue
        layer, _, suffix = key.partition(".")
        width = _width(file, layer, suffix, tensor)
        if layer[:8] in halves:
            halves[layer[:8]] = width
            first, second = halves.values()
            width = None if first is None or second is None else first + second
        if width is not None:
            return width
    return None


def _width(file: File, layer: str, suffix: str, tensor: Tensor) -> int | None:
    if suffix in (DOWN, "hada_w1_b", "hada_w2_b", "diff"):
        return int(tensor.shape[1])
    if "lokr_" in suffix:
        whole = [file.given.tensors.get(f"{layer}.{name}") for name in ("lokr_w1", "lokr_w2")]
        return None if whole[0] is None or whole[1] is None else int(whole[0].shape[1] * whole[1].shape[1])
    return int(tensor.shape[0]) if suffix == "weight" and not layer.startswith("lora_unet_") else None


_DEEP = (
    r"^lora_unet_((down_blocks|up_blocks)_\d+_attentions_\d+|mid_block_attentions_\d+|(in|out)put_blocks_\d+_\d+"
    r"|middle_block_\d+)_transformer_blocks_([2-9]|\d\d)_"
)


def _diffusion(file: File, *widths: int) -> bool:
    """Whether it takes a file for one of Stable Diffusion's with texts as wide as that."""
    endings = ("to_k_lora.up.weight", "to_q_lora.down.weight", A, B, "lokr_w1", "lokr_w2", "hada_w1_a", "hada_w2_a")
    if _flux_format(file) or not (file.starts(*FLAT) or file.ends(*endings)):
        return False
    if file.has(_ANIMA_LOOSE):
        return False
    width = _tokens(file)
    deep = width not in (768, 1024, 1280, 2048) and file.has(_DEEP)
    return width in widths or (deep and 2048 in widths)


# -- FLUX

_KOHYA_FLUX = (
    r"lora_unet_\w+_blocks_\d+_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)"
    r"|lora_unet_final_layer_linear"
    r"|lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w"
    r"|lora_te2_encoder_block_\d+_layer_\d+_(DenseReluDense|SelfAttention)_\w"
)
_BFL = ("diffusion_model.double_blocks.", "diffusion_model.single_blocks.")
_BFL_ROOTS = ("diffusion_model.", "base_model.model.")
_PEFT_BFL = tuple(name.replace("diffusion_model.", "base_model.model.") for name in _BFL)
_BFL_ENDINGS = (A, B, *LOKR, *LOHA, "lokr_t2", "alpha", "dora_scale", "diff")
_FIRST_FLUX = tuple(
    f"{layer}.{ending}"
    for layer in ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")
    for ending in (A, B)
)
_SECOND_FLUX = ("to_qkv_mlp_proj", "ff.linear_in", "ff_context.linear_in")


def _in_diffusers(file: File) -> bool:
    return all(key.endswith((A, B, "lora.down.weight", "lora.up.weight")) for key in file.keys)


def _is_first_flux(file: File) -> bool:
    roots = ("transformer.", "base_model.model.")
    return _in_diffusers(file) and any(all(root + key in file.keys for key in _FIRST_FLUX) for root in roots)


def _in_bfl(file: File) -> bool:
    named = all(key.endswith(_BFL_ENDINGS) and key.startswith(_BFL_ROOTS) for key in file.keys)
    return named and file.starts(*_BFL, *_PEFT_BFL)


_FLUX_FORMATS: Mapping[str, Callable[[File], bool]] = {  # the first that a file has
    "kohya": lambda file: all(re.match(_KOHYA_FLUX, key) for key in file.keys),
    "diffusers": _is_first_flux,
    "diffusers 2": lambda file: _in_diffusers(file) and any(name in key for key in file.keys for name in _SECOND_FLUX),
    "ai-toolkit": lambda file: file.starts(*_BFL) and not (file.ends(*LOKR, *LOHA, "lokr_t2") or file.given.metadata),
    "BFL": _in_bfl,
}


def _flux_format(file: File) -> str:
    """Which of its layouts of FLUX files it is; "" = none."""
    return next((title for title, shown in _FLUX_FORMATS.items() if shown(file)), "")


def _is_second(file: File) -> bool:
    """Whether it takes a FLUX file for one of FLUX.2: by the width of a layer, then by its MLP's."""
    if _flux_format(file) == "diffusers 2":
        return True
    for layer in file.layers:
        if re.search(r"(^lora_unet_|\.)txt_in$", layer):
            return file.sizes(layer, 1) in (7680, 12288, 15360)
    width = next((file.sizes(layer, 1) for layer in file.layers if re.search(r"[_.]img_attn[_.]proj$", layer)), None)
    if width is None or width != 3072:
        return width is not None
    mlp = next((file.sizes(layer, 0) for layer in file.layers if re.search(r"[_.]img_mlp[_.]0$", layer)), None)
    return mlp is not None and mlp != 4 * width


# -- the others

_ANIMA_LOOSE = (
    r"lora_unet_(llm_adapter_)?blocks_\d+_(cross_attn|self_attn|mlp|adaln_modulation)"
    r"|(diffusion_model|transformer|base_model\.model\.transformer)\.blocks\.\d+\.(cross_attn|self_attn|mlp|adaln_modu)"
)
_ANIMA_OWN = r"(mlp[._]layer|adaln_modulation|(?:cross|self)_attn[._](?:[qkv]_proj|output_proj))"
_ANIMA = (
    rf"lora_unet_(llm_adapter_)?blocks_\d+_{_ANIMA_OWN}"
    rf"|(diffusion_model|transformer|base_model\.model\.transformer)\.blocks\.\d+\.{_ANIMA_OWN}"
)
_WAN = (
    r"lora_unet_blocks_\d+_(attn[12]_(to_[qkv]|to_out_0|norm_[qk])|(self|cross)_attn_[qkvo](_|\.|$)|ffn_(\d|net_\d))"
    r"|(^|(diffusion_model|transformer|base_model\.model\.transformer)\.)blocks\.\d+\."
    r"(attn1\.|attn2\.|ffn\.net\.|(self|cross)_attn\.[qkvo](\.|$)|ffn\.\d+\.)"
)
_NOT_WAN = (
    r"blocks[._]\d+[._](mlp|adaln_modulation)|(self|cross)_attn[._]([qkv]_proj|output_proj)|transformer_blocks\.\d"
)
_MARKS = (*PAIRS, "dora_scale")
_MORE_MARKS = (*_MARKS, ".lokr_w1", ".lokr_w2")
_KREA2_LAYERS = (
    r"(txtfusion\.(layerwise|refiner)_blocks|blocks)\.\d+\.(attn\.(wq|wk|wv|wo|gate)|mlp\.(gate|up|down))"
    r"|txtfusion\.projector|first|tmlp\.[02]|tproj\.1|txtmlp\.[13]|last\.linear"
)
_WAN_LAYERS = r"blocks\.\d+\.((self|cross)_attn\.([qkvo]|norm_[qk])|ffn\.[02])"
_ANIMA_LAYERS = (
    r"(llm_adapter\.)?blocks\.\d+\.((self|cross)_attn\.([qkvo]|output)_proj|mlp\.layer[12]"
    r"|adaln_modulation_(self_attn|cross_attn|mlp)\..*)"
)


def _is_krea2(file: File) -> bool:
    own = file.has("text_fusion|txtfusion|time_mod_proj") or (file.has(r"\.attn\.wq\.") and file.has(r"\.attn\.gate\."))
    pairs = [own & PAIRS for own in file.layers.values() if own & PAIRS]
    return own and bool(pairs) and all(pair in ({A, B}, {DOWN, UP}) for pair in pairs)


def _is_qwen(file: File) -> bool:
    others = r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.|lora_unet_(double|single)_"
    names = "transformer_blocks.", "transformer.transformer_blocks.", "lora_unet_transformer_blocks_"
    return file.starts(*names) and file.ends(*_MORE_MARKS) and not file.has(others) and not file.has("text_fusion")


_ZIMAGE_FLAT = r"(layers|(context|noise)_refiner)\.\d+\.(attention|feed_forward)\.(to_[kqv]|w[123])"
_ZIMAGE = (
    "diffusion_model.layers.", "diffusion_model.context_refiner.", "diffusion_model.noise_refiner.",
    "transformer.layers.", "base_model.model.transformer.layers.",
)  # fmt: skip


def _is_zimage(file: File) -> bool:
    return file.has("^lora_unet__" + _ZIMAGE_FLAT.replace(r"\.", "_")) or (file.starts(*_ZIMAGE) and file.ends(*_MARKS))


def _flux_refuses(file: File) -> str:
    """It looks again, without the metadata, at a file that it has taken for one of FLUX, and divides every name with
    dots before its last two parts, if there is no LoKr or LoHa."""
    if not file.starts(*_BFL) or file.ends(*LOKR, *LOHA, "lokr_t2"):
        return ""
    return FORMAT if any("." not in suffix for own in file.layers.values() for suffix in own) else ""


def _sdxl_refuses(file: File) -> str:
    if not all(layer.startswith(("lora_unet_", "lora_te1_", "lora_te2_")) for layer in file.layers):
        return "Unrecognized SDXL LoRA key prefix"
    original = r"lora_unet_(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)_\d"
    unet = {bool(re.match(original, layer)) for layer in file.layers if layer.startswith("lora_unet_")}
    return "" if len(unet) < 2 else "The SDXL LoRA could only be partially converted to diffusers format"


_DOTTED = ("base_model.model.transformer.", "transformer.", "diffusion_model.")
_FLUX_BLOCKS = r"(double|single)_blocks\.\d+\..*"
_FLUX = (
    Names(("lora_unet_",), OWN, _FLUX_BLOCKS),
    Names(("diffusion_model.", "base_model.model.")),
)
_FLUX_2_LAYERS = (
    _FLUX_BLOCKS + r"|img_in|txt_in|(double|single)_stream_modulation.*|final_layer\.linear|time_in\..*_layer"
)

BASES: Mapping[str, Base] = {
    "sd": Base(
        lambda file: _diffusion(file, 768, 1024),
        (Names(("lora_unet_",), DIFFUSERS), Names(("lora_te_",), encoder=0)),
        pairs=False,
    ),
    "sdxl": Base(
        lambda file: _diffusion(file, 1280, 2048),
        (
            Names(("lora_unet_",)),
            Names(("lora_unet_",), DIFFUSERS),
            Names(("lora_te1_",), encoder=0),
            Names(("lora_te2_",), encoder=1),
        ),
        _sdxl_refuses,
        pairs=False,
    ),
    "flux": Base(
        lambda file: bool(_flux_format(file)) and not _is_second(file),
        (
            *_FLUX,
            Names(("transformer.", "base_model.model."), DIFFUSERS, endings=PAIRS),
            Names(("lora_te1_",), encoder=0),
            Names(("lora_te2_",), encoder=1),
        ),
        _flux_refuses,
    ),
    "flux_2": Base(
        lambda file: bool(_flux_format(file)) and _is_second(file),
        (
            _FLUX[0],
            replace(_FLUX[1], only=_FLUX_2_LAYERS),
            Names(("transformer.", "base_model.model.", ""), DIFFUSERS, endings=PAIRS),
        ),
        _flux_refuses,
        divided={r"lora_unet_.*_attn_qkv": (UP,), r".*\..*_attn\.qkv": (UP, B, "lokr_w1", "lokr_w1_a")},
    ),
    "zimage": Base(
        _is_zimage,
        (
            Names(("lora_unet__",), OWN, _ZIMAGE_FLAT, FACTORS),
            Names(_DOTTED, endings=FACTORS),
        ),
    ),
    "qwen_image": Base(
        _is_qwen,
        (
            Names(("lora_unet_",), OWN, r"transformer_blocks\.\d+\.(attn|(img|txt)_mlp|(img|txt)_mod)\..*"),
            Names(("transformer.", ""), endings=FACTORS),
        ),
    ),
    "wan": Base(
        lambda file: file.has(_WAN) and file.ends(*_MORE_MARKS) and not file.has(_NOT_WAN),
        (
            Names(("lora_unet_",), OWN, _WAN_LAYERS),
            Names(("lora_unet_",), DIFFUSERS, _WAN_LAYERS),
            Names((*_DOTTED, ""), OWN, _WAN_LAYERS, FACTORS),
            Names((*_DOTTED, ""), DIFFUSERS, r"blocks\..*", FACTORS),
        ),
        alphas=True,
    ),
    "krea2": Base(
        _is_krea2,
        (
            Names(("lora_unet_",), OWN, _KREA2_LAYERS, suffixes=FACTORS),
            Names(_DOTTED, OWN, _KREA2_LAYERS, FACTORS),
            Names(_DOTTED, DIFFUSERS, "", FACTORS),
        ),
        alphas=True,
    ),
    "anima": Base(
        lambda file: file.has(_ANIMA) and file.ends(*_MORE_MARKS),
        (
            Names(("lora_unet_",), OWN, _ANIMA_LAYERS),
            Names(_DOTTED, OWN, endings=FACTORS | LOKR),
            Names(("lora_te_",), encoder=0),
        ),
        plain="lokr_w1",
    ),
    # Base models for which it has no adapters.
    "sd3": Base(lambda file: False, ()),
    "ideogram4": Base(lambda file: False, ()),
    "ernie_image": Base(lambda file: False, ()),
}


# -- what it makes of a layer


@dataclass(frozen=True)
class _Layer:
    """A layer of a file.

    Attributes:
        suffixes: as it takes them.
        strength: by which its own is off.
        kernel: the model's layer is a convolution.
        base: its weight; None = not known.
    """

    saved: SavedLayer
    suffixes: set[str]
    strength: float
    kernel: bool
    base: Tensor | None

    @property
    def on_rows(self) -> bool:
        """Whether its magnitudes are those of rows."""
        magnitude = self.saved.magnitude
        return magnitude is not None and magnitude.numel() > 1 and (magnitude.dim() < 2 or magnitude.shape[0] > 1)


_KNOWN = (UP, "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "on_input", "w_norm")


def _refusal(layer: _Layer, base: Base) -> str:
    """Its own words, if this layer makes it refuse the whole file."""
    if "dora_scale" in layer.suffixes and not (base.plain and base.plain in layer.suffixes):
        return "" if {UP, DOWN} <= layer.suffixes else f"KeyError: '{UP}'"
    if "on_input" in layer.suffixes and layer.kernel and not bool(layer.saved.tensors["on_input"]):
        return "RuntimeError: shape"  # factors of the outputs of a convolution
    return "" if any(suffix in layer.suffixes for suffix in _KNOWN) else FORMAT


def _by_columns(saved: SavedLayer, base: Tensor) -> Tensor:
    """m (W + dW) / ||W + dW||, where the norms are those of columns, whatever m is."""
    assert saved.magnitude is not None
    whole = base + plain(saved, base)
    norms = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (base.dim() - 2))
    return whole * (saved.magnitude.to(base) / norms) - base


def _fate(layer: _Layer, base: Base) -> Fate:
    dropped = base.plain and base.plain in layer.suffixes
    if layer.saved.magnitude is not None and (dropped or "dora_scale" not in layer.suffixes):
        return _inexact(layer, "its magnitudes are not read: it acts as plain factors", plain)
    if layer.strength != 1:
        return Fate(True, "it does not read an alpha beside lora_A", (abs(layer.strength - 1),) * 2)
    if layer.on_rows:
        return _inexact(
            layer, "DoRA on the output side: it takes the magnitudes for those of the input side", _by_columns
        )
    if layer.saved.bias_change is not None and layer.suffixes.isdisjoint({"diff", "w_norm"}):
        return Fate(True, "its change of the bias is not read")
    return Fate()


def _inexact(layer: _Layer, reason: str, change: Change) -> Fate:
    return Fate(True, reason, off(layer.saved, layer.base, change))


_TITLES = {arch.name: arch.title for arch in ARCHS}
_Known = Mapping[str, tuple[Names, tuple[int, ...]]]


@dataclass(frozen=True)
class InvokeAI:
    name: str = "invokeai"
    title: str = "InvokeAI 6.14.2"
    order: int = 50
    unasked: bool = True

    def read(self, given: Given) -> Reading | None:
        base = BASES.get(given.arch.name)
        if base is None:
            return None
        file = File(given, suffixes_of(given))
        if not base.is_one(file):
            taken = next((name for name, other in BASES.items() if other.is_one(file)), "")
            words = f"it takes the file for one of {_TITLES[taken]}" if taken else UNKNOWN
            return Reading(dict.fromkeys(given.meant, Fate(False, words, (1.0, 1.0))), words)
        return self.applied(file, base)

    def applied(self, file: File, base: Base) -> Reading:
        """What it makes of a file which it has taken for one of the base model."""
        refused, fates = base.refuses(file), dict[str, Fate]()
        known = {name: (names, shape) for names in base.names for name, shape in names.of(file.given)}
        for name, saved in file.given.meant.items():
            suffixes = _taken(file.layers[name], base)
            weight = file.given.base(saved.name) if file.given.base else None
            dropped = "alpha" in file.layers[name] - suffixes
            strength = 1 / saved.scale if dropped else 1.0
            layer = _Layer(saved, suffixes, strength, name in known and len(known[name][1]) > 2, weight)
            refused = refused or _misdivided(name, file.layers[name], known) or _refusal(layer, base)
            missing = _missing(name, file.layers[name], known, base)
            fates[name] = Fate(False, missing, (1.0, 1.0)) if missing else _fate(layer, base)
        return Reading(fates, refused)


def _taken(suffixes: set[str], base: Base) -> set[str]:
    """The suffixes of a layer as it goes on with them."""
    if not base.pairs or A not in suffixes:
        return suffixes
    kept = suffixes - {A, B} if base.alphas else suffixes - {A, B, "alpha", "dora_scale"}
    return kept | {DOWN, UP}


def _misdivided(name: str, suffixes: set[str], known: _Known) -> str:
    """Its words for a suffix which it takes for a part of a dotted name."""
    endings = known[name][0].endings if name in known else frozenset()
    return FORMAT if endings and any("." not in suffix for suffix in suffixes - endings) else ""


def _missing(name: str, suffixes: set[str], known: _Known, base: Base) -> str:
    """Why it leaves out a layer; "" = it does not."""
    if name not in known:
        return "it finds no layer of this name"
    wanted = known[name][0].suffixes
    if wanted and not suffixes <= wanted:
        return "it does not find this name beside these suffixes"
    kinds = next((own for pattern, own in base.divided.items() if re.fullmatch(pattern, name)), None)
    if kinds is not None and (suffixes.isdisjoint(kinds) or "dora_scale" in suffixes):
        return "it divides this layer in three, and does not know how in this form"
    return ""


READERS = (InvokeAI(),)
