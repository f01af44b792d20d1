"""`python -m data prepare SOURCE OUT.zip`: conversion of images to the layout of StyleGAN."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import click
from tqdm import tqdm

from core.cli import report_user_errors
from core.errors import UserError
from data import prepare as preparation
from data.prepare import Options, Size, Summary, broken_lines

_LINE_EVERY_SECONDS = 15.0
_POWER_OF_TWO_HINT = (
    "StyleGAN's and EDM's networks take squares whose side is a power of two (32, 64, 128, …); "
    "for them, give such a --resolution"
)


class _Resolution(click.ParamType):
    name = "N|WxH"

    def convert(self, value: object, param: object, ctx: object) -> Size:
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(value))
        width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not (width and height):
            self.fail(f"{value!r}: expected pixels such as 64, or width x height such as 64x48")
        return width, height


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Prepare sets of real images for references (FID) and for training."""


PREPARE_HELP = """Write OUT.zip from the images at SOURCE: of one size, as PNG, with their labels.

It is an input of refine.py --teach, of reference statistics, and of StyleGAN's and EDM's programs.

\b
python -m data prepare photos mine.zip --resolution 64 --crop center
    the middle of each photo in the folder photos, 64x64
python -m data prepare cifar-10-python.tar.gz cifar10.zip
    CIFAR-10 as its authors publish it; --split test for the test images
python -m data prepare train-images-idx3-ubyte.gz mnist.zip --resolution 32
    MNIST and sets like it, the file of labels lying beside

\b
SOURCE is one of
    a folder or zip of PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, in folders of any depth
    cifar-10-python.tar.gz, or the folder unpacked from it
    an idx file of MNIST (train-images-idx3-ubyte.gz), or a folder of them
    a zip or folder of this command, or of StyleGAN's or EDM's programs

Labels are those of dataset.json in SOURCE; without one, each folder of images is a class, in
the order of their names (cat is 0, dog is 1), and the names are kept. Images in one folder
have no labels.

Images are read in the order of their names. Images smaller than --resolution are enlarged,
except MNIST's 28x28 digits, which get a black border for --resolution 32. Photos are rotated by
their EXIF orientation, transparent pixels are composed on white, 16-bit channels are reduced to
their upper 8 bits, CMYK is converted to RGB without a color profile; the number of images for
each of these changes is printed at the end. A set that would be almost black, as of 12 bits in
16-bit files, is refused until --bits says how many there are. Animations cannot be used. If any
image cannot be used, all such images are listed and nothing is written, unless --skip-broken is
given.

The same images and options give the same file, byte for byte. Images in it are not compressed:
50,000 of 32x32 in RGB take 166 MB, one of 256x256 takes 0.2 MB.
"""


@main.command(help=PREPARE_HELP)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.zip")
@click.option(
    "--resolution",
    type=_Resolution(),
    metavar="N|WxH",
    help="Size of all images, in pixels: 64, or width x height as 64x48.  [default: as they are]",
)
@click.option(
    "--crop",
    type=click.Choice(["none", "center"]),
    default="none",
    show_default=True,
    help="Images of another aspect ratio than --resolution: none stops with an error, center cuts "
    "the largest part of that aspect ratio out of the middle. Images are never stretched.",
)
@click.option(
    "--filter",
    "resampling",
    type=click.Choice(list(preparation.FILTERS)),
    default="lanczos",
    show_default=True,
    help="Resampling filter: lanczos is sharpest, box averages, bicubic is between.",
)
@click.option(
    "--channels",
    type=click.Choice(["1", "3", "keep"]),
    default="keep",
    show_default=True,
    help="1 makes all images grey, 3 makes them RGB.",
)
@click.option(
    "--bits",
    type=click.IntRange(9, 16),
    metavar="9..16",
    help="Bits of the pictures that 16-bit grey files hold, such as 12 of a scanner: they are "
    "scaled to 8.  [default: 16]",
)
@click.option("--images", type=click.IntRange(min=1), metavar="N", help="Only the first N images.")
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="Part of CIFAR-10 or MNIST.  [default: train]",
)
@click.option(
    "--flat-labels",
    is_flag=True,
    help="Where folders of classes have folders in them, make each innermost one a class of its "
    "own: animals/cat and animals/dog instead of animals.",
)
@click.option("--no-labels", is_flag=True, help="Ignore the labels of SOURCE and write none.")
@click.option(
    "--skip-broken", is_flag=True, help="Leave out and list images that cannot be used, and go on."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.zip if it exists.")
@report_user_errors(stopped="stopped; nothing was written")
def prepare(
    source: Path,
    out: Path,
    resolution: Size | None,
    crop: Literal["none", "center"],
    resampling: Literal["lanczos", "box", "bicubic"],
    channels: Literal["1", "3", "keep"],
    bits: int | None,
    images: int | None,
    split: Literal["train", "test"] | None,
    flat_labels: bool,
    no_labels: bool,
    skip_broken: bool,
    overwrite: bool,
) -> None:
    """Write a zip of images; `PREPARE_HELP` explains it."""
    _check_options(source, out, resolution, crop, flat_labels=flat_labels, no_labels=no_labels)

    # read the source
    labeling = "none" if no_labels else "flat" if flat_labels else "folders"
    opened = preparation.open_source(source, labeling=labeling, split=split)
    for remark in opened.remarks:
        click.echo(f"{source}: {remark}", err=True)

    # write the zip
    summary = preparation.prepare(
        opened,
        out,
        Options(resolution, crop, resampling, channels, bits),
        images=images,
        skip_broken=skip_broken,
        overwrite=overwrite,
        show=_progress,
    )
    click.echo("\n".join(_report(summary, out)))


def _check_options(
    source: Path,
    out: Path,
    resolution: Size | None,
    crop: str,
    *,
    flat_labels: bool,
    no_labels: bool,
) -> None:
    """Raise UserError for options that exclude each other or miss another."""
    if flat_labels and no_labels:
        raise UserError("--flat-labels and --no-labels exclude each other: give one of them")
    if crop != "none" and resolution is None:
        raise UserError(f"--crop {crop} needs the shape to crop to: give --resolution too")
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"SOURCE and OUT are both {out}: write to another file")


def _report(summary: Summary, out: Path) -> list[str]:
    """Return the lines of the result: changes, omitted pictures, hints and the file."""
    width, height = summary.size
    kind = "grey" if summary.channels == 1 else "RGB"
    lines = [f"{change}: {_images(count)}" for change, count in summary.changes.items()]
    if summary.left_out:
        lines += [f"left out: {_images(len(summary.left_out))}", *broken_lines(summary.left_out)]
    if width != height or width & (width - 1):
        lines.append(f"{width}x{height}: {_POWER_OF_TWO_HINT}")
    written = f"wrote {out}: {_images(summary.images)}, {width}x{height} {kind}"
    return [*lines, f"{written}, {_classes(summary)}, {out.stat().st_size / 1e6:,.1f} MB"]


def _classes(summary: Summary) -> str:
    """Return the number of classes and the range of their sizes."""
    if summary.labels is None:
        return "no labels"
    counts = Counter(summary.labels)
    classes = max(len(summary.class_names or ()), max(counts) + 1)
    each = [counts[label] for label in range(classes)]
    return f"{classes} classes of {min(each):,} to {_images(max(each))}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _progress(indices: Iterable[int], total: int) -> Iterable[int]:
    """Yield the indices; show a progress bar on a terminal, else a plain line every 15 seconds."""
    if sys.stderr.isatty():
        yield from tqdm(indices, total=total, unit=" images", dynamic_ncols=True)
        return
    started_at = line_at = time.monotonic()
    for done, index in enumerate(indices):
        now = time.monotonic()
        if now - line_at >= _LINE_EVERY_SECONDS:
            line_at, rate = now, done / (now - started_at)
            left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
            click.echo(f"{done}/{total} images  {rate:.0f} images/s  {left} left", err=True)
        yield index


if __name__ == "__main__":
    main()
