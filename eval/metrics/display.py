"""Display of metrics and their values: titles, numbers, changes, arrows."""

from __future__ import annotations

from eval.metrics.registry import MetricResult, metrics
from eval.provenance import ExtractorName

ARROWS = "↓ lower is better, ↑ higher"
"""Meaning of the arrows in tables."""


def metric_title(metric: str, extractor: ExtractorName | None) -> str:
    """Return a metric's label, with the extractor's name if it is not that of published values."""
    about = metrics()[metric]
    if extractor is None or has_published_features(metric, extractor.name):
        return about.label
    return f"{about.label} ({extractor.name} features)"


def shown(metric: str, result: MetricResult) -> str:
    """Return "24.1 ± 0.2": two decimals, fewer if mean and spread are large."""
    times = metrics()[metric].scale
    mean, std = result.mean * times, result.std * times
    if len(result.values) < 2:
        return number(metric, result.mean)
    decimals = 0 if mean >= 100 and std >= 1 else 1 if mean >= 10 and std >= 0.1 else 2
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def number(metric: str, value: float) -> str:
    """Return a displayed value, or difference of two values, of a metric."""
    value *= metrics()[metric].scale
    digits = 1 if abs(value) >= 10 else 2
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero


def change(before: MetricResult, after: MetricResult) -> str:
    """Return the relative change in per cent, or the factor if that is large."""
    if before.mean <= 0:  # a KID may be
        return "n/a"
    times = after.mean / before.mean
    return f"x {times:,.0f}" if times >= 11 else f"{times - 1:+.0%}".replace("%", " %")


def image_count(images: int | None) -> str:
    """Return "8,000 images", or that their number is not known."""
    return "an unknown number of images" if images is None else f"{images:,} images"


def unit(metric: str) -> str:
    """Return the unit to append to a metric's title, such as ", %"."""
    return f", {metrics()[metric].unit}" if metrics()[metric].unit else ""


def has_published_features(metric: str, extractor: str) -> bool:
    """Return whether a metric of this extractor's features compares with published values."""
    about = metrics()[metric]
    return about.needs == "student" or about.published_features == extractor


def arrow(metric: str) -> str:
    """Return the arrow in the direction of better values."""
    return {"lower": "↓", "higher": "↑"}[metrics()[metric].better]
