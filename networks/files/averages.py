"""Averages over a training (EMA): how each step counts, and what a file with one says of it."""

from __future__ import annotations

METADATA = "networks_ema"  # JSON: decay or another length, steps


def decay_at(decay: float, step: int) -> float:
    """What is kept of the average in a step of the optimizer, with the warm-up of diffusers' EMAModel.

    Args:
        decay: that is reached in the end.
        step: number of steps before this one; in the first the average is the new value.
    """
    return min(decay, (1 + step) / (10 + step)) if step else 0.0
