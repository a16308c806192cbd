"""Presets: TOML files that say which layers of a model are trained, and with what, in the schema of LyCORIS.

Our additions: `description`, `architectures`, `unet_only_name`, `text_encoder_only_name`, and `*` among target modules.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..foreign.texts import is_file, read_text, user_path
from ..records.arg import FACTORS
from .coerce import coerce, nearest, read_toml
from .expressions import flaw, part_of
from .table import BY_NAME

OWN = "*"  # among target modules: those that the architecture trains anyway
PREFIXES = ("lora_unet", "lora")  # what saved names have in any case
_RANKS = ("dim", "alpha", "conv_dim", "conv_alpha", "rs_lora")
_HERE = Path(__file__).resolve()
FOLDERS = (_HERE.parents[1] / "presets", _HERE.parents[2] / "presets")  # installed; in a checkout

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Targets:
    """What of one model is trained.

    Attributes:
        modules: class names; every Linear and convolution below such a module. `*` = the architecture's own.
        names: patterns of layers that join them.
        only: patterns one of which every layer must match; () = any layer.
    """

    modules: tuple[str, ...] = (OWN,)
    names: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        title: its name, or the file as the user wrote it.
        architectures: for which it is meant; () = all.
        enable_conv: whether kernels above 1x1 are trained.
        unet, text_encoder: targets in the denoiser and in the text encoders.
        exclude_name: patterns left out, before everything else.
        module_algo_map: class name -> options of the layers below it; the innermost such module wins.
        name_algo_map: pattern -> options; the first that matches, before module_algo_map.
        use_fnmatch: patterns are file name patterns on the whole dotted name.
        lora_prefix: what the saved names of the denoiser's layers begin with; "" = as the trainers have it.
    """

    title: str
    description: str = ""
    architectures: tuple[str, ...] = ()
    enable_conv: bool = True
    unet: Targets = field(default_factory=Targets)
    text_encoder: Targets = field(default_factory=Targets)
    exclude_name: tuple[str, ...] = ()
    module_algo_map: Mapping[str, Options] = field(default_factory=dict)
    name_algo_map: Mapping[str, Options] = field(default_factory=dict)
    use_fnmatch: bool = False
    lora_prefix: str = ""

    def matches(self, pattern: str, names: Sequence[str]) -> bool:
        """Whether a pattern means a layer with these dotted names.

        A regular expression may match the whole name, its beginning (as in LyCORIS), or its last components: `to_k`.
        """
        if self.use_fnmatch:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names)
        own = re.compile(_anywhere(pattern))
        return any(name == pattern or own.match(name) for name in names)

    @cached_property
    def algos(self) -> frozenset[str]:
        """Algorithms which it names."""
        maps = (*self.module_algo_map.values(), *self.name_algo_map.values())
        return frozenset(options["algo"] for options in maps if "algo" in options)

    def expressions(self, parts: Collection[str]) -> dict[str, str]:
        """What is searched for -> its pattern; nothing of file name patterns, which are quick.

        Args:
            parts: names of parts, with which a pattern may begin.
        """
        return {} if self.use_fnmatch else {_anywhere(part_of(one, parts)[1]): one for one in self.patterns}

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        return (
            *self.exclude_name,
            *(p for targets in (self.unet, self.text_encoder) for p in (*targets.names, *targets.only)),
            *self.name_algo_map,
        )


def _anywhere(pattern: str) -> str:
    return f"(?:{pattern})|(?:.*\\.)?(?:{pattern})$"


def names() -> list[str]:
    """The presets that come with this package."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.toml")})


def load(text: str) -> Preset:
    """A preset by its name, or a TOML file.

    Raises:
        ValueError: there is none, or everything that is wrong with it.
    """
    found = [folder / f"{text.lower()}.toml" for folder in FOLDERS]
    path = next((path for path in found if is_file(path)), None) or user_path(text)
    if not is_file(path):
        known = names()
        raise ValueError(f"is no preset and no TOML file; presets: {', '.join(known)}{nearest(text.lower(), known)}")
    try:
        data = read_toml(read_text(path))
    except ValueError as error:
        raise ValueError(f"names the file {path}, which is no TOML: {error}") from None
    return read(text, data)


def read(title: str, data: Mapping[str, Any]) -> Preset:
    """A preset from the contents of its file.

    Raises:
        ValueError: everything that is wrong with it.
    """
    wrong: list[str] = []
    values: dict[str, Any] = {}
    for key, raw in data.items():
        if key not in _READERS:
            wrong.append(f"no key is called {key}{nearest(key, _READERS) or ' (keys: ' + ', '.join(_READERS) + ')'}")
            continue
        try:
            values[key] = _READERS[key](raw)
        except ValueError as error:
            wrong.append(f"{key} {error}")
    preset = Preset(
        title,
        unet=_targets(values, "unet_"),
        text_encoder=_targets(values, "text_encoder_"),
        **{f.name: values[f.name] for f in fields(Preset) if f.name in values},
    )
    for pattern in () if preset.use_fnmatch else preset.patterns:
        if found := flaw(pattern):
            wrong.append(f"{found}; with use_fnmatch = true, write *attn*")
    if wrong:
        raise ValueError(f"has mistakes: {'; '.join(wrong)}")
    return preset


def _targets(values: Mapping[str, Any], prefix: str) -> Targets:
    """Of one model; `target_module` and `target_name` are LyCORIS' other spelling, for every model."""
    found = {}
    for name, key in (("modules", "target_module"), ("names", "target_name"), ("only", "only_name")):
        value = values.get(prefix + key, values.get(key))
        if value is not None:
            found[name] = value
    return Targets(**found)


def _flag(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise ValueError("is not a boolean; write true or false")
    return raw


def _string(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("is not text")
    return raw


def _strings(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
        raise ValueError('is not a list of texts; write ["one", "two"]')
    return tuple(raw)


def _prefix(raw: Any) -> str:
    """The beginning of names such as `lycoris_...`."""
    if not isinstance(raw, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", raw) or raw.startswith("lora_te"):
        raise ValueError(
            f"= {raw!r} is no beginning of saved names: write letters, digits and _, such as lycoris; text encoders "
            "keep lora_te"
        )
    return "" if raw in PREFIXES else raw.rstrip("_")


def _map(raw: Any) -> dict[str, Options]:
    if not isinstance(raw, Mapping) or not all(isinstance(entry, Mapping) for entry in raw.values()):
        raise ValueError("is not a table of tables; write [module_algo_map.Attention] and below it algo = 'lokr'")
    return {str(name): _options(str(name), entry) for name, entry in raw.items()}


def _options(where: str, entry: Mapping[str, Any]) -> Options:
    """Options of one entry, under the names of the argument table, `dim` and `alpha`."""
    per_layer = {name for name, arg in BY_NAME.items() if arg.group == FACTORS and arg.name != "split_qkv"} | {*_RANKS}
    found: dict[str, Any] = {}
    for key, raw in entry.items():
        if key not in per_layer:
            hint = nearest(key, per_layer) or f"; options of a layer: {', '.join(sorted(per_layer))}"
            raise ValueError(f"has {where}.{key}, which is no option of a single layer{hint}")
        row = BY_NAME[{"dim": "conv_dim", "alpha": "conv_alpha"}.get(key, key)]
        try:
            found[key if key in _RANKS else row.name] = coerce(row, raw)
        except ValueError as error:
            raise ValueError(f"has {where}.{key} = {raw!r}, which {error}") from None
    algo = str(found.get("algo", ""))
    for key, value in found.items() if algo else ():
        if key not in _RANKS and not BY_NAME[key].acts(value, [algo]):
            raise ValueError(f"has {where}.{key}, which has no effect with algo = {algo}")
    return found


_READERS = {
    "description": _string,
    "architectures": _strings,
    "enable_conv": _flag,
    "unet_target_module": _strings,
    "unet_target_name": _strings,
    "unet_only_name": _strings,
    "text_encoder_target_module": _strings,
    "text_encoder_target_name": _strings,
    "text_encoder_only_name": _strings,
    "target_module": _strings,
    "target_name": _strings,
    "module_algo_map": _map,
    "name_algo_map": _map,
    "exclude_name": _strings,
    "use_fnmatch": _flag,
    "lora_prefix": _prefix,
}


def markdown() -> str:
    """The presets as a table, for docs/presets.md."""
    lines = ["| preset | for | what it trains |", "| --- | --- | --- |"]
    for preset in map(load, names()):
        lines.append(f"| `{preset.title}` | {', '.join(preset.architectures) or 'all'} | {preset.description} |")
    return "\n".join(lines) + "\n"
