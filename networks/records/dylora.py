"""DyLoRA: LoRA whose first b ranks are a good LoRA, too, for every b (2210.07558)."""

from __future__ import annotations

from dataclasses import replace

from .arg import FACTORS, NOTHING, Arg
from .lora import LORA
from .spec import OF_WEIGHT, About

DYLORA = replace(
    LORA,
    name="dylora",
    order=40,
    saved_as=LORA.name,
    options=frozenset({"block_size"}),
    unsaved=frozenset({"block_size"}),
    arguments=(
        Arg(
            "block_size",
            "int",
            1,
            "ranks that learn together; a file cut after any number of blocks, with the same alpha, is a good LoRA",
            FACTORS,
            aliases=("unit", "dyloRA"),
            minimum=1,
            per_host=(("lycoris", 4),),
            file=f"{NOTHING}; it is a LoRA",
            example=("block_size=2",),
        ),
        Arg(
            "save_dims",
            "ints",
            (),
            "each save also writes files cut to these dims, `4,8`: name-0004.safetensors beside name.safetensors. "
            "scripts/resize.py cuts later. Trainers that remove old files do not know of these",
            FACTORS,
            minimum=1,
            file=f"{NOTHING}; NAME stays; further files NAME-0004.safetensors beside it",
            example=("save_dims=2,4",),
        ),
    ),
    features=LORA.features | {"save_dims"},
    keeps_start=False,
    elsewhere=(
        (
            "sd_scripts",
            frozenset(),
            "the first b of R ranks act at R/b times the scale, as in the paper and as files cut to them act; "
            "sd-scripts' own module has the root of R/b",
        ),
        (
            "lycoris",
            frozenset(),
            "files act as they were trained; those of LyCORIS' own module act at 1/block_size of that",
        ),
    ),
    no_starts=dict.fromkeys(
        OF_WEIGHT, "what has changed since the start has no nested ranks: its files could not be cut"
    ),
    stepwise=True,
    about=About(
        papers=(
            (
                "2210.07558",
                "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank "
                "Adaptation",
            ),
        ),
        scale="alpha / rank; a file cut to b ranks keeps alpha, so that b ranks act at alpha / b",
        use=(
            "One run for several ranks, where you do not know which you need: `kohya-networks resize` cuts the "
            "file afterwards, or `save_dims=2,4` does at each save. A step trains `block_size` ranks alone, so it "
            "takes more steps than a LoRA of the same dim."
        ),
    ),
)
