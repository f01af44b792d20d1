"""The pictures of a report, as PNG: pairs of images, and a metric over images seen.

Positions are pixels from the top left, so that one image pixel is a whole number of them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from eval.samples import Pairs

_BEFORE, _AFTER, _QUIET, _INK = "#8a8f98", "#1f6feb", "#57606a", "#1f2328"
_LEVEL_COLOURS = ("#cf6a1b", "#2d8a4e", "#8250df")
_TILE = 72
"""Pixels of the longer side of an image in a picture, at least."""
_LEFT, _TOP, _SEAM, _GAP = 92, 58, 4, 18
"""Margins, the space between images, and the space between rows of pairs, in pixels."""


def pairs_picture(pairs: Pairs) -> bytes:
    """Return a PNG of pairs, before above after, a column for each class or 8 of them."""
    columns = _columns(pairs)
    before, after = (_tiles(images, columns) for images in (pairs.before, pairs.after))
    _, _, tile_height, tile_width, _ = before.shape
    top = _TOP + 20 * bool(pairs.labels)
    pitch = 2 * tile_height + _SEAM + _GAP
    width = _LEFT + columns * (tile_width + _SEAM) + 20
    figure = _figure(width, top + len(before) * pitch + 8)
    _text(figure, _LEFT, 26, "Same latents, before and after refinement", size=13, weight="bold")
    for row in range(len(before)):
        y = top + row * pitch
        _row(figure, before[row], y, name="before", colour=_BEFORE)
        _row(figure, after[row], y + tile_height + _SEAM, name="after", colour=_AFTER)
    for column, label in enumerate((pairs.labels or ())[:columns]):
        x = _LEFT + column * (tile_width + _SEAM) + tile_width / 2
        _text(figure, x, top - 14, str(label), colour=_QUIET, align="center")
    return _png(figure)


def curve_picture(
    points: Sequence[tuple[int, float]],
    *,
    metric: str,
    title: str,
    levels: Mapping[str, float | None],
) -> bytes:
    """Return a PNG of (images seen, value) points; levels: dashed lines, None where not known."""
    known = {name: value for name, value in levels.items() if value is not None}
    kimg = [images_seen / 1000 for images_seen, _ in points]
    values = [value for _, value in points]
    figure = _figure(860, 470)
    axes = figure.add_axes((0.09, 0.145, 0.78, 0.72))
    axes.plot(kimg, values, color=_AFTER, linewidth=2.2, marker="o", markersize=4.5, zorder=3)
    for place in sorted({0, len(points) - 1}):
        _value(axes, kimg[place], values[place])
    for (name, value), colour in zip(known.items(), _LEVEL_COLOURS, strict=False):
        _level(axes, value, name=name, colour=colour)
    axes.set_ylim(0, 1.12 * max([*values, *known.values()]))
    axes.set_xlabel("images seen (thousands)", color=_QUIET)
    axes.set_ylabel(metric, color=_QUIET)
    _clean(axes)
    _text(figure, 78, 32, title, size=13, weight="bold")
    return _png(figure)


def _row(figure: Figure, tiles: np.ndarray, y: float, *, name: str, colour: str) -> None:
    """Draw a row of tiles [columns, H, W, 3] with its name at the left."""
    _, height, width, _ = tiles.shape
    _text(figure, _LEFT - 12, y + height / 2, name, colour=colour, align="right", weight="bold")
    for column, tile in enumerate(tiles):
        _paste(figure, tile, _LEFT + column * (width + _SEAM), y)


def _columns(pairs: Pairs) -> int:
    classes = len(set(pairs.labels or ()))
    return min(len(pairs.before), classes if 2 <= classes <= 16 else 8)


def _tiles(images: Tensor, columns: int) -> np.ndarray:
    """Return [rows, columns, H, W, 3] uint8, enlarged by a whole factor, full rows only."""
    rows = len(images) // columns
    tiles = images[: rows * columns].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    scale = max(1, -(-_TILE // max(tiles.shape[1:3])))
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    return tiles.reshape(rows, columns, *tiles.shape[1:])


def _figure(width: int, height: int) -> Figure:
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _paste(figure: Figure, tile: np.ndarray, x: float, y: float) -> None:
    height = figure.get_figheight() * 100
    figure.figimage(tile, x, height - y - tile.shape[0], origin="upper")


def _text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 11,
    weight: str = "normal",
    colour: str = _INK,
    align: str = "left",
) -> None:
    width, height = figure.get_size_inches() * 100
    style = {"fontsize": size, "weight": weight, "color": colour, "ha": align, "va": "center"}
    figure.text(x / width, 1 - y / height, text, **style)


def _value(axes: Axes, x: float, y: float) -> None:
    style = {"ha": "center", "va": "bottom", "fontsize": 11, "weight": "bold", "color": _AFTER}
    axes.annotate(_number(y), (x, y), xytext=(0, 8), textcoords="offset points", **style)


def _level(axes: Axes, value: float, *, name: str, colour: str) -> None:
    axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, zorder=2)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    label = f"{name}\n{_number(value)}"
    axes.annotate(label, (1, value), xytext=(6, 0), va="center", color=colour, **place)


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d0d7de")
    axes.tick_params(colors=_QUIET, length=0)
    axes.grid(axis="y", color="#eaeef2", zorder=0)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
