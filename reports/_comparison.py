"""The page that compares runs: one file that opens from disk, in the look of report.html."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from urllib.parse import quote

from eval.metrics.registry import metrics
from reports._drawing import Series, drawing, legend
from reports._html import coded, document, notes
from reports.compare import COLUMNS, Comparison, Run, lines, title
from reports.text import shown_points


def page(compared: Comparison) -> str:
    """Return the page as HTML."""
    heading = f"{len(compared.runs)} runs compared"
    sections = [
        notes(compared.warnings),
        _table(compared),
        *_curves(compared),
        _differences("What differs in the recipes", compared.settings, compared.runs),
        _differences("What else differs", compared.facts, compared.runs),
    ]
    return document(heading, sections, title=heading)


def _table(compared: Comparison) -> str:
    """Return the runs by the metrics, a group of rows for each metric."""
    if not compared.metrics:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("run", *COLUMNS))
    groups = "".join(_group(compared, metric) for metric in compared.metrics)
    return (
        "<section><h2>What was measured</h2><div class=wide><table class=runs><thead><tr>"
        f"{head}</tr></thead>{groups}</table></div><p>↓ lower is better, ↑ higher; the best after "
        "is bold where the runs are comparable. A run's name leads to its own report.</p></section>"
    )


def _group(compared: Comparison, metric: str) -> str:
    rows = []
    for line in lines(compared, metric):
        before, after, *others = (escape(cell) for cell in line.cells)
        after = f"<strong>{after}</strong>" if line.is_best else after
        cells = "".join(f"<td>{cell}</td>" for cell in (before, after, *others))
        rows.append(f"<tr><th>{_linked(line.run)}</th>{cells}</tr>")
    width = len(COLUMNS) + 1
    head = f'<tr class="group"><th colspan="{width}">{escape(title(metric))}</th></tr>'
    return f"<tbody>{head}{''.join(rows)}</tbody>"


def _linked(run: Run) -> str:
    name = _breakable(run.name)
    return name if run.link is None else f'<a href="{escape(quote(run.link))}">{name}</a>'


def _curves(compared: Comparison) -> Iterator[str]:
    """Yield a drawing for each metric that was measured while training, all its runs in it."""
    drawn: dict[str, list[Series]] = {}
    for run in compared.runs:
        if len(run.report.curve.points) > 1:
            series = Series(run.name, shown_points(run.report))
            drawn.setdefault(run.report.curve.metric, []).append(series)
    for metric, series in drawn.items():
        about = metrics()[metric]
        counts = {
            run.report.curve.images
            for run in compared.runs
            if run.report.curve.metric == metric and len(run.report.curve.points) > 1
        }
        of = f" of {counts.pop():,} images" if len(counts) == 1 and None not in counts else ""
        apart = " Each is of another number of images." if len(counts) > 1 else ""
        yield (
            f"<section><h2>{about.label} while training</h2>{drawing(series, {})}{legend(series)}"
            f"<p>{about.label}{of}, over thousands of images seen; {about.better} is better."
            f"{apart}</p></section>"
        )


def _differences(heading: str, found: Mapping[str, tuple[str, ...]], runs: tuple[Run, ...]) -> str:
    """Return what differs, a row each, a column for each run."""
    if not found:
        return ""
    head = "".join(f"<th>{_breakable(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{_breakable(key)}</th>"
        + "".join(f"<td>{coded(text)}</td>" for text in values)
        + "</tr>"
        for key, values in found.items()
    )
    return (
        f'<section><h2>{heading}</h2><div class=wide><table class="facts"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _breakable(name: str) -> str:
    """Return a name as HTML that may go on in the next line between its parts."""
    return re.sub(r"([./_-])", r"\1<wbr>", escape(name))
