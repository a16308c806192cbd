"""Random numbers that depend on a name and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
