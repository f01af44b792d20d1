"""MNIST and data sets in its format (Fashion-MNIST, KMNIST): two idx files, gzipped or not.

An idx file is big-endian: two zero bytes, the type of its values (8: unsigned bytes), the number of
its dimensions, each dimension as 32 bits, then the values (LeCun, Cortes, Burges: described on
MNIST's page).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import UserError
from data._source import Source, Split

_UNSIGNED_BYTES = 8
_IMAGES_FILE = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")
_PREFIXES = {"train": "train-", "test": "t10k-"}
_PADDED_SIZE = (32, 32)


def is_at(path: Path) -> bool:
    """Return whether path is an idx file of images, or a folder with one named as in MNIST."""
    if path.is_dir():
        return any(_images_file(path, prefix) is not None for prefix in _PREFIXES.values())
    return _IMAGES_FILE.fullmatch(path.name) is not None


def read(path: Path, split: Split | None, *, labeled: bool) -> Source:
    """Return the images of an idx file or of one split (None: train) of a folder of them.

    Raises UserError if a file is missing, truncated or of another kind.
    """
    # find the file
    images_file = _images_file(path, _PREFIXES[split or "train"]) if path.is_dir() else path
    if images_file is None:
        raise UserError(f"{path} holds no {_PREFIXES[split or 'train']}images-idx3-ubyte.gz")
    if split is not None and not images_file.name.startswith(_PREFIXES[split]):
        raise UserError(f"--split {split}: {path.name} is another part; leave --split out")

    # images and labels
    images = _read_idx(images_file, dimensions=3)
    labels = _labels(images_file, len(images)) if labeled else None
    origin = "labels from the file beside" if labeled else "no labels, as --no-labels asks"
    is_digits_size = images.shape[1:] == (28, 28)
    return Source(
        names=[f"{images_file.name}[{index}]" for index in range(len(images))],
        picture=lambda index: Image.fromarray(images[index]),
        labels=labels,
        padded_size=_PADDED_SIZE if is_digits_size else None,
        remarks=(f"{images_file.name} read as MNIST", origin),
    )


def _images_file(folder: Path, prefix: str) -> Path | None:
    files = sorted(folder.glob(f"{prefix}images?idx3-ubyte*"))
    return next((file for file in files if _IMAGES_FILE.fullmatch(file.name)), None)


def _labels(images_file: Path, count: int) -> list[int]:
    match = _IMAGES_FILE.fullmatch(images_file.name)
    assert match is not None, images_file
    stem, joint, suffix = match.groups(default="")
    names = [f"{stem}labels{joint}idx1-ubyte{ending}" for ending in (suffix, "", ".gz")]
    files = [file for name in names if (file := images_file.parent / name).exists()]
    if not files:
        raise UserError(
            f"{images_file} has no {names[0]} beside it: put the labels there, or give --no-labels"
        )
    labels = _read_idx(files[0], dimensions=1)
    if len(labels) != count:
        raise UserError(
            f"{files[0]} has {len(labels)} labels for the {count} images of {images_file.name}"
        )
    return labels.tolist()


def _read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Return the values of an idx file, uint8 in its shape."""
    # read
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read, it may be cut off: {error}") from error

    # check the header
    start = 4 + 4 * dimensions
    expected = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if content[:4] != expected or len(content) < start:
        raise UserError(
            f"{path} is no idx file of unsigned bytes in {dimensions} dimensions: expected it to "
            f"begin with {expected.hex()}, found {content[:4].hex() or 'nothing'}"
        )

    # check the length
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape) or 0 in shape:
        raise UserError(
            f"{path} says that it holds {'x'.join(map(str, shape))} values, but holds "
            f"{len(content) - start}: it is cut off or damaged; get it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
