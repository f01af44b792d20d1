"""A file that a user names by path, URL or short name: resolved once, fetched and hashed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.downloads import cache_path, local_file, sha256_of
from core.errors import UserError
from core.run_folder import RunFolder


@dataclass(frozen=True)
class File:
    """A named file; nothing is read before `path` or `sha256` is asked for."""

    shown: str
    """Name as the user wrote it, for recipes and reports."""
    location: str
    """Its path or URL."""
    expected_sha256: str | None = None
    """SHA-256 that it must have; None: not checked."""
    licence: str | None = None
    """Licence of a published file, if known."""

    def __str__(self) -> str:
        """Return the name as the user wrote it."""
        return self.shown

    @property
    def is_url(self) -> bool:
        """Whether the file is downloaded."""
        return self.location.startswith(("http://", "https://"))

    @cached_property
    def path(self) -> Path:
        """Path of the local file or folder, downloaded first if need be; of a run, its weights.

        Raises UserError if it is missing, cannot be downloaded, or has another SHA-256.
        """
        run = RunFolder(Path(self.location).expanduser())
        if self.is_url or not run.recipe.is_file():
            return local_file(self.location, sha256=self.expected_sha256)
        if not run.student.is_file():
            raise UserError(
                f"{run.path} has no {run.student.name} yet: finish it with `python refine.py "
                f"--resume {run.path}`, or measure where it stands with --report"
            )
        return local_file(run.student, sha256=self.expected_sha256)

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 in hexadecimal; None for a folder."""
        path = self.path
        if self.expected_sha256 is not None:
            return self.expected_sha256.lower()  # checked with the path
        return None if path.is_dir() else sha256_of(path)

    @property
    def is_here(self) -> bool:
        """Whether the file can be read without a download; nothing is fetched."""
        if self.is_url:
            return cache_path(self.location).exists()
        return Path(self.location).expanduser().exists()

    @property
    def status(self) -> str:
        """Location with size, or with the reason why it is not here yet; nothing is fetched."""
        if self.is_url:
            cached = cache_path(self.location)
            state = "kept at" if cached.exists() else "to be downloaded to"
            return f"{self.location}, {state} {cached}"
        path = Path(self.location).expanduser()
        if not path.exists():
            return f"{path} (MISSING)"
        return f"{path} ({path.stat().st_size:,} bytes)"
