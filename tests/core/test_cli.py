"""The log of a command: our lines, and errors of libraries."""

from __future__ import annotations

import logging
import logging.handlers

from core import cli
from core.distributed import World


def test_notes_of_libraries_are_left_out(capsys, monkeypatch) -> None:
    """What a library warns its developers of does not stand between our lines; its errors do."""
    monkeypatch.setattr(logging.root, "handlers", [])
    cli.set_up_logging(World.single())
    ours = logging.getLogger("training")
    ours.warning("ours")
    theirs = ours.makeRecord(
        "torch", logging.WARNING, "/usr/lib/site-packages/torch/x.py", 1, "theirs", (), None
    )
    logging.root.handle(theirs)
    theirs.levelno, theirs.msg = logging.ERROR, "an error"
    logging.root.handle(theirs)
    assert capsys.readouterr().err == "ours\nan error\n"
