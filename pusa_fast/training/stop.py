"""SIGTERM and SIGINT as requests to stop after the step that is running."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from pusa_fast.training.parallel import World


class Stop:
    """The signal received, if any. All processes stop at the same step, whichever got it."""

    received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice: stop at once
        self.received = number
        os.write(2, b"stopping after this step, with a checkpoint\n")

    def agreed(self, world: World) -> bool:
        return bool(world.sum(torch.tensor([float(self.received is not None)]))[0])


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Receive signals in this block. Outside the main thread they are the caller's."""
    stop = Stop()
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
