"""Conversion of any images to a zip in the layout of StyleGAN and EDM, which data.images reads.

    00000/img00000000.png …   PNG, uncompressed; the folder has the first five digits of the number
    dataset.json              {"labels": [["00000/img00000000.png", 9], …], "class_names": […]}

The bytes of the zip are a function of the source's pixels and labels and of the options: times are
fixed, and the PNG encoder is below. Changes of a picture besides cropping and resizing are counted
and reported.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from core.disk import atomic_write
from core.errors import UserError
from data import _cifar, _folders, _mnist
from data._files import CLASS_NAMES, LABELS_FILE
from data._folders import Labeling
from data._pictures import ConvertedImage, UnusablePicture, convert, too_dark
from data._source import Source, Split

_Result = TypeVar("_Result")
Size = tuple[int, int]
"""(W, H)"""

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
_CHANNELS = {"L": 1, "RGB": 3}
_BROKEN_NAMED = 20
_WORKERS = min(os.cpu_count() or 1, 8)
_WAITING_PER_WORKER = 4


@dataclass(frozen=True)
class Options:
    """Processing of each picture."""

    resolution: Size | None = None
    """(W, H) of all images; None: their common size."""
    crop: Literal["none", "center"] = "none"
    """center: cut the largest part with the target's aspect ratio out of the middle first."""
    filter: Literal["lanczos", "box", "bicubic"] = "lanczos"
    """Resampling filter."""
    channels: Literal["1", "3", "keep"] = "keep"
    """1: convert to grey; 3: convert to RGB; keep: no conversion."""
    bits: int | None = None
    """Significant bits of 16-bit grey pictures, the lowest; None: 16, and sets too dark for that
    are refused.
    """


class Summary(NamedTuple):
    """Contents of the zip."""

    images: int
    size: Size
    channels: int
    labels: list[int] | None
    class_names: list[str] | None
    left_out: dict[str, str]
    """Name of each unusable picture -> reason."""
    changes: dict[str, int]
    """Change besides cropping and resizing -> number of pictures."""


def open_source(
    path: Path, *, labeling: Labeling = "folders", split: Split | None = None
) -> Source:
    """Return the pictures at a path: CIFAR-10 or MNIST as published, a folder, or a zip.

    split applies to CIFAR-10 and MNIST only, by default "train". Raises UserError if path holds no
    images, or labels that do not fit them.
    """
    if _cifar.is_at(path):
        return _cifar.read(path, split or "train", labeled=labeling != "none")
    if _mnist.is_at(path):
        return _mnist.read(path, split, labeled=labeling != "none")
    if split is not None:
        raise UserError(
            f"--split {split}: {path} has no such parts, only CIFAR-10 and MNIST have; give the "
            "folder of that part as SOURCE"
        )
    return _folders.read(path, labeling)


def prepare(
    source: Source,
    out: Path,
    options: Options,
    *,
    images: int | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    show: Callable[[Iterable[int], int], Iterable[int]] = lambda indices, _: indices,
) -> Summary:
    """Write a zip of the first images of a source (None: all), atomically.

    show: progress display, a pass-through of indices. Raises UserError if out may not be written,
    if sizes or channels differ, and, unless skip_broken, if pictures are unusable: then all are
    read first, to list them.
    """
    _check_out(out, overwrite=overwrite)
    count = _count(source, images)
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        writer = _Writer(archive, source, skip_broken=skip_broken)
        with closing(_in_order(lambda index: _try(source, index, options), count)) as converted:
            for index, result in zip(show(range(count), count), converted, strict=True):
                writer.add(index, result)
        return writer.finish(count)


class _Writer:
    """Writer of a zip of images with one size and mode; collects the unusable pictures."""

    def __init__(self, archive: zipfile.ZipFile, source: Source, *, skip_broken: bool) -> None:
        self._archive, self._source, self._skip_broken = archive, source, skip_broken
        self._written: list[int] = []
        self._broken: dict[str, str] = {}
        self._changes: Counter[str] = Counter()
        self._peaks: set[int | None] = set()
        self._image = Image.new("L", (0, 0))

    def add(self, index: int, result: ConvertedImage | UnusablePicture) -> None:
        """Write one image, unless it or an earlier one is unusable."""
        if isinstance(result, UnusablePicture):
            self._broken[self._source.names[index]] = str(result)
            return
        self._peaks.add(result.peak_16_bits)
        if self._written:
            result = result.fitting(self._image.mode)
            self._check_same(index, result.image)
        else:
            self._image = result.image
        self._changes.update(result.changes)
        if self._skip_broken or not self._broken:
            _store(self._archive, _name(len(self._written)), png(np.asarray(result.image)))
        self._written.append(index)

    def finish(self, count: int) -> Summary:
        """Write the labels. Raises UserError if pictures were unusable, or hold fewer bits."""
        if self._broken and not (self._skip_broken and self._written):
            raise UserError(_broken_sentence(self._broken, count))
        if reason := too_dark(self._peaks):
            raise UserError(
                f"{reason}: give --bits N, N the bits that they have, or --bits 16 if they are so "
                "dark"
            )

        # labels of the written images
        all_labels, class_names = self._source.labels, self._source.class_names
        labels = None if all_labels is None else [int(all_labels[i]) for i in self._written]
        class_names = None if class_names is None or labels is None else list(class_names)
        _store(self._archive, LABELS_FILE, _metadata(labels, class_names))

        return Summary(
            images=len(self._written),
            size=self._image.size,
            channels=_CHANNELS[self._image.mode],
            labels=labels,
            class_names=class_names,
            left_out=self._broken,
            changes=dict(self._changes),
        )

    def _check_same(self, index: int, image: Image.Image) -> None:
        """Raise UserError unless an image has the size and mode of the first."""
        first, name = self._source.names[self._written[0]], self._source.names[index]
        if image.size != self._image.size:
            raise UserError(
                f"{first} is {_text(self._image.size)}, but {name} is {_text(image.size)}: give "
                "--resolution N to make them one size"
            )
        if image.mode != self._image.mode:
            kinds = {"L": "grey", "RGB": "in colour"}
            raise UserError(
                f"{first} is {kinds[self._image.mode]}, but {name} is {kinds[image.mode]}: give "
                "--channels 3 to make all RGB, or --channels 1 to make all grey"
            )


# One picture ------------------------------------------------------------------------------------


def _try(source: Source, index: int, options: Options) -> ConvertedImage | UnusablePicture:
    """Return one picture as an image of the set, or the reason against it.

    Raises UserError if the options do not fit a usable picture.
    """
    try:
        converted = convert(source.picture(index), bits=options.bits)
    except UnusablePicture as why:
        return why
    if options.channels != "keep":
        mode = "L" if options.channels == "1" else "RGB"
        converted = converted._replace(image=converted.image.convert(mode))
    image, changes = _fit(converted.image, source, index, options)
    return converted._replace(image=image, changes=(*converted.changes, *changes))


class _Fitted(NamedTuple):
    image: Image.Image
    changes: tuple[str, ...] = ()


def _fit(picture: Image.Image, source: Source, index: int, options: Options) -> _Fitted:
    """Return an image of the target resolution. Raises UserError if its aspect ratio differs."""
    # no change, or a border
    target = options.resolution
    if target is None or picture.size == target:
        return _Fitted(picture)
    if source.padded_size == target:
        return _pad(picture, target)

    # crop and resize
    left, top, right, bottom = box = _largest_box(picture.size, target)
    if options.crop == "none" and (right - left, bottom - top) != picture.size:
        raise UserError(
            f"{source.names[index]} is {_text(picture.size)}, another shape than {_text(target)}: "
            "give --crop center to cut the largest part of that shape out of the middle"
        )
    is_smaller = right - left < target[0] or bottom - top < target[1]
    part = picture.crop(box)  # resize(box=…) would mix in pixels around it
    image = part.resize(target, FILTERS[options.filter])
    return _Fitted(image, (f"enlarged to {_text(target)}",) * is_smaller)


def _pad(picture: Image.Image, target: Size) -> _Fitted:
    """Return a picture with a black border."""
    image = Image.new(picture.mode, target)
    width, height = picture.size
    image.paste(picture, ((target[0] - width) // 2, (target[1] - height) // 2))
    return _Fitted(image, (f"given a black border from {_text(picture.size)} to {_text(target)}",))


def _largest_box(size: Size, shape: Size) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the largest centered box with an aspect ratio."""
    width, height = size
    scale = min(width / shape[0], height / shape[1])
    inner_width, inner_height = (max(1, round(side * scale)) for side in shape)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _in_order(function: Callable[[int], _Result], count: int) -> Generator[_Result]:
    """Yield function(0), function(1), …, computed by a pool of threads with a bounded queue."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for index in range(count):
                waiting.append(pool.submit(function, index))
                if len(waiting) == _WORKERS * _WAITING_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# The zip ----------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    """Return an uncompressed PNG, independent of library versions, of uint8 [H, W] or [H, W, 3].

    No row is filtered, and the zlib stream is of stored blocks (RFC 1950 and 1951).
    """
    height, width = pixels.shape[:2]
    color_type = 0 if pixels.ndim == 2 else 2
    rows = np.zeros((height, 1 + pixels.size // height), np.uint8)  # first byte: filter 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", _zlib_stored(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _zlib_stored(content: bytes) -> bytes:
    parts = [content[start : start + 0xFFFF] for start in range(0, len(content), 0xFFFF)]
    blocks = [
        struct.pack("<BHH", number == len(parts), len(part), len(part) ^ 0xFFFF) + part
        for number, part in enumerate(parts, start=1)
    ]
    return b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(content))


def _name(index: int) -> str:
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def _store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix values on every system
    archive.writestr(entry, content)


def _metadata(labels: Sequence[int] | None, class_names: Sequence[str] | None) -> bytes:
    pairs = labels and [[_name(index), label] for index, label in enumerate(labels)]
    metadata: dict[str, object] = {"labels": pairs}
    if class_names is not None:
        metadata[CLASS_NAMES] = class_names
    return json.dumps(metadata).encode()


# Bad input --------------------------------------------------------------------------------------


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.suffix.lower() != ".zip":
        raise UserError(f"OUT is {out}: expected a name that ends in .zip")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of a new zip")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: give another name, or --overwrite")


def _count(source: Source, images: int | None) -> int:
    if images is not None and images > len(source.names):
        raise UserError(f"--images {images}: the source has only {len(source.names)}")
    return len(source.names) if images is None else images


def broken_lines(broken: Mapping[str, str]) -> list[str]:
    """Return a line for each unusable picture, up to twenty, and the number of further ones."""
    lines = [f"  {name}: {why}" for name, why in itertools.islice(broken.items(), _BROKEN_NAMED)]
    more = len(broken) - len(lines)
    return [*lines, f"  and {more} more"] if more else lines


def _broken_sentence(broken: dict[str, str], count: int) -> str:
    end = "mend or remove them"
    if len(broken) < count:
        end += ", or leave them out with --skip-broken"
    return "\n".join(
        [f"{len(broken)} of {count} images cannot be used:", *broken_lines(broken), end]
    )
