"""A report in words: headline, table, warnings, and provenance."""

from __future__ import annotations

from typing import NamedTuple

from core.downloads import short_sha256
from eval.metrics.display import (
    ARROWS,
    arrow,
    change,
    image_count,
    metric_title,
    number,
    shown,
    unit,
)
from eval.metrics.registry import metrics
from eval.provenance import ExtractorName
from reports._warnings import warnings
from reports.data import CurvePoint, File, Report, SampleScore


class Row(NamedTuple):
    """One metric in a table, as text."""

    metric: str
    before: str
    after: str
    change: str
    teacher: str
    """Of the teacher's own samples; empty if that is not known."""


def rows(report: Report) -> list[Row]:
    """Return a line for each metric."""
    teacher = report.teacher_samples.metrics if report.teacher_samples else {}
    return [
        Row(
            metrics()[name].label + unit(name) + f" {arrow(name)}",
            shown(name, report.before[name]),
            shown(name, report.after[name]),
            change(report.before[name], report.after[name]),
            number(name, teacher[name]) if name in teacher else "",
        )
        for name in report.metrics
    ]


def columns(report: Report) -> tuple[str, ...]:
    """Return the titles of a table of rows; the teacher's column only if there is one."""
    extractor = report.extractor
    first = "metric"
    if extractor is not None and extractor.name != "inception":
        first = f"{extractor.name} features"
    titles = (first, "before", "after", "change")
    return (*titles, "teacher") if report.teacher_samples else titles


def headline(report: Report) -> str:
    """Return the first metric in a line, such as "FID 24.1 ± 0.2 → 15.3 ± 0.1 (-36 %)"."""
    if not report.metrics:
        return "nothing was measured"
    name = report.metrics[0]
    before, after = report.before[name], report.after[name]
    return (
        f"{metric_title(name, report.extractor)} {shown(name, before)} → {shown(name, after)} "
        f"({change(before, after)})"
    )


def summary(report: Report) -> str:
    """Return a small before/after table for the terminal."""
    titles = columns(report)
    table = [titles, *(row[: len(titles)] for row in rows(report))] if report.metrics else []
    widths = [max((len(row[column]) for row in table), default=0) for column in range(len(titles))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
        for row in table
    ]
    return "\n".join([*lines, *(f"! {warning}" for warning in warnings(report))])


def verdict(report: Report) -> str:
    """Return whether the first metric changed by more than chance, in a sentence."""
    name = report.metrics[0]
    before, after = report.before[name], report.after[name]
    if len(after.values) < 2:
        return "One set of images: whether the change is more than chance is not known."
    spread, moved = before.std + after.std, abs(after.mean - before.mean)
    than = "more" if moved > spread else "no more"
    return (
        f"A change of {number(name, moved)}, {than} than the spread between sets of images "
        f"({number(name, spread)})."
    )


def sets(report: Report) -> str:
    """Return on how many images the metrics are, and which way is better, in a sentence or two."""
    count = len(report.seeds)
    seeds = f"before and after on the same seeds. {ARROWS}."
    if count == 1:
        return f"One set of {report.images:,} images; {seeds}"
    return f"Mean ± standard deviation over {count} sets of {report.images:,} images; {seeds}"


def levels(report: Report) -> dict[str, float]:
    """Return the levels that the curve can be compared with, by name, as displayed."""
    if not report.curve.points:
        return {}
    scores = {"teacher": report.teacher_samples, "real images": report.real_halves}
    metric = report.curve.metric
    return {
        name: score.metrics[metric] * metrics()[metric].scale
        for name, score in scores.items()
        if score is not None and metric in score.metrics
    }


def shown_points(report: Report) -> list[CurvePoint]:
    """Return the curve's points with their values as shown."""
    if not report.curve.points:
        return []
    times = metrics()[report.curve.metric].scale
    return [CurvePoint(seen, value * times) for seen, value in report.curve.points]


def remarks(report: Report) -> dict[str, str]:
    """Return remarks on single images: title -> some words."""
    rows = {"What stayed": _kept(report), "Copies": _copies(report)}
    return {title: text for title, text in rows.items() if text}


def _kept(report: Report) -> str:
    """Return the drift of latents' images, in a sentence or two."""
    drift = report.drift
    if drift is None:
        return ""
    if drift.apart == 0:
        return "All latents' images were alike before: there was nothing of theirs to keep."
    return (
        f"From the same latent, an image moved by {drift.moved / drift.apart:.0%} of the distance "
        f"between two latents' images (mean over {drift.images:,} latents, in feature space). "
        f"{drift.recognised:.0%} of the images after are still nearer to their own image before "
        "than to any other latent's."
    ).replace("%", " %")


def _copies(report: Report) -> str:
    """Return whether generated images are copies of real ones, in a sentence or two."""
    near = report.nearness
    if near is None:
        return ""
    times = near.generated_distance / near.real_distance if near.real_distance else float("inf")
    return (
        f"Of {near.images:,} images after, {near.suspicious:.1%} are as near to a real image as "
        "only the nearest 1% of real images are to another real one: about 1% where nothing is "
        f"copied. Half of them have one of {near.real_images:,} real images within {times:.2f} "
        "times the median distance from a real image to the nearest other one."
    ).replace("%", " %")


def facts(report: Report) -> dict[str, str]:
    """Return the provenance of the metrics: name -> some words."""
    environment, reference = report.environment, report.reference
    compared = "nothing"
    if reference is not None:
        compared = (
            f"{image_count(reference.images)} of `{reference.name}` ({_short(reference.sha256)})"
        )
    dirty = ", with changes" if environment.git_dirty else ""
    return {
        "features": _named(report.extractor),
        "compared with": compared,
        "seeds": ", ".join(f"{start} to {stop - 1}" for start, stop in report.seeds) or "none",
        "truncation, noise": f"{report.truncation:g}, {report.noise_mode}",
        "student": _file(report.student),
        "teacher": _file(report.teacher),
        "teacher's own samples": _score(report.teacher_samples),
        **({"teacher's sampler": report.sampler} if report.sampler else {}),
        "half of the real images against the other": _score(report.real_halves),
        "images seen in training": f"{report.images_seen:,}{_speed(report)}",
        "started, finished": f"{report.started_at}, {report.finished_at}",
        "time": ", ".join(f"{k} {_duration(v)}" for k, v in report.durations_seconds.items())
        or "unknown",
        "kernels": report.kernel_backend,
        "hardware": environment.hardware,
        "versions": ", ".join(f"{k} {v}" for k, v in environment.versions.items()),
        "commit": f"{(environment.git_commit or 'unknown')[:12]}{dirty}",
    }


def _file(file: File) -> str:
    return f"`{file.path}` ({_short(file.sha256)})" if file.sha256 else file.path


def _score(score: SampleScore | None) -> str:
    """Return the metrics of images that no student made, in words."""
    if score is None or not score.metrics:
        return "not measured"
    values = ", ".join(
        f"{metrics()[name].label} {number(name, value)}{unit(name).replace(',', '')}"
        for name, value in score.metrics.items()
    )
    return f"{values} of {image_count(score.images)}"


def _speed(report: Report) -> str:
    seconds = report.durations_seconds.get("training", 0.0)
    images = report.images_seen if report.timed_images is None else report.timed_images
    return f", {images / seconds:.3g} images per second of training" if seconds else ""


def _named(extractor: ExtractorName | None) -> str:
    return f"`{extractor.name}` ({_short(extractor.sha256)})" if extractor else "none"


def _short(sha256: str | None) -> str:
    return f"sha256 {short_sha256(sha256)}" if sha256 else "hash unknown"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
