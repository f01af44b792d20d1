"""How a run is asked to stop: signals become a question that the loop asks after each round."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ONE_REQUEST_SECONDS = 1.0
"""Signals that come within this time ask for one thing."""


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM came; a second one raises at once.

    Ctrl-C under torchrun arrives twice, from the terminal and from torchrun: that is one request.
    """
    came: list[float] = []

    def note(*_: object) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > _ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
