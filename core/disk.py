"""Files that appear whole or not at all, disk errors as a sentence with a remedy, and JSON read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "free some space there, or write elsewhere with --outdir",
    errno.EDQUOT: "free some of your quota, or write elsewhere with --outdir",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "the disk or the way to it fails: see to it, or write elsewhere with --outdir",
    errno.ESTALE: "the folder is gone from its server: mount it anew",
    errno.EROFS: "choose a folder that can be written to with --outdir",
    errno.EACCES: "choose a folder that you may write to with --outdir",
    errno.EPERM: "choose a folder that you may write to with --outdir",
    errno.ENOTDIR: "choose a folder with --outdir",
    errno.EEXIST: "choose a folder with --outdir",
    errno.EISDIR: "name a file, not a folder",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; its file replaces `path` when the block ends without an error.

    The yielded path has the same name, in a hidden folder beside. A disk that is full or may not be
    written to becomes a UserError, whichever library noticed it: torch and safetensors raise errors
    of their own, so an error's text is searched and one more block of the same file is tried.
    """
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    partial = folder / path.name
    with writing(path):
        folder.mkdir(parents=True)
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
            flush(path.parent)
        except Exception as error:
            _raise_disk_error(error, partial)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk errors that a user can mend into a UserError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno]
        raise UserError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_disk_error(error: Exception, path: Path) -> None:
    """Raise the OSError that made a library fail to write a file, if it was one."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors quotes it
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    if path.parent.is_dir() and not path.is_dir():
        with path.open("ab") as file:
            file.write(bytes(1 << 20))


def parsed_json(text: str | bytes) -> Any:
    """Return the data of a JSON text. Raises ValueError if it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
