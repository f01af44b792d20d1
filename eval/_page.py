"""report.html: one file that opens from disk and asks nobody for anything.

Pictures are in it as data, the curve is drawn as SVG in the page's own colours, so that it reads in
light, in dark and on paper. Without scripts all of it shows, at the middle of the slider.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html import escape

from PIL import Image
from torch import Tensor

from eval._numbers import metric_title
from eval._warnings import warnings
from eval.measuring import METRICS
from eval.report import CurvePoint, Report
from eval.samples import Neighbours, Pairs
from eval.wording import (
    columns,
    facts,
    levels,
    remarks,
    rows,
    sets,
    shown_points,
    verdict,
)

_LARGEST = 256
"""Pixels of an image's longer side in the page; larger ones are shrunk."""
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 122, 18, 40
"""Size and margins of the curve, in units of its drawing."""


def page(report: Report, pairs: Pairs | None, neighbours: Neighbours | None) -> str:
    """Return the page as HTML."""
    sections = [
        _headline(report),
        _notes(warnings(report)),
        _table(report),
        _pairs(pairs),
        _remarks(report, neighbours),
        _curve(report),
        _facts(report),
        _recipe(report),
    ]
    title = escape(report.name)
    body = "\n".join(filter(None, sections))
    return _PAGE.replace("{style}", _STYLE).replace("{title}", title).replace("{body}", body)


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


def _notes(sentences: list[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_coded(sentence)}</li>" for sentence in sentences)
    return f'<section><h2>Before you believe it</h2><ul class="notes">{items}</ul></section>'


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
        'aria-label="how much of each image is after">'
        '<label for="cut">after</label></p>'
        f'<div class="pairs">{"".join(figures)}</div>'
        f"<p>Left of the cut is after, right of it before.{below}</p></section>"
    )


def _remarks(report: Report, neighbours: Neighbours | None) -> str:
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
    metric = escape(metric_title(curve.metric, report.extractor))
    better = METRICS[curve.metric].better
    of = f" of {curve.images:,} images" if curve.images else ""
    return (
        f"<section><h2>{metric} while training</h2>{_drawing(points, levels(report))}"
        f"<p>{metric}{of}, over thousands of images seen; {better} is better.</p></section>"
    )


def _drawing(points: list[CurvePoint], lines: dict[str, float]) -> str:
    seen_ticks = _ticks(max(point.images_seen for point in points))
    value_ticks = _ticks(max([point.value for point in points] + list(lines.values())))
    last, top = seen_ticks[-1], value_ticks[-1]

    def x(images_seen: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * images_seen / last

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
        f'y2="{y(tick):.1f}"/><text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" '
        f'text-anchor="end">{tick:g}</text>'
        for tick in value_ticks
    ]
    parts += [
        f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 20}" '
        f'text-anchor="middle">{tick / 1000:g}</text>'
        for tick in seen_ticks
    ]
    parts += [
        f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" '
        f'y2="{y(value):.1f}"/><text class="name" x="{_WIDTH - _RIGHT + 6}" y="{y(value) + 4:.1f}">'
        f"{escape(name)} {value:.3g}</text>"
        for name, value in lines.items()
    ]
    path = " ".join(f"{x(seen):.1f},{y(value):.1f}" for seen, value in points)
    parts.append(f'<polyline points="{path}"/>')
    parts += [
        f'<circle cx="{x(seen):.1f}" cy="{y(value):.1f}" r="4"><title>{seen:,} images: {value:.4g}'
        "</title></circle>"
        for seen, value in points
    ]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _ticks(largest: float) -> list[float]:
    """Return round numbers from 0 to just above the largest: steps of 1, 2 or 5 times a power."""
    rough = max(largest, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(math.ceil(largest / step) + 1)]


def _facts(report: Report) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{_coded(value)}</td></tr>"
        for name, value in facts(report).items()
    )
    return f'<section><h2>On what, by what</h2><table class="facts">{lines}</table></section>'


def _recipe(report: Report) -> str:
    text = escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))
    return (
        f"<section><h2>Recipe</h2><details><summary>every setting</summary><pre>{text}</pre>"
        "</details></section>"
    )


def _coded(text: str) -> str:
    """Return text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #57606a; --paper: #fff; --line: #d8dee4;
  --blue: #1f6feb; --green: #2d8a4e; --note: #fff8e5; --cut: 50% }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa4af; --paper: #0d1117;
  --line: #30363d; --blue: #58a6ff; --green: #56d364; --note: #272115 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 20px 64px; max-width: 860px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.3rem; margin: 0 0 8px; color: var(--quiet); font-weight: 600 }
h2 { font-size: 1.05rem; margin: 36px 0 10px }
p { margin: 8px 0; color: var(--quiet) }
.headline .metric { margin: 0 }
.numbers { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; margin: 0;
  font-size: clamp(1.6rem, 6vw, 2.6rem); color: var(--quiet) }
.numbers strong { color: var(--ink) }
.chip { font-size: 1.1rem; padding: 2px 10px; border-radius: 999px; border: 1px solid var(--line);
  color: var(--ink) }
.notes { margin: 0; padding: 12px 16px 12px 34px; background: var(--note); border-radius: 8px }
.notes li { margin: 4px 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
thead th { color: var(--quiet); font-weight: 500 }
.wide table { min-width: 30rem }
table:not(.facts) th, table:not(.facts) td { white-space: nowrap }
table:not(.facts) td, table:not(.facts) thead th:not(:first-child) { text-align: right }
.facts th { width: 11rem; font-weight: 500; color: var(--quiet) }
code, pre { font: .86em/1.45 ui-monospace, Menlo, Consolas, monospace }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--line); border-radius: 8px }
.slide { display: flex; align-items: center; gap: 12px; max-width: 420px }
.slide input { flex: 1; accent-color: var(--blue); min-width: 0 }
.pairs { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)) }
figure { margin: 0; break-inside: avoid }
figcaption { font-size: .78rem; color: var(--quiet) }
.pair { position: relative; line-height: 0 }
.pair img, .teacher { width: 100%; image-rendering: pixelated; border-radius: 4px }
.pair .after { position: absolute; inset: 0; height: 100%;
  clip-path: inset(0 calc(100% - var(--cut)) 0 0) }
.pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 1px;
  background: var(--blue) }
.beside { display: flex; gap: 3px; line-height: 0 }
.beside img { width: 50%; image-rendering: pixelated; border-radius: 4px }
.wide { overflow-x: auto }
.teacher { margin-top: 4px; display: block; outline: 2px solid var(--green); outline-offset: -2px }
svg { width: 100%; height: auto }
svg .grid { stroke: var(--line) } svg .level { stroke: var(--green); stroke-dasharray: 5 4 }
svg text { font-size: 12px; fill: var(--quiet) } svg .name { fill: var(--green) }
svg polyline { fill: none; stroke: var(--blue); stroke-width: 2.2 } svg circle { fill: var(--blue) }
@media print { body { max-width: none } .slide { display: none } pre { white-space: pre-wrap } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}: before and after</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>
const cut = document.getElementById("cut");
if (cut) cut.addEventListener("input", () =>
  document.documentElement.style.setProperty("--cut", cut.value + "%"));
</script>
</body>
</html>
"""
