"""References: measured once, kept by content, read back, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.distributed import World
from core.errors import UserError
from eval import features
from eval.feature_stats import FeatureStatistics, kept_indices
from eval.features import Extractor
from eval.metrics.frechet import frechet_distance
from eval.metrics.registry import Config
from eval.reference import Reference, read_npz, reference_statistics, save_npz
from rank_runs import run_as_ranks

PIXELS = features.load("pixels")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty grey 3x3 images."""
    (tmp_path / "images").mkdir()
    pixels = np.random.RandomState(1).randint(0, 256, (20, 3, 3)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:03d}.png")
    return tmp_path / "images"


def _counting(extractor: Extractor) -> tuple[Extractor, list[int]]:
    sizes: list[int] = []

    def function(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return extractor.function(images)

    return replace(extractor, function=function), sizes


def _published(path: Path, dimensions: int = 2048) -> Path:
    np.savez(path, mu=np.zeros(dimensions), sigma=np.eye(dimensions))
    return path


def _assert_equal(found: Reference, expected: Reference) -> None:
    arrays = dict.fromkeys(("mean", "covariance", "features"))
    assert replace(found, **arrays) == replace(expected, **arrays)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.covariance, expected.covariance)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_reference_is_the_statistics_of_all_images(
    folder: Path, tmp_path: Path, batch_size: int
) -> None:
    """Mean and covariance are those of every image's features, whatever the batch size."""
    reference = reference_statistics(folder, PIXELS, batch_size=batch_size, cache=tmp_path / "kept")
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])
    expected = FeatureStatistics.of(torch.from_numpy(pixels).flatten(1) / 127.5 - 1)
    torch.testing.assert_close(reference.mean, expected.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(reference.covariance, expected.covariance, rtol=1e-6, atol=1e-7)
    assert (reference.images, reference.image_shape) == (20, (1, 3, 3))


def test_a_reference_is_measured_once(folder: Path, tmp_path: Path) -> None:
    """A second call reads what the first one kept and extracts nothing."""
    extractor, sizes = _counting(PIXELS)
    first = reference_statistics(folder, extractor, batch_size=8, cache=tmp_path / "kept")
    second = reference_statistics(folder, extractor, batch_size=8, cache=tmp_path / "kept")
    assert sizes == [8, 8, 4]
    _assert_equal(second, first)


def test_another_image_or_extractor_is_measured_again(folder: Path, tmp_path: Path) -> None:
    """What is kept belongs to one content and one extractor."""
    extractor, sizes = _counting(PIXELS)
    reference_statistics(folder, extractor, batch_size=99, cache=tmp_path / "kept")
    other = replace(extractor, sha256="0" * 64)
    reference_statistics(folder, other, batch_size=99, cache=tmp_path / "kept")
    (folder / "000.png").unlink()
    reference_statistics(folder, extractor, batch_size=99, cache=tmp_path / "kept")
    assert sizes == [20, 20, 19]


def test_the_cache_folder_is_the_projects(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder of its own, the cache is below GAN_REFINE_CACHE."""
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path / "cache"))
    reference_statistics(folder, PIXELS)
    assert len(list((tmp_path / "cache" / "references").glob("*.npz"))) == 1


def test_npz_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    """A saved reference is read back equal, through the same call that reads images."""
    reference = reference_statistics(folder, PIXELS, cache=tmp_path / "kept")
    save_npz(tmp_path / "saved.npz", reference)
    _assert_equal(reference_statistics(tmp_path / "saved.npz", PIXELS), reference)


def test_features_are_kept_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    """Of 20 images the features of 8 stay, in their order, and come back from the cache."""
    keep = Config(kept_images=8)
    extractor, sizes = _counting(PIXELS)
    first, again = (
        reference_statistics(folder, extractor, keep=keep, batch_size=7, cache=tmp_path / "kept")
        for _ in range(2)
    )
    assert sizes == [7, 7, 6]
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])
    expected = (torch.from_numpy(pixels).flatten(1) / 127.5 - 1)[kept_indices(20, 8, 2020)]
    torch.testing.assert_close(first.features, expected)
    assert torch.equal(again.features, first.features)
    bare = reference_statistics(folder, extractor, batch_size=7, cache=tmp_path / "kept")
    assert bare.features is None and len(sizes) == 6
    torch.testing.assert_close(bare.covariance, first.covariance)


def test_the_distance_of_halves_is_that_of_every_other_image(folder: Path, tmp_path: Path) -> None:
    """What chance alone leaves: images 0, 2, 4... against 1, 3, 5..., in any batch size."""
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])
    features = torch.from_numpy(pixels).flatten(1) / 127.5 - 1
    expected = frechet_distance(
        FeatureStatistics.of(features[::2]), FeatureStatistics.of(features[1::2])
    )
    found = reference_statistics(folder, PIXELS, batch_size=7, cache=tmp_path / "kept")
    assert found.halves_fid == pytest.approx(expected, rel=1e-6)


def test_a_published_file_is_inceptions(tmp_path: Path) -> None:
    """A file of mu and sigma alone is accepted for Inception's 2048 features and says no more."""
    inception = replace(PIXELS, name="inception", dimensions=2048)
    reference = read_npz(_published(tmp_path / "edm.npz"), inception)
    assert (reference.images, reference.image_shape, reference.source) == (None, None, "edm.npz")
    assert torch.equal(reference.covariance, torch.eye(2048, dtype=torch.float64))


def test_a_published_file_does_not_fit_the_digit_network(tmp_path: Path) -> None:
    """2048 features of a published file and the digit extractor: refused with both named."""
    digits = replace(PIXELS, name="mnist32", dimensions=64)
    with pytest.raises(UserError, match=r"2048 features .* Inception's, .* 'mnist32'"):
        read_npz(_published(tmp_path / "edm.npz"), digits)


def test_a_published_file_of_another_size_is_refused(tmp_path: Path) -> None:
    """Inception has 2048 features; a file of 64 is not of it."""
    inception = replace(PIXELS, name="inception", dimensions=2048)
    with pytest.raises(UserError, match=r"64 features an image, but .* 2048"):
        read_npz(_published(tmp_path / "small.npz", 64), inception)


def test_our_file_knows_its_extractor(folder: Path, tmp_path: Path) -> None:
    """A reference of other weights is refused even where name and size agree."""
    save_npz(tmp_path / "a.npz", reference_statistics(folder, PIXELS, cache=tmp_path / "kept"))
    with pytest.raises(UserError, match=r"holds features of the extractor pixels .*ffffffffffff"):
        read_npz(tmp_path / "a.npz", replace(PIXELS, sha256="f" * 64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no arrays 'mu' and 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "not a readable .npz"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "meta": np.array("{}")}, "make the file again"),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048), "features": np.zeros((3, 4))},
            r"features has shape \(3, 4\); expected finite numbers \[M, 2048\]",
        ),
    ],
)
def test_files_that_hold_no_reference_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    """Missing keys, wrong shapes, NaN, pickled objects, foreign meta: a sentence each."""
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_npz(tmp_path / "bad.npz", replace(PIXELS, name="inception"))


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    """A truncated .npz is refused by its path."""
    content = _published(tmp_path / "whole.npz", 8).read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"half\.npz is not a readable"):
        reference_statistics(tmp_path / "half.npz", PIXELS)


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    """A path that leads nowhere is named."""
    with pytest.raises(UserError, match="nothing-here"):
        reference_statistics(tmp_path / "nothing-here.zip", PIXELS)


# Several ranks ------------------------------------------------------------------------------------


def _measure_as_rank(world: World, folder: Path, out: Path) -> None:
    """Leave the reference that this rank gets, the images that it looked at, and whether the second
    time it looked at any.
    """
    extractor, sizes = _counting(PIXELS)
    keep = Config(kept_images=8)
    options = {"keep": keep, "batch_size": 3, "cache": out / "kept", "world": world}
    made = reference_statistics(folder, extractor, **options)
    looked_at = sum(sizes)
    reference_statistics(folder, extractor, **options)
    arrays = {"mean": made.mean, "covariance": made.covariance, "features": made.features}
    counts = {"looked_at": looked_at, "again": sum(sizes) - looked_at}
    torch.save(
        {**arrays, **counts, "halves_fid": made.halves_fid, "sha256": made.sha256},
        out / f"{world.rank}.pt",
    )


@pytest.mark.parametrize(("count", "looked_at"), [(19, [9, 10]), (3, [3, 3])])
def test_ranks_share_the_images_of_a_reference(
    folder: Path, tmp_path: Path, count: int, looked_at: list[int]
) -> None:
    """Two ranks look at half of the images each, or at all where there are too few to share; both
    get what one process gets, to rounding, and one writes the cache, which both read.
    """
    for image in sorted(folder.iterdir())[count:]:
        image.unlink()
    alone = reference_statistics(
        folder, PIXELS, keep=Config(kept_images=8), cache=tmp_path / "alone"
    )
    run_as_ranks(_measure_as_rank, folder, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["looked_at"] for rank in found] == looked_at
    assert [rank["again"] for rank in found] == [0, 0]
    for rank in found:
        torch.testing.assert_close(rank["mean"], alone.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(rank["covariance"], alone.covariance, rtol=1e-12, atol=1e-14)
        assert torch.equal(rank["features"], alone.features)
        assert rank["halves_fid"] == (
            alone.halves_fid and pytest.approx(alone.halves_fid, rel=1e-6)
        )
        assert rank["sha256"] == alone.sha256
    (kept,) = (tmp_path / "kept").glob("*.npz")
    assert torch.equal(read_npz(kept, PIXELS).covariance, found[0]["covariance"])
