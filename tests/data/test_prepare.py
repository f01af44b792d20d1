"""`python -m data prepare`: every kind of source, what is done to pictures, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from data.__main__ import main
from data.images import Images
from data.prepare import png


def _prepare(*arguments: object) -> Result:
    """Run the command; a failure that is no exit of its own comes up."""
    result = CliRunner().invoke(main, ["prepare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _made(*arguments: object) -> Images:
    """Run the command, which must go well, and open what it wrote."""
    result = _prepare(*arguments)
    assert result.exit_code == 0, result.output
    return Images(str(arguments[1]))


def _refused(*arguments: object) -> str:
    """Run the command, which must leave with a sentence and code 2 and write nothing."""
    result = _prepare(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    out = Path(str(arguments[1]))
    assert not list(out.parent.glob(f".{out.name}*"))
    return result.output


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def _pets(folder: Path, size: int = 8) -> dict[str, np.ndarray]:
    """Write two classes of pictures, the second first."""
    names = ["dog/b.png", "dog/deeper/a.png", "cat/c.png"]
    return {
        name: _save(folder / name, _pixels(size, size, 3, seed=seed))
        for seed, name in enumerate(names)
    }


def _chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1)


# Folders and zips -------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    """cat is 0 and dog is 1; pixels come back exactly; the names of classes are kept."""
    pets = _pets(tmp_path / "pets")
    images = _made(tmp_path / "pets", tmp_path / "out.zip")
    assert images.names == [f"00000/img{index:08d}.png" for index in range(3)]
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1]
    for index, name in enumerate(["cat/c.png", "dog/b.png", "dog/deeper/a.png"]):
        assert torch.equal(images[index], _chw(pets[name]))
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["class_names"] == ["cat", "dog"]


def test_flat_labels_are_of_whole_folders(tmp_path: Path) -> None:
    """With --flat-labels the folder in a folder is a class of its own."""
    _pets(tmp_path / "pets")
    images = _made(tmp_path / "pets", tmp_path / "out.zip", "--flat-labels")
    assert images.labels is not None and images.labels.tolist() == [0, 1, 2]


def test_no_labels_are_asked_for(tmp_path: Path) -> None:
    """With --no-labels, and where all images lie in one folder however deep, there are none."""
    _pets(tmp_path / "pets")
    assert _made(tmp_path / "pets", tmp_path / "a.zip", "--no-labels").labels is None
    _save(tmp_path / "deep" / "in" / "here" / "a.png", _pixels(4, 4))
    assert _made(tmp_path / "deep", tmp_path / "b.zip").labels is None


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    """A folder and its zip, written at other times, give one file, byte for byte."""
    _pets(tmp_path / "pets", size=12)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for file in sorted((tmp_path / "pets").rglob("*.png"), reverse=True):
            archive.write(file, "pets" / file.relative_to(tmp_path / "pets"))
    for source in ("pets", "pets.zip"):
        _made(tmp_path / source, tmp_path / f"{source}-out.zip", "--resolution", 8)
    first, second = ((tmp_path / f"{name}-out.zip").read_bytes() for name in ("pets", "pets.zip"))
    assert first == second


def test_the_bytes_are_those_of_every_machine(tmp_path: Path) -> None:
    """Neither Pillow's PNG encoder nor zlib's compression decides over them."""
    _save(tmp_path / "in" / "a.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    _made(tmp_path / "in", tmp_path / "out.zip")
    digest = hashlib.sha256((tmp_path / "out.zip").read_bytes()).hexdigest()
    assert digest == "fcf02acfd8a20197c87cdcf06124eef82afd74045846e2f913a52875b0affaad"


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 301, 3)])
def test_the_png_encoder_keeps_pixels(shape: tuple[int, ...]) -> None:
    """Pillow reads back what was encoded, also where it takes several stored blocks."""
    pixels = _pixels(*shape)
    picture = Image.open(io.BytesIO(png(pixels)))
    assert np.array_equal(np.asarray(picture), pixels)


def test_what_was_made_is_a_source_itself(tmp_path: Path) -> None:
    """Preparing a prepared zip again gives the same file: labels and class names are kept."""
    _pets(tmp_path / "pets")
    _made(tmp_path / "pets", tmp_path / "once.zip")
    _made(tmp_path / "once.zip", tmp_path / "twice.zip")
    assert (tmp_path / "once.zip").read_bytes() == (tmp_path / "twice.zip").read_bytes()


def test_numbered_folders_of_the_layout_are_no_classes(tmp_path: Path) -> None:
    """00000/ and 00001/ of a StyleGAN set without labels do not become classes."""
    for index in (0, 1000):
        _save(tmp_path / "set" / f"{index:08d}"[:5] / f"img{index:08d}.png", _pixels(4, 4))
    assert _made(tmp_path / "set", tmp_path / "out.zip").labels is None


def test_linked_folders_are_read(tmp_path: Path) -> None:
    """A class that is a link to a folder counts; a link back up does not go on for ever."""
    _save(tmp_path / "elsewhere" / "a.png", _pixels(4, 4))
    _save(tmp_path / "set" / "own" / "b.png", _pixels(4, 4))
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "own" / "up").symlink_to(tmp_path / "set")
    assert len(_made(tmp_path / "set", tmp_path / "out.zip")) == 2


def test_images_takes_the_first(tmp_path: Path) -> None:
    """--images N takes the first N names; more than there are is refused."""
    _pets(tmp_path / "pets")
    assert len(_made(tmp_path / "pets", tmp_path / "out.zip", "--images", 2)) == 2
    assert "has only 3" in _refused(tmp_path / "pets", tmp_path / "b.zip", "--images", 4)


def test_one_image_is_a_set(tmp_path: Path) -> None:
    """A single picture makes a set of one; other files are named, not passed over."""
    pixels = _save(tmp_path / "in" / "a.png", _pixels(4, 4))
    (tmp_path / "in" / "notes.txt").write_text("hello")
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "not ending like an image: 1 of 2 files: notes.txt" in result.output
    assert torch.equal(Images(tmp_path / "out.zip").load_all(), _chw(pixels)[None])


# Published sets ---------------------------------------------------------------------------------


def _python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Return a pickle as Python 2 and NumPy 1 wrote those of CIFAR-10: strings are bytes."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    data = pixels.transpose(0, 3, 1, 2).tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(data)) + data + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"data") + array + text(b"labels") + numbers
    return b"\x80\x02}(" + text(b"batch_label") + text(b"training batch") + items + b"u."


_CIFAR_CLASSES = [f"class {index}" for index in range(10)]


def _cifar(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Write CIFAR-10's six batches with two images each, and its archive cifar.tar.gz."""
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pixels = {name: _pixels(2, 32, 32, 3, seed=seed) for seed, name in enumerate(names)}
    labels = {name: [index, 9 - index] for index, name in enumerate(names)}
    for name in names:
        (folder / name).write_bytes(_python2_batch(pixels[name], labels[name]))
    meta = {"label_names": _CIFAR_CLASSES}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    with tarfile.open(folder.parent / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    return pixels, labels


@pytest.mark.parametrize("source", ["cifar.tar.gz", "cifar"])
def test_cifar_comes_in_the_order_of_its_batches(tmp_path: Path, source: str) -> None:
    """Train images are those of five batches, test images those of one, channels first in both."""
    pixels, labels = _cifar(tmp_path / "cifar")
    train = _made(tmp_path / source, tmp_path / "train.zip")
    batches = [name for name in pixels if name != "test_batch"]
    expected = torch.stack([_chw(image) for name in batches for image in pixels[name]])
    assert torch.equal(train.load_all(), expected)
    assert train.labels is not None
    assert train.labels.tolist() == [label for name in batches for label in labels[name]]
    test = _made(tmp_path / source, tmp_path / "test.zip", "--split", "test")
    assert torch.equal(test[1], _chw(pixels["test_batch"][1]))
    with zipfile.ZipFile(tmp_path / "test.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["class_names"] == _CIFAR_CLASSES


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_that_python_3_wrote_are_read(tmp_path: Path, protocol: int) -> None:
    """A batch that was read and saved again by someone is the same."""
    pixels, labels = _cifar(tmp_path / "cifar")
    rows = np.ascontiguousarray(pixels["test_batch"].transpose(0, 3, 1, 2)).reshape(2, 3072)
    batch = {b"data": rows, b"labels": labels["test_batch"]}
    (tmp_path / "cifar" / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    test = _made(tmp_path / "cifar", tmp_path / "test.zip", "--split", "test")
    assert torch.equal(test[0], _chw(pixels["test_batch"][0]))


def test_a_batch_that_runs_something_is_refused(tmp_path: Path) -> None:
    """What a batch asks for beyond arrays is named, and is not run."""
    _cifar(tmp_path / "cifar")
    marker = tmp_path / "it-ran"
    attack = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (tmp_path / "cifar" / "data_batch_3").write_bytes(attack)
    assert "data_batch_3 asks for 'os.system'" in _refused(tmp_path / "cifar", tmp_path / "o.zip")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (b"", "cut off or damaged"),
        (_python2_batch(_pixels(2, 32, 32, 3), [1, 2])[:3000], "cut off or damaged"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"fine_labels": [1]}), "has no images"),
        (pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [1, 2]}), "of 9 values"),
        (_python2_batch(_pixels(2, 32, 32, 3), [1]), "one label from 0 to 9 for each of 2"),
        (_python2_batch(_pixels(2, 32, 32, 3), [1, 10]), "one label from 0 to 9"),
    ],
)
def test_batches_that_are_none_are_refused(tmp_path: Path, batch: bytes, says: str) -> None:
    """A damaged batch, or one of another set, is named in one sentence."""
    _cifar(tmp_path / "cifar")
    (tmp_path / "cifar" / "data_batch_2").write_bytes(batch)
    message = _refused(tmp_path / "cifar", tmp_path / "out.zip")
    assert says in message and "data_batch_2" in message


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    """A cut archive, one of something else, and a missing batch: a sentence each."""
    _cifar(tmp_path / "cifar")
    whole = (tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in _refused(tmp_path / "cut.tar.gz", tmp_path / "out.zip")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "cifar" / "batches.meta", "other/readme")
    assert "lacks data_batch_1" in _refused(tmp_path / "other.tar", tmp_path / "out.zip")
    (tmp_path / "cifar" / "data_batch_4").unlink()
    assert "lacks data_batch_4" in _refused(tmp_path / "cifar", tmp_path / "out.zip")


def _idx(values: np.ndarray) -> bytes:
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def _mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(exist_ok=True)
    digits, labels = _pixels(3, 28, 28), np.array([7, 2, 1], np.uint8)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(digits)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))
    (folder / "t10k-images-idx3-ubyte").write_bytes(_idx(digits[::-1]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(_idx(labels[::-1]))
    return digits, labels


def test_mnist_is_read_from_its_two_files(tmp_path: Path) -> None:
    """The images' file brings the labels beside it; a folder has both parts, gzipped or not."""
    digits, labels = _mnist(tmp_path / "mnist")
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    train = _made(file, tmp_path / "train.zip")
    assert torch.equal(train.load_all(), torch.from_numpy(digits)[:, None])
    assert train.labels is not None and train.labels.tolist() == labels.tolist()
    test = _made(tmp_path / "mnist", tmp_path / "test.zip", "--split", "test")
    assert torch.equal(test[0], _chw(digits[2]))


def test_digits_get_a_border_for_32_and_are_resampled_for_other_sizes(tmp_path: Path) -> None:
    """At 32x32 the 28x28 pixels stand in the middle, unchanged, in black; and it is said."""
    digits, _ = _mnist(tmp_path / "mnist")
    result = _prepare(tmp_path / "mnist", tmp_path / "out.zip", "--resolution", 32)
    assert "given a black border from 28x28 to 32x32: 3 images" in result.output
    padded = torch.nn.functional.pad(torch.from_numpy(digits)[:, None], (2, 2, 2, 2))
    assert torch.equal(Images(tmp_path / "out.zip").load_all(), padded)
    assert _made(tmp_path / "mnist", tmp_path / "14.zip", "--resolution", 14)[0][0, 0, 0] > 0


def test_mnist_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Missing labels, too few, a file cut off, and one of another kind: a sentence each."""
    digits, labels = _mnist(tmp_path)
    images_file = tmp_path / "train-images-idx3-ubyte.gz"
    labels_file = tmp_path / "train-labels-idx1-ubyte.gz"
    labels_file.write_bytes(gzip.compress(_idx(labels[:2])))
    assert "2 labels for the 3 images" in _refused(images_file, tmp_path / "out.zip")
    labels_file.unlink()
    assert f"has no {labels_file.name} beside it" in _refused(images_file, tmp_path / "out.zip")
    assert _made(images_file, tmp_path / "none.zip", "--no-labels").labels is None
    for content, says in [
        (gzip.compress(_idx(digits))[:900], "cut off"),
        (gzip.compress(_idx(digits)[:-1]), "says that it holds 3x28x28 values, but holds 2351"),
        (gzip.compress(_idx(labels)), "no idx file of unsigned bytes in 3 dimensions"),
        (b"hello", "cannot be read"),
    ]:
        images_file.write_bytes(content)
        assert says in _refused(images_file, tmp_path / "out.zip")


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    """--split is of CIFAR-10 and MNIST alone; folders that look like splits are no classes."""
    _save(tmp_path / "set" / "train" / "a.png", _pixels(4, 4))
    _save(tmp_path / "set" / "test" / "a.png", _pixels(4, 4))
    out = tmp_path / "out.zip"
    assert "has no such parts" in _refused(tmp_path / "set", out, "--split", "test")
    assert "folders test, train, which look like parts" in _refused(tmp_path / "set", out)


# What is done to pictures -----------------------------------------------------------------------


def test_the_center_is_cut_out_before_resizing(tmp_path: Path) -> None:
    """Of 12x8, the middle 8x8 remains; what stands beside it does not leak in."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200
    _save(tmp_path / "in" / "a.png", pixels)
    source, out = tmp_path / "in", tmp_path / "out.zip"
    image = _made(source, out, "--resolution", 4, "--crop", "center")[0]
    assert torch.equal(image, torch.full((3, 4, 4), 200, dtype=torch.uint8))
    assert "12x8, another shape than 4x4" in _refused(source, tmp_path / "b.zip", "--resolution", 4)


def test_box_is_the_mean_of_pixels(tmp_path: Path) -> None:
    """--filter box halves a picture to the means of 2x2 pixels; WxH is width, then height."""
    pixels = _save(tmp_path / "in" / "a.png", _pixels(4, 8))
    image = _made(tmp_path / "in", tmp_path / "o.zip", "--resolution", "4x2", "--filter", "box")[0]
    means = pixels.reshape(2, 2, 4, 2).mean((1, 3))
    assert image.shape == (1, 2, 4)
    assert (
        image[0].double() - torch.from_numpy(means)
    ).abs().max() <= 1  # rounded along, then across


def test_sizes_that_many_networks_do_not_take_are_said(tmp_path: Path) -> None:
    """A side that is no power of two is no error, but it is said; so is enlarging."""
    _save(tmp_path / "in" / "a.png", _pixels(4, 4))
    result = _prepare(tmp_path / "in", tmp_path / "out.zip", "--resolution", 6)
    assert result.exit_code == 0 and "power of two" in result.output
    assert "enlarged to 6x6: 1 image" in result.output


def test_channels_are_made_one_kind(tmp_path: Path) -> None:
    """Grey beside colour is refused with both names, unless --channels says what to make."""
    _save(tmp_path / "in" / "a.png", grey := _pixels(4, 4))
    _save(tmp_path / "in" / "b.png", _pixels(4, 4, 3))
    out = tmp_path / "out.zip"
    assert "a.png is grey, but b.png is in colour" in _refused(tmp_path / "in", out)
    assert torch.equal(
        _made(tmp_path / "in", out, "--channels", 3)[0], _chw(grey).expand(3, -1, -1)
    )
    assert _made(tmp_path / "in", tmp_path / "1.zip", "--channels", 1).image_shape == (1, 4, 4)


def test_mixed_sizes_are_refused_with_two_names(tmp_path: Path) -> None:
    """Without --resolution all pictures have one size."""
    _save(tmp_path / "in" / "a.png", _pixels(4, 4))
    _save(tmp_path / "in" / "b.png", _pixels(4, 6))
    message = _refused(tmp_path / "in", tmp_path / "out.zip")
    assert "a.png is 4x4, but b.png is 6x4: give --resolution" in message


def test_transparent_parts_are_laid_on_white(tmp_path: Path) -> None:
    """Clear is white, half is between, opaque is itself; only seen transparency is counted."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 51, 255)  # 51/255 = 1/5 black on 4/5 white
    _save(tmp_path / "in" / "a.png", pixels)
    _save(tmp_path / "in" / "b.png", np.full((1, 3, 4), 255, np.uint8))
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "laid on white where transparent: 1 image" in result.output
    assert Images(tmp_path / "out.zip")[0][0].tolist() == [[255, 204, 0]]


def test_grey_with_alpha_and_a_clear_palette_colour(tmp_path: Path) -> None:
    """LA stays grey; the transparent colour of a palette is white."""
    alpha = np.dstack([np.full((2, 2), 7, np.uint8), np.array([[0, 255], [255, 255]], np.uint8)])
    _save(tmp_path / "grey" / "a.png", alpha)
    image = _made(tmp_path / "grey", tmp_path / "grey.zip")[0]
    assert image.tolist() == [[[255, 7], [7, 7]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    (tmp_path / "palette").mkdir()
    palette.save(tmp_path / "palette" / "a.png", transparency=1)
    image = _made(tmp_path / "palette", tmp_path / "palette.zip")[0]
    assert image.permute(1, 2, 0).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path: Path, name: str) -> None:
    """0xABCD becomes 0xAB, and it is said."""
    values = np.array([[0xABCD, 0x00FF], [0xFFFF, 0x0100]], np.uint16)
    _save(tmp_path / "in" / name, values)
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "kept the upper 8 of 16 bits a channel: 1 image" in result.output
    assert Images(tmp_path / "out.zip")[0].tolist() == [[[0xAB, 0], [0xFF, 1]]]


def test_16_bits_of_colour_are_said_too(tmp_path: Path) -> None:
    """Pillow drops the lower bits of such a PNG without a word; here it is counted."""
    rows = b"".join(b"\0" + bytes([0xAB, 0xCD] * 6) for _ in range(2))

    def chunk(kind: bytes, content: bytes) -> bytes:
        length, checksum = len(content), zlib.crc32(kind + content)
        return struct.pack(">I", length) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "kept the upper 8 of 16 bits a channel: 1 image" in result.output
    assert Images(tmp_path / "out.zip")[0].unique().tolist() == [0xAB]


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6 is a quarter turn to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = _save(tmp_path / "in" / "a.png", _pixels(2, 3), exif=exif)
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "turned as EXIF says: 1 image" in result.output
    assert torch.equal(Images(tmp_path / "out.zip")[0], _chw(np.rot90(pixels, -1)))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    """A CMYK photo is converted, and it is said."""
    (tmp_path / "in").mkdir()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "in" / "a.jpg", quality=100)
    result = _prepare(tmp_path / "in", tmp_path / "out.zip")
    assert "converted from CMYK to RGB, without a colour profile: 1 image" in result.output
    red, green, blue = Images(tmp_path / "out.zip")[0].float().mean((1, 2)).tolist()
    assert red > 250 and green < 5 and blue < 5


# Bad input --------------------------------------------------------------------------------------


def _broken(folder: Path) -> None:
    """Write two good pictures and five: cut off, empty, text, an animation, a link to nothing."""
    _save(folder / "a.png", _pixels(8, 8))
    content = io.BytesIO()
    Image.fromarray(_pixels(8, 8)).save(content, format="png")
    (folder / "b.png").write_bytes(content.getvalue()[:60])
    (folder / "c.png").write_bytes(b"")
    (folder / "d.jpg").write_text("hello")
    frames = [Image.fromarray(_pixels(8, 8, seed=seed)) for seed in (0, 1)]
    frames[0].save(folder / "e.gif", save_all=True, append_images=frames[1:])
    _save(folder / "f.png", _pixels(8, 8, seed=5))
    (folder / "g.png").symlink_to(folder / "nothing.png")


def test_all_broken_images_are_named(tmp_path: Path) -> None:
    """Each of five is named with its reason, and nothing is written."""
    _broken(tmp_path / "in")
    message = _refused(tmp_path / "in", tmp_path / "out.zip")
    assert "5 of 7 images cannot be used:" in message and "--skip-broken" in message
    for says in [
        "b.png: ",
        "c.png: the file is empty",
        "d.jpg: it is no image",
        "2 frames",
        "g.png: No such file",
    ]:
        assert says in message
    assert not (tmp_path / "out.zip").exists()


def test_broken_images_are_left_out_where_that_is_asked(tmp_path: Path) -> None:
    """--skip-broken lists what it leaves out, and numbers the rest without gaps."""
    _broken(tmp_path / "in")
    result = _prepare(tmp_path / "in", tmp_path / "out.zip", "--skip-broken")
    assert "left out: 5 images" in result.output
    assert "c.png: the file is empty" in result.output
    images = Images(tmp_path / "out.zip")
    assert images.names == ["00000/img00000000.png", "00000/img00000001.png"]
    assert torch.equal(images[1], _chw(_pixels(8, 8, seed=5)))


def test_labels_stay_with_their_images_when_some_are_left_out(tmp_path: Path) -> None:
    """The label of a broken picture goes with it."""
    _pets(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "a.png").write_bytes(b"")
    (tmp_path / "pets" / "dog" / "c.png").write_bytes(b"")
    images = _made(tmp_path / "pets", tmp_path / "out.zip", "--skip-broken")
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1]


def test_many_broken_images_are_counted_after_twenty(tmp_path: Path) -> None:
    """Twenty names, then how many more; with none left, --skip-broken is no way out."""
    (tmp_path / "in").mkdir()
    for index in range(25):
        (tmp_path / "in" / f"{index:02d}.png").write_bytes(b"")
    for options in ([], ["--skip-broken"]):
        message = _refused(tmp_path / "in", tmp_path / "out.zip", *options)
        assert "19.png" in message and "20.png" not in message and "and 5 more" in message
        assert "with --skip-broken" not in message


def test_zips_that_are_none_are_refused(tmp_path: Path) -> None:
    """A zip cut off is refused; one with a damaged picture in it names that picture."""
    _pets(tmp_path / "pets")
    _made(tmp_path / "pets", tmp_path / "good.zip")
    content = (tmp_path / "good.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-200])
    assert "readable zip" in _refused(tmp_path / "cut.zip", tmp_path / "out.zip")
    damaged = bytearray(content)
    damaged[100] ^= 0xFF
    (tmp_path / "damaged.zip").write_bytes(damaged)
    assert "00000/img00000000.png: Bad CRC" in _refused(
        tmp_path / "damaged.zip", tmp_path / "o.zip"
    )


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"labels": [["cat/c.png", 0], ["dog/b.png", 1]]}, "dog/deeper/a.png the label None"),
        ({"labels": [["cat/c.png", -1]]}, "the label -1"),
        ({"labels": [["cat/c.png", [0.5, 0.5]]]}, "the label [0.5, 0.5]"),
        ({"classes": 3}, "must be"),
        ([], "must be"),
        (
            {
                "labels": [["cat/c.png", 0], ["dog/b.png", 1], ["dog/deeper/a.png", 1]],
                "class_names": ["cat"],
            },
            '"class_names" in dataset.json must be a list of names, one for each label from 0 to 1',
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, metadata: object, says: str) -> None:
    """A dataset.json goes before folders; where it does not fit, --no-labels is a way out."""
    _pets(tmp_path / "pets")
    (tmp_path / "pets" / "dataset.json").write_text(json.dumps(metadata))
    assert says in _refused(tmp_path / "pets", tmp_path / "out.zip")
    assert len(_made(tmp_path / "pets", tmp_path / "out.zip", "--no-labels")) == 3


def test_labels_that_lie_too_deep_are_not_passed_over(tmp_path: Path) -> None:
    """A set in a folder of its own is refused by name, before its folders become classes."""
    _pets(tmp_path / "set" / "pets")
    (tmp_path / "set" / "pets" / "dataset.json").write_text('{"labels": null}')
    message = _refused(tmp_path / "set", tmp_path / "out.zip")
    assert "has its labels in pets/dataset.json" in message
    assert _made(tmp_path / "set" / "pets", tmp_path / "out.zip").labels is None


def test_an_image_beside_the_classes_is_refused(tmp_path: Path) -> None:
    """A picture in no class's folder is named."""
    _pets(tmp_path / "pets")
    _save(tmp_path / "pets" / "lost.png", _pixels(8, 8, 3))
    assert "lost.png lies beside the folders" in _refused(tmp_path / "pets", tmp_path / "out.zip")


def test_classes_without_images_are_said(tmp_path: Path) -> None:
    """The first images of sorted folders are of the first classes alone: that shows."""
    _pets(tmp_path / "pets")
    result = _prepare(tmp_path / "pets", tmp_path / "out.zip", "--images", 1)
    assert "2 classes of 0 to 1 image" in result.output


def test_what_exists_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    """OUT that exists is refused, then replaced with --overwrite; OUT is never SOURCE."""
    _pets(tmp_path / "pets")
    out = tmp_path / "out.zip"
    out.write_text("mine")
    assert "exists already" in _refused(tmp_path / "pets", out)
    assert out.read_text() == "mine"
    assert len(_made(tmp_path / "pets", out, "--overwrite")) == 3
    assert "SOURCE and OUT are both" in _refused(out, out, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing", "out.zip"], "no images at"),
        (["empty", "out.zip"], "holds no image"),
        (["pets", "out.tar"], "ends in .zip"),
        (["pets", "out.zip", "--crop", "center"], "give --resolution"),
        (["pets", "out.zip", "--resolution", "0"], "expected pixels such as 64"),
        (["pets", "out.zip", "--resolution", "64x"], "expected pixels such as 64"),
        (["pets", "out.zip", "--no-labels", "--flat-labels"], "exclude each other"),
    ],
)
def test_arguments_that_do_not_do_are_refused(
    tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence each, before anything is written."""
    monkeypatch.chdir(tmp_path)
    _pets(tmp_path / "pets")
    (tmp_path / "empty").mkdir()
    assert says in " ".join(_refused(*arguments).split())


def test_progress_says_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the output is no terminal, a plain line comes once in a while."""
    command = sys.modules["data.__main__"]
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert list(command._progress(range(4), 4)) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1/4 images  0 images/s  0:01:00 left", "3/4 images  0 images/s  0:00:13 left"]
