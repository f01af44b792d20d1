"""Image set of a zip or folder in the layout of StyleGAN and EDM.

    00000/img00000000.png …   PNG or JPEG; any names, any depth; read in sorted order
    dataset.json              maybe: {"labels": [["00000/img00000000.png", 9], …]}

All images of a set have one size and one number of channels (1 or 3). Nothing is resized, padded
or converted in color.
"""

from __future__ import annotations

import hashlib
import io
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError
from data._files import UNREADABLE, image_names, open_files, read_labels

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


class Images(Dataset[Tensor]):
    """Images of a zip or folder, sorted by name; an item is a uint8 tensor [C, H, W]."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = open_files(self.path)
        self.names = image_names(self._files.names(), _SUFFIXES)
        if not self.names:
            raise UserError(f"{self.path} holds no PNG or JPEG image")
        labels = read_labels(self._files, self.names, self.path)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        """[N] int64, or None if dataset.json is absent or without labels."""
        channels, height, width = self._decode(self.names[0]).shape
        self.image_shape = (channels, height, width)
        """(C, H, W) of every image."""

    @property
    def num_classes(self) -> int:
        """Return the largest label + 1, or 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

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
        image = self._decode(self.names[index])
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

    def _decode(self, name: str) -> Tensor:
        """Return one image as uint8 [C, H, W]."""
        try:
            picture = Image.open(io.BytesIO(self._read(name)))
            picture.load()
        except UNREADABLE as error:
            raise UserError(f"{self.path}: {name} is not a readable image: {error}") from error
        if picture.mode not in _MODES or "transparency" in picture.info:
            raise UserError(
                f"{self.path}: {name} has pixels of kind {picture.mode!r}, maybe transparent; "
                "expected 8-bit grey or RGB: convert it first"
            )
        pixels = np.array(picture.convert(_MODES[picture.mode]))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
