"""A run's log, stats.jsonl: typed rows, one JSON object a line. No other file knows a key of it.

    log = RunLog(folder.path / "stats.jsonl")
    log.append(Stats(images_seen=1024, images_per_second=310.5, values={"score_loss": 0.31}))
    log.last(Evaluation, when="before")     the newest such row, or None
    log.all(Rollback)                       all of them, oldest first

A line is {"images_seen": 1024, "stats": {...}}: the count of student images, then the kind of row
with its fields. A line that a crash cut off is dropped; any other damage is named by its number.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, TypeVar

from pydantic import TypeAdapter

from core.disk import atomic_write, flush, parsed_json, writing
from core.errors import UserError

When = Literal["before", "training", "after"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the log."""

    kind: ClassVar[str]
    """Key of the row's fields in its line."""
    survives_rollback: ClassVar[bool] = False
    """Whether the row stays when the run goes back to an earlier count of images."""
    images_seen: int
    """Student images before the row was written."""


@dataclass(frozen=True, kw_only=True)
class Stats(Row):
    """Means over the iterations since the last row of stats, and over ranks."""

    kind = "stats"
    images_per_second: float
    values: Mapping[str, float]
    """Losses, gradient norms and the like, by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Row):
    """Metrics of the student: before, while training (one value each) or after."""

    kind = "evaluation"
    when: When
    metrics: Mapping[str, tuple[float, ...]]
    """Name of a metric -> its value on each set of seeds."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of each metric over the sets of seeds."""
        return {name: sum(values) / len(values) for name, values in self.metrics.items()}


@dataclass(frozen=True, kw_only=True)
class ImageComparison(Row):
    """Image by image: how far latents' images moved ("drift"), or came near to real ones."""

    kind = "comparison"
    name: str
    result: Mapping[str, object]
    """Fields of the result, whose type its owner knows."""


@dataclass(frozen=True, kw_only=True)
class Session(Row):
    """One process's work on the run, which ends with this row."""

    kind = "session"
    started_at: str
    """ISO 8601, with the offset from UTC."""
    finished_at: str
    seconds: Mapping[str, float]
    """Part of the work -> its duration."""
    images: int
    """Images trained."""


@dataclass(frozen=True, kw_only=True)
class Rollback(Row):
    """A return to the checkpoint of images_seen, after the run diverged."""

    kind = "rollback"
    survives_rollback = True
    why: str
    from_images_seen: int
    lr_scale: float
    """Factor of both learning rates from here on."""


@dataclass(frozen=True, kw_only=True)
class Divergence(Row):
    """The run diverged and stopped."""

    kind = "divergence"
    why: str


@dataclass(frozen=True, kw_only=True)
class EarlyStop(Row):
    """The run ended before its full length: the metric no longer improved."""

    kind = "early_stop"
    metric: str
    value: float
    at_images_seen: int


_KINDS = {
    row.kind: row
    for row in (
        Stats,
        Evaluation,
        ImageComparison,
        Session,
        Rollback,
        Divergence,
        EarlyStop,
    )
}
T = TypeVar("T", bound=Row)


@dataclass(frozen=True)
class RunLog:
    """The rows of one run's log; its file appears with the first of them."""

    path: Path

    def append(self, row: Row) -> None:
        """Add one line. Raises ValueError for a number that is not finite, which is our bug."""
        line = _line(row)
        with writing(self.path), self.path.open("ab+") as file:
            _drop_cut_line(file)
            file.write(line.encode())

    def rows(self) -> list[Row]:
        """Return all rows, oldest first. Raises UserError that names a damaged line."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        # text behind the last newline was cut off by a crash
        return [self._row(line, number) for number, line in enumerate(lines[:-1], start=1)]

    def all(self, kind: type[T]) -> list[T]:
        """Return the rows of one kind, oldest first."""
        return of_kind(self.rows(), kind)

    def last(self, kind: type[T], **fields: object) -> T | None:
        """Return the newest row of a kind with these values of its fields, if any."""
        return newest(self.rows(), kind, **fields)

    def keep_until(self, images_seen: int, *, then: Sequence[Row] = ()) -> None:
        """Drop rows later than a checkpoint, except rollbacks, and add others, in one step."""
        rows = [row for row in self.rows() if row.images_seen <= images_seen or _survives(row)]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(map(_line, (*rows, *then))), encoding="utf-8")

    def flush(self) -> None:
        """Force the rows to the disk."""
        if self.path.exists():
            with writing(self.path):
                flush(self.path)

    def _row(self, line: str, number: int) -> Row:
        try:
            document = parsed_json(line)
            images_seen = document.pop("images_seen")
            ((kind, fields),) = document.items()
            return _adapter(_KINDS[kind]).validate_python({"images_seen": images_seen, **fields})
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"{self.path}, line {number}: expected a row of a run's log, got {line[:60]!r}; "
                "remove that line"
            ) from error


def of_kind(rows: Sequence[Row], kind: type[T]) -> list[T]:
    """Return the rows of one kind, in their order."""
    return [row for row in rows if isinstance(row, kind)]


def newest(rows: Sequence[Row], kind: type[T], **fields: object) -> T | None:
    """Return the last row of a kind with these values of its fields, if any."""
    matching = (
        row
        for row in reversed(of_kind(rows, kind))
        if all(getattr(row, name) == value for name, value in fields.items())
    )
    return next(matching, None)


def _survives(row: Row) -> bool:
    return row.survives_rollback


@cache
def _adapter(kind: type[Row]) -> TypeAdapter[Row]:
    return TypeAdapter(kind)


def _line(row: Row) -> str:
    """Return a row as a line of JSON."""
    fields = dataclasses.asdict(row)
    document = {"images_seen": fields.pop("images_seen"), row.kind: fields}
    return json.dumps(document, allow_nan=False) + "\n"


def _drop_cut_line(file: BinaryIO) -> None:
    """Truncate a file behind its last newline: a writer died within that line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
