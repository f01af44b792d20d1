"""A report as files: report.json, report.md, report.html and the pictures; several as one page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from core.disk import atomic_write
from eval.metrics.registry import metrics
from eval.samples import Neighbors, Pairs
from reports import _views
from reports._warnings import warnings
from reports.compare import STRIP, Comparison
from reports.data import Report, to_json
from reports.figures import curve_picture, pairs_picture, strip_picture
from reports.text import columns, facts, headline, remarks, rows, sets


def write(
    folder: str | Path,
    report: Report,
    pairs: Pairs | None = None,
    neighbors: Neighbors | None = None,
) -> Path:
    """Write report.json, report.md, report.html and the pictures; return the path of report.html.

    pairs: None leaves the pictures of an earlier report in report.md, and out of report.html.
    neighbours: pictures of `report.nearness`, if the real images are available.
    """
    folder = Path(folder)
    if pairs is not None:
        _write(folder / "report.png", pairs_picture(pairs))
        _write(folder / STRIP, strip_picture(pairs.before, pairs.after))
    has_curve = len(report.curve.points) > 1
    if has_curve:
        _write(folder / "curve.png", _curve_png(report))
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    _write(folder / "report.json", text.encode())
    names = ("report.png", "curve.png") if has_curve else ("report.png",)
    pictures = [name for name in names if (folder / name).exists()]
    _write(folder / "report.md", markdown(report, pictures=pictures).encode())
    view = _views.report_view(report, pairs, neighbors)
    _write(folder / "report.html", _page("report.html", view))
    return folder / "report.html"


def write_comparison(path: str | Path, compared: Comparison) -> None:
    """Write the page that compares runs."""
    _write(Path(path), _page("comparison.html", _views.comparison_view(compared)))


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


@cache
def _templates() -> Environment:
    """Return the templates of pages: all text is escaped, an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"coded": _coded, "breakable": _breakable}
    return environment


def _page(template: str, view: Mapping[str, object]) -> bytes:
    """Return a page: one file with its style, script and pictures, which makes no request."""
    return _templates().get_template(template).render(view).encode()


def _coded(text: str) -> Markup:
    """Return text as HTML, with code between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _breakable(name: str) -> Markup:
    """Return a name as HTML with line breaks allowed between its parts."""
    return Markup(re.sub(r"([./_-])", r"\1<wbr>", str(escape(name))))


def _curve_png(report: Report) -> bytes:
    title, of = _views.curve_title(report)
    return curve_picture(_views.report_drawing(report), title=title + of)


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
