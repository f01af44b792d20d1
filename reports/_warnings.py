"""What a reader of a report must know before believing its numbers."""

from __future__ import annotations

from eval.display import metric_title, number, shown
from eval.measuring import METRICS
from eval.metrics import MetricResult
from reports.data import Report

_FEW_IMAGES = 10_000
"""Fewer make a Fréchet distance that is compared with nothing else."""


def warnings(report: Report) -> list[str]:
    """Return what a reader must know before believing the numbers, one sentence each."""
    found = list(report.notes)
    if report.extractor is None:
        found.append("The recipe names no reference (evaluation.reference): nothing was measured.")
    else:
        found += _features_warning(report)
    for name in report.metrics:
        title = metric_title(name, report.extractor)
        found += _spread_warning(name, title, report.before[name], report.after[name])
    found += _teacher_warnings(report) + _mode_loss_warning(report)
    if report.metrics and report.images < _FEW_IMAGES:
        found.append(
            f"Each value is of {report.images:,} images: a Fréchet distance of so few is too high; "
            "compare it only with values of as many."
        )
    if report.environment.git_dirty:
        found.append("The checkout had changes that are in no commit.")
    return found


def _features_warning(report: Report) -> list[str]:
    assert report.extractor is not None
    name = report.extractor.name
    others = [m for m in report.metrics if METRICS[m].published_features not in (name, "lpips")]
    if not others:
        return []
    titles = _listed([METRICS[metric].label for metric in others])
    usual = _listed([METRICS[metric].published_features for metric in others])
    return [
        f"{titles} of features of `{name}`, not of {usual}: not comparable with published values."
    ]


def _teacher_warnings(report: Report) -> list[str]:
    found = []
    name = next(iter(report.metrics), "")
    teacher = report.teacher_samples.metrics.get(name) if report.teacher_samples else None
    if teacher is not None and _is_better(name, report.before[name].mean, than=teacher):
        found.append(
            f"The teacher's own samples ({METRICS[name].label} {number(name, teacher)}) are worse "
            "than the student was before: there is little to learn from it."
        )
    if report.teacher_sees:
        found.append(
            f"The teacher saw the student's images shrunk to {report.teacher_sees}: it can improve "
            "what is still visible there, such as shapes and colours, and says nothing of finer "
            "detail."
        )
    return found


def _mode_loss_warning(report: Report) -> list[str]:
    """Return a warning where images became better and fewer kinds of them are left."""
    if not {"fid", "recall"} <= set(report.metrics):
        return []
    before, after = report.before["recall"], report.after["recall"]
    fell = before.mean - after.mean > before.std + after.std
    if not fell or report.after["fid"].mean >= report.before["fid"].mean:
        return []
    return [
        f"Recall fell from {shown('recall', before)} to {shown('recall', after)} % while FID "
        "improved: some kinds of images are made no more (mode loss)."
    ]


def _is_better(metric: str, value: float, *, than: float) -> bool:
    return value < than if METRICS[metric].better == "lower" else value > than


def _spread_warning(
    metric: str, title: str, before: MetricResult, after: MetricResult
) -> list[str]:
    if len(after.values) < 2:
        return [f"{title} was measured on one set of images: its spread is not known."]
    spread = before.std + after.std
    if abs(after.mean - before.mean) < spread:
        return [
            f"{title} changed by {number(metric, abs(after.mean - before.mean))}, "
            f"less than the spread over seeds ({number(metric, spread)}): no change was shown."
        ]
    return []


def _listed(names: list[str]) -> str:
    """Return "a, b and c"; what comes twice is named once."""
    *most, last = dict.fromkeys(names)
    return f"{', '.join(most)} and {last}" if most else last
