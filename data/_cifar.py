"""CIFAR-10 as published for Python: cifar-10-python.tar.gz, or its unpacked folder.

A batch is a pickle of Python 2: {"data": uint8 [N, 3072], channels first, "labels": N
numbers, …} (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009). It is read
as data by pretrained.nvidia_pickle, which builds arrays, lists and strings only.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from core.errors import UserError
from data._source import Source, Split

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_CLASS_NAMES_FILE = "batches.meta"
_FOLDER = "cifar-10-batches-py"
_SHAPE = (3, 32, 32)
_CLASSES = 10
_BATCH_BYTES_LIMIT = 1 << 28
"""Limit of a file in the archive: a published batch has 31 MB."""


def is_at(path: Path) -> bool:
    """Return whether path is a tar archive, or a folder with batches of CIFAR-10."""
    if path.is_dir():
        return _batches_folder(path) is not None
    return path.is_file() and path.name.lower().endswith((".tar", ".tgz", ".tar.gz"))


def read(path: Path, split: Split, *, labeled: bool) -> Source:
    """Return the images of one split, in the order of its batches.

    Raises UserError if a batch is missing, damaged or not of plain data.
    """
    # batches
    batch_names = _BATCHES[split]
    folder = _batches_folder(path)
    files = (
        _from_folder(folder, batch_names)
        if folder is not None
        else _from_archive(path, batch_names)
    )
    missing = [name for name in batch_names if name not in files]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: expected cifar-10-python.tar.gz as published, its "
            "unpacked folder, or any other images in a folder or zip"
        )
    batches = [_batch(files[name], f"{path}: {name}") for name in batch_names]
    images = np.concatenate([images for images, _ in batches])

    # labels and class names
    counts = {name: len(labels) for name, (_, labels) in zip(batch_names, batches, strict=True)}
    class_names = _class_names(files.get(_CLASS_NAMES_FILE), f"{path}: {_CLASS_NAMES_FILE}")
    return Source(
        names=[f"{name}[{index}]" for name in batch_names for index in range(counts[name])],
        picture=lambda index: Image.fromarray(images[index]),
        labels=[label for _, labels in batches for label in labels] if labeled else None,
        class_names=class_names if labeled else None,
        remarks=(
            f"CIFAR-10, {split} images",
            "labels from its batches" if labeled else "no labels, as --no-labels asks",
        ),
    )


def _batches_folder(path: Path) -> Path | None:
    """Return the folder with batches: path, or its published subfolder; None without."""
    every = [name for names in _BATCHES.values() for name in names]
    folders = (path, path / _FOLDER)
    return next((f for f in folders if any((f / name).is_file() for name in every)), None)


def _from_folder(folder: Path, batch_names: Sequence[str]) -> dict[str, bytes]:
    files = [folder / name for name in (*batch_names, _CLASS_NAMES_FILE)]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _from_archive(path: Path, batch_names: Sequence[str]) -> dict[str, bytes]:
    """Return file name -> content for the batches of a tar archive, without unpacking it."""
    contents = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in (*batch_names, _CLASS_NAMES_FILE):
                    if member.size > _BATCH_BYTES_LIMIT:
                        raise UserError(f"{path}: {name} is larger than any batch of CIFAR-10")
                    file = archive.extractfile(member)
                    assert file is not None, "a member that is a file"
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut off or no tar archive: {error}") from error
    return contents


def _batch(content: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Return the images of a batch, uint8 [N, 32, 32, 3], and their labels."""
    batch = _unpickle(content, where)
    data, labels = batch.get("data"), batch.get("labels")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise UserError(f"{where} has no images as CIFAR-10 has them: expected uint8 [N, 3072]")
    if data.shape[1] != np.prod(_SHAPE):
        raise UserError(f"{where} has images of {data.shape[1]} values, expected 3072")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(n) is int and 0 <= n < _CLASSES for n in labels)
    ):
        raise UserError(f"{where} must have one label from 0 to 9 for each of {len(data)} images")
    images = data.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _class_names(content: bytes | None, where: str) -> list[str] | None:
    names = None if content is None else _unpickle(content, where).get("label_names")
    if not isinstance(names, list) or len(names) != _CLASSES:
        return None
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _unpickle(content: bytes, where: str) -> dict[str, object]:
    """Return a pickled dict with str keys; Python 2 strings become str."""
    from pretrained import nvidia_pickle  # it imports torch, which takes seconds

    batch = nvidia_pickle.read_plain(content, what=where)
    if not isinstance(batch, dict):
        raise UserError(f"{where} holds a {type(batch).__name__}, expected a dict as CIFAR-10 has")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in batch.items()}
