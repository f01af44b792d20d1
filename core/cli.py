"""Command line: logging of rank 0, and user errors as one sentence with exit code 2."""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from core import distributed
from core.distributed import World
from core.errors import UserError

_PROJECT = Path(__file__).resolve().parents[1]


def set_up_logging(world: World) -> None:
    """Log messages of rank 0 to stderr, without decoration; of libraries, errors alone."""
    handler = logging.StreamHandler()
    handler.addFilter(distributed.main_only(world))
    handler.addFilter(_is_ours_or_error)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)


def _is_ours_or_error(record: logging.LogRecord) -> bool:
    """Return whether a user needs a message: notes of libraries are for their developers."""
    path = Path(record.pathname).resolve()
    ours = path.is_relative_to(_PROJECT) and "site-packages" not in path.parts
    return ours or record.levelno >= logging.ERROR


def report_user_errors(*, stopped: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for commands: errors become one sentence and exit code 2.

    stopped: message for a Ctrl-C without a message of its own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: object, **options: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                command(*args, **options)
            except UserError as error:
                sys.exit(_says(f"error: {error}"))
            except KeyboardInterrupt as stop:
                sys.exit(_says(str(stop) or stopped))

        return run

    return decorate


def _says(sentence: str) -> int:
    click.echo(sentence, err=True)
    return 2
