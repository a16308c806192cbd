"""Which programs read a file, and how: what each of them computes from every kind of layer.

Facts of these programs' code, checked by running it where it can be run; versions stand beside their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from ..archs import ARCHS
from ..records.spec import UNREAD, FileKind
from .codec import SavedLayer

READERS = {  # field of records' Reads -> the program
    "comfyui": "ComfyUI 2026-08",
    "a1111": "A1111 1.10",
    "forge": "Forge 2025-06",
    "diffusers": "diffusers 0.42",
    "peft": "PEFT 0.21",
    "invokeai": "InvokeAI 2026-08",
}

# From the best to the worst: a file is read as its worst layer is.
VERDICTS = {
    "yes": "exactly",
    "strength 1": "exactly at strength 1, not in proportion at others",
    "nearly": "about a tenth off: it divides by the norm of the base weight alone",
    "some": f"exactly on {' and '.join(arch.title for arch in ARCHS if arch.diffusers_lokr)}, refuses it elsewhere",
    "skipped": "skips these layers, with a line in its log",
    "wrong": "at a wrong strength, without a word",
    "no": "does not know it",
    "refused": "refuses the file",
}
_ORDER = list(VERDICTS)


# For files in another form than the portable one.
OTHER_FORMS = {
    "diffusers": "diffusers' load_lora_weights and PEFT: exactly",
    "comfyui": "ComfyUI and Forge: DoRA exactly; LyCORIS reads its magnitudes otherwise, the rest as the portable form",
    "blissful": "DustyL's blissful-tuner: exactly; others take RS-LoRA as alpha / rank and miss the magnitudes",
}


def kind_of(saved: SavedLayer) -> FileKind:
    spec = saved.algorithm.spec
    limited = bool(spec.alpha_option and saved.alpha)
    own = (kind for kind in spec.kinds if kind.marks <= saved.tensors.keys() and (limited or not kind.constrained))
    return next(own, UNREAD)


def side_of(saved: SavedLayer) -> str:
    """Of its DoRA magnitude, "output" or "input" by the shape alone; "" without one."""
    if saved.magnitude is None:
        return ""
    shape = saved.magnitude.shape
    return "input" if len(shape) > 1 and shape[0] == 1 and saved.magnitude.numel() > 1 else "output"


def reading(layers: Iterable[SavedLayer]) -> dict[str, tuple[str, str]]:
    """Reader -> (verdict of VERDICTS, the kind of layer that decides it; "" for "yes"), in the portable dialect."""
    worst = {program: ("yes", "") for program in READERS.values()}
    for saved in layers:
        kind, side = kind_of(saved), side_of(saved)
        ways = [(kind.title, kind.reads)]
        if side:
            ways.append((f"DoRA on the {side} side", saved.algorithm.spec.dora[side]))
        for title, reads in ways:
            for reader, verdict in asdict(reads).items():
                if _ORDER.index(verdict) > _ORDER.index(worst[READERS[reader]][0]):
                    worst[READERS[reader]] = verdict, title
    return worst
