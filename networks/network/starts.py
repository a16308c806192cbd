"""What a file's metadata says of start values."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow

log = logging.getLogger(__name__)


def told(layers: Sequence[tuple[PlanRow, AdaptedLayer]]) -> dict[str, str]:
    """Metadata about start values, after the tensors of a file were made; {} with default ones by the host's seed."""
    rows = [row for row, _ in layers if row.init != "default" or row.init_seed is not None]
    if not rows:
        return {}
    found: dict[str, object] = {"init": sorted({row.init for row in rows})}
    if rows[0].init_seed is not None:
        found["init_seed"] = rows[0].init_seed
    errors = [layer.adapter.refactor_error for _, layer in layers if layer.adapter.refactor_error is not None]
    if errors:
        found |= {"ranks": "2 x dim", "refactored_layers": len(errors), "largest_relative_error": max(errors)}
        log.info(
            "%d layers saved as their difference from the start, at twice their dim (largest relative error %.1g)",
            len(errors), max(errors),
        )  # fmt: skip
    return {"networks_init": json.dumps(found)}
