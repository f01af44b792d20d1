"""Image set of a zip or folder in the layout of StyleGAN and EDM.

    00000/img00000000.png …   images; any names, any depth; read in sorted order
    dataset.json              maybe: {"labels": [["00000/img00000000.png", 9], …]}

A picture is read as `python -m data prepare` reads it (`data._pictures`), and a change of it, such
as a turn, is logged at the first picture that needs it. All images of a set have one size and one
number of channels (1 or 3). Nothing is resized, padded or converted in color.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError
from data import _cifar, _mnist
from data._files import UNREADABLE, image_names, open_files, read_labels, unread_files
from data._pictures import (
    SUFFIXES,
    ConvertedImage,
    UnusablePicture,
    convert,
    open_picture,
    too_dark,
)

_log = logging.getLogger(__name__)
_MODES = {1: "L", 3: "RGB"}
_PEAKS_OF = 16
"""Number of pictures that tell whether 16-bit pictures have fewer bits."""


class Images(Dataset[Tensor]):
    """Images of a zip or folder, sorted by name; an item is a uint8 tensor [C, H, W]."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if _cifar.is_at(self.path) or _mnist.is_at(self.path):
            raise UserError(
                f"{self.path} is a data set as published: make a zip of it first, with "
                f"`python -m data prepare {self.path} OUT.zip`"
            )
        self._files = open_files(self.path)
        all_names = self._files.names()
        self.names = image_names(all_names, SUFFIXES)
        if not self.names:
            raise UserError(f"{self.path} holds no image; expected {', '.join(SUFFIXES)}")
        self._said: set[str] = set()
        for sentence in unread_files(all_names, self.names):
            self._say(sentence)

        labels = read_labels(self._files, self.names, self.path)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        """[N] int64, or None if dataset.json is absent or without labels."""
        channels, height, width = _pixels(self._read_image(self.names[0])).shape
        self.image_shape = (channels, height, width)
        """(C, H, W) of every image."""
        self._check_16_bits()

    @property
    def num_classes(self) -> int:
        """Return the largest label + 1, or 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def description(self) -> str:
        """Return number, size and classes, such as "60,000 images, 32x32 RGB, 10 classes"."""
        channels, height, width = self.image_shape
        kind = "grey" if channels == 1 else "RGB"
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        return f"{len(self):,} images, {width}x{height} {kind}, {classes}"

    @cached_property
    def sha256(self) -> str:
        """Return a hash of names, labels and file bytes in sorted order.

        A zip and its unpacked folder have the same hash.
        """
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            label = "" if self.labels is None else int(self.labels[index])
            content = self._read(name)
            digest.update(f"{name}\0{label}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        image = _pixels(self._read_image(self.names[index]).fitting(_MODES[self.image_shape[0]]))
        if tuple(image.shape) != self.image_shape:
            raise UserError(
                f"{self.path}: {self.names[index]} is {_size(image.shape)}, but {self.names[0]} is "
                f"{_size(self.image_shape)}; all images of a set must have one size"
            )
        return image

    def load_all(self) -> Tensor:
        """Return every image, uint8 [N, C, H, W]."""
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for index in range(len(self)):
            images[index] = self[index]
        return images

    def _read(self, name: str) -> bytes:
        try:
            return self._files.read(name)
        except UNREADABLE as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}") from error

    def _read_image(self, name: str) -> ConvertedImage:
        """Return one picture as an image; log what was changed for the first time."""
        try:
            converted = convert(open_picture(self._read(name)))
        except UnusablePicture as why:
            raise UserError(f"{self.path}: {name} is not a readable image: {why}") from why
        for change in converted.changes:
            self._say(change, name)
        return converted

    def _check_16_bits(self) -> None:
        """Raise UserError if a set of 16-bit pictures holds fewer bits, by some of them."""
        step = max(1, len(self) // _PEAKS_OF)
        peaks = []
        for name in self.names[::step]:
            peaks.append(self._read_image(name).peak_16_bits)
            if too_dark(peaks) is None:  # not 16 bits, or bright enough
                return
        if reason := too_dark(peaks):
            raise UserError(
                f"{self.path}: {reason}. Make a zip with `python -m data prepare {self.path} "
                "OUT.zip --bits N`, N the bits that they have; 16 if they are so dark"
            )

    def _say(self, sentence: str, example: str | None = None) -> None:
        """Log a sentence once."""
        if sentence not in self._said:
            self._said.add(sentence)
            _log.info("%s: %s", self.path, f"{sentence}, first {example}" if example else sentence)


def _pixels(converted: ConvertedImage) -> Tensor:
    """Return an image as uint8 [C, H, W]."""
    pixels = np.array(converted.image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
