"""Reference statistics: features of real images, computed from an image set or read from a file.

    images.zip, a folder   computed once and cached by content and extractor
    cifar-10-python.tar.gz likewise
    ours.npz               written by `save_npz`: mu, sigma and their origin
    published.npz          mu and sigma of 2048 Inception features, in the format of EDM
    published.pkl          sums of these features, in the format of StyleGAN's programs

A source may be a URL. Reference images are for evaluation only, never for training.
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from core import distributed
from core.disk import atomic_write
from core.distributed import World
from core.downloads import cache_path, local_file, sha256_of, short_sha256
from core.errors import UserError
from data.images import Images
from eval import _published_sets
from eval.feature_stats import Collected, Collector, kept_indices, merged_over_ranks
from eval.features import Extractor, announce
from eval.metrics import registry
from eval.metrics.frechet import frechet_distance
from eval.progress import Show, silent

_log = logging.getLogger(__name__)
_SINGLE = World.single()
_OTHER_ZIPS = (".npz", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of NumPy's and torch's zip files, which are no image sets."""


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of real images, and their origin."""

    mean: Tensor
    """[D] float64."""
    covariance: Tensor
    """[D, D] float64."""
    source: str
    """Name of the image set or file."""
    sha256: str
    """Hash of the images (`Images.sha256`), or of the file for published statistics."""
    images: int | None
    """Number of images; None if unknown (published files)."""
    image_shape: tuple[int, int, int] | None
    """(C, H, W) of the images; None if unknown (published files)."""
    extractor: str
    """Name of the extractor."""
    extractor_sha256: str | None
    """Hash of the extractor's weights; None if unknown (published files)."""
    halves_fid: float | None = None
    """Fréchet distance between even and odd images, the floor of the FID; None: unknown."""
    features: Tensor | None = None
    """[M, D] float32 of some or all images, in their order; None if they were not kept."""
    classes: None = None
    """Class statistics are not stored."""


def reference_statistics(
    source: str | Path,
    extractor: Extractor,
    *,
    keep: registry.Config | None = None,
    batch_size: int = 250,
    cache: Path | None = None,
    world: World = _SINGLE,
    show: Show = silent,
) -> Reference:
    """Return the reference of images or of a file of statistics (above), given as a path or a URL.

    keep: number and seed of the images whose features are kept; None keeps mean and covariance
    only. cache: folder of computed references, by default `references` in the project's cache
    folder. world: all ranks call this, share the images, and return the same reference. show:
    progress display. Raises UserError if the source is unreadable or does not fit the extractor.
    """
    # a file of statistics
    with distributed.main_first(world):
        path = local_file(source)
    if path.suffix == ".npz":
        stored = read_npz(path, extractor)
        return replace(stored, features=None) if keep is None else stored
    if path.suffix == ".npy":
        raise UserError(
            f"{path} holds one array: statistics are a .npz with mu [D] and sigma [D, D], as "
            "numpy.savez(OUT, mu=…, sigma=…) writes them; images are a zip or a folder"
        )
    if path.suffix == ".pkl":
        return _read_pkl(path, extractor, keep=keep)

    # images in the cache
    images = image_set(path)
    if len(images) < 2:
        raise UserError(f"{path} holds one image: reference statistics need at least 2")
    sha256 = distributed.broadcast_from_main(images.sha256 if world.is_main else "", world)
    folder = cache_path("references").parent / "references" if cache is None else cache
    suffix = "" if keep is None else f"-{keep.kept_images}-{keep.random_seed}"
    path = folder / f"{sha256[:24]}-{extractor.sha256[:24]}{suffix}.npz"
    if _is_cached_everywhere(path, world):
        return read_npz(path, extractor)

    # new images
    reference = measure(
        images, extractor, sha256=sha256, keep=keep, batch_size=batch_size, world=world, show=show
    )
    if world.is_main:
        save_npz(path, reference)
    return reference


def _is_cached_everywhere(path: Path, world: World) -> bool:
    """Return whether the file exists on every rank: each machine may have its own cache."""
    return not distributed.any_rank(not path.exists(), world)


def is_image_set(path: Path) -> bool:
    """Return whether a path is an image set: a folder, an archive, or a zip but NumPy's or torch's.

    Judged by the content; the set itself may still be invalid.
    """
    if path.is_dir() or path.name.endswith(_published_sets.ARCHIVES):
        return True
    with path.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    return begins_as_zip and path.suffix not in _OTHER_ZIPS


ImageSet = Images | _published_sets.Archive
"""Images in a fixed order, uint8 [C, H, W] each, all of one shape."""


def image_set(path: Path) -> ImageSet:
    """Return the images of a zip, a folder, or of CIFAR-10's archive for Python.

    Raises UserError if there are none.
    """
    if path.name.endswith(_published_sets.ARCHIVES):
        return _published_sets.Archive(path)
    return Images(path)


def measure(
    images: ImageSet,
    extractor: Extractor,
    *,
    sha256: str | None = None,
    keep: registry.Config | None = None,
    batch_size: int = 250,
    world: World = _SINGLE,
    show: Show = silent,
) -> Reference:
    """Return the reference of an image set, from the features of all its images.

    sha256: hash of the images, if known. keep, world and show: as in `reference_statistics`. The
    number of ranks changes the statistics by rounding only.
    """
    _log.info("reading %d reference images of %s, once for all runs", len(images), images.path)
    announce(extractor, len(images), images.image_shape, ranks=world.size)
    collected = _collect(
        images, extractor, keep=keep, batch_size=batch_size, world=world, show=show
    )
    both = collected.even.merge(collected.odd)

    return Reference(
        mean=both.mean.cpu(),
        covariance=both.covariance.cpu(),
        source=images.path.name,
        sha256=images.sha256 if sha256 is None else sha256,
        images=len(images),
        image_shape=images.image_shape,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        halves_fid=frechet_distance(collected.even, collected.odd) if len(images) >= 4 else None,
        features=collected.whole.features,
    )


class _Parts(NamedTuple):
    """Statistics of an image set's features."""

    whole: Collected
    """The kept features, if any."""
    even: Collected
    """Moments of images 0, 2, 4, …"""
    odd: Collected
    """Moments of images 1, 3, 5, …"""


def _collect(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep: registry.Config | None,
    batch_size: int,
    world: World,
    show: Show,
) -> _Parts:
    """Return the statistics of all images, the same on every rank."""
    # this rank's share
    if len(images) < 2 * world.size:  # too few for each rank to have an even and an odd one
        world = World.single(world.device)
    share = distributed.local_range(len(images), world)
    even, odd = (Collector({"moments"}, images=len(images)) for _ in range(2))
    whole = Collector(
        frozenset() if keep is None else {"features"},
        images=len(images),
        kept_images=0 if keep is None else keep.kept_images,
        random_seed=0 if keep is None else keep.random_seed,
        first=share.start,
    )

    # features in batches, split by the parity of the image's index
    first = share.start
    with show(len(images)) as advance:
        for batch in DataLoader(Subset(images, share), batch_size=batch_size):
            features = extractor(batch)
            whole.add(features)
            for half, start in ((even, first % 2), (odd, 1 - first % 2)):
                if len(features) > start:
                    half.add(features[start::2])
            first += len(batch)
            advance(len(batch) * world.size)  # the other ranks are about as far

    return _Parts(*(merged_over_ranks(part.collected, world) for part in (whole, even, odd)))


def of_samples(
    collected: Collected, *, source: str, extractor: Extractor, shape: tuple[int, int, int]
) -> Reference:
    """Return the statistics of generated images as a reference; its sha256 is empty."""
    return Reference(
        mean=collected.mean.cpu(),
        covariance=collected.covariance.cpu(),
        source=source,
        sha256="",
        images=collected.images,
        image_shape=shape,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        features=collected.features,
    )


def save_npz(path: str | Path, reference: Reference) -> None:
    """Write a reference: arrays mu and sigma, the kept features if any, other fields as JSON in
    `meta`.
    """
    meta = {name: getattr(reference, name) for name in _Meta.model_fields}
    arrays = {"mu": reference.mean.numpy(), "sigma": reference.covariance.numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    with atomic_write(Path(path)) as partial:
        arrays["meta"] = np.array(json.dumps(meta))
        np.savez_compressed(partial, allow_pickle=False, **arrays)


def read_npz(path: str | Path, extractor: Extractor) -> Reference:
    """Return the reference of a .npz, ours or published. Raises UserError unless it fits."""
    path = Path(path)
    arrays = _read_arrays(path)
    mean, covariance = _moments(path, arrays)
    if "meta" in arrays:
        meta = _read_meta(path, arrays["meta"])
        _check_extractor(path, meta, extractor)
    else:
        meta = _published_meta(path, len(mean), extractor)
    _check_dimensions(path, len(mean), extractor)
    features = _features(path, arrays, dimensions=len(mean))
    return Reference(mean, covariance, **meta.model_dump(), features=features)


def _read_pkl(path: Path, extractor: Extractor, *, keep: registry.Config | None) -> Reference:
    """Return the reference of statistics that StyleGAN's programs keep."""
    stored = _published_sets.read_full_data(path)
    meta = _published_meta(path, len(stored.mean), extractor)
    _check_dimensions(path, len(stored.mean), extractor)
    features = None
    if keep is not None and stored.features is not None:
        rows = kept_indices(stored.images, keep.kept_images, keep.random_seed)
        features = stored.features[rows]
    known = meta.model_copy(update={"images": stored.images})
    return Reference(stored.mean, stored.covariance, **known.model_dump(), features=features)


def _check_dimensions(path: Path, dimensions: int, extractor: Extractor) -> None:
    if extractor.dimensions not in (None, dimensions):
        raise UserError(
            f"{path} holds {dimensions} features an image, "
            f"but the extractor {extractor.name} gives {extractor.dimensions}"
        )


class _Meta(BaseModel):
    """Fields of `Reference` other than its arrays, in the JSON of a file."""

    source: str
    sha256: str
    images: int | None
    image_shape: tuple[int, int, int] | None
    extractor: str
    extractor_sha256: str | None
    halves_fid: float | None = None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = {"mu", "sigma", "features", "meta"}
            return {name: archive[name] for name in archive.files if name in names}
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path} is not a readable .npz of reference statistics: {error}"
        ) from error


def _moments(path: Path, arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] in float64."""
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} has no arrays 'mu' and 'sigma': it holds no reference statistics")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; "
            "expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds numbers that are not finite")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(
        covariance.astype(np.float64)
    )


def _features(path: Path, arrays: dict[str, np.ndarray], *, dimensions: int) -> Tensor | None:
    """Return the kept features [M, D] in float32, if any."""
    if "features" not in arrays:
        return None
    features = arrays["features"]
    if features.ndim != 2 or features.shape[1] != dimensions or not np.isfinite(features).all():
        raise UserError(
            f"{path}: features has shape {features.shape}; "
            f"expected finite numbers [M, {dimensions}]"
        )
    return torch.from_numpy(features.astype(np.float32))


def _read_meta(path: Path, array: np.ndarray) -> _Meta:
    try:
        return _Meta.model_validate_json(str(array))
    except ValidationError as error:
        raise UserError(
            f"{path}: its 'meta' is not what this version writes; make the file again"
        ) from error


def _check_extractor(path: Path, meta: _Meta, extractor: Extractor) -> None:
    if meta.extractor_sha256 is None:
        fits = meta.extractor == extractor.name
    else:
        fits = meta.extractor_sha256 == extractor.sha256
    if fits:
        return
    raise UserError(
        f"{path} holds features of the extractor {meta.extractor} "
        f"(weights {_short(meta.extractor_sha256)}), but the images are measured with "
        f"{extractor.name} ({_short(extractor.sha256)}): use one of the two for both"
    )


def _published_meta(path: Path, dimensions: int, extractor: Extractor) -> _Meta:
    """Return the fields for a file of moments only, which by convention are Inception's."""
    if extractor.name != "inception":
        raise UserError(
            f"{path} holds {dimensions} features an image of an unnamed extractor, by convention "
            f"Inception's, but the images are measured with {extractor.name!r}: their "
            "distance would mean nothing; set the extractor to inception, "
            "or the reference to an image zip or folder"
        )
    return _Meta(
        source=path.name,
        sha256=sha256_of(path),
        images=None,
        image_shape=None,
        extractor=extractor.name,
        extractor_sha256=None,
    )


def _short(sha256: str | None) -> str:
    return "unknown" if sha256 is None else short_sha256(sha256)
