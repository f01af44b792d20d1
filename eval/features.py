"""Feature extractors: images to vectors, whose means and covariances a Fréchet distance compares.

    inception              Inception v3 with the original FID weights, 2048 features
    inception:WEIGHTS.pth  the same from a local file
    mnist32                the digit classifier of the embedded default, 64 features
    NET.safetensors        any classifier of the family below
    pixels                 the pixels themselves, for tutorials and tests: no network at all

Distances of different extractors have nothing to do with each other, so an extractor carries its
name and hash everywhere. Inception itself is torch-fidelity's.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from pydantic import Field
from torch import Tensor, nn

from core import weights
from core.config import Section, validate
from core.downloads import local_file, sha256_of
from core.errors import UserError

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_MNIST32 = Path(__file__).resolve().parents[1] / "assets" / "mnist32" / "features.safetensors"
_MOST_PIXELS = 8192


@dataclass(frozen=True)
class Extractor:
    """A named function from images to features, and the hash of the weights in it."""

    name: str
    sha256: str
    dimensions: int | None
    """Features of an image; None: as many as the image has values."""
    device: torch.device
    function: Callable[[Tensor], Tensor]
    """uint8 [N, C, H, W] on the device -> [N, D]."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D] float32, on its device, for images uint8 [N, C, H, W]."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
            )
        return self.function(images.to(self.device)).to(torch.float32)


def load(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Return the extractor of that name, or of a classifier's weights file."""
    device = torch.device(device)
    if name == "pixels":
        return _pixels(device)
    if name == "inception" or name.startswith("inception:"):
        return _inception(name.partition(":")[2], device)
    if name == "mnist32":
        return _classifier(name, _MNIST32, device)
    if name.endswith(".safetensors"):
        return _classifier(Path(name).name, local_file(name), device)
    raise UserError(
        f"no feature extractor {name!r}: expected inception, inception:WEIGHTS.pth, mnist32, "
        "pixels, or the path of a classifier's .safetensors file"
    )


class Config(Section):
    """Shape of a classifier."""

    image_channels: int = Field(default=1, ge=1)
    """Channels of an image."""
    resolution: int = Field(default=32, ge=8, multiple_of=8)
    """Width and height of an image in pixels, a multiple of 8."""
    width: int = Field(default=16, ge=1)
    """Channels after the first convolution; later layers have up to four times as many."""
    num_classes: int = Field(default=10, ge=2)
    """Classes it tells apart."""
    feature_dim: int = Field(default=64, ge=1)
    """Size of the penultimate layer, whose activations are the features."""


class Classifier(nn.Module):
    """A small convolutional classifier, fast on a CPU; its last hidden layer is the features."""

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
    """Write a classifier that `load` and `read_classifier` read."""
    weights.save(
        Path(path),
        family="classifier",
        config=classifier.config.model_dump(),
        tensors=classifier.state_dict(),
        provenance=provenance,
    )


def read_classifier(path: str | Path) -> Classifier:
    """Return the classifier of a weights file, in eval mode and without gradients."""
    stored = weights.read(path)
    if not isinstance(stored, weights.SavedNetwork) or stored.family != "classifier":
        found = getattr(stored, "family", "a pickle of generators or denoisers")
        raise UserError(f"{path} holds {found}; a feature extractor needs the family classifier")
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

    return Extractor(name, sha256_of(path), config.feature_dim, device, function)


def _pixels(device: torch.device) -> Extractor:
    def function(images: Tensor) -> Tensor:
        flat = _to_unit_range(images).flatten(1)
        if flat.shape[1] > _MOST_PIXELS:
            raise UserError(
                f"the extractor pixels compares at most {_MOST_PIXELS} values an image, "
                f"these have {flat.shape[1]}: use inception"
            )
        return flat

    return Extractor(
        "pixels", hashlib.sha256(b"pixels / 127.5 - 1").hexdigest(), None, device, function
    )


def _inception(path: str, device: torch.device) -> Extractor:
    """Return torch-fidelity's Inception; without a path the published weights, downloaded once."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = local_file(path) if path else local_file(INCEPTION_URL, sha256=INCEPTION_SHA256)
    weights_copy = _as_plain_tensors(file)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights_copy
        ).to(device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not hold the weights of Inception v3") from error

    def function(images: Tensor) -> Tensor:
        return network(images.expand(-1, 3, -1, -1).contiguous())[0]

    sha256 = sha256_of(file)
    name = "inception" if sha256 == INCEPTION_SHA256 else f"inception:{file.name}"
    return Extractor(name, sha256, 2048, device, function)


def _as_plain_tensors(path: Path) -> io.BytesIO:
    """Return the weights written again by us.

    torch-fidelity unpickles whatever file it is given, so it gets only this.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, UnpicklingError) as error:
        raise UserError(
            f"{path} is not a file of plain tensors, as Inception weights are"
        ) from error
    copy = io.BytesIO()
    torch.save(tensors, copy)
    copy.seek(0)
    return copy


def _to_unit_range(images: Tensor) -> Tensor:
    """Return float32 in [-1, 1] for uint8."""
    return images.to(torch.float32) / 127.5 - 1
