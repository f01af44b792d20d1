"""A run's folder: its paths, its readings, and files that appear whole or not at all.

    runs/00000-NAME/: recipe.yaml readings.jsonl checkpoints/ samples/ student.safetensors report/

Every file that is replaced while a run goes on goes through `atomic_write`: a full disk or a power
cut leaves the previous file as it was. Who writes to a run holds it (`RunFolder.exclusive`), so
that no second process does. What stands *in* checkpoints is their writer's concern.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from core import _lock
from core._lock import Held, Lock
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


@dataclass(frozen=True)
class RunFolder:
    """Where the files of one run are."""

    path: Path

    @property
    def recipe(self) -> Path:
        """Return the path of the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def job(self) -> Path:
        """Return the path of the note which job began the run, where one did."""
        return self.path / "job.txt"

    @property
    def readings(self) -> Path:
        """Return the path of the readings, one JSON object a line."""
        return self.path / "readings.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of what a resumed run needs."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Return the folder of images made on the way."""
        return self.path / "samples"

    @property
    def student(self) -> Path:
        """Return the path of the refined weights."""
        return self.path / "student.safetensors"

    @property
    def refined_pickle(self) -> Path:
        """Return the path of the user's own pickle with the refined weights in it."""
        return self.path / "refined.pkl"

    @property
    def teacher_samples(self) -> Path:
        """Return the path of the statistics of the teacher's own samples, where they were made."""
        return self.path / "teacher-samples.npz"

    @property
    def report(self) -> Path:
        """Return the folder of the report."""
        return self.path / "report"

    @classmethod
    def create(cls, outdir: Path, name: str) -> RunFolder:
        """Return a new folder OUTDIR/00000-NAME of the next free number, also among many callers.

        Raises UserError where the name or the place does not do.
        """
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"run name {name!r}: expected letters, digits and _ . + - only")
        with _writing(outdir):
            outdir.mkdir(parents=True, exist_ok=True)
            folder = cls(_numbered(outdir, name))
            for below in (folder.checkpoints, folder.samples, folder.report):
                below.mkdir()
            _flush(outdir)
        return folder

    @classmethod
    def open_existing(cls, path: Path) -> RunFolder:
        """Return the folder of an earlier run. Raises UserError where there is none."""
        folder = cls(path)
        if folder.recipe.is_file():
            return folder
        if not path.exists():
            raise UserError(f"{path}: no such run folder")
        inside = sorted(recipe.parent.name for recipe in path.glob("*/recipe.yaml"))
        hint = f"; did you mean {path / inside[-1]}?" if inside else ""
        raise UserError(f"{path}: not a run folder, it has no recipe.yaml{hint}")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run while the block goes on; what a killed process left half written goes.

        However this process ends, the run is free again. Raises UserError where another process
        holds it, and says which.
        """
        path = self.path / ".lock"
        try:
            with _writing(path):
                lock = Lock.acquire(path)
        except Held as holder:
            raise UserError(
                f"{self.path}: {holder} writes to this run; wait until it ends, or stop it"
            ) from None
        try:
            if lock.is_sure:
                for partial in self.checkpoints.glob(".*.partial"):
                    shutil.rmtree(partial, ignore_errors=True)
            yield
        finally:
            lock.release()

    def holder(self) -> str | None:
        """Return which process holds the run; None where none does, as far as can be known."""
        return _lock.holder(self.path / ".lock")

    def append_reading(self, reading: Mapping[str, object]) -> None:
        """Add one line to the readings. It has `images_seen`; a non-finite number is our bug."""
        assert "images_seen" in reading, reading
        line = json.dumps(dict(reading), allow_nan=False)
        with _writing(self.readings), self.readings.open("ab+") as file:
            _drop_cut_line(file)
            file.write(f"{line}\n".encode())

    def flush_readings(self) -> None:
        """Have the readings so far on the disk: what goes on from here counts on them."""
        if self.readings.exists():
            with _writing(self.readings):
                _flush(self.readings)

    def read_readings(self) -> list[dict[str, object]]:
        """Return all readings, oldest first, without a last line that was cut off while written."""
        if not self.readings.exists():
            return []
        lines = self.readings.read_text(encoding="utf-8").split("\n")
        rows = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{self.readings}, line {number}: expected a JSON object, got {line[:60]!r}; "
                    "remove that line"
                ) from error
        return rows

    def keep_readings_until(
        self, images_seen: int, *, then: Sequence[Mapping[str, object]] = ()
    ) -> None:
        """Drop the readings later than a checkpoint, which will be written again, and add others;
        all at once. That a run went back (`rollback`) is never dropped.
        """
        rows: list[Mapping[str, object]] = [
            row
            for row in self.read_readings()
            if _images_seen(row) <= images_seen or "rollback" in row
        ]
        lines = [json.dumps(dict(row), allow_nan=False) for row in (*rows, *then)]
        with atomic_write(self.readings) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to; if the block ends well, the file moves to its place, else it goes.

    The yielded path has the same name, in a hidden folder beside. A disk that is full or may not be
    written to becomes a UserError, whichever library noticed it: torch and safetensors raise errors
    of their own, so an error's text is searched and one more block of the same file is tried.
    """
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    partial = folder / path.name
    with _writing(path):
        folder.mkdir(parents=True)
        try:
            yield partial
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
        except Exception as error:
            _raise_disk_error(error, partial)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the user can mend about a disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno]
        raise UserError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error


def _numbered(outdir: Path, name: str) -> Path:
    """Return a new folder whose number no other has.

    The bare number is claimed first (mkdir succeeds once). A claim is free again as soon as its
    owner has renamed it, so whoever gets it then looks whether the number is taken by now.
    """
    taken = [re.match(r"(\d{5,})-", found.name) for found in outdir.iterdir()]
    numbers = [int(match[1]) for match in taken if match]
    for number in itertools.count(max(numbers, default=-1) + 1):
        claim = outdir / f"{number:05d}"
        try:
            os.mkdir(claim)
        except FileExistsError:
            continue
        if any(outdir.glob(f"{number:05d}-*")):
            os.rmdir(claim)
            continue
        return claim.rename(outdir / f"{number:05d}-{name}")
    raise AssertionError("numbers do not end")


def _images_seen(row: Mapping[str, object]) -> int:
    images_seen = row["images_seen"]
    assert isinstance(images_seen, int), row
    return images_seen


def _drop_cut_line(file: BinaryIO) -> None:
    """Remove what stands behind the last newline: the line of a writer that could not end it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
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
