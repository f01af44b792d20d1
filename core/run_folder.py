"""A run's folder: its paths, its log, and the lock of the one process that may write to it.

    runs/00000-NAME/: recipe.yaml stats.jsonl checkpoints/ samples/ student.safetensors report/

Every file that is replaced during a run goes through `core.disk.atomic_write`: a full disk or a
power cut leaves the previous file as it was. The content of checkpoints is their writer's concern.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core import _lock
from core._lock import Lock, LockHeld
from core.disk import flush, writing
from core.errors import UserError
from core.run_log import RunLog


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """Return the path of the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def inputs(self) -> Path:
        """Return the path of the note of the input files and their hashes."""
        return self.path / "inputs.json"

    @property
    def job(self) -> Path:
        """Return the path of the note of the job that began the run."""
        return self.path / "job.txt"

    @property
    def log(self) -> RunLog:
        """Return the run's log: stats, evaluations, sessions, rollbacks."""
        return RunLog(self.path / "stats.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
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

    def exported(self, images_seen: int) -> RunFolder:
        """Return the folder of weights that are exported later, with paths as in a run's."""
        return RunFolder(self.path / "exports" / f"{images_seen:012d}")

    @property
    def teacher_samples(self) -> Path:
        """Return the path of the statistics of the teacher's own samples."""
        return self.path / "teacher-samples.npz"

    @property
    def report(self) -> Path:
        """Return the folder of the report."""
        return self.path / "report"

    @classmethod
    def create(cls, outdir: Path, name: str) -> RunFolder:
        """Return a new folder OUTDIR/00000-NAME of the next free number, also among many callers.

        Raises UserError if the name is not allowed or the folder cannot be written.
        """
        name = unicodedata.normalize("NFC", name)
        if not re.fullmatch(r"\w([^/\\\x00-\x1f]*[^/\\\x00-\x20])?", name):
            raise UserError(
                f"run name {name!r}: expected a letter or digit first, no slash and no space at "
                "the end"
            )
        with writing(outdir):
            outdir.mkdir(parents=True, exist_ok=True)
            folder = cls(_numbered(outdir, name))
            for below in (folder.checkpoints, folder.samples, folder.report):
                below.mkdir()
            flush(outdir)
        return folder

    @classmethod
    def open_existing(cls, path: Path) -> RunFolder:
        """Return the folder of an earlier run. Raises UserError if there is none."""
        folder = cls(path)
        if (path / "readings.jsonl").exists():
            raise UserError(
                f"{path}: a run of an earlier version of this program, whose log is readings.jsonl "
                "(now stats.jsonl): finish it with that version, or start again from its recipe"
            )
        if folder.recipe.is_file():
            return folder
        if not path.exists():
            raise UserError(f"{path}: no such run folder")
        inside = sorted(recipe.parent.name for recipe in path.glob("*/recipe.yaml"))
        hint = f"; did you mean {path / inside[-1]}?" if inside else ""
        raise UserError(f"{path}: not a run folder, it has no recipe.yaml{hint}")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run during the block; half-written files of a killed process are removed.

        However this process ends, the run is free again. Raises UserError if another process
        holds it, and says which.
        """
        path = self.path / ".lock"
        try:
            with writing(path):
                lock = Lock.acquire(path)
        except LockHeld as holder:
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
        """Return which process holds the run; None if none does, as far as can be known."""
        return _lock.holder(self.path / ".lock")


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
