"""diffusers: `load_lora_weights` of its pipelines.

Each pipeline knows some ways in which programs name layers, and converts them by rules of its own. A key decides which
way a file goes; what the rules leave over ends in an error, or is left out. What is converted, or has diffusers' names
already, goes to PEFT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ...archs.places import COMFYUI, Place, own_layers, places
from ...archs.spec import Part
from ...records.lokr import LOKR
from ...tensors.factor import factorization
from .. import dotted
from ..codec import SavedLayer
from ..strengths import METADATA
from .contract import Fate, Given, Reading
from .errors import UNKNOWN, below_the_norm, errors, plain

# Ways in which a layer is named.
FLAT = "flat"  # as the trainers save it
PATH = "path"  # diffusers' own: component and path
ORIGINAL = "diffusion_model."  # this, and the trainer's path
RELEASED = "released"  # the same beginning, and the path in ComfyUI's classes
PEFT = dotted.PEFT  # likewise
WRAPPER = "lycoris_"  # this, and diffusers' path flat
BARE = "bare"  # the trainer's path alone

# What a layer must have to be converted: one of these sets of suffixes.
KOHYA = (frozenset({"lora_down.weight", "lora_up.weight"}),)
AB = (frozenset({"lora_A.weight", "lora_B.weight"}),)
KRONECKER = LOKR.required
VECTORS = {dotted.VECTOR, f"{dotted.VECTOR}.weight"}

INVALID = "Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring."
NEITHER = "Invalid adapter checkpoint. We currently support LoRA and LoKr."
LEFT = "state_dict` should be empty at this point but has"
NO_MATCH = "NoMatchingPeftModuleError"
NO_FACTOR = "Could not infer a `decompose_factor`"
ALONE = "its transformer takes files of save_format=diffusers: pipeline.transformer.load_lora_adapter(file)"
TWO_STRENGTHS = "Both `network_alphas` and `metadata` cannot be specified."


@dataclass(frozen=True)
class Road:
    """A way on which a pipeline converts a file.

    Attributes:
        sign: regular expression; a key in which it is found sends the file this way.
        names: of the layers that are converted, in one of these ways.
        factors: which they must have.
        layers: regular expression on their names in the trainer's model.
        alphas: they are multiplied in; otherwise they are left over.
        rest: its words where something is left over; "" = that is left out.
        lost: regular expression on keys that are left out before anything can be left over.
        whole: suffix which every layer of a block must have; "" = layers may be missing.
        magnitudes: DoRA's `dora_scale` are left over, which other roads drop before.
        all_keys: every key must have the sign.
        common_alpha: where alphas differ, attention and text encoders get the one that is most common.
    """

    sign: str
    names: tuple[str, ...] = ()
    factors: tuple[frozenset[str], ...] = KOHYA
    layers: str = ".*"
    alphas: bool = True
    rest: str = LEFT
    lost: str = "(?!)"
    whole: str = ""
    magnitudes: bool = False
    all_keys: bool = False
    common_alpha: bool = False


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline takes.

    Attributes:
        roads: the first whose sign a file has; files without any go to PEFT as they are.
        factors: of layers with diffusers' names.
        alphas: beside these, too.
        missing: it takes no adapters: what is said of it.
    """

    roads: tuple[Road, ...] = ()
    factors: tuple[frozenset[str], ...] = AB
    alphas: bool = False
    missing: str = ""


_OWN, _OWN_OR_PEFT, _NO_PATH = r"^diffusion_model\.", r"^(diffusion_model|base_model\.model)\.", r"^(?!transformer\.)"
_BLOCKS = r"(double|single)_blocks\..*"
_STABLE = Pipeline(
    (
        Road(
            r"^lora_(unet|te|te1|te2)_",
            (FLAT,),
            rest="The following keys have not been correctly renamed",
            all_keys=True,
            common_alpha=True,
        ),
    )
)
_FLUX = Pipeline(
    (
        Road(
            rf"{_NO_PATH}.*\.lora_down\.weight$",
            (FLAT, ORIGINAL),
            layers=rf"{_BLOCKS}|text_model\..*",
            rest="Incompatible keys detected",
            lost=r"^lora_te|^(lora_unet_|diffusion_model\.)(?!double_|single_)|\.diff_b$",
        ),
        Road(
            "base_model",
            (PEFT,),
            AB,
            layers=rf"{_BLOCKS}|final_layer\.linear",
            alphas=False,
            whole="lora_A.weight",
        ),
    ),
    alphas=True,
)
_MIXED = (  # of Qwen-Image and Z-Image
    Road(r"^transformer\..*\.alpha$", rest=NO_MATCH),
    Road(r"\.alpha$|^lora_unet_|^diffusion_model\.|default\.", (FLAT, ORIGINAL), (*KOHYA, *AB)),
)
_KRONECKER_ELSEWHERE = Road(rf"{_NO_PATH}.*\.lokr_", rest=NO_MATCH)
PIPELINES = {  # by architecture
    "ace_step": Pipeline(
        (
            Road(r"\.alpha$", rest=INVALID),
            Road(r"^(?!base_model\.model\.).*[qk]_proj\.lora_", rest=NO_MATCH),
            Road(r"[qk]_proj", (PEFT,), AB, alphas=False, rest=INVALID),
        )
    ),
    "anima": Pipeline((Road(_OWN, (ORIGINAL,), AB, alphas=False, rest=INVALID),)),
    "flux": _FLUX,
    "chroma": replace(_FLUX, roads=(_FLUX.roads[0], Road("base_model", rest=f"'{PEFT}double_blocks.0.img_mod"))),
    "flux_2": Pipeline(
        (
            Road(
                r"\.lora_down\.weight$",
                (FLAT,),
                layers=rf"{_BLOCKS}|img_in|txt_in|time_in\..*|final_layer\.linear",
                rest="",
            ),
            Road(
                r"^lycoris_.*\.lokr_",
                (WRAPPER,),
                KRONECKER,
                layers=_BLOCKS,
                rest="These keys are not LyCORIS Flux2 LoKr keys",
            ),
            Road(rf"{_OWN_OR_PEFT}.*\.lokr_", (ORIGINAL, PEFT), KRONECKER),
            _KRONECKER_ELSEWHERE,
            Road(_OWN_OR_PEFT, (ORIGINAL, PEFT), AB, alphas=False),
        ),
        (*AB, *KRONECKER),
    ),
    "hunyuan_image": Pipeline(missing="'HunyuanImagePipeline' object has no attribute 'load_lora_weights'"),
    "hunyuan_video": Pipeline(
        (
            Road(r"img_attn_qkv\.alpha$", rest="chunk expects at least a 1-dimensional tensor"),
            Road(rf"{_OWN}.*img_attn_qkv\.lora_A", (ORIGINAL,), AB, rest=""),
            Road(r"img_attn_qkv\.lora_A", rest=NO_MATCH),
        )
    ),
    "hv_1_5": Pipeline(missing="'HunyuanVideo15Pipeline' object has no attribute 'load_lora_weights'"),
    "ernie_image": Pipeline((Road(_OWN_OR_PEFT, (ORIGINAL, PEFT), AB, alphas=False, rest=INVALID),)),
    "framepack": Pipeline(),
    "ideogram4": Pipeline(
        (
            Road(_OWN, (ORIGINAL,), (*KOHYA, *AB), layers=r"layers\..*"),
            Road(r"\.attention\.qkv\."),
        )
    ),
    "kandinsky": Pipeline(),
    "krea2": Pipeline((Road(_OWN_OR_PEFT, (ORIGINAL, PEFT), AB, alphas=False),)),
    "ltx_video": Pipeline((Road(_OWN, (ORIGINAL,), AB, alphas=False, rest=INVALID),)),
    "ltx2": Pipeline(
        (
            Road(r"^diffusion_model\.(?!.*(lora|dora_scale))", rest=INVALID),
            Road(r"^diffusion_model\.(model|\w*embeddings_connector)\.", rest=NO_MATCH, all_keys=True),
            Road(_OWN, (RELEASED,), AB, layers=r"model\..*", alphas=False, rest=""),
        )
    ),
    "lumina": Pipeline(
        (
            Road(
                _OWN,
                (ORIGINAL,),
                AB,
                layers=r"(layers|(noise|context)_refiner)\..*",
                alphas=False,
                whole="lora_A.weight",
            ),
        )
    ),
    "minimax_h3": Pipeline(
        (
            Road(r"^lora_unet_\w*norm\d?\.", rest="does not name a MiniMax-H3 module"),
            Road(
                r"^(lora_unet_|diffusion_model\.|(token_refiner\.)?blocks\.|final_layer\.)",
                (FLAT, ORIGINAL, BARE),
                (*KOHYA, *AB),
            ),
        )
    ),
    "qwen_image": Pipeline(_MIXED),
    "qwen_image_21": Pipeline(
        (
            _MIXED[0],
            # It takes the flat name of a gate for that of a layer in a layer, and leaves it out.
            Road(r"^lora_unet_", (FLAT,), layers=r"(?!.*\.gate_layer$).*", lost="_gate_layer"),
            *_MIXED,
        )
    ),
    "sd": _STABLE,
    "sdxl": _STABLE,
    "sd3": Pipeline(),
    "wan": Pipeline(
        (
            Road(rf"{_OWN}.*\.self_attn\.\w\.(?!lora_|alpha|diff|dora_)", rest=".lora_down.weight'"),
            Road(
                _OWN,
                (ORIGINAL,),
                (*KOHYA, *AB),
                layers=r"blocks\..*|time_projection\.1|head\.head|(text|time)_embedding\.[02]|img_emb\.proj\.[13]",
                lost=r"norm.*\.diff(_b)?$",
                magnitudes=True,
            ),
            Road(r"^lora_unet_", (FLAT,), whole="lora_down.weight", magnitudes=True),
        )
    ),
    "zimage": Pipeline(
        (
            Road(
                rf"{_OWN}.*\.lokr_",
                (ORIGINAL,),
                KRONECKER,
                rest="`state_dict` contains unexpected non-LoKr keys",
            ),
            _KRONECKER_ELSEWHERE,
            *_MIXED,
        ),
        (*AB, *KRONECKER),
    ),
}


@dataclass(frozen=True)
class Named:
    """A layer of the model behind a name in a file.

    Attributes:
        way: in which it is named.
        place: the rows which it is; None = all.
    """

    way: str
    part: Part
    trainer_name: str
    place: Place | None = None

    @property
    def saved_name(self) -> str:
        return f"{self.part.prefix}_{self.trainer_name}".replace(".", "_")

    def base(self, given: Given) -> Tensor | None:
        """Its base weight, where that is known."""
        if given.base is None or self.place is None:
            return None if given.base is None else given.base(self.saved_name)
        rows = given.base(self.saved_name)[self.place.start : self.place.stop]
        return torch.cat(rows.chunk(2)[::-1]) if self.place.swapped else rows


def at_paths(given: Given) -> Iterator[Named]:
    """All layers of diffusers' models."""
    for part in given.arch.parts:
        for trainer_name, shape in given.shapes.get(part.name, {}).items() if part.diffusers else ():
            for place in places(given.arch, part, trainer_name, shape[0], shape[1] if len(shape) > 1 else 1):
                yield Named(PATH, part, trainer_name, place)


@dataclass(frozen=True)
class Diffusers:
    name: str = "diffusers"
    title: str = "diffusers 0.42.1"
    order: int = 40
    unasked: bool = True

    def read(self, given: Given) -> Reading | None:
        """What `load_lora_weights` of the architecture's pipeline makes of a file."""
        pipeline = PIPELINES.get(given.arch.name)
        return None if pipeline is None else _Sitting(given, pipeline).reading()


class _Sitting:
    """A file, and the pipeline that is given it."""

    def __init__(self, given: Given, pipeline: Pipeline) -> None:
        self.given, self.pipeline = given, pipeline
        self.layers: dict[str, dict[str, Tensor]] = {}
        for key, name, suffix in dotted.divided(given.tensors):
            self.layers.setdefault(name, {})[suffix] = given.tensors[key]
        self.road = next((road for road in pipeline.roads if self._takes(road)), None)

    def _takes(self, road: Road) -> bool:
        found = (re.search(road.sign, key) is not None for key in self.given.tensors)
        return all(found) if road.all_keys else any(found)

    def reading(self) -> Reading:
        refused = self.pipeline.missing or self._missing() or self._left_over() or self._no_factor() or self._no_scale()
        if refused:
            fates = {name: Fate(False, "the file is refused") for name in self.given.meant}
            return Reading(fates, refused, (ALONE,) if self.pipeline.missing else ())
        return Reading({name: self._fate(name) for name in self.given.meant})

    # -- which layers go to PEFT

    @cached_property
    def named(self) -> dict[str, Named]:
        """Name in a file, in every way -> layer."""
        flat_only = all("." not in name and not name.startswith(WRAPPER) for name in self.layers)
        paths = () if flat_only else at_paths(self.given)  # which takes its time
        found = {one.place.path: one for one in paths if one.place}
        for path, one in [*found.items()]:
            found[WRAPPER + path.partition(".")[2].replace(".", "_")] = replace(one, way=WRAPPER)
        for part in self.given.arch.parts:
            for trainer_name in self.given.shapes.get(part.name, {}):
                flat = Named(FLAT, part, trainer_name)
                found[flat.saved_name] = flat
                if part is self.given.arch.denoiser:
                    found.setdefault(trainer_name, replace(flat, way=BARE))
                    found[ORIGINAL + trainer_name] = replace(flat, way=ORIGINAL)
                    found[PEFT + trainer_name] = replace(flat, way=PEFT)
                    if any(RELEASED in road.names for road in self.pipeline.roads):
                        path = own_layers(part, trainer_name, COMFYUI)[0].own
                        found[ORIGINAL + path] = replace(flat, way=RELEASED)
        return found

    def _factors(self, name: str) -> frozenset[str]:
        """Those of its tensors with which a layer goes to PEFT; none = it does not."""
        place, road = self.named.get(name), self.road or Road("", (PATH,), self.pipeline.factors)
        if place is None or place.way not in road.names or not re.fullmatch(road.layers, place.trainer_name):
            return frozenset()
        return next((one for one in road.factors if one <= self.layers[name].keys()), frozenset())

    @cached_property
    def converted(self) -> dict[str, frozenset[str]]:
        """Layer -> its factors, of those which have any."""
        return {name: factors for name in self.layers if (factors := self._factors(name))}

    # -- what is refused

    def _left_over(self) -> str:
        road = self.road
        if road is None:
            return self._unlike_a_lora()
        for name, suffixes in self.layers.items():
            factors = self.converted.get(name, frozenset())
            left = suffixes.keys() - factors - (set() if road.magnitudes else {dotted.MAGNITUDE})
            if factors and road.alphas:
                left -= {dotted.ALPHA}
            if any(not re.search(road.lost, f"{name}.{suffix}") for suffix in left):
                return road.rest
        return ""

    def _unlike_a_lora(self) -> str:
        """Where nothing is converted, every key must have a certain word in it."""
        keys = [key for key in self.given.tensors if not key.endswith(f".{dotted.MAGNITUDE}")]
        words = ("lora", "lokr") if KRONECKER[0] in self.pipeline.factors else ("lora",)
        named = [any(word in key for word in words) for key in keys]
        if any(named) if self.pipeline.alphas else all(named):
            return ""
        return INVALID if len(words) == 1 else NEITHER

    def _missing(self) -> str:
        """The first layer that is not there, where others of its block are."""
        if not self.road or not self.road.whole:
            return ""
        blocks = {_block(name) for name in self.layers}
        of_images = any("_img" in name for name in self.converted)
        for name, one in self.named.items():
            if self._is_needed(one) and _block(name) in blocks - {""} and name not in self.converted:
                if of_images or not name.endswith("_img"):
                    return f"KeyError: '{re.sub('^(lora_unet_|diffusion_model.)', '', name)}.{self.road.whole}'"
        return ""

    def _is_needed(self, one: Named) -> bool:
        """Whether it is a Linear in the way that is converted."""
        assert self.road is not None
        return one.way in self.road.names and len(self.given.shapes[one.part.name][one.trainer_name]) > 1

    def _no_factor(self) -> str:
        """One factor must divide all layers of LoKr alike."""
        split = [kronecker(self.layers[name]) for name, factors in self.converted.items() if factors in KRONECKER]
        candidates = [*sorted({left for (left, _), _ in split}), -1]
        alike = (
            all(factorization(m * n, factor) == (m, n) for sides in split for m, n in sides) for factor in candidates
        )
        return "" if any(alike) else NO_FACTOR

    def _no_scale(self) -> str:
        common = self.road is not None and self.road.common_alpha
        return TWO_STRENGTHS if common and METADATA in self.given.metadata and self._common else ""

    # -- how strong

    @cached_property
    def _common(self) -> dict[str, float]:
        """Part -> the alpha that most of its layers have, of those which have any."""
        alphas: dict[str, list[float]] = {}
        for name in self.converted:
            alpha = self.given.meant[name].alpha
            if alpha is not None:
                alphas.setdefault(self.named[name].part.name, []).append(alpha)
        return {part: Counter(values).most_common(1)[0][0] for part, values in alphas.items()}

    def _factor(self, name: str) -> float:
        """By how much a layer is stronger than it is meant to be."""
        one, alpha = self.named[name], self.given.meant[name].alpha
        if not self.road or not self.road.common_alpha or not alpha:
            return 1.0
        own = one.part is not self.given.arch.denoiser or ".attn" in one.trainer_name
        return self._common[one.part.name] / alpha if own else 1.0

    def _fate(self, name: str) -> Fate:
        saved = self.given.meant[name]
        if name not in self.converted:
            kinds = "LoRA and LoKr" if KRONECKER[0] in self.pipeline.factors else "LoRA"
            unknown = name not in self.named
            return Fate(False, "it knows no such name" if unknown else f"it reads {kinds} under other names alone")
        if self.road and METADATA in self.given.metadata:
            return Fate(True, f"{METADATA} act beside its alpha", UNKNOWN)
        factor = self._factor(name)
        if saved.magnitude is None:
            if abs(factor - 1) < 1e-6:
                return Fate()
            return Fate(True, "it gets the alpha which most layers have", (abs(factor - 1), abs(factor - 1)))
        if self.layers[name].keys() & VECTORS:
            told = errors(saved, self.named[name].base(self.given), below_the_norm)
            return Fate(True, "the strength of its DoRA acts below the norm", (0.0, told[1]))
        told = errors(saved, self.named[name].base(self.given), partial(_without_magnitudes, factor))
        return Fate(True, "its magnitudes are left out", told)


def _without_magnitudes(factor: float, saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    return plain(saved, base, strength * factor)


def kronecker(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a layer of LoKr divides its output and its input features."""
    shapes = []
    for name in ("w1", "w2"):
        whole = LOKR.keys[name] in tensors
        rows, columns = (tensors[LOKR.keys[name if whole else f"{name}_{side}"]] for side in "ab")
        shapes.append((rows.shape[0], columns.shape[1]))
    return (shapes[0][0], shapes[1][0]), (shapes[0][1], shapes[1][1])


def _block(name: str) -> str:
    """The beginning of a layer's name up to the first number; "" = it is in no block."""
    found = re.match(r".*?[._]\d+(?=[._])", name)
    return found[0] if found else ""


READERS = (Diffusers(),)
