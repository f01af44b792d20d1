"""Short names of published teachers -> URL and licence, and files that users name.

A name stands for a URL and nothing else: the content of the file tells the rest. No checksums are
published for these files; a recipe may give one (`teacher.sha256`).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from core.errors import UserError
from core.file import File

_ROOT = Path(__file__).resolve().parents[1]

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


def resolve(source: str, *, sha256: str | None = None) -> File:
    """Return the file of a short name, a URL or a path.

    A relative path is looked for from the user's folder, then from the project's own. sha256: that
    the file must have. Nothing is read.
    """
    if source in CATALOGUE:
        return File(source, CATALOGUE[source], sha256, LICENCE)
    beside = _ROOT / source
    is_ours = not Path(source).exists() and beside.exists()
    return File(source, str(beside) if is_ours else source, sha256)


def check_name(source: str) -> None:
    """Raise UserError with the nearest short names for a word that is neither name nor file."""
    if source in CATALOGUE:
        return
    is_bare = not any(mark in source for mark in ("/", "\\", ".")) and not Path(source).exists()
    if is_bare:
        near = difflib.get_close_matches(source, CATALOGUE, n=3, cutoff=0.0)
        raise UserError(
            f"{source} is no file, and none of the published teachers known by name; "
            f"the nearest are {', '.join(near)}"
        )
