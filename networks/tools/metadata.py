"""What the header of a file says after a tool has made it: the training stays told, what no longer holds goes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..foreign.texts import parse_json

HISTORY = "networks_history"  # list of what was done to a file, the newest last
# Of the tensors as they were: hashes of another payload, and marks of converters which decide how readers take them.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "networks_health", "networks_init",
          "lora_adapter_metadata", "lora_alpha", "alpha")  # fmt: skip


def told(
    metadata: Mapping[str, str],
    command: str,
    details: Mapping[str, Any],
    algo: str = "",
    ranks: Iterable[int] = (),
) -> dict[str, str]:
    """Metadata of a file that was made from one with these.

    Args:
        metadata: of the input.
        command: what was done.
        details: with what, plain values.
        algo: of all layers now, by our name for it; "" = of each what it was.
        ranks: of the layers now; none = as they were.
    """
    found = {key: value for key, value in metadata.items() if key not in _STALE}
    if algo:
        found["ss_network_module"] = f"networks.{algo}"
        for key in ("ss_network_args", "ss_network_dim", "ss_network_alpha"):
            found.pop(key, None)
    dims = sorted(set(ranks))
    if dims:
        found["ss_network_dim"] = str(dims[0]) if len(dims) == 1 else "Dynamic"  # the trainers' word for several
        found["ss_network_alpha"] = found["ss_network_dim"]
    past = history(metadata)
    return {**found, HISTORY: json.dumps([*past, {"command": command, **details}])}


def history(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What tools did to a file, the oldest first; [] where it does not say, or not in a form that is known."""
    try:
        found = parse_json(metadata.get(HISTORY, "[]"))
    except ValueError:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
