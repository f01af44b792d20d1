"""A report as files: report.json, report.md, report.html and the pictures; several as one page."""

from __future__ import annotations

import json
from pathlib import Path

from core.disk import atomic_write
from eval.display import metric_title
from eval.metrics.registry import metrics
from eval.samples import Neighbors, Pairs
from reports import _comparison, _page
from reports._warnings import warnings
from reports.compare import Comparison
from reports.data import Report, to_json
from reports.figures import curve_picture, pairs_picture
from reports.text import columns, facts, headline, levels, remarks, rows, sets, shown_points


def write(
    folder: str | Path,
    report: Report,
    pairs: Pairs | None = None,
    neighbours: Neighbors | None = None,
) -> Path:
    """Write report.json, report.md, report.html and the pictures; return the path of report.html.

    pairs: None leaves the pictures of an earlier report in report.md, and out of report.html.
    neighbours: pictures of `report.nearness`, where the real images are at hand.
    """
    folder = Path(folder)
    if pairs is not None:
        _write(folder / "report.png", pairs_picture(pairs))
    if len(report.curve.points) > 1:
        _write(folder / "curve.png", _curve_png(report))
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    _write(folder / "report.json", text.encode())
    pictures = [name for name in ("report.png", "curve.png") if (folder / name).exists()]
    _write(folder / "report.md", markdown(report, pictures=pictures).encode())
    _write(folder / "report.html", _page.page(report, pairs, neighbours).encode())
    return folder / "report.html"


def write_comparison(path: str | Path, compared: Comparison) -> None:
    """Write the page that compares runs."""
    _write(Path(path), _comparison.page(compared).encode())


def markdown(report: Report, *, pictures: list[str]) -> str:
    """Return report.md; pictures: file names beside it."""
    captions = {
        "report.png": "Pairs from the same latents, before above after",
        "curve.png": f"{_curve_label(report)} while training",
    }
    parts = [f"# {report.name}", f"**{headline(report)}**", _markdown_table(report)]
    parts += ["\n".join(f"> **Note.** {warning}  " for warning in warnings(report))]
    parts += [f"![{captions[name]}]({name})\n\n*{captions[name]}.*" for name in pictures]
    parts += [f"**{title}.** {text}" for title, text in remarks(report).items()]
    parts += ["## What was measured", _markdown_facts(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _curve_png(report: Report) -> bytes:
    curve = report.curve
    metric = metric_title(curve.metric, report.extractor)
    return curve_picture(
        shown_points(report),
        metric=metric,
        title=f"{metric} of {curve.images:,} images" if curve.images else metric,
        levels=levels(report),
    )


def _markdown_table(report: Report) -> str:
    if not report.metrics:
        return ""
    titles = columns(report)
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += [f"| {' | '.join(row[: len(titles)])} |" for row in rows(report)]
    return "\n".join(lines) + f"\n\n{sets(report)}"


def _markdown_facts(report: Report) -> str:
    lines = [f"| {name} | {value} |" for name, value in facts(report).items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _curve_label(report: Report) -> str:
    """Return the label of the curve's metric; empty without a curve."""
    return metrics()[report.curve.metric].label if report.curve.points else ""
