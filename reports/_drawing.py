"""Curves over images seen, drawn as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from reports.data import CurvePoint

COLORS = 8
"""How many curves the page can tell apart: classes c0 to c7 of its style."""
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 122, 18, 40
"""Size and margins, in units of the drawing."""


class Series(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[CurvePoint]
    """Values as shown."""


class _Scale(NamedTuple):
    """From numbers to places in the drawing."""

    images_seen: float
    """At the right end."""
    value: float
    """At the top."""

    def x(self, images_seen: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * images_seen / self.images_seen

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.value


def drawing(series: Sequence[Series], levels: Mapping[str, float]) -> str:
    """Return curves, one with two points at least, and levels as lines across them."""
    points = [point for one in series for point in one.points]
    seen_ticks = _ticks(max(point.images_seen for point in points))
    value_ticks = _ticks(max([point.value for point in points] + list(levels.values())))
    scale = _Scale(seen_ticks[-1], value_ticks[-1])
    parts = [*_grid(scale, seen_ticks, value_ticks), *_levels(scale, levels)]
    for index, one in enumerate(series):
        parts += _curve(scale, one, color=f"c{index % COLORS}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def legend(series: Sequence[Series]) -> str:
    """Return which curve is which, as a list."""
    items = "".join(
        f'<li><svg viewBox="0 0 28 10"><polyline class="c{index % COLORS}" points="0,5 28,5"/>'
        f"</svg>{escape(one.name)}</li>"
        for index, one in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def _grid(scale: _Scale, seen_ticks: Sequence[float], value_ticks: Sequence[float]) -> list[str]:
    across = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{scale.y(tick):.1f}" '
        f'y2="{scale.y(tick):.1f}"/><text class="tick" x="{_LEFT - 8}" '
        f'y="{scale.y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in value_ticks
    ]
    below = [
        f'<text class="tick" x="{scale.x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 20}" '
        f'text-anchor="middle">{tick / 1000:g}</text>'
        for tick in seen_ticks
    ]
    return across + below


def _levels(scale: _Scale, levels: Mapping[str, float]) -> list[str]:
    return [
        f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{scale.y(value):.1f}" '
        f'y2="{scale.y(value):.1f}"/><text class="name" x="{_WIDTH - _RIGHT + 6}" '
        f'y="{scale.y(value) + 4:.1f}">{escape(name)} {value:.3g}</text>'
        for name, value in levels.items()
    ]


def _curve(scale: _Scale, series: Series, *, color: str) -> list[str]:
    places = [(scale.x(seen), scale.y(value)) for seen, value in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [
        f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(series.name)}, '
        f"{seen:,} images: {value:.4g}</title></circle>"
        for (x, y), (seen, value) in zip(places, series.points, strict=True)
    ]
    return [f'<polyline class="{color}" points="{path}"/>', *dots]


def _ticks(largest: float) -> list[float]:
    """Return round numbers from 0 to just above the largest: steps of 1, 2 or 5 times a power."""
    rough = max(largest, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(max(math.ceil(largest / step), 1) + 1)]
