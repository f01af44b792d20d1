"""Students: one-step generators, one family a file. `load` opens any weights file that a family
knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from core import networks
from core.protocols import Student


def load(source: str | Path) -> Student:
    """Return the student of a path or URL, in eval mode on the CPU.

    Takes a StyleGAN pickle (its G_ema, else its G), read as data, or our own safetensors;
    recognised by content. Raises core.errors.UserError where the file cannot be read or holds no
    student.
    """
    return cast(Student, networks.load("generators", source, records=("G_ema", "G")))
