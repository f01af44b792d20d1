"""Students: one-step generators, one family a file. `load` opens any weights file that a family
knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn

from core.roles import Generator
from pretrained import networks

_RECORDS = ("G_ema", "G")
"""Of a StyleGAN pickle: the moving average is the student; both carry refined weights back."""


def load(source: str | Path) -> Generator:
    """Return the student of a path or URL, in eval mode on the CPU.

    Takes a StyleGAN pickle (its G_ema, else its G), of TensorFlow's time too, read as data, or our
    own safetensors; recognised by content. Raises core.errors.UserError if the file cannot be
    read or holds no student.
    """
    return cast(Generator, networks.load("generators", source, records=_RECORDS))


def save_refined(
    original: str | Path, out: str | Path, student: nn.Module, *, g_ema_only: bool = False
) -> tuple[str, ...]:
    """Write a copy of the student's StyleGAN pickle with its refined weights; return its records.

    G_ema and, unless g_ema_only, G (where present) carry them, all else is as in the original, so
    every tool that opened that opens this. Raises core.errors.UserError if the original is no such
    pickle, of another network, or cannot be copied (a TensorFlow pickle).
    """
    records = _RECORDS[:1] if g_ema_only else _RECORDS
    return networks.save_refined(Path(original), Path(out), student, records=records)
