"""Sizes of released models: enough to build each of them without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Module = tuple[str, tuple[int, ...]]  # a class, of torch if it has sizes, and its sizes


@dataclass(frozen=True)
class Encoder:
    """A text encoder.

    Attributes:
        name: of its skeleton.
        cls, config: its class in transformers, and that of its configuration.
        sizes: where they are not the configuration's defaults.
    """

    name: str
    cls: str
    config: str
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Release:
    """A released model.

    Attributes:
        name: as users type it, and of its skeleton.
        title: for people.
        denoiser: its class in diffusers; "" = it has none, and the outline is that of the trainer's.
        sizes: where they are not that class's defaults.
        text_encoders: those which trainers can train, in their order; None where the place stays empty.
        added: modules that the trainer's denoiser has and diffusers' has not: by dotted name.
        also: other names that users have for it; case, blanks and punctuation do not count.
    """

    name: str
    title: str
    denoiser: str
    sizes: dict[str, Any] = field(default_factory=dict)
    text_encoders: tuple[Encoder | None, ...] = ()
    added: dict[str, Module] = field(default_factory=dict)
    also: tuple[str, ...] = ()
