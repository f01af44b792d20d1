"""One reader of pictures for every road: what `prepare` writes is what an evaluation reads."""

from __future__ import annotations

import io
import json
import logging
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import ExifTags, Image

from core.errors import UserError
from data.__main__ import main
from data.images import Images

_GREYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _prepare(source: Path, *options: str) -> tuple[int, str, Path]:
    """Run the command; return its exit code, its output, and the zip."""
    out = source.with_name("out.zip")
    result = CliRunner().invoke(main, ["prepare", str(source), str(out), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output, out


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _png(width: int, height: int, *, depth: int, color_type: int, rows: bytes) -> bytes:
    """Return a PNG of rows that begin with a filter byte each."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def _save(path: Path, picture: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def _rgb(path: Path) -> None:
    _save(path, Image.fromarray(_pixels(8, 8, 3)))


def _rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _save(path, Image.fromarray(_pixels(8, 8, 3)), exif=exif)


def _transparent(path: Path) -> None:
    _save(path, Image.fromarray(_pixels(8, 8, 4), "RGBA"))


def _sixteen_bits(path: Path) -> None:
    _save(path, Image.fromarray(_pixels(8, 8).astype(np.uint16) * 257))


def _cmyk(path: Path) -> None:
    _save(path, Image.fromarray(_pixels(8, 8, 4), "CMYK"))


def _palette(path: Path) -> None:
    picture = Image.fromarray(_pixels(8, 8), "P")
    picture.putpalette(_pixels(256, 3, seed=1).tobytes())
    _save(path, picture)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((f"a.{ending}", _rgb) for ending in ("png", "jpg", "bmp", "webp", "tiff", "ppm", "JPEG")),
        ("a.gif", _palette),
        ("a.png", _palette),
        ("a.jpg", _rotated),
        ("a.png", _transparent),
        ("a.png", _sixteen_bits),
        ("a.tif", _cmyk),
    ],
)
def test_both_roads_read_the_same(tmp_path: Path, name: str, write) -> None:
    """An evaluation of a folder measures the pixels that `prepare` writes of it."""
    write(tmp_path / "set" / name)
    code, output, out = _prepare(tmp_path / "set")
    assert code == 0, output
    assert torch.equal(Images(tmp_path / "set").load_all(), Images(out).load_all())


def test_what_is_not_read_and_what_is_changed_is_said_once(tmp_path: Path, caplog) -> None:
    """The log names files that are no images, and the first picture of each change."""
    for name in ("a.png", "b.png"):
        _transparent(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    with caplog.at_level(logging.INFO):
        Images(tmp_path).load_all()
    assert caplog.text.count("laid on white where transparent, first a.png") == 1
    assert caplog.text.count("not ending like an image: 1 of 3 files: notes.txt") == 1


def test_a_picture_of_too_many_pixels_is_named_on_both_roads(tmp_path: Path) -> None:
    """Pillow refuses a bomb: the sentence names the file."""
    _rgb(tmp_path / "set" / "a.png")
    bomb = _png(20_000, 20_000, depth=8, color_type=0, rows=b"")
    (tmp_path / "set" / "b.png").write_bytes(bomb)
    code, output, _ = _prepare(tmp_path / "set")
    assert code == 2 and "b.png: Image size (400000000 pixels) exceeds limit" in output
    with pytest.raises(UserError, match=r"b.png is not a readable image: Image size"):
        Images(tmp_path / "set").load_all()


def test_an_animation_is_refused_on_both_roads(tmp_path: Path) -> None:
    frames = [Image.fromarray(_pixels(8, 8, seed=seed)) for seed in range(3)]
    _save(tmp_path / "set" / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    code, output, _ = _prepare(tmp_path / "set")
    assert code == 2 and "it has 3 frames" in output
    with pytest.raises(UserError, match=r"a.gif is not a readable image: it has 3 frames"):
        Images(tmp_path / "set")


@pytest.mark.parametrize("data_set", ["cifar-10-python.tar.gz", "digits"])
def test_a_published_data_set_is_sent_to_prepare(tmp_path: Path, data_set: str) -> None:
    """Only `prepare` reads CIFAR-10 and MNIST as published; the other roads say so."""
    path = tmp_path / data_set
    if path.suffix:
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a data set as published.*data prepare"):
        Images(path)


# Grey


def _mode(folder: Path) -> int:
    code, output, out = _prepare(folder)
    assert code == 0, output
    channels = Images(out).image_shape[0]
    assert Images(folder).image_shape[0] == channels
    return channels


def test_grey_in_a_palette_is_grey(tmp_path: Path) -> None:
    """Colors that do not occur do not count."""
    values = _pixels(8, 8) % 200
    picture = Image.fromarray(values, "P")
    colors = _GREYS.copy()
    colors[200:] = 255, 0, 0
    picture.putpalette(colors.tobytes())
    _save(tmp_path / "set" / "a.png", picture)
    assert _mode(tmp_path / "set") == 1
    assert torch.equal(Images(tmp_path / "set")[0][0], torch.from_numpy(values))


def test_grey_in_a_palette_with_a_clear_color_is_grey(tmp_path: Path) -> None:
    picture = Image.fromarray(_pixels(8, 8), "P")
    picture.putpalette(_GREYS.tobytes())
    _save(tmp_path / "set" / "a.png", picture, transparency=7)
    assert _mode(tmp_path / "set") == 1


def test_a_grey_palette_among_colored_ones_is_rgb(tmp_path: Path) -> None:
    """A blank picture of a set in color does not stop it."""
    _palette(tmp_path / "set" / "a.png")
    picture = Image.fromarray(_pixels(8, 8), "P")
    picture.putpalette(_GREYS.tobytes())
    _save(tmp_path / "set" / "b.png", picture)
    assert _mode(tmp_path / "set") == 3
    assert torch.equal(Images(tmp_path / "set")[1][0], torch.from_numpy(_pixels(8, 8)))


@pytest.mark.parametrize(("depth", "dtype"), [(8, ">u1"), (16, ">u2")])
def test_grey_with_alpha_is_grey_in_8_and_16_bits(tmp_path: Path, depth: int, dtype: str) -> None:
    """Grey values of opaque pixels stay what they are."""
    values, most = _pixels(4, 4), 2**depth - 1
    samples = np.stack([values.astype(np.int64) * (most // 255), np.full((4, 4), most)], -1)
    rows = b"".join(b"\0" + row.astype(dtype).tobytes() for row in samples)
    (tmp_path / "set").mkdir()
    png = _png(4, 4, depth=depth, color_type=4, rows=rows)
    (tmp_path / "set" / "a.png").write_bytes(png)
    assert _mode(tmp_path / "set") == 1
    assert torch.equal(Images(tmp_path / "set")[0][0], torch.from_numpy(values))


# Bits


def _of_bits(folder: Path, bits: int, *, count: int = 3) -> np.ndarray:
    """Write 16-bit pictures with values of fewer bits; return them."""
    rng = np.random.default_rng(bits)
    pictures = rng.integers(0, 2**bits, (count, 8, 8)).astype(np.uint16)
    for index, pixels in enumerate(pictures):
        _save(folder / f"{index:02d}.png", Image.fromarray(pixels))
    return pictures


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_16_bit_files_are_refused_until_they_are_named(
    tmp_path: Path, bits: int
) -> None:
    """An almost black set is no default: the error names the option, which scales to 8 bits."""
    pictures = _of_bits(tmp_path / "set", bits)
    code, output, out = _prepare(tmp_path / "set")
    assert code == 2 and f"as in pictures of {bits} bits" in output and "--bits N" in output
    assert not out.exists()
    with pytest.raises(UserError, match=f"as in pictures of {bits} bits.*--bits N"):
        Images(tmp_path / "set")

    code, output, out = _prepare(tmp_path / "set", "--bits", str(bits))
    assert code == 0 and f"scaled from {bits} to 8 bits: 3 images" in output
    expected = torch.from_numpy((pictures >> (bits - 8)).astype(np.uint8))
    assert torch.equal(Images(out).load_all()[:, 0], expected)

    code, output, out = _prepare(tmp_path / "set", "--bits", "16", "--overwrite")
    assert code == 0 and torch.equal(
        Images(out).load_all()[:, 0], torch.from_numpy((pictures >> 8).astype(np.uint8))
    )


def test_a_dark_picture_among_others_is_read(tmp_path: Path) -> None:
    """The rule is one of a set: a single dark picture of 16 bits is what it is."""
    _of_bits(tmp_path / "set", 10, count=20)
    _sixteen_bits(tmp_path / "set" / "05.png")
    code, output, _ = _prepare(tmp_path / "set")
    assert code == 0, output


def test_more_bits_than_named_are_refused(tmp_path: Path) -> None:
    _of_bits(tmp_path / "set", 13)
    code, output, _ = _prepare(tmp_path / "set", "--bits", "12")
    assert code == 2 and "more than 12 bits" in output


# Zips and labels


def _content(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(_pixels(8, 8, 3, seed=seed)).save(content, "png")
    return content.getvalue()


def _zip(path: Path, names: list[str], labels: object = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in enumerate(names):
            archive.writestr(name, _content(index))
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_a_zip_packed_on_windows_has_its_classes(tmp_path: Path) -> None:
    r"""cat\0.png lies in the folder cat."""
    source = _zip(tmp_path / "set.zip", ["cat\\0.png", "dog\\0.png", "dog\\1.png"])
    code, output, out = _prepare(source)
    assert code == 0 and "2 classes" in output
    labels = Images(out).labels
    assert labels is not None and labels.tolist() == [0, 1, 1]
    assert Images(source).names == ["cat/0.png", "dog/0.png", "dog/1.png"]


@pytest.mark.parametrize("written", ["a\\0.png", "./a/0.png", ".\\a\\0.png"])
def test_names_in_dataset_json_are_found_however_they_are_written(
    tmp_path: Path, written: str
) -> None:
    images = Images(_zip(tmp_path / "set.zip", ["a/0.png"], labels=[[written, 5]]))
    assert images.labels is not None and images.labels.tolist() == [5]


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_with_accents_are_found(tmp_path: Path, forms: tuple[str, str]) -> None:
    """macOS writes the letter and its accent as two characters."""
    packed, written = (unicodedata.normalize(form, "é/0.png") for form in forms)
    images = Images(_zip(tmp_path / "set.zip", [packed], labels=[[written, 3]]))
    assert images.labels is not None and images.labels.tolist() == [3]


@pytest.mark.parametrize("second", ["0.png", "./0.png"])
def test_two_labels_of_one_image_are_refused(tmp_path: Path, second: str) -> None:
    """Neither the first nor the last wins; the same label twice is no harm."""
    twice = _zip(tmp_path / "set.zip", ["0.png"], labels=[["0.png", 1], [second, 2]])
    with pytest.raises(UserError, match=r"0.png has two labels, 1 and 2"):
        Images(twice)
    same = _zip(tmp_path / "same.zip", ["0.png"], labels=[["0.png", 1], [second, 1]])
    assert Images(same).labels is not None


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a/0.png", "a\\0.png"])
def test_two_files_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    """Of two entries of a zip with one name, neither is counted twice nor lost."""
    source = _zip(tmp_path / "set.zip", ["a/0.png", second])
    with pytest.raises(UserError, match=r"has two files a/0.png"):
        Images(source)
    code, output, _ = _prepare(source)
    assert code == 2 and "has two files a/0.png" in output


def test_a_label_beyond_all_classes_is_refused(tmp_path: Path) -> None:
    """No list as long as the label is made."""
    source = _zip(tmp_path / "set.zip", ["0.png"], labels=[["0.png", 10**12]])
    code, output, _ = _prepare(source)
    assert code == 2 and "the label 1000000000000; expected a whole number from 0 up" in output
    with pytest.raises(UserError, match="below 1,000,000"):
        Images(source)
