"""How a metric and its values are shown."""

from __future__ import annotations

from eval.measuring import METRICS
from eval.metrics import MetricResult
from eval.provenance import ExtractorName


def metric_title(metric: str, extractor: ExtractorName | None) -> str:
    """Return a metric's name for a reader, with the extractor's where it is not the usual one."""
    about = METRICS[metric]
    usual = extractor is None or about.published_features in (extractor.name, "lpips")
    return about.label if usual else f"{about.label} ({extractor.name} features)"


def shown(metric: str, result: MetricResult) -> str:
    """Return "24.1 ± 0.2": two decimals, fewer where mean and spread are large."""
    times = METRICS[metric].times
    mean, std = result.mean * times, result.std * times
    if len(result.values) < 2:
        return number(metric, result.mean)
    decimals = 0 if mean >= 100 and std >= 1 else 1 if mean >= 10 and std >= 0.1 else 2
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def number(metric: str, value: float) -> str:
    """Return a value, or a difference of two, of a metric as it is shown."""
    value *= METRICS[metric].times
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def change(before: MetricResult, after: MetricResult) -> str:
    """Return the relative change in per cent, or how many times as much where that is a lot."""
    if before.mean <= 0:  # a KID may be
        return "n/a"
    times = after.mean / before.mean
    return f"x {times:,.0f}" if times >= 11 else f"{times - 1:+.0%}".replace("%", " %")


def unit(metric: str) -> str:
    """Return what stands behind a metric's title, such as ", %"."""
    return f", {METRICS[metric].unit}" if METRICS[metric].unit else ""
