"""Teachers: pretrained diffusion denoisers, one family a file. `load` opens any weights file that a
family knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from core import networks
from core.protocols import Denoiser


def load(source: str | Path) -> Denoiser:
    """Return the denoiser of a path or URL, in eval mode on the CPU.

    Takes an EDM pickle (its ema), read as data, or our own safetensors; recognised by content.
    Raises core.errors.UserError where the file cannot be read or holds no denoiser.
    """
    return cast(Denoiser, networks.load("teachers", source, records=("ema",)))
