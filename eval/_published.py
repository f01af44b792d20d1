"""Published feature networks of metrics, from files that are read as data.

Inception, CLIP and VGG16 are torch-fidelity's; DINOv2 is ours, since torch-fidelity runs the
current code of its authors' repository. All accept uint8 images of any size, with torch-fidelity's
resizing and normalization.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor

from core.downloads import local_file, sha256_of
from core.errors import UserError
from eval import _dinov2

_CLIP = "https://openaipublic.azureedge.net/clip/models"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"


class Source(NamedTuple):
    """URL and hash of published weights."""

    url: str
    sha256: str


SOURCES = {
    "inception": Source(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": Source(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    **{
        f"clip-{file.lower()}": Source(f"{_CLIP}/{sha256}/{file}.pt", sha256)
        for file, sha256 in {
            "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            "ViT-B-16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
            "ViT-L-14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        }.items()
    },
    **{
        f"dinov2-vit-{size}-14": Source(
            f"{_DINOV2}/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth", sha256
        )
        for size, sha256 in {
            "s": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
            "b": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
            "l": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        }.items()
    },
}
"""Name -> source."""


class FeatureNetwork(NamedTuple):
    """A published network, with name and hash of its weights file."""

    name: str
    sha256: str
    dimensions: int
    function: Callable[[Tensor], Tensor]
    """uint8 [N, 3, H, W] on its device -> features [N, D]."""
    head: Callable[[Tensor], Tensor] | None = None
    """Features -> logits [N, K]; None without a classifier head."""


def load(name: str, file: str, device: torch.device) -> FeatureNetwork:
    """Return a network by its name in SOURCES. file: its weights; "" downloads them once."""
    builders = {"inception": _inception, "vgg16": _vgg16, "clip": _clip, "dinov2": _dino}
    build = builders[name.partition("-")[0]]
    source = SOURCES[name]
    path = local_file(file) if file else local_file(source.url, sha256=source.sha256)
    return build(name, path, device)


def plain_tensors(path: Path, *, what: str) -> dict[str, Tensor]:
    """Return the tensors of a torch.save file. Raises UserError for any other file."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, UnpicklingError) as error:
        raise UserError(f"{path} is not a file of plain tensors, as {what} weights are") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{path} does not hold the weights of {what}")
    return tensors


def _inception(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """Return Inception v3 with the original FID weights: 2048 features, 1008 classes.

    The logits are without bias, as in Inception Scores.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=_copy(path, what="Inception"),
        ).to(device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the weights of Inception v3") from error
    return FeatureNetwork(
        *_identity(name, path),
        2048,
        lambda images: network(images)[0],
        lambda features: features @ network.fc.weight.T,
    )


def _vgg16(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """Return VGG16 up to its second hidden layer of 4096, for published precision and recall."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    try:
        network = FeatureExtractorVGG16(
            "vgg16", ["fc2_relu"], feature_extractor_weights_path=_copy(path, what="VGG16")
        ).to(device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the weights of VGG16") from error
    return FeatureNetwork(*_identity(name, path), 4096, lambda images: network(images)[0])


def _clip(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """Return the image encoder of CLIP.

    OpenAI publishes programs (TorchScript), not tensors: only files with the published checksums
    are opened.
    """
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    local_file(path, sha256=SOURCES[name].sha256)
    with warnings.catch_warnings():
        # deprecated by newer versions of torch, but the only published format
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        network = FeatureExtractorCLIP(
            name, ["clip"], feature_extractor_weights_path=str(path), verbose=False
        ).to(device)
    dimensions = network.model.visual.output_dim
    return FeatureNetwork(*_identity(name, path), dimensions, lambda images: network(images)[0])


def _dino(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """Return DINOv2 with its class token after the last normalization as features."""
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    try:
        network = _dinov2.from_tensors(plain_tensors(path, what="DINOv2")).to(device)
    except (RuntimeError, LookupError, AttributeError, ValueError) as error:
        raise UserError(f"{path} does not hold the weights of {name}") from error
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def function(images: Tensor) -> Tensor:
        resized = resize(images.to(torch.float32), size=(224, 224), align_corners=False)
        return network((resized / 255 - mean) / deviation)

    return FeatureNetwork(*_identity(name, path), network.width, function)


def _identity(name: str, path: Path) -> tuple[str, str]:
    """Return name and hash; the name includes the file's unless it is the published one."""
    sha256 = sha256_of(path)
    return name if sha256 == SOURCES[name].sha256 else f"{name}:{path.name}", sha256


def _copy(path: Path, *, what: str) -> io.BytesIO:
    """Return the weights in a new torch.save file: torch-fidelity unpickles its input."""
    copy = io.BytesIO()
    torch.save(plain_tensors(path, what=what), copy)
    copy.seek(0)
    return copy
