"""Comparison of several runs: their metrics, and their differences.

    compared = compare(reports, paths, beside=Path("comparison.html"))
    summary(compared)                   for a terminal; write.write_comparison writes the page

Values are put side by side only with a warning if they are not comparable: of other features,
against another reference, of other counts of images.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from core.errors import UserError
from eval.metrics.display import arrow, change, number, shown, unit
from eval.metrics.registry import MetricResult, metrics
from reports.data import Report
from reports.figures import strip_tiles
from reports.text import facts

COLUMNS = ("before", "after", "change", "teacher")
STRIP = "pairs.png"
"""File of a report with its pairs, before above after, without any margin."""
_MOST_PICTURES = 10
_NOWHERE = "-"
"""Stands for a key that a run's recipe has not."""


@dataclass(frozen=True)
class Run:
    """A run in a comparison."""

    name: str
    """Its folder's, or as much of its path as tells it from the others."""
    report: Report
    link: str | None
    """Address of its own page, relative to the comparison; None without one."""
    strip: Path
    """Its picture of pairs, which may be missing."""


@dataclass(frozen=True)
class Line:
    """One run's values of a metric, as text; empty if it has none."""

    run: Run
    cells: tuple[str, ...]
    """In the order of COLUMNS."""
    is_best: bool


@dataclass(frozen=True)
class Comparison:
    """Runs, and their differences."""

    runs: tuple[Run, ...]
    warnings: tuple[str, ...]
    """Why values may not be compared, a sentence each."""
    settings: Mapping[str, tuple[str, ...]]
    """Key path of a recipe -> its value in each run; only keys that differ."""
    facts: Mapping[str, tuple[str, ...]]
    """Other differences, such as the commit -> words for each run."""

    @property
    def metrics(self) -> list[str]:
        """Return the metrics that any run has, the first run's headline first."""
        return list(dict.fromkeys(name for run in self.runs for name in run.report.metrics))


def report_path(run: Path) -> Path:
    """Return the report.json of a run's folder, of its report's folder, or of that name itself."""
    if not run.exists():
        raise UserError(f"there is no {run}: give a run's folder, such as runs/00000-mnist32")
    if run.is_file():
        return run
    inside = run / "report.json"
    return inside if inside.exists() else run / "report" / "report.json"


def compare(reports: Sequence[Report], paths: Sequence[Path], *, beside: Path) -> Comparison:
    """Return the comparison of at least two reports.

    paths: where each was read. beside: where the page goes, whose links are relative to that.
    """
    names = _names(paths)
    runs = tuple(
        Run(name, report, _link(path, beside=beside), path.with_name(STRIP))
        for name, report, path in zip(names, reports, paths, strict=True)
    )
    recipes = [dict(_flat(run.report.recipe)) for run in runs]
    return Comparison(
        runs,
        tuple(_warnings(runs)),
        _differing(recipes, skip={"name"}),
        _differing([facts(run.report) for run in runs], skip={"student", "seeds"}),
    )


@dataclass(frozen=True)
class PictureRow:
    """Images of the same seeds: of a student before any run, or of one run after it."""

    name: str
    images: Tensor
    """[N, 3, H, W] uint8."""


def pictures(compared: Comparison) -> tuple[tuple[int, ...], list[PictureRow]]:
    """Return seeds that all runs have pictures of, ten at most, and a row of images each.

    Each student comes once before the first run that began from it. Runs without pictures are
    left out; without two runs that have some there is nothing to compare.
    """
    tiles = {
        run.name: strip_tiles(run.strip, len(run.report.pair_seeds))
        for run in compared.runs
        if run.report.pair_seeds
    }
    shown = [run for run in compared.runs if tiles.get(run.name) is not None]
    if len(shown) < 2:
        return (), []
    common = set.intersection(*(set(run.report.pair_seeds) for run in shown))
    seeds = tuple(seed for seed in shown[0].report.pair_seeds if seed in common)[:_MOST_PICTURES]

    # a row for each student, then for its run
    rows: dict[str, PictureRow] = {}
    for run in shown:
        before, after = tiles[run.name] or (None, None)
        assert before is not None and after is not None
        places = [run.report.pair_seeds.index(seed) for seed in seeds]
        student = run.report.student
        began = f"before: {Path(student.path).name}"
        rows.setdefault(student.sha256 or began, PictureRow(began, before[places]))
        rows[run.name] = PictureRow(run.name, after[places])
    return seeds, list(rows.values()) if seeds else []


def title(metric: str) -> str:
    """Return a metric's name with its unit and which way is better."""
    return f"{metrics()[metric].label}{unit(metric)} {arrow(metric)}"


def lines(compared: Comparison, metric: str) -> list[Line]:
    """Return each run's values; the best after is marked if the runs are comparable."""
    after = [run.report.after[metric].mean for run in compared.runs if _has(run, metric)]
    best = (min if metrics()[metric].better == "lower" else max)(after)
    may_mark = not compared.warnings and len(after) > 1
    return [
        Line(
            run,
            _cells(run.report, metric),
            may_mark and _has(run, metric) and run.report.after[metric].mean == best,
        )
        for run in compared.runs
    ]


def summary(compared: Comparison) -> str:
    """Return the values and the warnings for a terminal."""
    table: list[tuple[str, ...]] = [("", *COLUMNS)]
    for metric in compared.metrics:
        table.append((title(metric), *[""] * len(COLUMNS)))
        table += [
            (f"  {line.run.name}{' *' if line.is_best else ''}", *line.cells)
            for line in lines(compared, metric)
        ]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS) + 1)]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]
    return "\n".join([*aligned, *(f"! {warning}" for warning in compared.warnings)])


def _has(run: Run, metric: str) -> bool:
    return metric in run.report.metrics


def _cells(report: Report, metric: str) -> tuple[str, ...]:
    if metric not in report.metrics:
        return ("",) * len(COLUMNS)
    before, after = report.before[metric], report.after[metric]
    teacher = report.teacher_samples.metrics if report.teacher_samples else {}
    return (
        shown(metric, before),
        shown(metric, after),
        change(before, after),
        number(metric, teacher[metric]) if metric in teacher else "",
    )


# Names and links


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the name of each run's folder, with those above it if two are alike."""
    folders = [_run_folder(path).absolute() for path in paths]
    names = [folder.name for folder in folders]
    for depth in range(2, max(len(folder.parts) for folder in folders) + 1):
        alike = Counter(names)
        names = [
            "/".join(folder.parts[-depth:]) if alike[name] > 1 else name
            for folder, name in zip(folders, names, strict=True)
        ]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{twice} is given twice: name each run once")
    return names


def _run_folder(path: Path) -> Path:
    folder = path.absolute().parent
    return folder.parent if folder.name == "report" else folder


def _link(path: Path, *, beside: Path) -> str | None:
    page = path.with_name("report.html")
    if not page.exists():
        return None
    return Path(os.path.relpath(page.absolute(), beside.absolute().parent)).as_posix()


# What is different


def _flat(section: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value of a recipe with its dotted key path."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{above}{key}", text


def _differing(rows: Sequence[Mapping[str, str]], *, skip: set[str]) -> dict[str, tuple[str, ...]]:
    """Return those keys whose values are not the same in all, in the order in which they come."""
    keys = [key for key in dict.fromkeys(key for one in rows for key in one) if key not in skip]
    values = {key: tuple(one.get(key, _NOWHERE) for one in rows) for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


# Why values may not be compared


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """Yield reasons that make values incomparable, then those that make them doubtful."""
    features = _by(runs, lambda report: report.extractor and report.extractor.sha256)
    if len(features) > 1:
        named = _told(features, lambda r: r.extractor.name if r.extractor else "nothing")
        yield f"Of features of different extractors, so no two values can be compared: {named}."
    references = _by(runs, _compared_with)
    if len(references) > 1:
        named = _told(references, lambda r: r.reference.name if r.reference else "nothing")
        yield f"Against different references, so no two values can be compared: {named}."
    counts = _by(runs, lambda report: report.images)
    if len(counts) > 1:
        named = _told(counts, lambda r: f"{r.images:,}")
        yield f"Of different numbers of images, which alone changes a FID: {named}."
    definitions = _by(runs, lambda report: json.dumps(_definitions(report), sort_keys=True))
    if len(definitions) > 1:
        named = _told(definitions, lambda r: json.dumps(_definitions(r)))
        yield f"By different definitions of the metrics (evaluation.definitions): {named}."
    yield from _doubts(runs)


def _compared_with(report: Report) -> str | None:
    """Return the identity of a reference's images: their hash; for a teacher's samples, which have
    none, the teacher and the sampler.
    """
    reference = report.reference
    if reference is None or reference.sha256:
        return reference and reference.sha256
    origin = (report.recipe.get("teacher"), report.teacher.sha256, report.sampler)
    return json.dumps([reference.name, reference.images, *origin], sort_keys=True)


def _doubts(runs: Sequence[Run]) -> Iterator[str]:
    """Yield why a difference that comparable values show may be none."""
    empty = [run.name for run in runs if not run.report.metrics]
    if empty:
        yield f"Nothing was measured in {_listed(empty)}."
    once = [run.name for run in runs if any(_count(r) < 2 for r in run.report.after.values())]
    if once:
        yield (
            f"One set of images in {_listed(once)}: whether a difference is more than chance is "
            "not known."
        )
    students = _by(runs, lambda report: report.student.sha256 or report.student.path)
    if len(students) > 1:
        named = _told(students, lambda r: f"`{r.student.path}`")
        yield f"The runs began from different students: {named}."


def _definitions(report: Report) -> object:
    evaluation = report.recipe.get("evaluation")
    return evaluation.get("definitions", {}) if isinstance(evaluation, Mapping) else {}


def _count(result: MetricResult) -> int:
    return len(result.values)


def _by(runs: Sequence[Run], key: Callable[[Report], Hashable]) -> list[list[Run]]:
    """Return the runs in groups of one key each."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run.report), []).append(run)
    return list(groups.values())


def _told(groups: Sequence[Sequence[Run]], words: Callable[[Report], str]) -> str:
    """Return "inception in a and b, mnist32 in c"."""
    return ", ".join(
        f"{words(group[0].report)} in {_listed([run.name for run in group])}" for group in groups
    )


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
