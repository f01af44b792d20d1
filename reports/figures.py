"""The figures of a report: pairs of images, and metrics over images seen as SVG and PNG.

Positions in pictures are pixels from the top left: one image pixel is a whole number of them.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from eval.samples import Pairs
from reports.data import CurvePoint

_BEFORE, _AFTER, _QUIET, _INK = "#8a8f98", "#1f6feb", "#57606a", "#1f2328"
_GRID = "#d8dee4"
_LEVEL_COLORS = ("#2d8a4e", "#cf6a1b", "#8250df")
_TILE = 72
"""Pixels of the longer side of an image in a picture, at least."""
_LEFT, _TOP, _SEAM, _GAP = 92, 58, 4, 18
"""Margins, the space between images, and the space between rows of pairs, in pixels."""
_WIDEST = 2048
"""Pixels that all images of a row may take."""
_LARGEST = 256
"""Pixels of the longer side of an image in a page, at most."""
_COLORS = 8
"""Curves that a drawing tells apart."""
_LEVEL_PITCH = 18
"""Least distance of two levels' texts, in a drawing's units."""
_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_TOP = 860, 470, 72
"""Size of curve.png and the height of its title, in pixels."""


def pairs_picture(pairs: Pairs) -> bytes:
    """Return a PNG of pairs, before above after, a column for each class or 8 of them.

    The teacher's own samples stand below them, if they start from the same latents.
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


def strip_picture(before: Tensor, after: Tensor) -> bytes:
    """Return a PNG of two rows of images, before above after, each shrunk to 256 pixels at most.

    images: uint8 [N, C, H, W]. A comparison of runs cuts its pictures out of it (`strip_tiles`).
    """
    images = torch.cat([before, after])
    height, width = images.shape[2:]
    if max(height, width) > _LARGEST:
        scale = _LARGEST / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        images = interpolate(images.float(), size, mode="area").round().to(torch.uint8)
    return grid_picture(images, columns=len(before))


def strip_tiles(path: Path, columns: int) -> tuple[Tensor, Tensor] | None:
    """Return the images before and after, uint8 [N, 3, H, W], of a `strip_picture` in a file.

    None if there is no such file, or it is not one of so many columns.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            sheet = torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    height, width = sheet.shape[:2]
    if height % 2 or width % columns:
        return None
    tiles = sheet.view(2, height // 2, columns, width // columns, 3).permute(0, 2, 4, 1, 3)
    return tiles[0], tiles[1]


def _columns(pairs: Pairs, tile_width: int) -> int:
    """Return how many pairs stand in a row: the picture stays narrower than a large screen."""
    classes = len(set(pairs.labels or ()))
    wanted = classes if 2 <= classes <= 16 else 8
    return max(1, min(wanted, len(pairs.before), _WIDEST // tile_width))


def _labels(pairs: Pairs, columns: int) -> list[str]:
    """Return each pair's class, or nothing if the one above it already says so."""
    if pairs.labels is None:
        return [""] * len(pairs.before)
    return [
        "" if index >= columns and pairs.labels[index - columns] == label else str(label)
        for index, label in enumerate(pairs.labels)
    ]


def _tiles(images: Tensor) -> np.ndarray:
    """Return [N, H, W, 3] uint8, enlarged by a whole factor if images are small."""
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


def data_address(image: Tensor) -> str:
    """Return the address of a PNG in a page, shrunk to 256 pixels; image: uint8 [C, H, W]."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LARGEST, _LARGEST))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


# Curves: one geometry, which templates/curve.html draws as SVG and curve_picture as PNG


class Series(NamedTuple):
    """One curve's name and points."""

    name: str
    points: Sequence[CurvePoint]
    """Values as shown."""


class Tick(NamedTuple):
    """A number on an axis."""

    x: float
    y: float
    text: str


class Level(NamedTuple):
    """A line across the curves, at a value to compare with."""

    y: float
    text_y: float
    """Height of its text, which keeps clear of the other levels' texts."""
    text: str


class Dot(NamedTuple):
    """A point of a curve."""

    x: float
    y: float
    text: str
    """Images seen and value."""
    value: str


class Line(NamedTuple):
    """One curve in a drawing."""

    name: str
    color: int
    """Index of a color: class c0 to c7 of style.css."""
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class CurveDrawing:
    """Positions of curves, ticks and levels, in units from the top left."""

    width: ClassVar[int] = 720
    height: ClassVar[int] = 300
    left: ClassVar[int] = 52
    right: ClassVar[int] = 598
    top: ClassVar[int] = 18
    bottom: ClassVar[int] = 260
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]
    value_ticks: tuple[Tick, ...]
    images_seen_ticks: tuple[Tick, ...]


def curve_drawing(series: Sequence[Series], levels: Mapping[str, float]) -> CurveDrawing:
    """Return the drawing of curves, one with two points at least, with levels across them."""
    # axes between round numbers around zero and every value
    points = [point for one in series for point in one.points]
    seen_ticks = _ticks([point.images_seen for point in points])
    value_ticks = _ticks([*(point.value for point in points), *levels.values()])
    drawing = CurveDrawing

    def x(images_seen: float) -> float:
        share = images_seen / seen_ticks[-1]
        return round(drawing.left + (drawing.right - drawing.left) * share, 1)

    def y(value: float) -> float:
        share = (value - value_ticks[0]) / (value_ticks[-1] - value_ticks[0])
        return round(drawing.bottom - (drawing.bottom - drawing.top) * share, 1)

    # curves, in the colors' order
    lines = []
    for index, one in enumerate(series):
        dots = [
            Dot(x(seen), y(value), f"{seen:,} images: {value:.4g}", _number(value))
            for seen, value in one.points
        ]
        lines.append(Line(one.name, index % _COLORS, tuple(dots)))
    return CurveDrawing(
        lines=tuple(lines),
        levels=_levels({name: (value, y(value)) for name, value in levels.items()}),
        value_ticks=tuple(Tick(drawing.left, y(tick), f"{tick:g}") for tick in value_ticks),
        images_seen_ticks=tuple(
            Tick(x(tick), drawing.bottom, f"{tick / 1000:g}") for tick in seen_ticks
        ),
    )


def _levels(places: Mapping[str, tuple[float, float]]) -> tuple[Level, ...]:
    """Return levels from the lowest value, each text above the one before; places: value, y."""
    levels: list[Level] = []
    for name, (value, y) in sorted(places.items(), key=lambda place: place[1][0]):
        highest = levels[-1].text_y - _LEVEL_PITCH if levels else y
        levels.append(Level(y, min(y, highest), f"{name} {value:.3g}"))
    return tuple(levels)


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers around the values and 0: steps of 1, 2 or 5 times a power of ten."""
    lowest, largest = min(0.0, *values), max(0.0, *values)
    rough = (largest - lowest or 1.0) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(lowest / step), math.ceil(largest / step)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def curve_picture(drawing: CurveDrawing, *, title: str) -> bytes:
    """Return a PNG of a drawing of one curve, in the page's light colors."""
    # axes in the drawing's units, over the figure's whole width
    figure = _figure(_CURVE_WIDTH, _CURVE_HEIGHT)
    scale = _CURVE_WIDTH / drawing.width
    share = drawing.height * scale / _CURVE_HEIGHT
    axes = figure.add_axes((0, 1 - _CURVE_TOP / _CURVE_HEIGHT - share, 1, share))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")

    # grid and ticks
    left, right = drawing.left, drawing.right
    text: dict[str, Any] = {"color": _QUIET, "fontsize": 10, "va": "center"}
    for tick in drawing.value_ticks:
        axes.hlines(tick.y, left, right, color=_GRID, linewidth=1)
        axes.text(tick.x - 8, tick.y, tick.text, ha="right", **text)
    for tick in drawing.images_seen_ticks:
        axes.text(tick.x, tick.y + 16, tick.text, ha="center", **text)

    # levels, then the curve over them
    for level, color in zip(drawing.levels, itertools.cycle(_LEVEL_COLORS), strict=False):
        axes.hlines(level.y, left, right, color=color, linestyle="--", linewidth=1.2)
        colored: dict[str, Any] = text | {"color": color}
        axes.text(right + 6, level.text_y, level.text, **colored)
    for line in drawing.lines:
        xs, ys = [dot.x for dot in line.dots], [dot.y for dot in line.dots]
        style: dict[str, Any] = {
            "color": _AFTER,
            "linewidth": 2.2,
            "marker": "o",
            "markersize": 4.5,
        }
        axes.plot(xs, ys, clip_on=False, **style)
        for dot in (line.dots[0], line.dots[-1]):
            value: dict[str, Any] = {
                "ha": "center",
                "va": "bottom",
                "weight": "bold",
                "color": _AFTER,
            }
            axes.text(dot.x, dot.y - 6, dot.value, fontsize=11, **value)

    # words
    _text(figure, drawing.left * scale, 32, title, size=13, weight="bold")
    middle = (drawing.left + drawing.right) / 2 * scale
    below = _CURVE_HEIGHT - 30
    _text(figure, middle, below, "images seen (thousands)", color=_QUIET, align="center")
    return _png(figure)
