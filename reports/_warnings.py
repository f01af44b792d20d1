"""Warnings of a report."""

from __future__ import annotations

from eval.metrics.display import has_published_features, metric_title, number, shown
from eval.metrics.registry import MetricResult, metrics
from reports.data import Report

_FEW_IMAGES = 10_000
"""Fewer make a Fréchet distance that is compared with nothing else."""
_SMALL_CHANGE = 0.02
"""A relative change that shows nothing, whatever the spread over seeds."""


def warnings(report: Report) -> list[str]:
    """Return the warnings of a report, one sentence each."""
    sentences = [*_worse_warning(report), *_exported_note(report), *report.notes]
    if report.extractor is None:
        sentences.append(
            "The recipe names no reference (evaluation.reference): nothing was measured."
        )
    else:
        sentences += _features_warning(report)
    for name in report.metrics:
        title = metric_title(name, report.extractor)
        sentences += _spread_warning(name, title, report.before[name], report.after[name])
    sentences += _teacher_warnings(report) + _mode_loss_warning(report)
    if report.metrics and report.images < _FEW_IMAGES:
        sentences.append(
            f"Each value is of {report.images:,} images: a Fréchet distance of so few is too high; "
            "compare it only with values of as many."
        )
    if report.environment.git_dirty:
        sentences.append("The checkout had changes that are in no commit.")
    return sentences


def _worse_warning(report: Report) -> list[str]:
    """Return a warning if the headline metric got worse by more than its spread."""
    name = next(iter(report.metrics), None)
    if name is None:
        return []
    about, before, after = metrics()[name], report.before[name], report.after[name]
    is_worse = about.is_better(before.mean, than=after.mean)
    noise = max(before.std + after.std, _SMALL_CHANGE * before.mean)
    if not is_worse or abs(after.mean - before.mean) <= noise:
        return []
    went = "rose" if after.mean > before.mean else "fell"
    return [
        f"{about.label} {went} from {shown(name, before)} to {shown(name, after)}: the run made "
        "the student worse, so keep the original. What to try: a smaller training.student_lr; a "
        "score network that follows better (a longer objective.head_start_kimg, a larger "
        "training.score_lr); a larger training.batch_size; or a teacher that is further ahead."
    ]


def _exported_note(report: Report) -> list[str]:
    """Return a sentence on refined weights that are not the last ones, with the metrics of both."""
    name = next(iter(report.metrics), None)
    if name is None or not report.last or report.exported_images_seen is None:
        return []
    label, best, last = metrics()[name].label, report.after[name], report.last[name]
    return [
        f"The refined weights are those after {report.exported_images_seen:,} images, the best "
        f"that were measured while training: {label} {shown(name, best)}. The last ones, after "
        f"{report.images_seen:,} images, have {label} {shown(name, last)}: "
        "`python refine.py --export RUN --at last` writes them."
    ]


def _features_warning(report: Report) -> list[str]:
    assert report.extractor is not None
    name = report.extractor.name
    others = [m for m in report.metrics if not has_published_features(m, name)]
    if not others:
        return []
    titles = _listed([metrics()[metric].label for metric in others])
    usual = _listed([metrics()[metric].published_features for metric in others])
    return [
        f"{titles} of features of `{name}`, not of {usual}: not comparable with published values."
    ]


def _teacher_warnings(report: Report) -> list[str]:
    warnings = []
    name = next(iter(report.metrics), "")
    teacher = report.teacher_samples.metrics.get(name) if report.teacher_samples else None
    if teacher is not None and metrics()[name].is_better(report.before[name].mean, than=teacher):
        warnings.append(
            f"The teacher's own samples ({metrics()[name].label} {number(name, teacher)}) are "
            "worse than the student was before: there is little to learn from it."
        )
    if report.teacher_sees:
        warnings.append(
            f"The teacher saw the student's images shrunk to {report.teacher_sees}: it can improve "
            "what is still visible there, such as shapes and colours, and says nothing of finer "
            "detail."
        )
    return warnings


def _mode_loss_warning(report: Report) -> list[str]:
    """Return a warning for each metric of mode coverage that fell while the headline improved."""
    headline = next(iter(report.metrics), None)
    if headline is None or report.student.sha256 is None:  # it began as noise: nothing to lose
        return []
    about = metrics()[headline]
    if not about.is_better(report.after[headline].mean, than=report.before[headline].mean):
        return []
    lines = []
    for name in report.metrics:
        before, after = report.before[name], report.after[name]
        noise = max(before.std + after.std, _SMALL_CHANGE * before.mean)
        fell = before.mean - after.mean > noise
        if metrics()[name].shows_mode_loss and name != headline and fell:
            lines.append(
                f"{metrics()[name].label} fell from {shown(name, before)} to {shown(name, after)} "
                f"% while {about.label} improved: the student no longer produces some kinds of "
                "images (mode loss)."
            )
    return lines


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
    """Return "a, b and c"; repetitions are named once."""
    *most, last = dict.fromkeys(names)
    return f"{', '.join(most)} and {last}" if most else last
