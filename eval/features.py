"""Feature extractors: the networks behind metrics, from images to feature vectors.

    inception         Inception v3 with the original FID weights, 2048 features: the standard
    vgg16             VGG16 of ImageNet, 4096 features, for published precision and recall
    clip-vit-b-32     CLIP, 512 features; also vit-b-16, vit-l-14
    dinov2-vit-b-14   DINOv2, 768 features; also vit-s-14, vit-l-14
    NAME:FILE         any of these from a local file, here inception:WEIGHTS.pth
    mnist32           the digit classifier of the embedded default, 64 features
    NET.safetensors   any classifier of the family below
    random-conv-v1    random convolutions, 528 features: any images of 16x16 or more, no download
    pixels            the pixels themselves, without a network, for tutorials and tests

Distances of different extractors are not comparable, so every result stores the extractor's name
and hash. The published networks are in _published.py.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from core.config import Section, validate
from core.downloads import local_file, sha256_of
from core.errors import UserError
from eval import _published, _random_conv
from pretrained import files

INCEPTION_URL = _published.SOURCES["inception"].url
_MNIST32 = Path(__file__).resolve().parents[1] / "assets" / "mnist32" / "features.safetensors"
_MOST_PIXELS = 8192
_ANNOUNCED_SECONDS = 60
_SLOW_SECONDS_PER_IMAGE = 1.0
"""Above what any extractor takes: fewer images than this tells are not timed."""
_TIMED_IMAGES = 8
_log = logging.getLogger(__name__)
_EMBEDDED = ("mnist32", _random_conv.NAME, "pixels")
"""Extractors that need no file of a user's and no download."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor with its name and the hash of its weights."""

    name: str
    sha256: str
    dimensions: int | None
    """Size of the feature vector; None: the number of values of an image."""
    device: torch.device
    function: Callable[[Tensor], Tensor]
    """uint8 [N, C, H, W] on the device -> [N, D]."""
    head: Callable[[Tensor], Tensor] | None = None
    """Features [N, D] on the device -> logits of classes [N, K]; None without a classifier head."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D] float32 on the device for images uint8 [N, C, H, W]."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
            )
        return self.function(images.to(self.device)).to(torch.float32)


def announce(
    extractor: Extractor, images: int, image_shape: tuple[int, int, int], *, ranks: int = 1
) -> None:
    """Log how long the features of so many images will take, by a few of them, if it is long."""
    if images * _SLOW_SECONDS_PER_IMAGE < _ANNOUNCED_SECONDS:
        return
    some = torch.zeros(_TIMED_IMAGES, *image_shape, dtype=torch.uint8)
    extractor(some).sum().item()  # warms up
    started = time.perf_counter()
    extractor(some).sum().item()
    seconds = (time.perf_counter() - started) / len(some) * images / ranks
    if seconds >= _ANNOUNCED_SECONDS:
        _log.info(
            "features of %s for %s images: about %s",
            *(extractor.name, f"{images:,}", timedelta(seconds=round(seconds))),
        )


def load(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Return the extractor of a name, or of a classifier's weights file."""
    device = torch.device(device)
    if name == "pixels":
        return _pixels(device)
    if name == _random_conv.NAME:
        return _random_convolutions(device)
    kind, _, file = name.partition(":")
    if kind in _published.SOURCES:
        return _published_extractor(_published.load(kind, file, device), device)
    if name == "mnist32" or name.endswith(".safetensors"):
        return _classifier(Path(name).name, classifier_path(name), device)
    raise UserError(
        f"no feature extractor {name!r}: expected {', '.join(_published.SOURCES)}, one of these "
        f"with its file as in inception:WEIGHTS.pth, {', '.join(_EMBEDDED)}, or the path of a "
        "classifier's .safetensors file"
    )


def weights_of(name: str) -> str | None:
    """Return path or URL of an extractor's weights; None for an embedded one."""
    if name in _EMBEDDED:
        return None
    kind, _, file = name.partition(":")
    if kind not in _published.SOURCES:
        return name
    return file or _published.SOURCES[kind].url


def with_weights(name: str, weights: str) -> str:
    """Return the name of the same extractor with its weights at another path."""
    kind = name.partition(":")[0]
    return f"{kind}:{weights}" if kind in _published.SOURCES else weights


class Config(Section):
    """Shape of a classifier."""

    image_channels: int = Field(default=1, ge=1)
    """Channels of an image."""
    resolution: int = Field(default=32, ge=8, multiple_of=8)
    """Width and height of an image in pixels, a multiple of 8."""
    width: int = Field(default=16, ge=1)
    """Channels after the first convolution; later layers have up to four times as many."""
    num_classes: int = Field(default=10, ge=2)
    """Number of classes."""
    feature_dim: int = Field(default=64, ge=1)
    """Size of the penultimate layer, whose activations are the features."""


class Classifier(nn.Module):
    """A small convolutional classifier for CPUs; its last hidden layer is the feature vector."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.resolution // 8
        self.stem = _convolution(config.image_channels, width, stride=2)
        self.body = nn.Sequential(
            _convolution(width, 2 * width),
            _convolution(2 * width, 4 * width, stride=2),
            _convolution(4 * width, 4 * width),
            _convolution(4 * width, 4 * width, stride=2),
        )
        self.embedding = nn.Sequential(
            nn.Linear(4 * width * side * side, config.feature_dim), nn.SiLU()
        )
        self.head = nn.Linear(config.feature_dim, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer [N, feature_dim] for images [N, C, H, W] in [-1, 1]."""
        return self.embedding(self.body(self.stem(images)).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, C, H, W] float32 in [-1, 1]."""
        return self.head(self.features(images))


def save_classifier(
    path: str | Path, classifier: Classifier, *, provenance: Mapping[str, object]
) -> None:
    """Write a classifier in the format of `load` and `read_classifier`."""
    files.save(
        Path(path),
        family="classifier",
        config=classifier.config.model_dump(),
        tensors=classifier.state_dict(),
        provenance=provenance,
    )


def classifier_path(name: str) -> Path:
    """Return the weights file of mnist32, or of a classifier given as a path or a URL."""
    return _MNIST32 if name == "mnist32" else local_file(name)


def read_classifier(path: str | Path) -> Classifier:
    """Return the classifier of a weights file, in eval mode and without gradients."""
    stored = files.read(path)
    if not isinstance(stored, files.SavedNetwork) or stored.family != "classifier":
        kind = getattr(stored, "family", "a pickle of generators or denoisers")
        raise UserError(f"{path} holds {kind}; a feature extractor needs the family classifier")
    classifier = Classifier(validate(Config, stored.config, source=str(path)))
    try:
        classifier.load_state_dict(stored.tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the classifier that it describes: {error}") from error
    return classifier.eval().requires_grad_(False)


def _convolution(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


def _classifier(name: str, path: Path, device: torch.device) -> Extractor:
    classifier = read_classifier(path).to(device)
    config = classifier.config
    expected = (config.image_channels, config.resolution, config.resolution)

    def function(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"the extractor {name} was made for images {expected}, "
                f"got {tuple(images.shape[1:])}"
            )
        return classifier.features(_to_unit_range(images))

    return Extractor(
        name, sha256_of(path), config.feature_dim, device, function, head=classifier.head
    )


def _pixels(device: torch.device) -> Extractor:
    def function(images: Tensor) -> Tensor:
        flat = _to_unit_range(images).flatten(1)
        if flat.shape[1] > _MOST_PIXELS:
            raise UserError(
                f"the extractor pixels compares at most {_MOST_PIXELS} values an image, "
                f"these have {flat.shape[1]}: use inception, or "
                f"{_random_conv.NAME}, which needs no download"
            )
        return flat

    return Extractor(
        "pixels", hashlib.sha256(b"pixels / 127.5 - 1").hexdigest(), None, device, function
    )


def _random_convolutions(device: torch.device) -> Extractor:
    network = _random_conv.RandomConvolutions(device)

    def function(images: Tensor) -> Tensor:
        channels, *size = images.shape[1:]
        if channels not in (1, 3) or min(size) < _random_conv.SMALLEST:
            raise UserError(
                f"the extractor {_random_conv.NAME} takes images of 1 or 3 channels and 16x16 "
                f"pixels or more, these are {tuple(images.shape[1:])}"
            )
        return network(_to_unit_range(images))

    return Extractor(_random_conv.NAME, network.sha256, _random_conv.DIMENSIONS, device, function)


def fetch(name: str) -> Path:
    """Return the file of a published extractor's weights, downloaded once.

    Raises UserError for another name, or if it cannot be downloaded.
    """
    if name not in _published.SOURCES:
        raise UserError(f"{name} is no published extractor: {', '.join(_published.SOURCES)}")
    source = _published.SOURCES[name]
    return local_file(source.url, sha256=source.sha256)


def _published_extractor(published: _published.FeatureNetwork, device: torch.device) -> Extractor:
    """Return the extractor of a published network; one-channel images are repeated to three."""

    def function(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(
                f"the extractor {published.name} takes images of 1 or 3 channels, "
                f"these have {images.shape[1]}"
            )
        return published.function(images.expand(-1, 3, -1, -1).contiguous())

    return Extractor(
        published.name,
        published.sha256,
        published.dimensions,
        device,
        function,
        head=published.head,
    )


def _to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1
