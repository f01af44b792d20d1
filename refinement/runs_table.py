"""`--list`: the runs in a folder as a table, with the state, progress and metric of each.

Read from recipe, log, checkpoints and lock. Nothing is loaded, nothing is written; a run that
cannot be read is named with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.run_folder import RunFolder
from core.run_log import Divergence, EarlyStop, Evaluation, Rollback, Row, Stats, of_kind
from refinement.recipe import Recipe, read_recipe
from training import checkpoint


class Listed(NamedTuple):
    """One run as a line of the table."""

    name: str
    mode: str
    state: str
    images_seen: str
    metric: str
    written: str


_UNREADABLE = "unreadable"
_REASON = Listed._fields.index("state")
"""The column of a run that cannot be read in which the reason stands, however long."""
_HEADINGS = Listed("run", "mode", "state", "images", "metric", "last written")


def table(outdir: Path) -> str:
    """Return the runs in a folder, aligned in columns. Raises UserError if there is no folder."""
    if not outdir.is_dir():
        raise UserError(f"{outdir}: no such folder; runs go there, or to --outdir")
    paths = sorted(recipe.parent for recipe in outdir.glob("*/recipe.yaml"))
    if not paths:
        return f"{outdir}: no runs"
    rows = [_HEADINGS, *(_listed(path) for path in paths)]
    widths = [
        max(len(row[column]) for row in rows if column < _REASON or row.mode != _UNREADABLE)
        for column in range(len(_HEADINGS))
    ]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _listed(path: Path) -> Listed:
    folder = RunFolder(path)
    try:
        recipe, rows = read_recipe(folder.recipe), folder.log.rows()
        images_seen, state = _progress(folder, recipe, rows)
        return Listed(
            path.name,
            recipe.mode,
            state,
            str(images_seen),
            _metric(recipe, rows, images_seen),
            _written(folder),
        )
    except (UserError, OSError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Listed(path.name, _UNREADABLE, reason, "", "", "")


def _progress(folder: RunFolder, recipe: Recipe, rows: Sequence[Row]) -> tuple[int, str]:
    """Return how many images a run has seen, and its state."""
    total, saved = recipe.training.total_images, checkpoint.images_saved(folder)
    reached = max((row.images_seen for row in rows), default=0)
    if (holder := folder.holder()) is not None:
        return max(saved, reached), f"running, {_percent(max(saved, reached), total)} ({holder})"
    events = [row for row in rows if isinstance(row, Stats | Rollback | Divergence)]
    if events and isinstance(events[-1], Divergence):
        return saved, f"diverged after {events[-1].images_seen}, saved at {saved} of {total}"
    if saved >= total or any(row.images_seen >= saved for row in of_kind(rows, EarlyStop)):
        early = "" if saved >= total else f" early, at {saved} of {total}"
        is_reported = (folder.report / "report.json").exists()
        return saved, f"finished{early}" if is_reported else f"trained{early}, no report yet"
    return saved, f"stopped at {saved} of {total}"


def _metric(recipe: Recipe, rows: Sequence[Row], images_seen: int) -> str:
    """Return the watched metric before and after; without an after, its best so far."""
    evaluations = of_kind(rows, Evaluation)
    curve = [row for row in evaluations if row.when == "training"]
    ends = {
        row.when: row
        for row in evaluations
        if row.when == "before" or (row.when == "after" and row.images_seen == images_seen)
    }
    names = dict.fromkeys(name for row in (*curve, *ends.values()) for name in row.metrics)
    watched = recipe.watched_metric
    name = next((name for name in (watched.name, *names) if name in names), None)
    if name is None:
        return "not measured"

    parts = [f"{row.means[name]:.4g}" for row in ends.values() if name in row.metrics]
    points = [(row.means[name], row.images_seen) for row in curve if name in row.metrics]
    if "after" not in ends and points:
        better = max if watched.name == name and watched.highest else min
        value, images = better(points)
        parts.append(f"best {value:.4g} at {images}")
    return f"{name} {' -> '.join(parts)}"


def _written(folder: RunFolder) -> str:
    """Return when a file of the run was last written, to the minute."""
    files = [folder.recipe, folder.log.path, folder.report / "report.json"]
    files += folder.checkpoints.glob("*.pt")
    last = max(file.stat().st_mtime for file in files if file.exists())
    return datetime.fromtimestamp(last).isoformat(sep=" ", timespec="minutes")


def _percent(images_seen: int, total: int) -> str:
    return f"{images_seen / total:.0%} of {total}"
