"""report.html: one file that opens from disk and asks nobody for anything.

Pictures are in it as data, the curve is drawn as SVG in the page's own colours, so that it reads in
light, in dark and on paper. Without scripts all of it shows, at the middle of the slider.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape

from PIL import Image
from torch import Tensor

from eval.display import metric_title
from eval.metrics.registry import metrics
from eval.samples import Neighbors, Pairs
from reports._drawing import Series, drawing
from reports._html import coded, document, notes
from reports._warnings import warnings
from reports.data import Report
from reports.text import columns, facts, levels, remarks, rows, sets, shown_points, verdict

_LARGEST = 256
"""Pixels of an image's longer side in the page; larger ones are shrunk."""


def page(report: Report, pairs: Pairs | None, neighbours: Neighbors | None) -> str:
    """Return the page as HTML."""
    sections = [
        _headline(report),
        notes(warnings(report)),
        _table(report),
        _pairs(pairs),
        _remarks(report, neighbours),
        _curve(report),
        _facts(report),
        _recipe(report),
    ]
    return document(report.name, sections, title=f"{report.name}: before and after")


def _headline(report: Report) -> str:
    """Return the first metric in large letters, and whether its change is more than chance."""
    if not report.metrics:
        return '<p class="verdict">Nothing was measured.</p>'
    _, before, after, change, _ = rows(report)[0]
    metric = metric_title(report.metrics[0], report.extractor)
    return (
        f'<section class="headline"><p class="metric">{escape(metric)}</p>'
        f'<p class="numbers"><span>{before}</span><span class="arrow">→</span>'
        f'<strong>{after}</strong><span class="chip">{change}</span></p>'
        f'<p class="verdict">{escape(verdict(report))}</p></section>'
    )


def _table(report: Report) -> str:
    if not report.metrics:
        return ""
    titles = columns(report)
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = "".join(
        f"<tr><th>{escape(row.metric)}</th>"
        + "".join(f"<td>{cell}</td>" for cell in row[1 : len(titles)])
        + "</tr>"
        for row in rows(report)
    )
    return (
        f"<section><h2>What was measured</h2><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
        f"<p>{escape(sets(report))}</p></section>"
    )


def _pairs(pairs: Pairs | None) -> str:
    """Return the images, after over before, cut where the slider says."""
    if pairs is None:
        return ""
    figures = []
    for index, seed in enumerate(pairs.seeds):
        label = "" if pairs.labels is None else f"class {pairs.labels[index]}, "
        teacher = ""
        if pairs.teacher is not None:
            teacher = f'<img class="teacher" src="{_data(pairs.teacher[index])}" alt="teacher">'
        figures.append(
            f'<figure><div class="pair"><img src="{_data(pairs.before[index])}" alt="before">'
            f'<img class="after" src="{_data(pairs.after[index])}" alt="after"></div>{teacher}'
            f"<figcaption>{label}seed {seed}</figcaption></figure>"
        )
    below = "" if pairs.teacher is None else " Below: the teacher's own sample of the same noise."
    return (
        "<section><h2>The same latents, before and after</h2>"
        '<p class="slide"><label for="cut">before</label>'
        '<input id="cut" type="range" min="0" max="100" value="50" '
        'aria-label="how much of each image is before">'
        '<label for="cut">after</label></p>'
        f'<div class="pairs">{"".join(figures)}</div>'
        f"<p>Left of the cut is before, right of it after.{below}</p></section>"
    )


def _remarks(report: Report, neighbours: Neighbors | None) -> str:
    """Return what became of single images, with those that come nearest to real ones."""
    parts = [
        f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p></section>"
        for title, text in remarks(report).items()
    ]
    if neighbours is not None:
        figures = "".join(
            f'<figure><div class="beside"><img src="{_data(generated)}" alt="generated">'
            f'<img src="{_data(real)}" alt="real"></div>'
            f"<figcaption>seed {seed}</figcaption></figure>"
            for seed, generated, real in zip(*neighbours, strict=True)
        )
        parts.append(
            f'<section><div class="pairs">{figures}</div><p>The images after that come nearest to '
            "a real image: left generated, right the real one.</p></section>"
        )
    return "\n".join(parts)


def _data(image: Tensor) -> str:
    """Return uint8 [C, H, W] as the address of a PNG that is in the page."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LARGEST, _LARGEST))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _curve(report: Report) -> str:
    """Return the metric over images seen, with what it can be compared with as lines."""
    points, curve = shown_points(report), report.curve
    if len(points) < 2:
        return ""
    title = metric_title(curve.metric, report.extractor)
    drawn = drawing([Series(title, points)], levels(report))
    better = metrics()[curve.metric].better
    of = f" of {curve.images:,} images" if curve.images else ""
    return (
        f"<section><h2>{escape(title)} while training</h2>{drawn}"
        f"<p>{escape(title)}{of}, over thousands of images seen; {better} is better.</p></section>"
    )


def _facts(report: Report) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{coded(value)}</td></tr>"
        for name, value in facts(report).items()
    )
    return f'<section><h2>On what, by what</h2><table class="facts">{lines}</table></section>'


def _recipe(report: Report) -> str:
    text = escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))
    return (
        f"<section><h2>Recipe</h2><details><summary>every setting</summary><pre>{text}</pre>"
        "</details></section>"
    )
