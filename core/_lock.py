"""File lock of one process at a time, which the kernel releases at any end of the process."""

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
"""Error numbers of file systems without locks, such as some network mounts."""


class LockHeld(Exception):
    """The file is locked by another process or another part of this one, which the text names."""


@dataclass(frozen=True)
class Lock:
    """An acquired file lock."""

    is_sure: bool
    """False on a file system without locks: others may acquire it too."""
    _descriptor: int

    @classmethod
    def acquire(cls, path: Path) -> Lock:
        """Create and lock a file. Raises Held if it is locked, OSError if it cannot be created.

        On a file system without locks a warning is logged and the lock is not sure.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_sure = _try(descriptor)
            if not is_sure:
                _log.warning("%s: no locks here; let no other process write there", path.parent)
            with suppress(OSError):  # on a full disk the lock stays without a name
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockHeld(holder or "another process") from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(is_sure, descriptor)

    def release(self) -> None:
        """Release the lock. The file stays: removing it could remove another process's lock."""
        os.truncate(self._descriptor, 0)
        os.close(self._descriptor)


def holder(path: Path) -> str | None:
    """Return the name of the process that holds a lock; None if nobody does or it is unknown.

    Reads only, and blocks no other process.
    """
    try:
        name = path.read_text(errors="replace").strip()
    except OSError:
        return None
    if not name or sys.platform == "win32":  # release() clears the name
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
    """Lock the file; False on a file system without locks. Raises BlockingIOError if held."""
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
