"""The record of an architecture: which classes mark it, where its layers are, and what trainers call them."""

from __future__ import annotations

from dataclasses import dataclass, field

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Signature:
    """A denoiser class by its name, told apart from its namesakes by the sub-modules it has and lacks."""

    cls: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One trained model of an architecture: the denoiser or a text encoder.

    Attributes:
        name: as the plan and messages call it.
        prefix: of saved names.
        containers: class names; every Linear and 1x1 convolution below such a module is trained.
        conv_containers: class names that join when a dim for larger kernels is given.
        rename: (prefix of the model's own dotted name, prefix of the trainer's), first match wins: models with
            another library's classes are saved under the trainer's names.
    """

    name: str
    prefix: str
    containers: tuple[str, ...]
    conv_containers: tuple[str, ...] = ()
    rename: Pairs = ()

    def trainer_name(self, dotted_name: str) -> str:
        """The dotted name which this layer has in the trainer's own model."""
        for old, new in self.rename:
            if dotted_name.startswith(old):
                return new + dotted_name[len(old) :]
        return dotted_name

    def saved_name(self, dotted_name: str) -> str:
        return f"{self.prefix}_{self.trainer_name(dotted_name)}".replace(".", "_")


@dataclass(frozen=True)
class ArchSpec:
    """An architecture.

    Attributes:
        name, title: for the machine and for people.
        signatures: denoiser classes that mark it.
        denoiser, text_encoders: its parts; text encoders in the order in which hosts hand them over.
        blocks: (prefix of a trainer's dotted name, block number), for `blocks=`.
        exclude: regular expressions left out by default.
    """

    name: str
    title: str
    signatures: tuple[Signature, ...]
    denoiser: Part
    text_encoders: tuple[Part, ...] = ()
    blocks: tuple[tuple[str, int], ...] = field(default=())
    exclude: tuple[str, ...] = ()

    def block_of(self, trainer_name: str) -> int | None:
        """The block number of a denoiser layer, or None for layers outside all blocks."""
        return next((n for prefix, n in self.blocks if trainer_name.startswith(prefix)), None)

    @property
    def block_count(self) -> int:
        return 1 + max((n for _, n in self.blocks), default=-1)
