"""GLoRA: a low-rank change of what goes into the layer, beside one of its weight (2306.07967)."""

from __future__ import annotations

from .spec import ALPHA_OVER_RANK, BIAS, OF_WEIGHT, About, AlgoSpec, FileKind

_KEYS = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}

GLORA = AlgoSpec(
    "glora",
    keys={**_KEYS, **BIAS},
    kinds=(FileKind("GLoRA", frozenset({"a1.weight"})),),
    order=60,
    options=frozenset({"use_scalar"}),
    no_starts=dict.fromkeys(OF_WEIGHT, "W A reaches the directions of the base weight as it is, from a start at 0"),
    grows=frozenset({"a2", "b2"}),
    plus=frozenset({"a1", "b1"}),  # which lead out of the rank, as up does
    required=(frozenset(_KEYS.values()),),
    axes=({"a1.weight": "IR", "a2.weight": "RI", "b1.weight": "OP", "b2.weight": "QJ*"},),  # see `describe`
    bias_key="diff_b",
    fold=("b2",),
    rank_shows=(("a2.weight", 0),),
    relative=True,
    about=About(
        papers=(("2306.07967", "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning"),),
        scale=ALPHA_OVER_RANK,
        use=(
            "W A changes what goes into a layer, in the directions that the layer has; B is a LoRA. Twice the "
            "values of a LoRA of that dim. Its update depends on the base weight, so a file acts otherwise on "
            "another base model, and fewer programs read it."
        ),
    ),
)
