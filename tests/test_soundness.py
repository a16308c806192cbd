"""What a file of any algorithm cannot be is told as it is opened, without a model: one sentence with file, layer and
tensor. test_fuzz_files.py looks for what is missing here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from networks.algos import ALGOS
from networks.files.adapter_file import Naming, open_adapter

X = "lora_unet_x"
LORA = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2.0)}
CONV = {"lora_down.weight": torch.ones(2, 6, 3, 3), "lora_up.weight": torch.ones(4, 2, 1, 1)}
TUCKER = {
    "lora_down.weight": torch.ones(2, 6, 1, 1), "lora_mid.weight": torch.ones(2, 2, 3, 3),
    "lora_up.weight": torch.ones(4, 2, 1, 1),
}  # fmt: skip
DORA = {**LORA, "dora_scale": torch.ones(4, 1)}
LOHA = {f"hada_w{n}_{side}": torch.ones(shape) for n in (1, 2) for side, shape in (("a", (4, 2)), ("b", (2, 6)))}
LOHA_TUCKER = {
    f"hada_{name}": torch.ones(shape)
    for n in (1, 2)
    for name, shape in ((f"w{n}_a", (2, 4)), (f"w{n}_b", (2, 6)), (f"t{n}", (2, 2, 3, 3)))
}
LOKR = {"lokr_w1": torch.ones(2, 3), "lokr_w2_a": torch.ones(2, 1), "lokr_w2_b": torch.ones(1, 2)}
LOKR_BOTH = {"lokr_w1_a": torch.ones(2, 1), "lokr_w1_b": torch.ones(1, 3), "lokr_w2": torch.ones(2, 2)}
GLORA = {"a1": (6, 2), "a2": (2, 6), "b1": (4, 2), "b2": (2, 6)}
FULL = {"diff": torch.ones(4, 6), "diff_b": torch.ones(4)}
NORM = {"w_norm": torch.ones(4), "b_norm": torch.ones(4)}
OFT, BOFT = {"oft_blocks": torch.ones(2, 2, 2)}, {"oft_blocks": torch.ones(2, 2, 2, 2)}
INPUT, BOFT_INPUT = {"oft_R.weight": torch.ones(3, 1)}, {"boft_R": torch.ones(1, 3, 2, 2)}
IA3 = {"weight": torch.ones(4), "on_input": torch.tensor(0)}
GOOD = {
    "lora": LORA, "conv": CONV, "tucker": TUCKER, "dora": DORA, "loha": LOHA, "loha tucker": LOHA_TUCKER, "lokr": LOKR,
    "lokr both": LOKR_BOTH, "glora": {f"{k}.weight": torch.ones(shape) for k, shape in GLORA.items()}, "full": FULL,
    "norm": NORM, "oft": OFT, "boft": BOFT, "oft input": INPUT, "boft input": BOFT_INPUT, "ia3": IA3,
    "oft of single features": {"oft_R.weight": torch.ones(7, 0)},
    "linear as 1x1": {**LORA, "lora_up.weight": torch.ones(4, 2, 1, 1)},
    "float8": {**LORA, "lora_up.weight": torch.ones(4, 2).to(torch.float8_e4m3fn)},
    "alpha with an axis": {**LORA, "alpha": torch.tensor([2.0])},
}  # fmt: skip
NO_NUMBER, EMPTY, APART = "alpha is no number, but", "is empty", "do not go together"
BROKEN: list[tuple[dict[str, Tensor], str, Tensor | None, str]] = [
    (LORA, "alpha", torch.ones(2), f"{NO_NUMBER} (2,) of type float32"),
    (LORA, "alpha", torch.zeros(0), f"{NO_NUMBER} (0,)"),
    (LORA, "alpha", torch.tensor(1j), f"{NO_NUMBER} () of type complex64"),
    (LORA, "alpha", torch.tensor(math.nan), "alpha has NaN or infinite values"),
    (LORA, "alpha", torch.tensor(1e300, dtype=torch.float64), "is 5.0e+299 by its alpha, which no training gives"),
    (LORA, "alpha", torch.tensor(1e-300, dtype=torch.float64), "alpha is 1e-300, which is 0 in fp32"),
    (LORA, "alpha", torch.tensor(-1e30), "is -5.0e+29 by its alpha, which no training gives"),
    (LORA, "lora_up.weight", torch.tensor(1.0), "lora_up.weight () has 0 axes, not 2"),
    (LORA, "lora_up.weight", torch.ones(4), "lora_up.weight (4,) has 1 axes, not 2"),
    (LORA, "lora_up.weight", torch.ones(1, 4, 2), "lora_up.weight (1, 4, 2) has 3 axes, not 2"),
    (
        LORA,
        "lora_up.weight",
        torch.ones(4, 3),
        f"lora_down.weight (2, 6) and lora_up.weight (4, 3) {APART}, 2 and 3 ranks",
    ),
    (LORA, "lora_up.weight", torch.ones(0, 2), f"lora_up.weight (0, 2) {EMPTY}"),
    (LORA, "lora_up.weight", torch.ones(4, 2, dtype=torch.complex64), "is of type complex64, not floating point"),
    (LORA, "lora_up.weight", torch.ones(4, 2).to(torch.int8), "is of type int8, not floating point"),
    (LORA, "lora_up.weight", torch.full((4, 2), 1e30), "lora_up.weight has values up to 1.0e+30, which no training"),
    (LORA, "lora_up.weight", torch.full((4, 2), -1e9), "lora_up.weight has values up to 1.0e+09"),
    (OFT, "alpha", torch.tensor(-2.0), "alpha is -2, and in diag-oft it is the constraint, a limit from 0 on"),
    (BOFT, "alpha", torch.tensor(1e9), "alpha is 1e+09, and in boft it is the constraint"),
    ({}, "oft_blocks.1", torch.full((2, 2, 2), 1e9), "oft_blocks.1 has values up to 1.0e+09"),
    (LORA, "lora_up.weight", torch.full((4, 2), math.nan).to(torch.float8_e5m2), "has NaN or infinite values"),
    (LORA, "lora_up.weight", None, "has lora_down.weight without lora_up.weight: the layer is incomplete"),
    (LORA, "lora_mid.weight", torch.ones(3, 3, 3, 3), f"{APART}, 3 and 2 ranks"),
    (TUCKER, "lora_mid.weight", torch.ones(2, 3, 3, 3), f"{APART}, 2 and 3 ranks"),
    (DORA, "dora_scale", torch.ones(0, 1), f"dora_scale (0, 1) {EMPTY}"),
    (DORA, "dora_scale", torch.ones(4, 1).bool(), "dora_scale is of type bool"),
    (LOHA, "hada_w2_a", torch.ones(4, 3), f"{APART}, 2 and 3 ranks"),
    (LOHA, "hada_w2_b", torch.ones(2, 5), f"{APART}, 6 and 5 values on one axis"),
    (LOHA, "hada_w2_b", None, "without hada_w2_b"),
    (LOHA_TUCKER, "hada_t1", torch.ones(2, 2), ""),
    (LOHA_TUCKER, "hada_t1", torch.ones(2, 3, 3, 3), f"{APART}, 2 and 3 ranks"),
    (LOKR, "lokr_w2_b", torch.ones(2, 2), f"{APART}, 1 and 2 ranks"),
    (LOKR, "lokr_w1", torch.ones(2), "lokr_w1 (2,) has 1 axes, not 2"),
    (LOKR_BOTH, "lokr_w1_a", torch.ones(2, 4), f"{APART}, 4 and 1 ranks"),
    (LOKR_BOTH, "lokr_w1_b", None, "has lokr_w1_a, lokr_w2 without lokr_w1_b"),
    (GOOD["glora"], "a2.weight", torch.ones(3, 6), f"{APART}, 2 and 3 ranks"),
    (FULL, "diff_b", torch.zeros(0), f"diff_b (0,) {EMPTY}"),
    (NORM, "b_norm", torch.ones(5), f"{APART}, 4 and 5 values"),
    (OFT, "oft_blocks", torch.ones(2, 2, 3), f"{APART}, 2 and 3 values"),
    (OFT, "oft_blocks", torch.ones(4, 2), "oft_blocks (4, 2) has 2 axes, not 3"),
    ({"oft_blocks.0": torch.ones(2, 2, 2)}, "oft_blocks.1", torch.ones(2, 3, 2), f"{APART}, 3 and 2 values"),
    (INPUT, "oft_R.weight", torch.ones(3), "oft_R.weight (3,) has 1 axes, not 2"),
    (BOFT_INPUT, "boft_R", torch.ones(3, 2, 2), "boft_R (3, 2, 2) has 3 axes, not 4"),
    (IA3, "on_input", torch.ones(2), "on_input is no number"),
    (IA3, "weight", torch.tensor(0.5), ""),
]


def under(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{X}.{suffix}": tensor for suffix, tensor in layer.items()}


@pytest.mark.parametrize("name", GOOD)
def test_right_layers(name: str) -> None:
    file = open_adapter(under(GOOD[name]), Naming(), "F").all_read()
    assert list(file.layers) == [X] and not file.stray


def test_layers_that_cannot_be() -> None:
    for layer, suffix, tensor, words in BROKEN:
        changed = {**layer, suffix: tensor}
        tensors = under({key: one for key, one in changed.items() if one is not None})
        if not words:  # whether it fits, a model knows
            open_adapter(tensors, Naming(), "F")
            continue
        with pytest.raises(ValueError) as caught:
            open_adapter(tensors, Naming(), "F").all_read()
        message = str(caught.value)
        assert message.startswith("F: ") and X in message and words in message and "\n" not in message, message


@pytest.mark.parametrize("flag", ["use_rslora_flag", "use_dora_flag"])
def test_flags_of_the_whole_file(flag: str) -> None:
    with pytest.raises(ValueError, match=f"F: '{flag}' is no number, but \\(4, 4\\)"):
        open_adapter({**under(LORA), flag: torch.ones(4, 4)}, Naming(), "F")


def test_an_alpha_or_a_magnitude_without_factors() -> None:
    """The first acts on nothing, and is told; without the second's factors something is lost."""
    y = {"lora_unet_y.alpha": torch.tensor(1.0)}
    assert open_adapter({**under(LORA), **y}, Naming(), "F").all_read().stray == ("lora_unet_y.alpha",)
    with pytest.raises(ValueError, match="F: lora_unet_y has dora_scale alone, without factors"):
        open_adapter({**under(LORA), **y, "lora_unet_y.dora_scale": torch.ones(4, 1)}, Naming(), "F").all_read()
    dots = {"unet.y.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="F: unet.y has lora_A.weight without lora_B.weight"):
        open_adapter(dots, Naming(), "F").all_read()


def test_a_tensor_without_a_name() -> None:
    for shape in ((), (2, 2)):
        with pytest.raises(ValueError, match="F is broken, as no program writes ''"):
            open_adapter({**under(LORA), "": torch.ones(shape)}, Naming(), "F")


@pytest.mark.parametrize("algo", ALGOS)
def test_every_algorithm_says_what_axes_its_tensors_have(algo: str) -> None:
    spec = ALGOS[algo].spec
    named = {suffix for form in spec.axes for suffix in form}
    assert {*spec.keys.values()} - {spec.bias_key} <= named, "see AlgoSpec.axes"
    assert ({*spec.more_keys} if algo in ("diag-oft", "ia3") else set()) <= named
