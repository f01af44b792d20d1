"""A source: pictures by index, in a fixed order, with their names and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "test"]


class Unusable(Exception):
    """Why one picture cannot be used."""


@dataclass(frozen=True)
class Source:
    """Pictures with their names and labels."""

    names: Sequence[str]
    """One for each picture, for messages."""
    picture: Callable[[int], Image.Image]
    """Opens a picture, which is decoded when its pixels are asked for. Raises Unusable."""
    labels: Sequence[int] | None = None
    """One for each picture, from 0 up."""
    class_names: Sequence[str] | None = None
    """The name of each class, where known."""
    padded_size: tuple[int, int] | None = None
    """(W, H) to which pictures are not enlarged: they get a black border instead."""
    remarks: tuple[str, ...] = ()
    """What the user should know of how this source was understood."""
