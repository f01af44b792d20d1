"""Images of a zip or folder in the layout that StyleGAN and EDM use.

    00000/img00000000.png …   PNG or JPEG; any names, any depth; read in sorted order
    dataset.json              maybe: {"labels": [["00000/img00000000.png", 9], …]}

All images of a set have one size and one number of channels (1 or 3). Nothing is resized,
padded or recoloured here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LABELS_FILE = "dataset.json"
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


class Images(Dataset[Tensor]):
    """The images of a zip or folder, sorted by name; an item is a uint8 tensor [C, H, W]."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = _open(self.path)
        self.names = _image_names(self._files.names())
        if not self.names:
            raise UserError(f"{self.path} holds no PNG or JPEG image")
        self.labels = _read_labels(self._files, self.names, self.path)
        """[N] int64, or None where dataset.json is absent or gives none."""
        self.image_shape: tuple[int, int, int] = tuple(self._decode(self.names[0]).shape)
        """(C, H, W) of every image."""

    @property
    def num_classes(self) -> int:
        """Return the largest label + 1, or 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @cached_property
    def sha256(self) -> str:
        """Return a hash of names, labels and file bytes in sorted order.

        A zip and the folder it was made of have the same one.
        """
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            label = "" if self.labels is None else int(self.labels[index])
            content = self._files.read(name)
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

    def _decode(self, name: str) -> Tensor:
        """Return one image as uint8 [C, H, W]."""
        try:
            picture = Image.open(io.BytesIO(self._files.read(name)))
            picture.load()
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} is not a readable image: {error}") from error
        if picture.mode not in _MODES or "transparency" in picture.info:
            raise UserError(
                f"{self.path}: {name} has pixels of kind {picture.mode!r}, maybe transparent; "
                "expected 8-bit grey or RGB: convert it first"
            )
        pixels = np.array(picture.convert(_MODES[picture.mode]))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


class _Folder:
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        files = (file for file in self._path.rglob("*") if file.is_file())
        return [file.relative_to(self._path).as_posix() for file in files]

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()


class _Zip:
    """The files of a zip, opened once a process: workers must not share one file position."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def names(self) -> list[str]:
        return [entry.filename for entry in self._archive().infolist() if not entry.is_dir()]

    def read(self, name: str) -> bytes:
        return self._archive().read(name)

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self._path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_opened": None}


def _open(path: Path) -> _Folder | _Zip:
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"no images at {path}: expected an existing zip or folder")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is neither a folder nor a readable zip: expected images in one of the two"
        )
    return _Zip(path)


def _image_names(names: list[str]) -> list[str]:
    """Return the image files among names, sorted, without the hidden ones that some systems add."""

    def is_image(name: str) -> bool:
        path = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        return path.suffix.lower() in _SUFFIXES and not hidden

    return sorted(name for name in names if is_image(name))


def _read_labels(files: _Folder | _Zip, names: list[str], path: Path) -> Tensor | None:
    """Return [N] int64 in the order of names, or None."""
    if _LABELS_FILE not in files.names():
        return None
    try:
        pairs = json.loads(files.read(_LABELS_FILE))["labels"]
        label_of = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: {_LABELS_FILE} must be {{"labels": [["name", 3], …]}} or '
            f'{{"labels": null}}, but: {error!r}'
        ) from error
    if label_of is None:
        return None
    for name in names:
        label = label_of.get(name)
        if type(label) is not int or label < 0:
            raise UserError(
                f"{path}: {_LABELS_FILE} gives {name} the label {label!r}; "
                "expected a whole number from 0 up"
            )
    return torch.tensor([label_of[name] for name in names], dtype=torch.int64)


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
