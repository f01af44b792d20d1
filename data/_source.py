"""Picture source: pictures by index in a fixed order, with names and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Source:
    """Pictures with their names and labels."""

    names: Sequence[str]
    """Name of each picture, for messages."""
    picture: Callable[[int], Image.Image]
    """Opens a picture by index; its pixels are decoded at first use. Raises UnusablePicture."""
    labels: Sequence[int] | None = None
    """Label of each picture, from 0 up."""
    class_names: Sequence[str] | None = None
    """Name of each class, if known."""
    padded_size: tuple[int, int] | None = None
    """(W, H) that is reached by a black border instead of enlargement."""
    remarks: tuple[str, ...] = ()
    """Sentences for the user on how the source was interpreted."""
