"""Names with dots: as PEFT and diffusers, and programs after them, write an adapter; to and from the trainers' keys.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight

A component or a prefix comes first, then the name of a layer in diffusers' model or in the trainer's. Where the trainer
has one layer for several of diffusers', their adapters become one: side by side if they share their first factor,
block-diagonal if not. PEFT's magnitude of DoRA is a vector; with `.weight` behind its name, transformers 5
finds it too. Its files have no alpha unless their metadata say one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algos import recognise
from ..archs.places import Place
from ..archs.spec import ArchSpec, Part
from ..archs.spellings import Rename
from ..records import ALGORITHMS
from ..records.lora import LORA

PEFT = "base_model.model."  # before the names of layers in its files
DOWN, UP, MAGNITUDE, ALPHA = LORA.keys["down"], LORA.keys["up"], "dora_scale", "alpha"
VECTOR = "lora_magnitude_vector"
SUFFIXES = {  # as others write them -> ours
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    VECTOR: MAGNITUDE,
    f"{VECTOR}.weight": MAGNITUDE,
    f"{VECTOR}.default.weight": MAGNITUDE,
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.keys.values() if suffix != "weight"},
    "magnitude": MAGNITUDE,  # ai-toolkit's
    **{suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()},
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.more_keys},
    MAGNITUDE: MAGNITUDE,
    ALPHA: ALPHA,
}
OF_PEFT = {suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()}
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)
_ENDING = re.compile(rf"\.({'|'.join(map(re.escape, _LONGEST_FIRST))})$")
DENOISER = ("transformer.", "unet.", "diffusion_model.", "model.diffusion_model.")


def write(tensors: Mapping[str, Tensor], places: Mapping[str, Sequence[Place]]) -> dict[str, Tensor]:
    """Plain LoRA layers, with or without magnitude, as diffusers reads them; alpha / rank goes into the second factor.

    Args:
        tensors: in the portable form.
        places: saved name -> diffusers' layers.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        layers.setdefault(name, {})[suffix] = tensor
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        where, up = places[name], _scaled_up(layer)
        pair = {DOWN: layer[DOWN], UP: up}
        own = recognise(pair)
        assert own is not None
        try:  # an adapter of its own for each projection, or one for all
            pairs = own.unstack(pair, [place.stop - place.start for place in where])
        except ValueError:
            pairs = [{DOWN: layer[DOWN], UP: up[place.start : place.stop]} for place in where]
        for place, one in zip(where, pairs, strict=True):
            found[f"{place.path}.lora_A.weight"] = one[DOWN].contiguous().clone()  # files hold no shared tensors
            found[f"{place.path}.lora_B.weight"] = _turn(one[UP], place).contiguous()
            if MAGNITUDE in layer:
                vector = _turn(layer[MAGNITUDE][place.start : place.stop], place).flatten()
                found[f"{place.path}.{VECTOR}.weight"] = vector if up.dim() == 2 else vector.view(1, -1, *up.shape[2:])
    return found


def _turn(rows: Tensor, place: Place) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows


def read(tensors: Mapping[str, Tensor], arch: ArchSpec | None, source: str = "the file") -> dict[str, Tensor]:
    """Under the trainers' keys. What has them already, or no place in this architecture, stays as it is.

    Raises:
        ValueError: layers that are one in the trainer's model are not all there, or do not go together.
    """
    found: dict[str, Tensor] = {}
    groups: dict[str, dict[int, _Piece]] = {}
    spoken = _parts(tensors, arch)
    for key, path, suffix in divided(tensors):
        tensor = tensors[key]
        if arch is None or "." not in path:
            found[key] = tensor
            continue
        part, dotted = _locate(path, arch)
        part = spoken[part.name]
        layer = part.layout_of(dotted) or Rename(dotted, part.trainer_name(dotted))
        name = f"{part.prefix}_{layer.trainer}".replace(".", "_")
        piece = groups.setdefault(name, {}).setdefault(layer.position, _Piece(path, layer, {}))
        piece.tensors[_own(path, suffix)] = tensor.flatten() if VECTOR in suffix else tensor
    for name, pieces in groups.items():
        count = next(iter(pieces.values())).layer.count
        if len(pieces) < count:
            there = ", ".join(piece.path for piece in pieces.values())
            raise ValueError(
                f"{source}: {count} layers make up {name}, but it has only {there}: take a file that has all of them, "
                "or one under the trainer's names"
            )
        joined = pieces[0].whole() if count == 1 else _join([pieces[i] for i in range(count)], source)
        found |= {f"{name}.{suffix}": tensor for suffix, tensor in joined.items()}
    return found


def _parts(keys: Iterable[str], arch: ArchSpec | None) -> dict[str, Part]:
    """Name -> each part as it reads these keys together."""
    names: dict[str, tuple[Part, set[str]]] = {}
    for path in {divide(key)[0] for key in keys}:
        if arch is not None and "." in path:
            part, dotted = _locate(path, arch)
            names.setdefault(part.name, (part, set()))[1].add(dotted)
    return {name: part.among(dotted) for name, (part, dotted) in names.items()}


def has_dots(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has names of this kind."""
    return any("." in divide(key)[0] for key in tensors)


def flattened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every layer as the file has it, with slashes for the dots of its name: to look at, where no model is known."""
    found = {}
    for key, path, suffix in divided(tensors):
        found[f"{path.replace('.', '/')}.{_own(path, suffix)}" if "." in path else key] = tensors[key]
    return found


def divide(key: str) -> tuple[str, str]:
    """(name of the layer, suffix); a suffix that nobody knows is "", and the name what stands before the first dot."""
    match = _ENDING.search(key)
    return (key[: match.start()], match[1]) if match else (key.partition(".")[0], "")


def divided(keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(key, name of the layer, suffix) of each. A suffix that nobody knows belongs to the layer which others name."""
    known = {key: divide(key) for key in keys}
    layers = {path for path, suffix in known.values() if suffix}
    for key, (path, suffix) in known.items():
        cuts = [at for at, letter in enumerate(key) if letter == "."] if not suffix else []
        at = next((at for at in reversed(cuts) if key[:at] in layers), None)
        if at is not None:
            path, suffix = key[:at], key[at + 1 :]
        yield key, path, suffix or key[len(path) + 1 :]


def _own(path: str, suffix: str) -> str:
    """Our suffix for that of a layer with this name; some mean something else in a file of PEFT."""
    own = SUFFIXES.get(suffix, suffix)
    return OF_PEFT.get(suffix, own) if PEFT in path else own


def _locate(path: str, arch: ArchSpec) -> tuple[Part, str]:
    """The part of a model, and the layer's name there."""
    path = path.removeprefix(PEFT)
    for part in arch.text_encoders:
        if part.diffusers and path.startswith(f"{part.diffusers}."):
            return part, path[len(part.diffusers) + 1 :].removeprefix(PEFT)
    for prefix in DENOISER:
        if path.startswith(prefix):
            path = path[len(prefix) :].removeprefix(PEFT)
            break
    return arch.denoiser, arch.denoiser.released_name(path)


@dataclass
class _Piece:
    """An adapter of one of diffusers' layers, under our suffixes."""

    path: str
    layer: Rename
    tensors: dict[str, Tensor]

    def whole(self) -> dict[str, Tensor]:
        """In the trainer's order of rows, the magnitude in our shape."""
        tensors = dict(self.tensors)
        magnitude, up, down = tensors.get(MAGNITUDE), tensors.get(UP), tensors.get(DOWN)
        if up is None or down is None:
            return tensors
        if magnitude is not None and magnitude.dim() == 1:
            tensors[MAGNITUDE] = magnitude.reshape(-1, *[1] * (up.dim() - 1))
        if self.layer.swapped and len(up) == 2 * down.shape[1]:
            tensors |= {s: torch.cat(tensors[s].chunk(2)[::-1]) for s in (UP, MAGNITUDE) if s in tensors}
        return tensors


def _join(pieces: Sequence[_Piece], source: str) -> dict[str, Tensor]:
    """The adapter of the one layer which they are in the trainer's model.

    Raises:
        ValueError: they are not all plain LoRAs, or of DoRA on the input side.
    """
    layers = [piece.whole() for piece in pieces]
    names = ", ".join(piece.path for piece in pieces)
    kinds = {frozenset(layer) - {ALPHA} for layer in layers}
    if len(kinds) > 1 or not {DOWN, UP} <= next(iter(kinds)) <= {DOWN, UP, MAGNITUDE}:
        raise ValueError(
            f"{source}: {names} are one layer here, and only plain LoRAs of all of them can become one: take a "
            "file under the trainer's names"
        )
    joined = _joined_factors([layer[DOWN] for layer in layers], [_scaled_up(layer) for layer in layers])
    if MAGNITUDE in layers[0]:
        if any(len(layer[MAGNITUDE]) != len(layer[UP]) for layer in layers):
            raise ValueError(
                f"{source}: {names} are one layer here, which DoRA on the input side cannot become: take a file "
                "under the trainer's names"
            )
        joined[MAGNITUDE] = torch.cat([layer[MAGNITUDE] for layer in layers])
    return joined


def _joined_factors(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> dict[str, Tensor]:
    """Below each other where the first factor is the same, otherwise block-diagonal."""
    if all(torch.equal(downs[0], down) for down in downs[1:]):
        return {DOWN: downs[0], UP: torch.cat([*ups])}
    return {DOWN: torch.cat([*downs]), UP: torch.block_diag(*ups)}


def _scaled_up(tensors: Mapping[str, Tensor]) -> Tensor:
    """The second factor times alpha / rank."""
    up, alpha = tensors[UP], tensors.get(ALPHA)
    if alpha is None or not float(alpha):
        return up
    return up.to(torch.promote_types(up.dtype, torch.float32)) * (float(alpha) / tensors[DOWN].shape[0])
