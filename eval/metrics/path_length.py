"""Perceptual path length: how far images move when their latents move a little.

    ppl2_wend, ppl     steps in W from its endpoints, as StyleGAN2 reports (Karras et al., CVPR
                       2020, Appendix D)
    ppl_zfull …        StyleGAN's own four: in Z or W, anywhere or at endpoints, faces cut out

The distance between images is LPIPS, or between features of a small classifier if there is no
network to download. Two things differ from the published program: classes are drawn evenly, not as
often as in a training set, and the noise inputs stay at their stored constants, while that program
draws new ones for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.distributed import World, all_gather_rows, local_range
from core.downloads import local_file, sha256_of
from core.errors import UserError
from core.roles import Generator
from eval import _published, features
from eval.metrics import _lpips
from eval.metrics.registry import Metric

_LPIPS = _published.Source(
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
    "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)
_LARGEST = 256
"""Sides of images that are compared; larger ones are averaged down by a whole factor."""


class Walk(NamedTuple):
    """Place of the steps, and the part of the images that is compared."""

    in_w: bool
    """Steps in W, along straight lines; else in Z, along great circles."""
    anywhere: bool
    """Steps between the endpoints; else at the first one."""
    cropped: bool
    """Compare only the part of the images that holds the face in published data sets."""


WALKS = {
    "ppl": Walk(in_w=True, anywhere=False, cropped=False),
    "ppl2_wend": Walk(in_w=True, anywhere=False, cropped=False),
    "ppl_zfull": Walk(in_w=False, anywhere=True, cropped=True),
    "ppl_wfull": Walk(in_w=True, anywhere=True, cropped=True),
    "ppl_zend": Walk(in_w=False, anywhere=False, cropped=True),
    "ppl_wend": Walk(in_w=True, anywhere=False, cropped=True),
}
"""The names that ask for a path length."""


class Distance(NamedTuple):
    """A squared distance between images, and the weights in it."""

    name: str
    sha256: str
    function: Callable[[Tensor, Tensor], Tensor]
    """Two times [N, C, H, W] float32, about [-1, 1] -> [N]."""


def load_distance(name: str, device: torch.device | str = "cpu") -> Distance:
    """Return LPIPS (lpips), or the squared distance of a classifier's features (mnist32, or the
    path of a .safetensors file).
    """
    device = torch.device(device)
    if name == "lpips":
        return _load_lpips(device)
    if name == "mnist32" or name.endswith(".safetensors"):
        path = features.classifier_path(name)
        classifier = features.read_classifier(path).to(device)

        def function(first: Tensor, second: Tensor) -> Tensor:
            return (classifier.features(first) - classifier.features(second)).square().sum(1)

        return Distance(name, sha256_of(path), function)
    raise UserError(
        f"no distance between images {name!r}: expected lpips, mnist32, or the path of a "
        "classifier's .safetensors file"
    )


def _load_lpips(device: torch.device) -> Distance:
    vgg16 = _published.SOURCES["vgg16"]
    network = _lpips.from_tensors(
        _published.plain_tensors(local_file(vgg16.url, sha256=vgg16.sha256), what="VGG16"),
        _published.plain_tensors(local_file(_LPIPS.url, sha256=_LPIPS.sha256), what="LPIPS"),
    ).to(device)

    def function(first: Tensor, second: Tensor) -> Tensor:
        return network(first.expand(-1, 3, -1, -1), second.expand(-1, 3, -1, -1))

    return Distance("lpips", _LPIPS.sha256, function)


@torch.no_grad()
def perceptual_path_length(
    student: Generator,
    distance: Distance,
    walk: Walk,
    *,
    images: int = 50_000,
    first_seed: int = 0,
    batch_size: int = 50,
    epsilon: float = 1e-4,
    world: World,
) -> float:
    """Return the mean of d(image(t), image(t + epsilon)) / epsilon^2, the work shared by all ranks.

    Of `images` pairs, those outside the percentiles 1 and 99 are left out. student: in eval mode,
    on the device of the world; in W it needs a `mapping` and a `synthesis`. Raises UserError where
    it has none, or if a distance is not finite.
    """
    if student.training:
        raise ValueError("the student must be in eval mode, so that its images are a function")
    check(student, walk)
    share = local_range(images, world)
    lengths_squared = [torch.zeros(0, dtype=torch.float64, device=world.device)]
    for start in range(share.start, share.stop, batch_size):
        seeds = range(first_seed + start, first_seed + min(start + batch_size, share.stop))
        before, after = _steps(student, walk, seeds, epsilon=epsilon, device=world.device)
        moved = distance.function(_looked_at(before, walk), _looked_at(after, walk))
        lengths_squared.append(moved.to(torch.float64) / epsilon**2)
    lengths = all_gather_rows(torch.cat(lengths_squared), world).cpu()
    if not lengths.isfinite().all():
        index = int((~lengths.isfinite()).nonzero()[0])
        raise UserError(f"the images of seed {first_seed + index} have no finite distance")
    return _trimmed_mean(lengths.numpy())


def check(student: Generator, walk: Walk) -> None:
    """Raise UserError if the student has no W to walk in."""
    if walk.in_w and not (hasattr(student, "mapping") and hasattr(student, "synthesis")):
        raise UserError(
            "a path in W needs a student with a mapping network, and this one has none: measure a "
            "path in Z, ppl_zend or ppl_zfull"
        )


def _trimmed_mean(lengths: np.ndarray) -> float:
    """Return the mean of the values within the percentiles 1 and 99, both included."""
    low = np.percentile(lengths, 1, method="lower")
    high = np.percentile(lengths, 99, method="higher")
    return float(lengths[(low <= lengths) & (lengths <= high)].mean())


def _steps(
    student: Generator, walk: Walk, seeds: Sequence[int], *, epsilon: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the images [N, C, H, W] before and after each seed's step."""
    draws = _draws(student, walk, seeds)
    places = torch.cat([draws.place, draws.place + epsilon])  # [2 N]
    labels = None if draws.labels is None else draws.labels.repeat(2).to(device)
    if walk.in_w:
        ends = torch.cat([draws.start, draws.end]).to(device, torch.float32)
        mapping, synthesis = _halves(student)
        start, end = mapping(ends, labels).chunk(2)  # [N, num_ws, w_dim] each
        weight = places.to(device, torch.float32)[:, None, None]
        images = synthesis(start.repeat(2, 1, 1).lerp(end.repeat(2, 1, 1), weight))
    else:
        shape = [2] + [1] * (draws.start.ndim - 1)
        latents = great_circle(draws.start.repeat(shape), draws.end.repeat(shape), places)
        images = student(latents.to(device, torch.float32), labels)
    before, after = images.chunk(2)
    return before, after


class _Draws(NamedTuple):
    """Endpoints of the steps of some seeds."""

    start: Tensor
    """[N, *latent_shape] float64."""
    end: Tensor
    """[N, *latent_shape] float64."""
    place: Tensor
    """[N] float64: the share of the way from start to end."""
    labels: Tensor | None
    """[N] int64."""


def _halves(student: Generator) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return mapping and synthesis of a student that `check` has found to have them."""
    mapping = cast(Callable[..., Tensor], student.mapping)
    return mapping, cast(Callable[..., Tensor], student.synthesis)


def _draws(student: Generator, walk: Walk, seeds: Sequence[int]) -> _Draws:
    """Return of each seed's stream two latents, then a uniform label, then a place."""
    ends, places, labels = [], [], []
    for seed in seeds:
        stream = np.random.RandomState(seed)
        ends.append(stream.standard_normal((2, *student.latent_shape)))
        labels.append(stream.randint(student.num_classes) if student.num_classes else 0)
        places.append(stream.uniform() if walk.anywhere else 0.0)
    start, end = torch.from_numpy(np.stack(ends)).unbind(1)
    return _Draws(
        start,
        end,
        torch.tensor(places, dtype=torch.float64),
        torch.tensor(labels) if student.num_classes else None,
    )


def great_circle(start: Tensor, end: Tensor, place: Tensor) -> Tensor:
    """Return the points at `place` [N] on the arcs between two directions [N, ...].

    Their root mean square is 1, that of a unit normal latent; the published program leaves it to
    the mapping network, which makes it so.
    """
    flat_start, flat_end = F.normalize(start.flatten(1)), F.normalize(end.flatten(1))
    cosine = (flat_start * flat_end).sum(1, keepdim=True)
    sideways = F.normalize(flat_end - cosine * flat_start)
    angle = place[:, None] * cosine.clamp(-1, 1).acos()
    point = flat_start * angle.cos() + sideways * angle.sin()
    return (point * point.shape[1] ** 0.5).view_as(start)


def _looked_at(images: Tensor, walk: Walk) -> Tensor:
    """Return the compared part of the images, averaged down to at most 256 pixels.

    The part is 4/8 by 4/8 of them, beginning 3/8 from the top and 2/8 from the left; the factor is
    that of the whole image, as in the published program.
    """
    side = images.shape[-1]
    if walk.cropped:
        eighth = side // 8
        images = images[:, :, 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]
    return F.avg_pool2d(images, side // _LARGEST) if side >= 2 * _LARGEST else images


PPL = Metric(
    name="ppl",
    label="PPL",
    title="Perceptual Path Length",
    better="lower",
    needs="student",
    published_features="lpips",
    compute=None,
    least_images=lambda config: 1,
    position=5,
    compares=False,
    published_names=tuple(name for name in WALKS if name != "ppl"),
)
METRICS = (PPL,)
