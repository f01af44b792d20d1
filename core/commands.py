"""How a command leaves where it cannot go on: with one sentence, and exit code 2."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable

import click

from core.errors import UserError


def one_sentence(*, stopped: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for commands. stopped: what Ctrl-C says that has nothing else to say."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def spoken(*args: object, **options: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                command(*args, **options)
            except UserError as error:
                sys.exit(_says(f"error: {error}"))
            except KeyboardInterrupt as stop:
                sys.exit(_says(str(stop) or stopped))

        return spoken

    return decorate


def _says(sentence: str) -> int:
    click.echo(sentence, err=True)
    return 2
