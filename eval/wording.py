"""A report in words: headline, table, warnings, and what was measured on what."""

from __future__ import annotations

from eval.metrics import MetricResult
from eval.report import ExtractorName, File, Report


def headline(report: Report) -> str:
    """Return the result in one line, such as "FID 24.1 ± 0.2 → 15.3 ± 0.1 (-36 %)"."""
    lines = [
        f"{metric_title(name, report.extractor)} {_shown(report.before[name])} → "
        f"{_shown(after)} ({_change(report.before[name], after)})"
        for name, after in report.after.items()
    ]
    return "; ".join(lines) or "nothing was measured"


def summary(report: Report) -> str:
    """Return a small before/after table for the terminal."""
    table = [("", "before", "after", "change"), *rows(report)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
        for row in table
    ]
    teacher = [f"the teacher's own samples: {_score(report)}"] if report.teacher_samples else []
    return "\n".join([*lines, *teacher, *(f"! {warning}" for warning in warnings(report))])


def verdict(report: Report) -> str:
    """Return whether the first metric changed by more than chance, in a sentence."""
    name, after = next(iter(report.after.items()))
    before = report.before[name]
    if len(after.values) < 2:
        return "One set of images: whether the change is more than chance is not known."
    spread, moved = before.std + after.std, abs(after.mean - before.mean)
    than = "more" if moved > spread else "no more"
    return (
        f"A change of {_number(moved)}, {than} than the spread between sets of images "
        f"({_number(spread)})."
    )


def sets(report: Report) -> str:
    """Return on how many images the metrics are, in a sentence."""
    count = len(report.seeds)
    if count == 1:
        return f"One set of {report.images:,} images; before and after on the same seeds."
    return (
        f"Mean ± standard deviation over {count} sets of {report.images:,} images; "
        "before and after on the same seeds."
    )


def warnings(report: Report) -> list[str]:
    """Return what a reader must know before believing the numbers, one sentence each."""
    found = []
    if report.extractor is None:
        found.append("The recipe names no reference (evaluation.reference): nothing was measured.")
    elif report.extractor.name != "inception":
        found.append(
            f"Distances are between features of `{report.extractor.name}`, not Inception: "
            "not comparable with published (Inception) FIDs."
        )
    for name, after in report.after.items():
        found += _spread_warning(metric_title(name, report.extractor), report.before[name], after)
    if report.teacher_samples and report.teacher_samples.fid > report.before["fid"].mean:
        found.append(
            f"The teacher's own samples ({_score(report)}) are worse than the student was before: "
            "there is little to learn from it."
        )
    if report.teacher_sees:
        found.append(
            f"The teacher saw the student's images shrunk to {report.teacher_sees}: it can improve "
            "what is still visible there, such as shapes and colours, and says nothing of finer "
            "detail."
        )
    if report.after and report.images < 10_000:
        found.append(
            f"Each value is of {report.images:,} images: a Fréchet distance of so few is too high; "
            "compare it only with values of as many."
        )
    if report.environment.git_dirty:
        found.append("The checkout had changes that are in no commit.")
    return found


def metric_title(metric: str, extractor: ExtractorName | None) -> str:
    """Return a metric's name for a reader, with the extractor's where it is not the usual one."""
    title = metric.upper() if len(metric) <= 3 else metric.replace("_", " ")
    usual = extractor is None or extractor.name == "inception"
    return title if usual else f"{title} ({extractor.name} features)"


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return metric, before, after and change, a line each."""
    return [
        (
            metric_title(name, report.extractor),
            _shown(report.before[name]),
            _shown(after),
            _change(report.before[name], after),
        )
        for name, after in report.after.items()
    ]


def _spread_warning(title: str, before: MetricResult, after: MetricResult) -> list[str]:
    if len(after.values) < 2:
        return [f"{title} was measured on one set of images: its spread is not known."]
    spread = before.std + after.std
    if abs(after.mean - before.mean) < spread:
        return [
            f"{title} changed by {_number(abs(after.mean - before.mean))}, "
            f"less than the spread over seeds ({_number(spread)}): no change was shown."
        ]
    return []


def facts(report: Report) -> dict[str, str]:
    """Return what was measured on what, by what: a name and some words each."""
    environment, reference = report.environment, report.reference
    compared = "nothing"
    if reference is not None:
        count = "an unknown number of" if reference.images is None else f"{reference.images:,}"
        compared = f"{count} images of `{reference.name}` ({_short(reference.sha256)})"
    dirty = ", with changes" if environment.git_dirty else ""
    return {
        "features": _named(report.extractor),
        "compared with": compared,
        "seeds": ", ".join(f"{start} to {stop - 1}" for start, stop in report.seeds) or "none",
        "truncation, noise": f"{report.truncation:g}, {report.noise_mode}",
        "student": _file(report.student),
        "teacher": _file(report.teacher),
        "teacher's own samples": _score(report),
        "images seen in training": f"{report.images_seen:,}",
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


def _score(report: Report) -> str:
    """Return what the teacher's own samples are worth, in words."""
    score = report.teacher_samples
    if score is None:
        return "not measured"
    count = "an unknown number of" if score.images is None else f"{score.images:,}"
    return f"{metric_title('fid', report.extractor)} {_number(score.fid)} of {count} images"


def _shown(result: MetricResult) -> str:
    """Return "24.1 ± 0.2": one decimal, or two where the mean or its spread is small."""
    if len(result.values) < 2:
        return _number(result.mean)
    decimals = 1 if result.mean >= 10 and result.std >= 0.1 else 2
    return f"{result.mean:.{decimals}f} ± {result.std:.{decimals}f}"


def _change(before: MetricResult, after: MetricResult) -> str:
    return f"{after.mean / before.mean - 1:+.0%}".replace("%", " %") if before.mean else "n/a"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _named(extractor: ExtractorName | None) -> str:
    return f"`{extractor.name}` ({_short(extractor.sha256)})" if extractor else "none"


def _short(sha256: str | None) -> str:
    return f"sha256 {sha256[:12]}" if sha256 else "hash unknown"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
