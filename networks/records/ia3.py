"""IA3: a learnt factor for every feature that comes out of a layer, or goes in (2205.05638)."""

from __future__ import annotations

from .spec import NO_ALPHA, NUMBER, About, AlgoSpec, FileKind

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
    about=About(
        papers=(
            ("2205.05638", "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"),
        ),
        scale=NO_ALPHA,
        use=(
            "One factor for each feature: the fewest values of all, and the least that can be learnt. "
            "`preset=ia3` trains the layers of the paper: keys, values, and the second layers of MLPs on their "
            "input. It wants a larger learning rate than a LoRA."
        ),
    ),
)
