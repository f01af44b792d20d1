"""Metrics by name: torch-fidelity's numbers from the same folders, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_fidelity import calculate_metrics, metric_kid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from core.distributed import World, local_range
from core.errors import UserError
from data.images import Images
from eval import evaluator, features
from eval.feature_stats import Collected, Collector, merged_over_ranks
from eval.metrics import registry
from eval.metrics.registry import Config, Request, evaluate, metrics, parse

CPU = torch.device("cpu")
SMALL = Config(kid_subsets=10, kid_subset_size=20)
FEATURES = frozenset({"moments", "features", "classes"})


@dataclass
class Reference:
    """Real images as a published file of statistics has them."""

    mean: Tensor
    covariance: Tensor
    images: int | None = None
    features: Tensor | None = None


def _collector(requests: Sequence[Request], **options: object) -> Collector:
    return evaluator.new_collector(registry.needs(requests), SMALL, **options)


def _random_inception(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write Inception weights that keep the scale of what goes through them; return their path."""
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(network.fc.weight, std=3.0)  # classes that differ from image to image
    torch.save(network.state_dict(), path)
    return path


def _folder(path: Path, *, seed: int, count: int = 60) -> Path:
    """Write images of 16 x 16 pixels: coarse squares, smoothed where the seed is odd."""
    path.mkdir()
    random = np.random.RandomState(seed)
    filtering = Image.Resampling.BICUBIC if seed % 2 else Image.Resampling.NEAREST
    for index in range(count):
        squares = Image.fromarray(random.randint(0, 256, (4, 4, 3)).astype(np.uint8))
        squares.resize((16, 16), filtering).save(path / f"{index:03d}.png")
    return path


def _collected(folder: Path, extractor: features.Extractor, batch_size: int) -> Collected:
    images = Images(folder)
    taken = evaluator.new_collector(
        registry.needs(ALL), SMALL, images=len(images), head=extractor.head
    )
    for batch in DataLoader(images, batch_size=batch_size):
        taken.add(extractor(batch))
    return taken.collected


ALL = parse(["fid", "kid", "inception_score", "precision", "recall"])


def _sum_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch-fidelity's KID in float64: in float32 its sums, which cancel, keep 4 digits."""
    kernel = metric_kid.kernel_poly

    def in_float64(first: np.ndarray, second: np.ndarray, **settings: object) -> np.ndarray:
        return kernel(first.astype(np.float64), second.astype(np.float64), **settings)

    monkeypatch.setattr(metric_kid, "kernel_poly", in_float64)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_all_metrics_are_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two folders of images, by the same Inception: equal to 1e-6, subsets and splits too."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the least it takes
    _sum_in_float64(monkeypatch)
    weights = _random_inception(tmp_path / "weights.pth", monkeypatch)
    made, real = _folder(tmp_path / "made", seed=1), _folder(tmp_path / "real", seed=2)
    expected = calculate_metrics(
        input1=str(made),
        input2=str(real),
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        kid_subsets=10,
        kid_subset_size=20,
        batch_size=30,
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
    )
    extractor = features.load(f"inception:{weights}")
    found = evaluate(
        ALL, _collected(made, extractor, 30), _collected(real, extractor, 30), config=SMALL
    )
    assert found == pytest.approx(
        {
            "fid": expected["frechet_inception_distance"],
            "kid": expected["kernel_inception_distance_mean"],
            "inception_score": expected["inception_score_mean"],
            "precision": expected["precision"],
            "recall": expected["recall"],
        },
        rel=1e-6,
    )
    assert found["inception_score"] > 1.1 and 0 < found["recall"] < 1


def _features(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def _taken(made: Tensor, *, world: World | None = None) -> Collected:
    """Return what is kept of features, taken in batches of 7; with a world, of a rank's share."""
    share = range(len(made)) if world is None else local_range(len(made), world)
    taken = evaluator.new_collector(
        registry.needs(ALL), SMALL, images=len(made), head=_head, first=share.start
    )
    for batch in made[share.start : share.stop].split(7):
        taken.add(batch)
    return taken.collected


def _head(features: Tensor) -> Tensor:
    return features[:, :4] * 2


def test_metrics_do_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with shares of 61 images, put together, measure what one rank measures."""
    made, real = _features(61, 1), _taken(_features(50, 2) + 0.5)
    alone = evaluate(ALL, _taken(made), real, config=SMALL)
    worlds = [World(rank, 3, rank, CPU) for rank in range(3)]
    parts = [_taken(made, world=world) for world in worlds]
    given: list[list[Tensor]] = [[], [], []]

    def recorded(rank: int) -> None:
        def gather(tensor: Tensor, world: World) -> Tensor:
            given[rank].append(tensor)
            return tensor.repeat(3, *[1] * (tensor.ndim - 1))

        monkeypatch.setattr("eval.feature_stats.all_gather_rows", gather)
        merged_over_ranks(parts[rank], worlds[rank])

    for rank in range(3):
        recorded(rank)
    rows = iter([torch.cat(tensors) for tensors in zip(*given, strict=True)])
    monkeypatch.setattr("eval.feature_stats.all_gather_rows", lambda tensor, world: next(rows))
    merged = merged_over_ranks(parts[1], worlds[1])
    assert merged.images == 61
    assert evaluate(ALL, merged, real, config=SMALL) == pytest.approx(alone, rel=1e-9)


def test_only_so_many_features_are_kept_the_same_on_any_rank() -> None:
    """Of 500 images those of 40 are kept: drawn from all of them, in order, whoever holds them."""
    made = torch.arange(500.0)[:, None]
    whole = Collector({"features"}, images=500, kept_images=40)
    parts = [Collector({"features"}, images=500, kept_images=40, first=first) for first in (0, 200)]
    whole.add(made)
    parts[0].add(made[:200])
    parts[1].add(made[200:])
    kept = whole.collected.features
    merged = parts[0].collected.merge(parts[1].collected).features
    assert kept is not None and merged is not None
    assert torch.equal(kept, merged)
    assert len(kept) == 40 and bool((kept[1:] > kept[:-1]).all())
    assert 150 < kept.mean() < 350


def test_nothing_is_kept_that_no_metric_asks_for() -> None:
    """FID and Inception Score alone keep no features, and KID alone no covariance."""
    streaming = evaluator.new_collector(
        registry.needs(parse(["fid", "is"])), SMALL, images=30, head=_head
    )
    streaming.add(_features(30, 1))
    assert streaming.collected.features is None and streaming.collected.classes is not None
    kept = _collector(parse(["kid"]), images=30)
    kept.add(_features(30, 1))
    assert kept.collected.statistics is None and kept.collected.classes is None


def test_features_that_are_not_finite_name_their_image() -> None:
    """The index is that in the whole set, also on a rank that starts in its middle."""
    made = _features(30, 1)
    made[12, 3] = torch.nan
    taken = Collector(FEATURES, images=130, first=100, head=_head)
    taken.add(made[:10])
    with pytest.raises(UserError, match="features of image 112 are not finite"):
        taken.add(made[10:])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fid", Request("fid", ("fid",))),
        ("pr", Request("pr", ("precision", "recall"))),
        ("fid50k_full", Request("fid50k_full", ("fid",), 50_000)),
        ("kid10k", Request("kid10k", ("kid",), 10_000, 50_000)),
        ("is50k", Request("is50k", ("inception_score",), 50_000)),
        ("pr50k3_full", Request("pr50k3_full", ("precision", "recall"), 50_000)),
        ("ppl2_wend", Request("ppl2_wend", ("ppl",), 50_000)),
    ],
)
def test_published_names_are_understood(name: str, expected: Request) -> None:
    """StyleGAN's names say which metric, of how many images, against how many real ones."""
    assert parse([name]) == (expected,)
    assert set(expected.metrics) <= metrics().keys()


@pytest.mark.parametrize("name", ["fid0k", "fid50", "is50k_full", "pr50k", "kid50k3", "FID", ""])
def test_other_names_are_refused(name: str) -> None:
    """A name that is nearly one is answered with those that are."""
    with pytest.raises(UserError, match=f"no metric '{name}': expected fid, kid, .* fid50k_full"):
        parse([name])


def test_one_value_is_asked_for_once() -> None:
    """fid and fid50k_full would both be `fid` in a report."""
    with pytest.raises(UserError, match="fid, fid50k_full ask for fid more than once"):
        parse(["fid", "kid", "fid50k_full"])


def test_all_that_is_missing_is_said_at_once() -> None:
    """Too few images of either kind, no features, no classes: one sentence, with the numbers."""
    published = Reference(torch.zeros(6), torch.eye(6), images=None)
    requests = parse(["kid", "is", "precision"])
    with pytest.raises(UserError) as caught:
        registry.check(requests, images=9, real=published, can_classify=False, config=Config())
    assert str(caught.value).split("; ") == [
        "kid needs at least 1,000 generated images, got 9",
        "kid needs the features of real images, and the reference holds only their mean and "
        "covariance: give the images, as a zip or folder",
        "inception_score needs at least 10 generated images, got 9",
        "inception_score needs an extractor with classes: inception, mnist32",
        "precision needs the features of real images, and the reference holds only their mean and "
        "covariance: give the images, as a zip or folder",
    ]


def test_counts_that_a_name_promises_are_held_to() -> None:
    """fid50k is of 50,000 images against 50,000 real ones at most; pr needs 4 real ones."""
    real = _taken(_features(10, 2))
    check = dict(can_classify=True, config=Config())
    with pytest.raises(UserError, match=r"fid50k_full is of 50,000 generated images, these are 9"):
        registry.check(parse(["fid50k_full"]), images=9, real=real, **check)
    many = Reference(torch.zeros(6), torch.eye(6), images=70_000)
    with pytest.raises(UserError, match=r"50,000 real images at most.*70,000: ask for fid50k_full"):
        registry.check(parse(["fid50k"]), images=50_000, real=many, **check)
    few = Reference(torch.zeros(6), torch.eye(6), images=3, features=_features(3, 1))
    with pytest.raises(UserError, match="recall needs at least 4 real images, got 3"):
        registry.check(parse(["recall"]), images=50, real=few, **check)


def test_a_published_reference_gives_the_distance_alone() -> None:
    """FID and Inception Score need no features of real images."""
    made = _taken(_features(40, 1))
    published = Reference(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    found = evaluate(parse(["fid", "is"]), made, published, config=SMALL)
    assert list(found) == ["fid", "inception_score"]
