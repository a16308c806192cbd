"""Splitting a dimension into two factors for Kronecker products."""

from __future__ import annotations


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split `dimension` = m * n with m <= n, in the way of LyCORIS, so that files of both sides have equal shapes.

    A `factor` that divides the dimension is taken as it is. Otherwise the divisors are climbed towards the square
    root while m stays <= factor (a negative factor sets no limit).

    >>> factorization(320), factorization(320, 8), factorization(127)
    ((16, 20), (8, 40), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor < 0 else factor
    best = (1, dimension)
    for m in range(2, dimension + 1):
        n, rest = divmod(dimension, m)
        if rest:
            continue
        if m > limit or m + n > sum(best):
            break
        best = (m, n)
    return min(best), max(best)
