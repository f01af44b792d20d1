"""Images of a folder or zip, with labels from dataset.json or from the names of folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from PIL import Image

from core.errors import UserError
from data._files import (
    LABELS_FILE,
    UNREADABLE,
    Files,
    image_names,
    is_hidden,
    open_files,
    read_class_names,
    read_labels,
    unread_files,
)
from data._pictures import SUFFIXES, UnusablePicture, open_picture
from data._source import Source

Labeling = Literal["folders", "flat", "none"]
"""Source of a class: the first folder level with several names; the innermost folder; none."""

_SPLIT_FOLDERS = {"train", "training", "test", "testing", "val", "valid", "validation"}
_NUMBERED = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")
"""Name in the layout of `prepare`, whose folders are not classes."""


def read(path: Path, labeling: Labeling) -> Source:
    """Return the images of a folder or zip, sorted by name.

    Raises UserError if there are none, or if the labels do not fit them.
    """
    # names
    files = open_files(path)
    all_names = files.names()
    names = image_names(all_names, SUFFIXES)
    if not names:
        raise UserError(f"{path} holds no image; expected files that end in {', '.join(SUFFIXES)}")

    # labels
    if labeling != "none":
        _check_labels_file(all_names, path)
    if labeling != "none" and LABELS_FILE in all_names:
        labels, class_names, remark = _labels_of_file(files, names, path)
    else:
        labels, class_names, remark = _labels_of_folders(names, path, labeling)

    return Source(
        names=names,
        picture=lambda index: _picture(files, names[index]),
        labels=labels,
        class_names=class_names,
        remarks=(*unread_files(all_names, names), remark),
    )


def _picture(files: Files, name: str) -> Image.Image:
    try:
        content = files.read(name)
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusablePicture(why) from error
    return open_picture(content)


# Labels -----------------------------------------------------------------------------------------


class _Labels(NamedTuple):
    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    remark: str
    """Origin of the labels, or the reason for none."""


def _labels_of_file(files: Files, names: Sequence[str], path: Path) -> _Labels:
    labels = read_labels(files, names, path)
    if labels is None:
        return _Labels(None, None, f"no labels, as {LABELS_FILE} says")
    return _Labels(labels, read_class_names(files, labels, path), f"labels from {LABELS_FILE}")


def _labels_of_folders(names: Sequence[str], path: Path, labeling: Labeling) -> _Labels:
    if labeling == "none":
        return _Labels(None, None, "no labels, as --no-labels asks")
    if all(_NUMBERED.fullmatch(name) for name in names):
        return _Labels(None, None, f"no labels: there is no {LABELS_FILE}")
    classes = _classes(names, path, labeling)
    if classes is None:
        return _Labels(None, None, "no labels: all images lie in one folder")
    class_names = sorted(set(classes))
    number = {name: index for index, name in enumerate(class_names)}
    labels = [number[name] for name in classes]
    return _Labels(labels, class_names, "labels from the names of folders")


def _check_labels_file(all_names: Sequence[str], path: Path) -> None:
    """Raise UserError if dataset.json is in a subfolder only."""
    deeper = [n for n in all_names if n.endswith(f"/{LABELS_FILE}") and not is_hidden(n)]
    if deeper and LABELS_FILE not in all_names:
        raise UserError(
            f"{path} has its labels in {deeper[0]}, expected {LABELS_FILE} at the top: give the "
            "folder that it lies in (unpack a zip for that), or --no-labels"
        )


def _classes(names: Sequence[str], path: Path, labeling: Labeling) -> list[str] | None:
    """Return the class name of each image, or None if there are no classes."""
    # folders below the common one
    folders = [PurePosixPath(name).parent.as_posix() for name in names]
    shared = os.path.commonpath(folders) if "." not in folders else ""
    below = [os.path.relpath(folder, shared or ".").replace(os.sep, "/") for folder in folders]
    if set(below) == {"."}:
        return None
    if "." in below:
        raise UserError(
            f"{path}: {names[below.index('.')]} lies beside the folders of classes, in none of "
            "them: move it into one, or give --no-labels"
        )

    # one class for each folder
    if labeling == "flat":
        return below
    classes = [folder.partition("/")[0] for folder in below]
    if {name.lower() for name in classes} <= _SPLIT_FOLDERS:
        raise UserError(
            f"{path} has the folders {', '.join(sorted(set(classes)))}, which look like parts of a "
            "set, not like classes: give one of them as SOURCE, or --no-labels for all together"
        )
    return classes
