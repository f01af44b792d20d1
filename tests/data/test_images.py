"""Image sets: what is read from a zip or folder, and what is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.images import Images


def _png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    content = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(content, format="png")
    return content.getvalue()


def _pixels(count: int, channels: int = 3, size: int = 4) -> np.ndarray:
    shape = (count, size, size, channels) if channels > 1 else (count, size, size)
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _set(pixels: np.ndarray, labels: list[int] | None = None) -> dict[str, bytes]:
    files = {f"00000/img{index:08d}.png": _png(image) for index, image in enumerate(pixels)}
    if labels is not None:
        pairs = list(zip(files, labels, strict=True))
        files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    return files


def test_images_come_back_as_they_were_written(tmp_path: Path) -> None:
    """A PNG's pixels are the item, channels first, and load_all stacks the items."""
    pixels = _pixels(3)
    images = Images(_zip(tmp_path / "set.zip", _set(pixels, [2, 0, 1])))
    assert images.image_shape == (3, 4, 4)
    assert torch.equal(images[1], torch.from_numpy(pixels[1]).permute(2, 0, 1))
    assert torch.equal(images.load_all(), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert images.labels is not None and images.labels.tolist() == [2, 0, 1]
    assert images.num_classes == 3


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    """A grey PNG is [1, H, W]; without dataset.json there are no labels."""
    images = Images(_zip(tmp_path / "set.zip", _set(_pixels(2, channels=1))))
    assert images.image_shape == (1, 4, 4)
    assert images.labels is None and images.num_classes == 0


def test_order_is_that_of_names(tmp_path: Path) -> None:
    """Images are sorted by name, whatever the order in the zip."""
    pixels = _pixels(2)
    files = {"b.png": _png(pixels[1]), "a/z.png": _png(pixels[0]), "__MACOSX/._b.png": b""}
    images = Images(_zip(tmp_path / "set.zip", files))
    assert images.names == ["a/z.png", "b.png"]
    assert torch.equal(images[0], torch.from_numpy(pixels[0]).permute(2, 0, 1))


def test_hash_is_of_content_not_of_container(tmp_path: Path) -> None:
    """A zip and its unpacked folder have one hash; another label gives another."""
    archive = _zip(tmp_path / "set.zip", _set(_pixels(2), [0, 1]))
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "folder")
    relabelled = _zip(tmp_path / "other.zip", _set(_pixels(2), [1, 1]))
    assert Images(archive).sha256 == Images(tmp_path / "folder").sha256
    assert Images(archive).sha256 != Images(relabelled).sha256


def test_a_worker_process_gets_its_own_archive(tmp_path: Path) -> None:
    """A set that was pickled, as DataLoader workers do, reads on."""
    images = Images(_zip(tmp_path / "set.zip", _set(_pixels(2))))
    assert torch.equal(pickle.loads(pickle.dumps(images))[1], images[1])


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    """Half a PNG is refused with its name."""
    files = _set(_pixels(2))
    files["00000/img00000001.png"] = files["00000/img00000001.png"][:40]
    images = Images(_zip(tmp_path / "set.zip", files))
    with pytest.raises(UserError, match=r"img00000001\.png is not a readable image"):
        images.load_all()


def test_a_damaged_entry_is_named_by_the_hash_too(tmp_path: Path) -> None:
    """A zip whose bytes were changed says in which image, instead of hashing what is left."""
    archive = _zip(tmp_path / "set.zip", _set(_pixels(2)))
    content = bytearray(archive.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"img00000000\.png cannot be read: Bad CRC"):
        _ = Images(archive).sha256


def test_another_size_is_named(tmp_path: Path) -> None:
    """An image of another size is refused with both sizes."""
    files = _set(_pixels(1)) | {"z.png": _png(_pixels(1, channels=1, size=8)[0])}
    images = Images(_zip(tmp_path / "set.zip", files))
    with pytest.raises(UserError, match=r"z.png is 8x8 with 1 channel, but .* 4x4 with 3 channels"):
        images.load_all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b'{"labels": [["00000/img00000000.png", 1]]}', "img00000001.png the label None"),
        (b'{"labels": {"x": 1', "must be"),
        (b'{"classes": []}', "must be"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: bytes, message: str) -> None:
    """A missing label is named; a dataset.json of another form is refused."""
    files = _set(_pixels(2)) | {"dataset.json": labels}
    with pytest.raises(UserError, match=message):
        Images(_zip(tmp_path / "set.zip", files))


def test_what_is_no_image_set_is_refused(tmp_path: Path) -> None:
    """No file, a file that is no zip, and a folder without images: a sentence each."""
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images at"):
        Images(tmp_path / "missing.zip")
    with pytest.raises(UserError, match="neither a folder nor a readable zip"):
        Images(tmp_path / "text.zip")
    with pytest.raises(UserError, match="holds no image"):
        Images(tmp_path / "empty")
