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
from PIL import Image
from torch import Tensor

from eval.samples import Pairs

_BEFORE, _AFTER, _QUIET, _INK = "#8a8f98", "#1f6feb", "#57606a", "#1f2328"
_LEVEL_COLORS = ("#2d8a4e", "#cf6a1b", "#8250df")
_TILE = 72
"""Pixels of the longer side of an image in a picture, at least."""
_LEFT, _TOP, _SEAM, _GAP = 92, 58, 4, 18
"""Margins, the space between images, and the space between rows of pairs, in pixels."""
_WIDEST = 2048
"""Pixels that all images of a row may take."""


def pairs_picture(pairs: Pairs) -> bytes:
    """Return a PNG of pairs, before above after, a column for each class or 8 of them.

    The teacher's own samples stand below them, where they start from the same latents.
    """
    lines = [("before", _BEFORE, _tiles(pairs.before)), ("after", _AFTER, _tiles(pairs.after))]
    if pairs.teacher is not None:
        lines.append(("teacher", _LEVEL_COLORS[0], _tiles(pairs.teacher)))
    count, tile_height, tile_width, _ = lines[0][2].shape
    columns = _columns(pairs, tile_width)
    labels = _labels(pairs, columns)
    rows = -(-count // columns)
    gap = _GAP + 20 * any(labels[columns:])
    top = _TOP + 20 * bool(pairs.labels)
    pitch = len(lines) * (tile_height + _SEAM) - _SEAM + gap
    figure = _figure(_LEFT + columns * (tile_width + _SEAM) + 20, top + rows * pitch + 24 - gap)
    _text(figure, _LEFT, 26, "Same latents, before and after", size=13, weight="bold")
    for row in range(rows):
        middle = top + row * pitch + tile_height / 2
        for line, (name, color, _) in enumerate(lines):
            _row_name(figure, middle + line * (tile_height + _SEAM), name, color=color)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = _LEFT + column * (tile_width + _SEAM), top + row * pitch
        for line, (_, _, tiles) in enumerate(lines):
            _paste(figure, tiles[index], x, y + line * (tile_height + _SEAM))
        _text(figure, x + tile_width / 2, y - 12, labels[index], color=_QUIET, align="center")
    return _png(figure)


def grid_picture(images: Tensor, *, columns: int) -> bytes:
    """Return a PNG of images side by side, in rows; images: uint8 [N, C, H, W], no enlargement."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for index, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
        row, column = divmod(index, columns)
        place = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
        sheet[place] = image
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="PNG")
    return content.getvalue()


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
    top = 1.12 * max([*values, *known.values(), 1e-9])  # all may be 0, or a KID below it
    axes.set_ylim(0, top)
    label_y = 0.0
    for place, (name, value) in enumerate(sorted(known.items(), key=lambda item: item[1])):
        label_y = max(value, label_y)
        color = _LEVEL_COLORS[place % len(_LEVEL_COLORS)]
        _level(axes, value, name=name, color=color, label_y=label_y)
        label_y += 0.1 * top  # the next label must not touch this one
    axes.set_xlabel("images seen (thousands)", color=_QUIET)
    axes.set_ylabel(metric, color=_QUIET)
    _clean(axes)
    _text(figure, 78, 32, title, size=13, weight="bold")
    return _png(figure)


def _columns(pairs: Pairs, tile_width: int) -> int:
    """Return how many pairs stand in a row: the picture stays narrower than a large screen."""
    classes = len(set(pairs.labels or ()))
    wanted = classes if 2 <= classes <= 16 else 8
    return max(1, min(wanted, len(pairs.before), _WIDEST // tile_width))


def _labels(pairs: Pairs, columns: int) -> list[str]:
    """Return each pair's class, or nothing where the one above it already says so."""
    if pairs.labels is None:
        return [""] * len(pairs.before)
    return [
        "" if index >= columns and pairs.labels[index - columns] == label else str(label)
        for index, label in enumerate(pairs.labels)
    ]


def _tiles(images: Tensor) -> np.ndarray:
    """Return [N, H, W, 3] uint8, enlarged by a whole factor where images are small."""
    tiles = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    scale = max(1, -(-_TILE // max(tiles.shape[1:3])))
    return tiles.repeat(scale, axis=1).repeat(scale, axis=2)


def _figure(width: int, height: int) -> Figure:
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _paste(figure: Figure, tile: np.ndarray, x: float, y: float) -> None:
    height = figure.get_figheight() * 100
    figure.figimage(tile, round(x), round(height - y - tile.shape[0]), origin="upper")


def _text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 11,
    weight: str = "normal",
    color: str = _INK,
    align: str = "left",
) -> None:
    width, height = figure.get_size_inches() * 100
    style = {"fontsize": size, "weight": weight, "color": color, "ha": align, "va": "center"}
    figure.text(x / width, 1 - y / height, text, **style)


def _row_name(figure: Figure, y: float, name: str, *, color: str) -> None:
    _text(figure, _LEFT - 12, y, name, color=color, align="right", weight="bold")


def _value(axes: Axes, x: float, y: float) -> None:
    style = {"ha": "center", "va": "bottom", "fontsize": 11, "weight": "bold", "color": _AFTER}
    axes.annotate(_number(y), (x, y), xytext=(0, 8), textcoords="offset points", **style)


def _level(axes: Axes, value: float, *, name: str, color: str, label_y: float) -> None:
    axes.axhline(value, color=color, linestyle="--", linewidth=1.2, zorder=2)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    label = f"{name}\n{_number(value)}"
    axes.annotate(label, (1, label_y), xytext=(6, 0), va="center", color=color, **place)


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
