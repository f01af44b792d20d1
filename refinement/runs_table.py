"""The runs in a folder as a table: what each is, how far it is, and what it is worth so far.

Read from what runs leave: recipe, readings, checkpoints and the lock. Nothing is loaded, nothing is
written; a run that cannot be read is named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast

from core.errors import UserError
from core.run_folder import RunFolder
from refinement.recipe import Recipe, read_recipe
from training import checkpoint

Reading = Mapping[str, object]


class Listed(NamedTuple):
    """One run as a line of the table."""

    name: str
    mode: str
    state: str
    images_seen: str
    metric: str
    written: str


_UNREADABLE = "unreadable"
_TRAINING = {"diverged", "rollback", "images_per_second"}
"""What is read while training: a report that is made later says nothing of how that ended."""
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
        recipe, rows = read_recipe(folder.recipe), _readings(folder)
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


def _readings(folder: RunFolder) -> list[Reading]:
    """Return the readings. Raises UserError where a line is none."""
    rows = folder.read_readings()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("images_seen"), int):
            raise UserError(f"{folder.readings}, line {number}: no reading")
    return list(rows)


def _progress(folder: RunFolder, recipe: Recipe, rows: Sequence[Reading]) -> tuple[int, str]:
    """Return how many images a run has seen, and its state."""
    total, saved = recipe.training.total_images, checkpoint.images_saved(folder)
    reached = max((cast(int, row["images_seen"]) for row in rows), default=0)
    if (holder := folder.holder()) is not None:
        return max(saved, reached), f"running, {_percent(max(saved, reached), total)} ({holder})"
    events = [row for row in rows if _TRAINING & row.keys()]
    if events and "diverged" in events[-1]:
        return saved, f"diverged after {events[-1]['images_seen']}, saved at {saved} of {total}"
    if saved >= total or any("early_stop" in row for row in rows):
        early = "" if saved >= total else f" early, at {saved} of {total}"
        is_reported = (folder.report / "report.json").exists()
        return saved, f"finished{early}" if is_reported else f"trained{early}, no report yet"
    return saved, f"stopped at {saved} of {total}"


def _metric(recipe: Recipe, rows: Sequence[Reading], images_seen: int) -> str:
    """Return a metric before and after; or, where there is no after yet, its best so far."""
    measured = [
        (cast(int, row["images_seen"]), cast(dict[str, float], row["measured"]))
        for row in rows
        if row.get("measured")
    ]
    at_ends = {
        when: cast(dict[str, list[float]], row[when])
        for row in rows
        for when in ("before", "after")
        if when in row and (when == "before" or row["images_seen"] == images_seen)
    }
    names = dict.fromkeys(name for _, found in measured for name in found)
    names |= dict.fromkeys(name for found in at_ends.values() for name in found)
    keep = recipe.training.keep
    name = next((name for name in (keep.best, "fid", *names) if name in names), None)
    if name is None:
        return "not measured"
    parts = [f"{fmean(found[name]):.4g}" for found in at_ends.values() if name in found]
    curve = [(found[name], images) for images, found in measured if name in found]
    if "after" not in at_ends and curve:
        better = max if keep.best == name and keep.best_is == "highest" else min
        value, images = better(curve)
        parts.append(f"best {value:.4g} at {images}")
    return f"{name} {' -> '.join(parts)}"


def _written(folder: RunFolder) -> str:
    """Return when a file of the run was last written, to the minute."""
    files = [folder.recipe, folder.readings, folder.report / "report.json"]
    files += folder.checkpoints.glob("*.pt")
    last = max(file.stat().st_mtime for file in files if file.exists())
    return datetime.fromtimestamp(last).isoformat(sep=" ", timespec="minutes")


def _percent(images_seen: int, total: int) -> str:
    return f"{images_seen / total:.0%} of {total}"
