"""How strong a layer of a file is, where its own alpha does not say: what programs write beside the tensors.

In this order: `.alpha` of the layer; `adapter_config.json` in the file's folder (PEFT's); `lora_adapter_metadata` in
the header (diffusers' form of the same); a number `alpha` or `lora_alpha` in the header; else 1, which is said. Two
that disagree are an error. `ss_network_alpha` is none of them: the trainers' converters multiply alpha into the tensors
and keep that key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algos import Adapter

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of a file: PEFT's settings, as JSON, under the names of a pipeline's components
NUMBERS = ("alpha", "lora_alpha")  # of a header, for the whole file
PEFT = "base_model.model."
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # peft_type -> what is divided by r
# Start values by which PEFT changes the base weights, too: such a file acts on that other base alone.
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ALPHA, HEADER, NOTHING = "alpha", "header", ""
SAID = {
    ALPHA: "its alpha",
    CONFIG: CONFIG,
    METADATA: f"{METADATA} in the header",
    HEADER: "a number in the header",
    NOTHING: "nothing, so it is 1",
}
ROUNDED = 5e-3  # an alpha in bf16


@dataclass(frozen=True)
class Said:
    """What one source says of a layer.

    Attributes:
        rank: which it takes the layer to have; None = whatever it has.
        root: RS-LoRA, alpha / sqrt(rank).
    """

    alpha: float
    rank: int | None = None
    root: bool = False

    def scale(self, shown: int | None) -> float | None:
        """The layer's scale; None if that depends on a rank which nobody knows."""
        rank = self.rank or shown
        if not rank:
            return None
        return (self.alpha or float(rank)) / (math.sqrt(rank) if self.root else rank)


Ask = Callable[[str], "Said | None"]


@dataclass
class Strengths:
    """Layers with alphas filled in.

    Attributes:
        layers: name -> suffix -> tensor.
        sources: key of SAID -> number of layers whose strength it decides.
    """

    layers: dict[str, dict[str, Tensor]]
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """Where the strength stands, for people."""
        if len(self.sources) == 1:
            return SAID[next(iter(self.sources))]
        return ", ".join(f"{SAID[name]} ({count} layers)" for name, count in self.sources.items())


def beside(path: Path) -> dict[str, Any] | None:
    """PEFT's settings in the folder of a file; None without any.

    Raises:
        ValueError: they cannot be read.
    """
    file = path.parent / CONFIG
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): mend it, or move it away from {path.name}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no settings: mend it, or move it away from {path.name}")
    return found


def fill(
    layers: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, type[Adapter]],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    source: str,
) -> Strengths:
    """Give each layer the alpha that stands for its strength, wherever the file says it.

    Args:
        layers: name -> our suffix -> tensor.
        kinds: the algorithm of each layer that has one.
        config: of `beside`.

    Raises:
        ValueError: settings cannot be read, or disagree.
    """
    asked = dict(_sources(metadata, config, source))
    found = Strengths({})
    for name, tensors in layers.items():
        kind = kinds.get(name)
        found.layers[name] = dict(tensors)
        if kind is None or not kind.saves_alpha or kind.alpha_option:
            continue
        shown = kind.shown_rank(tensors)
        said = {title: one for title, ask in asked.items() if (one := ask(name)) is not None}
        scales = {title: scale for title, one in said.items() if (scale := one.scale(shown)) is not None}
        title = _deciding(name, tensors, shown, said, scales, source)
        found.sources[title] = found.sources.get(title, 0) + 1
        if title in scales:
            found.layers[name] = kind.with_scale(tensors, scales[title])
    return found


def _deciding(
    name: str,
    tensors: Mapping[str, Tensor],
    shown: int | None,
    said: Mapping[str, Said],
    scales: Mapping[str, float],
    source: str,
) -> str:
    """The source of a layer's strength. Raises ValueError where two disagree."""
    for title, one in said.items():
        if one.rank and shown and one.rank != shown:
            raise ValueError(
                f"{source}: {name} has rank {shown}, but {SAID[title]} says {one.rank}: the two do not belong together"
            )
    values = dict(scales)
    if ALPHA in tensors:
        values.pop(HEADER, None)  # is for layers without an alpha of their own
        alpha = float(tensors[ALPHA])
        values = {ALPHA: alpha / shown if alpha and shown else 1.0, **values} if shown else {ALPHA: 1.0}
    first = next(iter(values), NOTHING)
    for title, value in values.items():
        if not math.isclose(value, values[first], rel_tol=ROUNDED):
            raise ValueError(
                f"{source}: the strength of {name} is {values[first]:g} by {SAID[first]}, but {value:g} by "
                f"{SAID[title]}: remove the one that is wrong"
            )
    return first


def _sources(metadata: Mapping[str, str], config: Mapping[str, Any] | None, source: str) -> Iterator[tuple[str, Ask]]:
    if config is not None and config.get("peft_type") in ALPHAS:
        yield CONFIG, _Settings(config, f"{CONFIG} beside {source}").of
    if METADATA in metadata:
        yield METADATA, _Components(metadata[METADATA], f"{METADATA} of {source}").of
    numbers = {name: _number(metadata, name, f"the header of {source}") for name in NUMBERS if name in metadata}
    if len({*numbers.values()}) > 1:
        told = " and ".join(f"{name} = {value:g}" for name, value in numbers.items())
        raise ValueError(f"the header of {source} says {told}: remove the one that is wrong")
    for value in [*numbers.values()][:1]:
        yield HEADER, lambda name, said=Said(value): said  # type: ignore[misc]


class _Settings:
    """PEFT's settings of one adapter.

    Args:
        where: for messages.
        stem: what names of layers begin with, which patterns do not see.
    """

    def __init__(self, settings: Mapping[str, Any], where: str, stem: str = "") -> None:
        start = str(settings.get("init_lora_weights")).lower()
        if start.startswith(OWN_BASE):
            raise ValueError(
                f"{where}: init_lora_weights={start} changed the base weights, too, and the file acts on those alone: "
                "save it from PEFT with path_initial_model_for_weight_conversion"
            )
        if settings.get("layer_replication"):
            raise ValueError(f"{where}: layer_replication makes another model, with some of its layers twice")
        self.where, self.stem, self.root = where, stem, bool(settings.get("use_rslora"))
        alpha = ALPHAS.get(str(settings.get("peft_type")), "lora_alpha")
        self.alpha = _number(settings, alpha, where) if settings.get(alpha) is not None else None
        self.rank = _number(settings, "r", where) if settings.get("r") is not None else None
        self.alphas, self.ranks = (self._numbers(settings.get(f"{name}_pattern")) for name in ("alpha", "rank"))

    def _numbers(self, table: Any) -> dict[str, float]:
        if not isinstance(table or {}, Mapping):
            raise ValueError(f"{self.where}: its patterns are {table!r}, not a table of names and numbers")
        return {str(key): _number(table, key, self.where) for key in table or {}}

    def of(self, name: str) -> Said | None:
        """For each value the first pattern that fits the end of the layer's name decides, as in PEFT."""
        name = name.removeprefix(self.stem).removeprefix(PEFT)
        alpha, rank = self._first(self.alphas, name, self.alpha), self._first(self.ranks, name, self.rank)
        return None if alpha is None else Said(alpha, None if rank is None else int(rank), self.root)

    def _first(self, patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
        try:
            return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
        except re.error as error:
            raise ValueError(f"{self.where}: a pattern is no regular expression ({error})") from None


class _Components:
    """The same for the components of a pipeline: `transformer.lora_alpha`."""

    def __init__(self, text: str, where: str) -> None:
        try:
            settings = json.loads(text)
            parts: dict[str, dict[str, Any]] = {}
            for key, value in settings.items():
                component, _, name = key.partition(".")
                parts.setdefault(component, {})[name] = value
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"the metadata {where} cannot be read: {error}") from None
        self.parts = {name: _Settings(part, where, f"{name}.") for name, part in parts.items()}

    def of(self, name: str) -> Said | None:
        part = self.parts.get(name.partition(".")[0])
        return None if part is None else part.of(name)


def _number(settings: Mapping[str, Any], name: str, where: str) -> float:
    """Raises ValueError for what is no finite number, or below 0."""
    try:
        value = float(settings[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0 or isinstance(settings[name], bool):
        raise ValueError(f"{where}: {name} is {str(settings[name])[:80]!r}, which is no strength")
    return value
