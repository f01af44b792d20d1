"""Command line: logging of rank 0, and user errors as one sentence with exit code 2."""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable

import click

from core import distributed
from core.distributed import World
from core.errors import UserError


def set_up_logging(world: World) -> None:
    """Log messages of rank 0 to stderr, without decoration."""
    handler = logging.StreamHandler()
    handler.addFilter(distributed.main_only(world))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)


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
