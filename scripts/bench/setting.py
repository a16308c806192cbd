"""What all tables of a run share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import hosts
from .cases import Case, Sizes
from .peers import Adapted, Peer
from .report import Progress

AUTOCAST = "autocast"
MODES = {AUTOCAST: torch.bfloat16, "fp32": torch.float32}  # -> dtype of the base layer


@dataclass
class Setting:
    """Of a run.

    Attributes:
        device: where it runs.
        sizes: how much it takes.
        peers: who is compared, ours first.
        checkouts: trainers by their short names.
        progress: the bar.
        lines: what could not be measured, a line each.
    """

    device: torch.device
    sizes: Sizes
    peers: Sequence[Peer]
    checkouts: dict[str, hosts.Checkout]
    progress: Progress
    lines: list[str] = field(default_factory=list)

    def autocast(self, on: bool = True) -> AbstractContextManager[Any]:
        """As the trainers train: in bf16, with adapters in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    @contextmanager
    def failing(self, peer: Peer | None, case: Case) -> Iterator[None]:
        """What fails inside is left out, with a line: some adapters of some peers do on some layers.

        Args:
            peer: whose; None = nobody's, and a failure is one.
            case: the adapter.
        """
        try:
            yield
        except RuntimeError as error:
            if peer is None:
                raise
            line = f"{peer.name} fails with {case}: {(str(error) or type(error).__name__).splitlines()[0][:120]}"
            self.lines += [line] if line not in self.lines else []

    def passes(self, layer: Adapted, x: Tensor, mode: str) -> tuple[Callable[[], Tensor], Callable[[], None]]:
        """The forward pass of a layer, and forward and backward together.

        Args:
            layer: that is called.
            x: its input.
            mode: of `MODES`.
        """
        call, trained, on = layer.call, layer.parameters, mode == AUTOCAST

        def forward() -> Tensor:
            with self.autocast(on):
                result: Tensor = call(x)
            return result

        gradient = torch.ones_like(forward())

        def both() -> None:
            x.grad = None
            for p in trained:
                p.grad = None
            forward().backward(gradient)

        return forward, both
