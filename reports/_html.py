"""What pages are made of: one file that opens from disk and asks nobody for anything, readable in
light, in dark, on a phone and on paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def document(heading: str, sections: Iterable[str], *, title: str) -> str:
    """Return a page of its sections, as HTML, without those that are empty."""
    page = _PAGE.replace("{style}", _STYLE).replace("{title}", escape(title))
    body = "\n".join(filter(None, sections))
    return page.replace("{heading}", escape(heading)).replace("{body}", body)


def notes(sentences: Sequence[str]) -> str:
    """Return what a reader must know, as a section; empty where there is nothing."""
    if not sentences:
        return ""
    items = "".join(f"<li>{coded(sentence)}</li>" for sentence in sentences)
    return f'<section><h2>Before you believe it</h2><ul class="notes">{items}</ul></section>'


def coded(text: str) -> str:
    """Return text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #57606a; --paper: #fff; --line: #d8dee4;
  --blue: #1f6feb; --green: #2d8a4e; --note: #fff8e5; --cut: 50%; --c1: #c2410c; --c2: #7c3aed;
  --c3: #0f766e; --c4: #be185d; --c5: #a16207; --c6: #475569; --c7: #4d7c0f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa4af; --paper: #0d1117;
  --line: #30363d; --blue: #58a6ff; --green: #56d364; --note: #272115; --c1: #fb923c; --c2: #b794f6;
  --c3: #2dd4bf; --c4: #f472b6; --c5: #facc15; --c6: #94a3b8; --c7: #a3e635 } }
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
  clip-path: inset(0 0 0 var(--cut)) }
.pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 1px;
  background: var(--blue) }
.beside { display: flex; gap: 3px; line-height: 0 }
.beside img { width: 50%; image-rendering: pixelated; border-radius: 4px }
.wide { overflow-x: auto }
.teacher { margin-top: 4px; display: block; outline: 2px solid var(--green); outline-offset: -2px }
svg { width: 100%; height: auto }
svg .grid { stroke: var(--line) } svg .level { stroke: var(--green); stroke-dasharray: 5 4 }
svg text { font-size: 12px; fill: var(--quiet) } svg .name { fill: var(--green) }
svg polyline { fill: none; stroke: var(--ink); stroke-width: 2.2 }
svg circle { fill: var(--ink) }
svg .c0 { --ink: var(--blue) } svg .c1 { --ink: var(--c1); stroke-dasharray: 9 3 }
svg .c2 { --ink: var(--c2); stroke-dasharray: 3 3 }
svg .c3 { --ink: var(--c3); stroke-dasharray: 12 3 3 3 }
svg .c4 { --ink: var(--c4) } svg .c5 { --ink: var(--c5); stroke-dasharray: 9 3 }
svg .c6 { --ink: var(--c6); stroke-dasharray: 3 3 }
svg .c7 { --ink: var(--c7); stroke-dasharray: 12 3 3 3 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; padding: 0;
  font-size: .86rem; color: var(--quiet) }
.legend svg { width: 28px; height: 10px; margin-right: 7px }
table.runs tbody th { font-weight: 500; white-space: normal; min-width: 8rem }
table.runs .group th { padding-top: 16px; color: var(--quiet); font-weight: 500 }
a { color: var(--blue) }
@media (max-width: 600px) { svg { overflow: visible } svg text { font-size: 17px } }
@media print { body { max-width: none } .slide { display: none } pre { white-space: pre-wrap } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
<script>
const cut = document.getElementById("cut");
if (cut) cut.addEventListener("input", () =>
  document.documentElement.style.setProperty("--cut", cut.value + "%"));
</script>
</body>
</html>
"""
