"""Random numbers that depend on a name and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def seed_of(name: str, seed: int) -> int:
    """A seed [0, 2^63) of its own for each name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU start at this seed; afterwards the generator goes on as if nothing had been drawn.

    Other devices' generators are left alone (torch.manual_seed would set them, too).
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _normal(seed: Tensor, shape: list[int], like: Tensor) -> Tensor:
    own = torch.Generator(like.device).manual_seed(int(seed))
    return torch.randn(shape, generator=own, dtype=like.dtype, device=like.device)


# An operator of our own, since a graph holds no generator; each copy of this package has its own.
seeded_normal = torch.library.custom_op(
    f"{__name__.replace('.', '_')}::seeded_normal",
    _normal,
    mutates_args=(),
    schema="(Tensor seed, int[] shape, Tensor like) -> Tensor",
)
"""Standard normal numbers of a shape that follow a seed (0-d) alone, in the dtype and on the device of `like`."""


@seeded_normal.register_fake
def _(seed: Tensor, shape: list[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)
