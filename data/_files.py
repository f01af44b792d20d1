"""Files of a folder or zip, their image names, and the labels in dataset.json."""

from __future__ import annotations

import os
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from core.disk import parsed_json
from core.errors import UserError

LABELS_FILE = "dataset.json"
CLASS_NAMES = "class_names"
"""Key of dataset.json for the class names, ignored by other programs."""
MOST_CLASSES = 1_000_000
"""Limit on the number of classes: a label beyond it is a mistake."""
_OTHERS_NAMED = 3

UNREADABLE = (
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,  # of an encrypted file in a zip
    SyntaxError,  # of a damaged PNG
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of reading and decoding a file of a folder or zip."""


class Files(Protocol):
    """Files by name."""

    def names(self) -> list[str]:
        """Return all names, with / as separator."""
        ...

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        ...


class Folder:
    """Files below a folder, including those behind links to folders."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        try:
            files = [Path(file) for file in _below(self._path)]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
        return [file.relative_to(self._path).as_posix() for file in files]

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()


class Zip:
    """Files of a zip, opened once in each process: workers must not share a file position."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._entries: dict[str, str] = {}
        for entry in self._archive().infolist():
            self._add(entry)

    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> bytes:
        return self._archive().read(self._entries[name])

    def _add(self, entry: zipfile.ZipInfo) -> None:
        """Note a file. Raises UserError if the zip has its name already."""
        name = _with_slashes(entry.filename)
        if entry.is_dir() or name.endswith("/"):
            return
        if name in self._entries:
            raise UserError(f"{self._path} has two files {name}: pack the images again")
        self._entries[name] = entry.filename

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self._path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def open_files(path: Path) -> Folder | Zip:
    """Return the files of a folder or zip. Raises UserError if path is neither."""
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UserError(f"no images at {path}: expected an existing zip or folder")
    if not _is_whole_zip(path):
        raise UserError(
            f"{path} is neither a folder nor a readable zip: expected images in one of the two"
        )
    return Zip(path)


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden, or metadata that macOS adds to zips."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def image_names(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Return the names with an image suffix, sorted, without hidden files."""
    return sorted(
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in suffixes and not is_hidden(name)
    )


def unread_files(all_names: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence on the files that are not among the read images, if there are any."""
    known = {*names, LABELS_FILE}
    others = sorted(name for name in all_names if name not in known and not is_hidden(name))
    if not others:
        return ()
    shown = ", ".join(others[:_OTHERS_NAMED]) + (", …" if len(others) > _OTHERS_NAMED else "")
    return (
        f"not read, not ending like an image: {len(others)} of {len(all_names)} files: {shown}",
    )


def read_labels(files: Files, names: Sequence[str], path: Path) -> list[int] | None:
    """Return the label of each name, or None if dataset.json is absent or without labels.

    Raises UserError if an image has no label or two, or a label is no whole number.
    """
    try:
        metadata = _metadata(files)
        if "labels" not in metadata:
            raise ValueError('it has no "labels"')
        pairs = metadata["labels"]
        label_of = None if pairs is None else _label_of_name(pairs)
    except (*UNREADABLE, TypeError) as error:
        raise UserError(
            f'{path}: {LABELS_FILE} must be {{"labels": [["name", 3], …]}} or '
            f'{{"labels": null}}, but: {error}'
        ) from error
    if label_of is None:
        return None
    return [_label(label_of, name, path) for name in names]


def _label_of_name(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Return the label of each name. Raises ValueError if a name has two."""
    label_of: dict[str, object] = {}
    for name, label in pairs:
        for form in (name, _normal_form(name)):
            if label_of.setdefault(form, label) != label:
                raise ValueError(f"{form} has two labels, {label_of[form]} and {label}")
    return label_of


def _label(label_of: Mapping[str, object], name: str, path: Path) -> int:
    label = label_of.get(name, label_of.get(_normal_form(name)))
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        raise UserError(
            f"{path}: {LABELS_FILE} gives {name} the label {label!r}; "
            f"expected a whole number from 0 up, below {MOST_CLASSES:,}"
        )
    return label


def read_class_names(files: Files, labels: Sequence[int], path: Path) -> list[str] | None:
    """Return the names of classes 0, 1, … in dataset.json, or None.

    labels: labels of the images. Raises UserError if there are fewer names than classes.
    """
    names = _metadata(files).get(CLASS_NAMES)
    if names is None:
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) <= max(labels):
        raise UserError(
            f'{path}: "{CLASS_NAMES}" in {LABELS_FILE} must be a list of names, one for each '
            f"label from 0 to {max(labels)}"
        )
    return names


def _metadata(files: Files) -> dict:
    try:
        content = files.read(LABELS_FILE)
    except (KeyError, FileNotFoundError):  # no such file in a zip; in a folder
        return {"labels": None}
    metadata = parsed_json(content)
    if not isinstance(metadata, dict):
        raise TypeError(f"a {type(metadata).__name__}")
    return metadata


def _is_whole_zip(path: Path) -> bool:
    try:
        zipfile.ZipFile(path).close()
    except (OSError, NotImplementedError, zipfile.BadZipFile):
        return False
    return True


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield all files below a folder; links to a parent folder are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _below(Path(entry.path), (*above, real))
            elif entry.is_file() or entry.is_symlink():  # a broken link is reported by name
                yield entry.path


def _normal_form(name: str) -> str:
    """Return a name in one form, whichever system wrote it: macOS takes letters apart."""
    return unicodedata.normalize("NFC", _with_slashes(name))


def _with_slashes(name: str) -> str:
    """Return the name of a file that was packed on Windows, or from ".", with / alone."""
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name
