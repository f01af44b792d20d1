"""One picture, as any program wrote it, as an image of a set: upright, 8-bit, grey or RGB, opaque.

Every road reads pictures by this file: `python -m data prepare`, evaluations, references, and the
training of a teacher. A change of a picture is returned as a sentence for the user.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data._files import UNREADABLE

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
"""Endings of the names of pictures, in lower case."""

_OPAQUE = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
"""Mode of an opaque picture -> mode of its image."""
_ALPHA = {"RGBA": "RGB", "PA": "RGB", "LA": "L"}
"""Mode with transparency -> without."""
_RAW_16_BITS = re.compile(r"(L|LA|RGB|RGBA|RGBX|CMYK);16[BLNS]*")
_UNDECODABLE = (
    *UNREADABLE,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
"""Exceptions of Pillow for damaged files."""

_UPPER_BITS = "kept the upper 8 of 16 bits a channel"
_SCALED_BITS = "scaled from {} to 8 bits"
_ROTATED = "turned as EXIF says"
_ON_WHITE = "laid on white where transparent"
_DARKEST_PEAK = 63
"""Largest 8-bit value that shows, of all the 16-bit pictures of a set, that they have fewer bits:
a quarter of the range is that of 14 bits.
"""


class UnusablePicture(Exception):
    """A picture cannot be used; the text gives the reason."""


class ConvertedImage(NamedTuple):
    """A picture as an image of a set."""

    image: Image.Image
    """L or RGB."""
    changes: tuple[str, ...] = ()
    """Changes besides cropping and resizing, a sentence each."""
    has_grey_palette: bool = False
    """Whether it is L because all colors of its palette are grey: it fits RGB images too."""
    peak_16_bits: int | None = None
    """Of a picture with 16 bits a channel, all of them significant: its largest value, 0 to 255."""

    def fitting(self, mode: str) -> ConvertedImage:
        """Return the image for a set of this mode: grey of a palette becomes RGB if need be."""
        if self.has_grey_palette and self.image.mode != mode:
            return self._replace(image=self.image.convert(mode))
        return self


def open_picture(content: bytes) -> Image.Image:
    """Return the picture of a file's content, not yet decoded. Raises UnusablePicture."""
    if not content:
        raise UnusablePicture("the file is empty")
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnusablePicture("it is no image of a known format") from error
    except _UNDECODABLE as error:
        raise UnusablePicture(str(error) or type(error).__name__) from error


def convert(picture: Image.Image, *, bits: int | None = None) -> ConvertedImage:
    """Return a picture upright, 8-bit, L or RGB, without transparency. Raises UnusablePicture.

    bits: significant bits of pictures with 16 bits a channel, the lowest ones; None: all 16.
    """
    try:
        return _convert(picture, bits)
    except _UNDECODABLE as error:
        raise UnusablePicture(str(error) or type(error).__name__) from error


def too_dark(peaks: Iterable[int | None]) -> str | None:
    """Return the reason against a set whose 16-bit pictures hold fewer bits; None: they do not.

    peaks: `peak_16_bits` of its pictures.
    """
    known = [peak for peak in peaks if peak is not None]
    if not known or max(known) > _DARKEST_PEAK:
        return None
    bits = 8 + max(max(known).bit_length(), 1)
    return (
        f"no value of its 16-bit pictures is above {256 * max(known) + 255:,} of 65,535, as in "
        f"pictures of {bits} bits that a 16-bit file holds: they would be almost black"
    )


def _convert(picture: Image.Image, bits: int | None) -> ConvertedImage:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a JPEG with a second view behind it
        raise UnusablePicture(f"it has {frames} frames: an animation, or several pages")

    # upright; what the file holds is known before it is decoded
    has_16_bits, is_grey_alpha = _has_16_bits(picture), _is_grey_with_16_bit_alpha(picture)
    is_rotated = picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    changes = [_ROTATED] * is_rotated
    picture = ImageOps.exif_transpose(picture)

    # opaque
    has_grey_palette = picture.mode in ("P", "PA") and _has_grey_palette(picture)
    if picture.mode in _ALPHA or "transparency" in picture.info:
        picture, is_visible = _on_white(picture)
        changes += [_ON_WHITE] * is_visible
    if picture.mode in ("CMYK", "YCbCr"):
        changes.append(f"converted from {picture.mode} to RGB, without a colour profile")

    # 8 bits
    all_bits = bits is None or bits == 16
    if has_16_bits:
        changes.append(_UPPER_BITS if all_bits else _SCALED_BITS.format(bits))
    image = _eight_bits(picture, bits=(bits or 16) if has_16_bits else None)
    if has_grey_palette or is_grey_alpha:
        image = image.convert("L")
    peak = int(np.asarray(image).max()) if has_16_bits and bits is None else None
    return ConvertedImage(image, tuple(changes), has_grey_palette, peak)


def _raw_modes(picture: Image.Image) -> list[str]:
    """Return the layouts of pixels in the file of a picture that is not yet decoded."""
    arguments = [tile[3] for tile in getattr(picture, "tile", ())]
    raw_modes = [a[0] if isinstance(a, tuple) and a else a for a in arguments]
    return [raw for raw in raw_modes if isinstance(raw, str)]


def _has_16_bits(picture: Image.Image) -> bool:
    """Return whether a picture that is not yet decoded has 16 bits a channel in its file."""
    if picture.mode.startswith("I;16"):
        return True
    if picture.mode == "I":  # 32 bits but for these formats, which have 16 at most
        return picture.format in ("PNG", "PPM")
    return any(_RAW_16_BITS.fullmatch(raw) for raw in _raw_modes(picture))


def _is_grey_with_16_bit_alpha(picture: Image.Image) -> bool:
    """Return whether a picture is grey with alpha in 16 bits, which Pillow decodes as RGBA."""
    return picture.mode == "RGBA" and any(raw.startswith("LA") for raw in _raw_modes(picture))


def _has_grey_palette(picture: Image.Image) -> bool:
    """Return whether all colors of the palette that occur are grey."""
    palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    occurring = np.flatnonzero(picture.getchannel(0).histogram())
    colors = palette[occurring[occurring < len(palette)]]
    return bool((colors == colors[:, :1]).all())


def _eight_bits(picture: Image.Image, *, bits: int | None) -> Image.Image:
    """Return an opaque picture converted to L or RGB.

    bits: significant bits of its 16 bits a channel; None: it has 8.
    """
    if picture.mode.startswith("I") and bits is not None:
        pixels = np.asarray(picture)
        if int(pixels.max()) >> bits:
            raise UnusablePicture(f"it has the value {int(pixels.max()):,}, more than {bits} bits")
        return Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
    if bits is not None and bits < 16:
        raise UnusablePicture(
            f"{bits} bits are read from 16-bit grey only: of 16-bit colour, or grey with alpha, "
            "the upper 8 bits are decoded; scale it to the whole range first"
        )
    if picture.mode not in _OPAQUE:
        raise UnusablePicture(
            f"its pixels are of kind {picture.mode!r}, expected 8-bit grey or colour"
        )
    return picture.convert(_OPAQUE[picture.mode])


def _on_white(picture: Image.Image) -> tuple[Image.Image, bool]:
    """Return a picture composed on white, and whether any pixel was transparent."""
    mode = _ALPHA.get(picture.mode) or _OPAQUE.get(picture.mode)
    if mode is None:
        raise UnusablePicture(f"its pixels are of kind {picture.mode!r}, in part transparent")
    layer = picture.convert("RGBA")
    lowest_alpha = int(np.asarray(layer.getchannel("A")).min())
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, layer).convert(mode), lowest_alpha < 255
