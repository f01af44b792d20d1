"""Seal of a checkpoint: the SHA-256 of the file, and the metrics of its state.

torch.save writes a zip archive, which may end in a comment. The seal is that comment, so that
torch.load and unzip read a sealed file like any other: a JSON object of measurements, then 64
hexadecimal digits, the SHA-256 of every byte before them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path

_DIGITS = 64
_BLOCK_BYTES = 1 << 20
_END = b"PK\x05\x06"
"""Signature of the last record of a zip archive (APPNOTE.TXT, 4.3.16)."""
_END_BYTES = 22
"""… and its length with an empty comment, whose length stands in the last two bytes."""
_DAMAGE = (
    EOFError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of reading a damaged zip archive."""


def seal(path: Path, scores: Mapping[str, float]) -> None:
    """Seal a file that torch.save has just written; scores that are finite go into it."""
    finite = {name: value for name, value in scores.items() if math.isfinite(value)}
    note = json.dumps(finite).encode()
    with path.open("r+b") as file:
        assert _ends_bare(file), f"{path}: torch.save ended it in another way than expected"
        file.seek(-2, os.SEEK_END)
        file.write((len(note) + _DIGITS).to_bytes(2, "little"))
        file.write(note)
        digits = _sha256(file, file.tell())
        file.seek(0, os.SEEK_END)
        file.write(digits)


def damage(path: Path) -> str | None:
    """Return the damage of a checkpoint's file; None if each byte is as it was written.

    A file of the time before seals has the checksums of a zip archive alone: its tensors' bytes are
    checked, not those between them.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "it is empty"
            if _ends_bare(file):
                return _damage_by_zip(path)
            digits = _sha256(file, max(size - _DIGITS, 0))
            return None if file.read() == digits else "its SHA-256 is not the one it was given"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def scores_of(path: Path) -> dict[str, float]:
    """Return the metrics in a checkpoint's seal; empty without a readable seal."""
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(json.loads(archive.comment[:-_DIGITS] or b"{}"))
    except _DAMAGE:
        return {}


def _damage_by_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except _DAMAGE as error:
        return f"it is no whole zip archive: {error}"
    return None if wrong is None else f"the checksum of {wrong} in it is wrong"


def _ends_bare(file: BufferedIOBase) -> bool:
    """Return whether a file ends as a zip archive without a comment."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END_BYTES, 0))
    end = file.read()
    return len(end) == _END_BYTES and end.startswith(_END) and end.endswith(b"\0\0")


def _sha256(file: BufferedIOBase, size: int) -> bytes:
    """Return the digits of the first `size` bytes; the file then stands behind them."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    file.seek(0)
    while size > 0:
        part = block[: file.readinto(block[: min(size, _BLOCK_BYTES)])]
        if not part:
            break
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()
