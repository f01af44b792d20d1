"""A report as files: report.json, report.md, report.html and the pictures."""

from __future__ import annotations

import json
from pathlib import Path

from core.run_folder import atomic_write
from eval import _page
from eval.pictures import curve_picture, pairs_picture
from eval.report import Report, to_json
from eval.samples import Pairs
from eval.wording import facts, headline, metric_title, rows, sets, warnings


def write(folder: str | Path, report: Report, pairs: Pairs | None = None) -> Path:
    """Write report.json, report.md, report.html and the pictures; return the path of report.html.

    pairs: None leaves the pictures of an earlier report in report.md, and out of report.html.
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
    _write(folder / "report.html", _page.page(report, pairs).encode())
    return folder / "report.html"


def markdown(report: Report, *, pictures: list[str]) -> str:
    """Return report.md; pictures: file names beside it."""
    captions = {
        "report.png": "Pairs from the same latents, before above after",
        "curve.png": "Distance to real images while training",
    }
    parts = [f"# {report.name}", f"**{headline(report)}**", _markdown_table(report)]
    parts += ["\n".join(f"> **Note.** {warning}  " for warning in warnings(report))]
    parts += [f"![{captions[name]}]({name})\n\n*{captions[name]}.*" for name in pictures]
    parts += ["## What was measured", _markdown_facts(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _curve_png(report: Report) -> bytes:
    curve = report.curve
    metric = metric_title("fid", report.extractor)
    return curve_picture(
        curve.points,
        metric=metric,
        title=f"{metric} of {curve.images:,} images" if curve.images else metric,
        levels={
            "teacher": report.teacher_samples and report.teacher_samples.fid,
            "real images": curve.floor_fid,
        },
    )


def _markdown_table(report: Report) -> str:
    lines = ["| metric | before | after | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(report)]
    return "\n".join(lines) + f"\n\n{sets(report)}" if report.after else ""


def _markdown_facts(report: Report) -> str:
    lines = [f"| {name} | {value} |" for name, value in facts(report).items()]
    return "\n".join(["| | |", "|---|---|", *lines])
