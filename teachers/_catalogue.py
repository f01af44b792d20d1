"""Short names of published teachers: where their authors keep them, under which licence.

A name stands for a URL and nothing else; what the file holds follows from its content. No checksum
is published for these files: a recipe may name one (`teacher.sha256`).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from core.errors import UserError

LICENCE = "CC BY-NC-SA 4.0: not for commercial use, and networks made from it likewise"
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
_NAMES = (
    *(f"edm-cifar10-32x32-{kind}-{net}" for kind in ("cond", "uncond") for net in ("vp", "ve")),
    *(f"edm-{data}-64x64-uncond-{net}" for data in ("ffhq", "afhqv2") for net in ("vp", "ve")),
    "edm-imagenet-64x64-cond-adm",
    "baseline/baseline-cifar10-32x32-uncond-vp",
    "baseline/baseline-cifar10-32x32-uncond-ve",
    "baseline/baseline-imagenet-64x64-cond-adm",
)
CATALOGUE = {name.rpartition("/")[2]: f"{_EDM}/{name}.pkl" for name in _NAMES}
"""Short name -> URL of a network of Karras et al. 2022 (EDM)."""


def located(source: str) -> str:
    """Return the URL of a short name; a path or a URL as it is.

    Raises UserError, with the nearest names, for a bare word that is neither a name nor a file.
    """
    if source in CATALOGUE:
        return CATALOGUE[source]
    is_bare = not any(mark in source for mark in ("/", "\\", ".")) and not Path(source).exists()
    if is_bare:
        near = difflib.get_close_matches(source, CATALOGUE, n=3, cutoff=0.0)
        raise UserError(
            f"{source} is no file, and none of the published teachers known by name; "
            f"the nearest are {', '.join(near)}"
        )
    return source
