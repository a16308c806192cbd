"""IA3: a learnt factor for every feature that comes out of a layer, or goes in (2205.05638)."""

from __future__ import annotations

from .spec import NUMBER, AlgoSpec, FileKind

PEFT = "ia3_l"  # the whole factors, in its files

IA3 = AlgoSpec(
    "ia3",
    keys={"weight": "weight", "on_input": "on_input"},
    kinds=(FileKind("IA3", frozenset({"on_input"})),),
    order=120,
    options=frozenset({"train_on_input"}),
    features=frozenset(),
    required=(frozenset({"weight", "on_input"}), frozenset({PEFT})),
    more_keys=frozenset({PEFT}),
    axes=({"on_input": NUMBER}, {"weight": "*"}, {PEFT: "*"}),
    relative=True,
)
