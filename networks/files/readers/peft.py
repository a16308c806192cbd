"""PEFT: a folder of adapter_model.safetensors and adapter_config.json, on diffusers' class of the denoiser.

Its settings say how strong a layer is and which modules are adapted; a file without them is none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...records.loha import LOHA
from ...records.lokr import LOKR
from ...tensors.factor import factorization
from .. import dotted
from ..strengths import CONFIG
from .contract import Fate, Given, Reading
from .diffusers import AB, VECTORS, Named, at_paths, kronecker
from .errors import UNKNOWN, below_the_norm, errors

# Kind of adapter in its settings -> suffixes which a layer must have.
KINDS = {"LORA": AB, "LOHA": LOHA.required, "LOKR": LOKR.required}


@dataclass(frozen=True)
class Peft:
    name: str = "peft"
    title: str = "PEFT 0.21.2"
    order: int = 50
    unasked: bool = False  # it reads folders alone: save_also=peft, save_format=peft

    def read(self, given: Given) -> Reading | None:
        """What `PeftModel.from_pretrained` makes of the folder."""
        if not given.arch.denoiser.diffusers:
            return None
        nothing = {name: Fate(False, "the file is refused") for name in given.meant}
        if given.folder is None:
            return Reading(nothing, f"Can't find '{CONFIG}'")
        paths = {
            dotted.PEFT + one.place.path.partition(".")[2]: one
            for one in at_paths(given)
            if one.place and one.part is given.arch.denoiser
        }
        layers: dict[str, dict[str, Tensor]] = {}
        for key, name, suffix in dotted.divided(given.tensors):
            layers.setdefault(name, {})[suffix] = given.tensors[key]
        if any(_mismatched(given.folder, tensors) for tensors in layers.values()):
            return Reading(nothing, "size mismatch for")
        return Reading({name: _fate(given, name, paths.get(name), layers[name]) for name in given.meant})


def _mismatched(folder: Mapping[str, object], tensors: Mapping[str, Tensor]) -> bool:
    """Whether it would make other factors for a layer of LoKr."""
    if folder.get("peft_type") != "LOKR" or not any(one <= tensors.keys() for one in LOKR.required):
        return False
    factor = int(str(folder.get("decompose_factor", -1)))
    return any(factorization(one * two, factor) != (one, two) for one, two in kronecker(tensors))


def _fate(given: Given, name: str, named: Named | None, tensors: Mapping[str, Tensor]) -> Fate:
    assert given.folder is not None
    kind, saved = str(given.folder.get("peft_type")), given.meant[name]
    if named is None:
        return Fate(False, "the model has no such name")
    if not _is_target(name.removeprefix(dotted.PEFT), given.folder.get("target_modules")):
        return Fate(False, "target_modules of its settings leave it out")
    if kind not in KINDS:
        return Fate(True, f"what it makes of {kind} is not known here", UNKNOWN)
    if not any(one <= tensors.keys() for one in KINDS[kind]):
        return Fate(False, f"its settings speak of {kind}")
    if bool(given.folder.get("use_dora")) is not bool(tensors.keys() & VECTORS):
        return Fate(True, "its settings and the file do not agree on DoRA", UNKNOWN)
    if saved.magnitude is None:
        return Fate()
    told = errors(saved, named.base(given), below_the_norm)
    return Fate(True, "the strength of its DoRA acts below the norm", (0.0, told[1]))


def _is_target(path: str, targets: object) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    names = targets if isinstance(targets, (list, tuple, set)) else ()
    return any(path == one or path.endswith(f".{one}") for one in names)


READERS = (Peft(),)
