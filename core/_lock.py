"""A file that one process at a time holds: the kernel lets go of it when the process ends, however
it ends.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What file systems say that know no locks: some network file systems, as they are mounted."""


class Held(Exception):
    """Another process, or another part of this one, holds the file; the text says who."""


@dataclass(frozen=True)
class Lock:
    """A file that is held until `release`."""

    is_sure: bool
    """False where the file system knows no locks, so that others may believe to hold it too."""
    _descriptor: int

    @classmethod
    def acquire(cls, path: Path) -> Lock:
        """Return the lock on a file, which is made. Raises Held, and OSError if it cannot be made.

        A file system that cannot lock is told of in the log, and gone on without.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_sure = _try(descriptor)
            if not is_sure:
                _log.warning("%s: no locks here; let no other process write there", path.parent)
            with suppress(OSError):  # a full disk: it is held all the same, without a name on it
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise Held(holder or "another process") from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(is_sure, descriptor)

    def release(self) -> None:
        """Let others have the file. It stays: whoever removes it may remove another's."""
        os.truncate(self._descriptor, 0)
        os.close(self._descriptor)


def holder(path: Path) -> str | None:
    """Return who holds a file, None where nobody does or where that cannot be known. Nothing is
    written, and who only looks keeps nobody waiting.
    """
    try:
        name = path.read_text(errors="replace").strip()
    except OSError:
        return None
    if not name or sys.platform == "win32":  # who lets go of it takes the name off
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return name
        except OSError:
            return None
    return None


def _try(descriptor: int) -> bool:
    """Return whether the file is locked now, or else cannot be. Raises BlockingIOError if held."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        return False
    return True
