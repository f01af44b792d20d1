"""Requests to stop: signals set a flag that the loop reads after each iteration.

SIGINT is Ctrl-C, SIGTERM comes from schedulers and torchrun, SIGUSR1 from Slurm (asked for with
--signal=USR1@SECONDS). Each ends the process with exit code `RESUME_ME` if the run can be resumed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

import click

RESUME_ME: Final = getattr(os, "EX_TEMPFAIL", 75)
"""Exit code of a run that was stopped and goes on with --resume: sysexits.h has it for temporary
failures.
"""
_ONE_REQUEST_SECONDS = 1.0
"""Signals that come within this time ask for one thing."""
_BY_MACHINES = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT, SIGTERM or SIGUSR1 came; Ctrl-C after any of them
    raises KeyboardInterrupt at once.

    Ctrl-C under torchrun arrives twice, from the terminal and from torchrun: that is one request.
    Slurm's SIGTERM after its SIGUSR1 is no more urgent; only SIGKILL does not wait.
    """
    came: list[float] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(time.monotonic())
        if number == signal.SIGINT and came[-1] - came[0] > _ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt

    with _handled_by(note, (signal.SIGINT, *_BY_MACHINES)):
        yield lambda: bool(came)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Run the body so that SIGTERM and SIGUSR1 raise KeyboardInterrupt, as Ctrl-C does: where
    nothing is trained, there is nothing to save.
    """
    with _handled_by(signal.default_int_handler, _BY_MACHINES):
        yield


def leave(sentence: str | None = None) -> NoReturn:
    """End the command with the code that asks to be resumed, after saying why."""
    if sentence is not None:
        click.echo(sentence, err=True)
    sys.exit(RESUME_ME)


def run_as_process(command: Callable[[], None]) -> None:
    """Run this process's command; if it ends to be resumed, exit at once.

    Python would clear up all objects first, which takes seconds on a busy machine.
    """
    try:
        command()
    except SystemExit as end:
        if end.code != RESUME_ME:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RESUME_ME)


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]
) -> Iterator[None]:
    previous: Mapping[int, object] = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
