"""Turn a path or a URL into a local file: cached, resumed, checked.

A file comes once. It grows as NAME.part beside its place and is renamed when whole, so a name
without .part is a whole file. NAME.lock lets one process in at a time and keeps the server's mark
of the file (ETag or Last-Modified), without which half a file is never continued: it may have
become another one. Locks are POSIX locks: Linux and macOS.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from core.errors import UserError

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 60
_PROGRESS_SECONDS = 10
_CHUNK_BYTES = 1 << 20


def local_file(source: str | Path, *, sha256: str | None = None) -> Path:
    """Return the path of a file that exists here, downloaded to the cache first if it is a URL.

    sha256: expected SHA-256 in hexadecimal. Raises UserError if the file is missing,
    cannot be downloaded, or hashes to something else; a download is then renamed NAME.rejected.
    """
    if isinstance(source, Path) or "://" not in source:
        path = _existing(Path(source).expanduser())
        rejected = None
    elif urlsplit(source).scheme in ("http", "https"):
        path = _downloaded(source)
        rejected = path.with_name(path.name + ".rejected")
    else:
        raise UserError(f"{source} is neither a path nor a URL: expected http:// or https://.")
    if sha256 is not None:
        _check(path, sha256.lower(), source=source, rejected=rejected)
    return path


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_sha256(sha256: str) -> str:
    """Return the first digits of a hash, for readers."""
    return sha256[:12]


def cache_path(url: str) -> Path:
    """Return the cache path of a URL's file: a short hash of the URL, then its own name.

    The folder is GAN_REFINE_CACHE, else gan-refine in XDG_CACHE_HOME, else ~/.cache/gan-refine.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GAN_REFINE_CACHE") or Path(base) / "gan-refine").expanduser()
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name[-100:] or 'download'}"


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise UserError(f"There is no {path}: the folder {path.parent} does not exist.")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    hint = f" Near it: {', '.join(near)}." if near else " Give the path of a file that exists."
    raise UserError(f"There is no {path}.{hint}")


def _check(path: Path, expected: str, *, source: str | Path, rejected: Path | None) -> None:
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if actual == expected:
        return
    fix = "Give the file that belongs to this checksum, or correct the checksum."
    if rejected is not None:
        path.replace(rejected)
        fix = f"It was set aside as {rejected}; a next call downloads it again. " + fix
    raise UserError(f"{source} has SHA-256 {actual}, expected {expected}. {fix}")


def _downloaded(url: str) -> Path:
    path = cache_path(url)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")) as lock:
            if not path.exists():  # another process may have been first
                _fetch(url, path, mark_file=lock)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} could not be downloaded: {error}. Run again to go on from what has arrived, "
            f"or put the file at {path}, or give the path of a copy of it."
        ) from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Give the open lock file while no other process has it."""
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process to download %s", path.stem)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _fetch(url: str, path: Path, *, mark_file: IO[str]) -> None:
    """Download a URL to a path, continuing an earlier attempt if the server allows it."""
    part = path.with_name(path.name + ".part")
    mark_file.seek(0)
    mark = mark_file.read()
    start = part.stat().st_size if mark and part.exists() else 0
    headers = {"User-Agent": "gan-refine"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": mark}

    # continue only the same version of the file
    with _opened(url, headers) as response:
        if response.headers.get_content_type() == "text/html":
            raise http.client.HTTPException("the server sent a web page, not a file")
        resumed = response.status == http.client.PARTIAL_CONTENT
        if not resumed:
            start = 0
            _write_mark(mark_file, _mark(response))
        elif not _continues(response, start=start, mark=mark):
            _write_mark(mark_file, "")
            raise http.client.HTTPException("the server's file has changed since it was begun")

        # append, then rename the complete file
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("r+b" if resumed else "wb") as file:
            file.seek(start)
            _copy(response, file, name=path.name, total=total)
            os.fsync(file.fileno())
    part.replace(path)
    _write_mark(mark_file, "")


def _opened(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Return the response, asked again from the start if the server refuses to go on."""
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or "Range" not in headers:
            raise
        return _opened(url, {k: v for k, v in headers.items() if k not in ("Range", "If-Range")})


def _continues(response: http.client.HTTPResponse, *, start: int, mark: str) -> bool:
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    return begins and _mark(response) == mark


def _mark(response: http.client.HTTPResponse) -> str:
    """Return the mark of this version of the file (ETag or Last-Modified); "" without one."""
    etag = response.headers.get("ETag", "")
    strong = etag if not etag.startswith("W/") else ""  # a weak one does not promise equal bytes
    return strong or response.headers.get("Last-Modified", "")


def _write_mark(mark_file: IO[str], mark: str) -> None:
    mark_file.truncate(0)
    mark_file.write(mark)
    mark_file.flush()


def _copy(
    response: http.client.HTTPResponse, file: IO[bytes], *, name: str, total: int | None
) -> None:
    """Write all that the response holds, with a line of progress now and then."""
    _log.info("downloading %s", name)
    last_line = time.monotonic()
    while chunk := response.read(_CHUNK_BYTES):
        file.write(chunk)
        if time.monotonic() - last_line > _PROGRESS_SECONDS:
            last_line = time.monotonic()
            whole = "" if total is None else f" of {total / 1e6:.0f}"
            _log.info("downloading %s: %.0f%s MB", name, file.tell() / 1e6, whole)
    if total is not None and file.tell() != total:
        raise http.client.HTTPException(f"it ended after {file.tell()} of {total} bytes")
