"""Ctrl-C and polite ends of a process, between the steps of a training run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch


class Interrupts:
    """Ctrl-C, or a polite end of the process, waits for the end of the step; a second one does not, except where a step
    would be left half done.

    Attributes:
        orderly: the last one came to its end between two steps, in all processes alike.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = self.orderly = self._held = False

    def __enter__(self) -> Interrupts:
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._held:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """In here every one waits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self, accelerator: Any) -> None:
        """Raise KeyboardInterrupt if one was asked for, in any process: all of them stop after the same step."""
        asked = self.asked
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=accelerator.device)
            asked = bool(accelerator.reduce(flag, reduction="sum") > 0)
        if asked:
            self.asked, self.orderly = False, True
            raise KeyboardInterrupt
