"""A network made from a file has the file's values alone: nothing is drawn, and no start value is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_merge_every_algorithm import CASES
from tiny_parts import randomise, sd_unet
from torch.utils._python_dispatch import TorchDispatchMode

import networks.lora

STARTS: dict[str, dict[str, str]] = {
    "orthogonal": {"init": "orthogonal"},
    "seed": {"init_seed": "3"},
    "pissa": {"init": "pissa"},
    "lokr norm": {"algo": "lokr", "full_matrix": "True", "init_lokr_norm": "0.001"},
    "LoRA+": {"loraplus_lr_ratio": "16", "loraplus_mode": "reparam"},
    "DoRA": {"use_dora": "True"},
}
FROM_FILE = {**CASES, **{name: (networks.lora, options) for name, options in STARTS.items()}}


class Draws(TorchDispatchMode):
    """The operations in here that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def without_chance() -> Iterator[None]:
    """Memory that nothing has been written to is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return sd_unet()


@pytest.mark.parametrize("case", sorted(FROM_FILE))
def test_a_network_from_a_file_has_its_values_alone(case: str, unet: torch.nn.Module, tmp_path: Path) -> None:
    entry, options = FROM_FILE[case]
    file, again = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    with Draws() as drawn:
        network = entry.create_network(1.0, 4, 2, None, None, unet, **options)
    randomise(network, 0.03)
    network.save_weights(file, None, {})
    before = torch.get_rng_state()
    with without_chance(), Draws() as draws:
        made, _ = entry.create_network_from_weights(1.0, file, None, None, unet, **options)
    assert not draws.found, f"{len(draws.found)} draws, where a new network has {len(drawn.found)}"
    assert torch.equal(torch.get_rng_state(), before)
    assert not [name for name, value in made.state_dict().items() if not value.isfinite().all()]
    made.save_weights(again, None, {})
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key.endswith(".alpha") and options.get("algo") in ("full", "ia3"):
            continue  # it means nothing without a rank
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-7)
