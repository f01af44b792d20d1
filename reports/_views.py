"""Views: all that the templates of the pages show, as text, numbers and drawings."""

from __future__ import annotations

import json
from collections.abc import Sequence

from eval.metrics.display import ARROWS, metric_title
from eval.metrics.registry import metrics
from eval.samples import Neighbors, Pairs
from reports._warnings import warnings
from reports.compare import COLUMNS, Comparison, Run, lines, pictures, title
from reports.data import Report
from reports.figures import CurveDrawing, Series, curve_drawing, data_address
from reports.text import columns, facts, levels, remarks, rows, sets, shown_points, verdict

View = dict[str, object]
"""Names in a template and their values."""


def report_view(report: Report, pairs: Pairs | None, neighbors: Neighbors | None) -> View:
    """Return the view of report.html."""
    return {
        "title": f"{report.name}: before and after",
        "heading": report.name,
        "headline": _headline(report),
        "warnings": warnings(report),
        "table": _table(report),
        "pairs": _pairs(pairs),
        "remarks": remarks(report),
        "neighbors": _neighbors(neighbors),
        "curve": _curve(report),
        "facts": facts(report),
        "recipe": json.dumps(report.recipe, indent=2, ensure_ascii=False),
    }


def comparison_view(compared: Comparison) -> View:
    """Return the view of comparison.html."""
    heading = f"{len(compared.runs)} runs compared"
    groups = [
        {"title": title(metric), "lines": lines(compared, metric)} for metric in compared.metrics
    ]
    return {
        "title": heading,
        "heading": heading,
        "warnings": compared.warnings,
        "runs": [run.name for run in compared.runs],
        "columns": ("run", *COLUMNS),
        "after_column": COLUMNS.index("after"),
        "groups": groups,
        "arrows": ARROWS,
        "pictures": _pictures(compared),
        "curves": _curves(compared),
        "settings": compared.settings,
        "facts": compared.facts,
    }


def _pictures(compared: Comparison) -> View | None:
    """Return the pictures of the same seeds, a row for each student and each run."""
    seeds, rows = pictures(compared)
    if not rows:
        return None
    return {
        "seeds": seeds,
        "rows": [
            {"name": row.name, "images": [data_address(image) for image in row.images]}
            for row in rows
        ],
    }


def report_drawing(report: Report) -> CurveDrawing:
    """Return the drawing of a report's curve and levels, for the page and for curve.png."""
    name = metric_title(report.curve.metric, report.extractor)
    return curve_drawing([Series(name, shown_points(report))], levels(report))


def curve_title(report: Report) -> tuple[str, str]:
    """Return a curve's metric, and " of 5,000 images" or nothing."""
    images = report.curve.images
    of = f" of {images:,} images" if images else ""
    return metric_title(report.curve.metric, report.extractor), of


def _headline(report: Report) -> View | None:
    """Return the first metric and whether its change is more than chance."""
    if not report.metrics:
        return None
    first = rows(report)[0]
    return {
        "metric": metric_title(report.metrics[0], report.extractor),
        "before": first.before,
        "after": first.after,
        "change": first.change,
        "verdict": verdict(report),
    }


def _table(report: Report) -> View | None:
    if not report.metrics:
        return None
    titles = columns(report)
    cells = [row[: len(titles)] for row in rows(report)]
    return {"columns": titles, "rows": cells, "sets": sets(report)}


def _pairs(pairs: Pairs | None) -> list[View]:
    """Return the images before and after, with the teacher's sample or None."""
    if pairs is None:
        return []
    views: list[View] = []
    for index, seed in enumerate(pairs.seeds):
        label = "" if pairs.labels is None else f"class {pairs.labels[index]}, "
        teacher = None if pairs.teacher is None else data_address(pairs.teacher[index])
        views.append(
            {
                "before": data_address(pairs.before[index]),
                "after": data_address(pairs.after[index]),
                "teacher": teacher,
                "caption": f"{label}seed {seed}",
            }
        )
    return views


def _neighbors(neighbors: Neighbors | None) -> list[View]:
    if neighbors is None:
        return []
    return [
        {"seed": seed, "generated": data_address(generated), "real": data_address(real)}
        for seed, generated, real in zip(*neighbors, strict=True)
    ]


def _curve(report: Report) -> View | None:
    """Return the metric while training; None without two points."""
    if len(report.curve.points) < 2:
        return None
    name, of = curve_title(report)
    return {
        "title": name,
        "drawing": report_drawing(report),
        "caption": _caption(name + of, report.curve.metric),
    }


def _curves(compared: Comparison) -> list[View]:
    """Return a drawing for each metric that was measured while training, with all its runs."""
    drawn: dict[str, list[Run]] = {}
    for run in compared.runs:
        if len(run.report.curve.points) > 1:
            drawn.setdefault(run.report.curve.metric, []).append(run)
    return [_curve_of_runs(metric, runs) for metric, runs in drawn.items()]


def _curve_of_runs(metric: str, runs: Sequence[Run]) -> View:
    # name the number of images only if all runs share it
    label = metrics()[metric].label
    counts = {run.report.curve.images for run in runs}
    common = next(iter(counts)) if len(counts) == 1 else None
    of = "" if common is None else f" of {common:,} images"
    apart = " Each is of another number of images." if len(counts) > 1 else ""

    # no levels: each run has its own
    series = [Series(run.name, shown_points(run.report)) for run in runs]
    return {
        "title": label,
        "drawing": curve_drawing(series, {}),
        "caption": _caption(label + of, metric) + apart,
    }


def _caption(name: str, metric: str) -> str:
    better = metrics()[metric].better
    return f"{name}, over thousands of images seen; {better} is better."
