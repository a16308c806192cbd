"""Which programs read a file, and how: what each of them computes from every kind of layer.

Facts of these programs' code, checked by running it where it can be run; versions stand beside their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .codec import SavedLayer

READERS = ("ComfyUI 2026-08", "A1111 1.10", "Forge 2025-06", "diffusers 0.42", "PEFT 0.21", "InvokeAI 2026-08")

# From the best to the worst: a file is read as its worst layer is.
VERDICTS = {
    "yes": "exactly",
    "strength 1": "exactly at strength 1, not in proportion at others",
    "nearly": "about a tenth off: it divides by the norm of the base weight alone",
    "some": "exactly on FLUX.2 and Z-Image, refuses it elsewhere",
    "skipped": "skips these layers, with a line in its log",
    "wrong": "at a wrong strength, without a word",
    "no": "does not know it",
    "refused": "refuses the file",
}
_ORDER = list(VERDICTS)


def _row(*verdicts: str) -> Mapping[str, str]:
    assert len(verdicts) == len(READERS)
    return dict(zip(READERS, verdicts, strict=True))


@dataclass(frozen=True)
class Kind:
    """A kind of layer in a file.

    Attributes:
        marks: suffixes; one of these sets marks it.
        constrained: only where alpha stands for a limit of the form and is not 0.
    """

    title: str
    marks: tuple[frozenset[str], ...]
    reads: Mapping[str, str]
    constrained: bool = False

    def fits(self, saved: SavedLayer) -> bool:
        limited = bool(saved.algorithm.alpha_option and saved.alpha)
        return any(marks <= saved.tensors.keys() for marks in self.marks) and (limited or not self.constrained)


def _kind(title: str, marks: str, *verdicts: str, constrained: bool = False) -> Kind:
    sets = tuple(frozenset(one.split("+")) for one in marks.split("|"))
    return Kind(title, sets, _row(*verdicts), constrained)


KINDS = (  # the first that fits
    _kind("LoRA in Tucker form", "lora_mid.weight", "yes", "yes", "yes", "refused", "no", "yes"),
    _kind("LoRA", "lora_up.weight", "yes", "yes", "yes", "yes", "yes", "yes"),
    _kind("LoHa", "hada_w1_a", "yes", "yes", "yes", "refused", "yes", "yes"),
    _kind("LoKr in Tucker form", "lokr_t2", "skipped", "yes", "refused", "refused", "no", "yes"),
    _kind("LoKr", "lokr_w1|lokr_w1_a", "yes", "yes", "yes", "some", "yes", "yes"),
    _kind("GLoRA", "a1.weight", "yes", "skipped", "yes", "refused", "no", "refused"),
    _kind("rescaled rotation", "oft_blocks+rescale", "wrong", "yes", "no", "refused", "no", "refused"),
    _kind("constrained rotation", "oft_blocks", "wrong", "yes", "no", "refused", "no", "refused", constrained=True),
    _kind("rotation", "oft_blocks", "strength 1", "yes", "no", "refused", "no", "refused"),
    _kind("rotation of the input", "oft_R.weight|oft_R.peft|oft_R.turn", "no", "no", "no", "no", "no", "no"),
    _kind("IA3", "on_input", "skipped", "yes", "no", "refused", "no", "yes"),
    _kind("whole difference", "diff", "yes", "yes", "yes", "refused", "no", "yes"),
    _kind("norm", "w_norm+b_norm", "yes", "yes", "yes", "refused", "no", "yes"),
    _kind("norm without bias", "w_norm", "yes", "refused", "yes", "refused", "no", "yes"),
)
UNKNOWN = Kind("form of this package alone", (), _row(*["no"] * len(READERS)))

# (LoRA's own form, side of the magnitude) -> how DoRA is read.
DORA = {
    (True, "input"): _row("yes", "yes", "yes", "wrong", "no", "yes"),
    (True, "output"): _row("nearly", "wrong", "nearly", "wrong", "yes", "wrong"),
    (False, "input"): _row("yes", "yes", "yes", "refused", "no", "refused"),
    (False, "output"): _row("nearly", "wrong", "nearly", "refused", "no", "wrong"),
}


# For files in another form than the portable one.
OTHER_FORMS = {
    "diffusers": "diffusers' load_lora_weights and PEFT: exactly",
    "comfyui": "ComfyUI and Forge: DoRA exactly; LyCORIS reads its magnitudes otherwise, the rest as the portable form",
    "blissful": "DustyL's blissful-tuner: exactly; others take RS-LoRA as alpha / rank and miss the magnitudes",
}


def kind_of(saved: SavedLayer) -> Kind:
    return next((kind for kind in KINDS if kind.fits(saved)), UNKNOWN)


def side_of(saved: SavedLayer) -> str:
    """Of its DoRA magnitude, "output" or "input" by the shape alone; "" without one."""
    if saved.magnitude is None:
        return ""
    shape = saved.magnitude.shape
    return "input" if len(shape) > 1 and shape[0] == 1 and saved.magnitude.numel() > 1 else "output"


def reading(layers: Iterable[SavedLayer]) -> dict[str, tuple[str, str]]:
    """Reader -> (verdict of VERDICTS, the kind of layer that decides it; "" for "yes"), in the portable dialect."""
    worst = {reader: ("yes", "") for reader in READERS}
    for saved in layers:
        kind, side = kind_of(saved), side_of(saved)
        ways = [(kind.title, kind.reads)]
        if side:
            ways.append((f"DoRA on the {side} side", DORA["lora_up.weight" in saved.tensors, side]))
        for title, reads in ways:
            for reader, verdict in reads.items():
                if _ORDER.index(verdict) > _ORDER.index(worst[reader][0]):
                    worst[reader] = verdict, title
    return worst
