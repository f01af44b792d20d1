"""Teachers: pretrained diffusion denoisers, one family a file. `load` opens any weights file that a
family knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from core.roles import Denoiser
from pretrained import networks
from teachers._catalogue import CATALOGUE, LICENCE, check_name, resolve

__all__ = ["CATALOGUE", "LICENCE", "check_name", "load", "resolve"]


def load(source: str | Path) -> Denoiser:
    """Return the denoiser of a path, a URL or a short name, in eval mode on the CPU.

    Short names are those of published files, such as edm-cifar10-32x32-uncond-vp: `CATALOGUE`.
    Takes an EDM or EDM2 pickle (its ema), read as data, or our own safetensors; recognised by
    content. Raises core.errors.UserError if the file cannot be read or holds no denoiser.
    """
    if isinstance(source, str):
        check_name(source)
        source = resolve(source).path
    return cast(Denoiser, networks.load("teachers", source, records=("ema",)))
