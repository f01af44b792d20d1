"""A recipe's metrics over seeds: on any number of ranks, in any batch size, on disjoint seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from core.config import ConfigError, validate
from core.distributed import World
from core.errors import EvaluationCancelled, UserError
from eval import evaluator, features, samples
from eval.evaluator import Config, Evaluator
from eval.feature_stats import FeatureStatistics
from eval.metrics import registry
from eval.metrics.frechet import frechet_distance
from eval.reference import Reference

CPU = torch.device("cpu")
ALONE = World.single()
PIXELS = features.load("pixels")
SMALL = registry.Config(kid_subsets=3, kid_subset_size=10)


class Linear(nn.Module):
    """A student with a mapping network, whose images are linear in its latents."""

    latent_shape = (6,)
    image_shape = (1, 3, 3)
    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 9, generator=generator) / 8)

    def mapping(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents[:, None]

    def synthesis(self, w: Tensor) -> Tensor:
        return (w[:, 0] @ self.weight).view(-1, 1, 3, 3)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesis(self.mapping(latents))


def _real(count: int = 60, *, keeps: bool = True) -> Reference:
    made = torch.randn(count, 9, generator=torch.Generator().manual_seed(1)) / 3
    moments = FeatureStatistics.of(made)
    reference = Reference(
        moments.mean,
        moments.covariance,
        "real",
        "0" * 64,
        count,
        (1, 3, 3),
        "pixels",
        PIXELS.sha256,
    )
    return replace(reference, features=made) if keeps else reference


def _evaluator(*names: str, world: World = ALONE, **settings: int) -> Evaluator:
    """Return an evaluator of pixels; settings are those of Config."""
    config = Config(metrics=names, definitions=SMALL, **{"batch_size": 7, **settings})
    return Evaluator(
        config=config,
        requests=registry.parse(names),
        extractor=PIXELS,
        distance=None,
        world=world,
        real=_real(),
    )


def _images_of(student: nn.Module) -> samples.ImagesOf:
    return samples.images_of_seeds(student, device="cpu")


def test_metrics_are_over_disjoint_ranges_of_seeds() -> None:
    """Value k is that of seeds first + k * images and following, by its own definition."""
    images_of = _images_of(Linear())
    found = _evaluator("fid", "kid", images=30, seeds=2).evaluate(images_of, first_seed=100)
    assert list(found) == ["fid", "kid"]
    for value, start in zip(found["fid"].values, (100, 130), strict=True):
        made = FeatureStatistics.of(PIXELS(images_of(range(start, start + 30))))
        assert value == pytest.approx(frechet_distance(made, _real()), rel=1e-6)


def test_metrics_do_not_depend_on_the_batch_size() -> None:
    """Batches of 7 and of 64 images measure the same, to rounding."""
    names = ("fid", "kid", "precision", "recall")
    first, second = (
        _evaluator(*names, batch_size=size, images=40).evaluate(_images_of(Linear()))
        for size in (7, 64)
    )
    for metric in names:
        assert first[metric].values == pytest.approx(second[metric].values, rel=1e-5), metric


def test_each_rank_measures_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks make 5, 6 and 6 of 17 images, together those of one rank, in order."""
    images_of = _images_of(Linear())
    alone = _evaluator("kid").features(images_of, range(17))
    shares: list[Tensor] = []
    monkeypatch.setattr(
        evaluator, "all_gather_rows", lambda rows, world: shares.append(rows) or rows
    )
    for rank in range(3):
        _evaluator("kid", world=World(rank, 3, rank, CPU)).features(images_of, range(17))
    assert [len(share) for share in shares] == [5, 6, 6]
    torch.testing.assert_close(torch.cat(shares), alone)


def test_fewer_images_than_ranks_are_refused() -> None:
    """A rank without an image would have no statistics: the user is told."""
    with pytest.raises(UserError, match="2 images are fewer than 3 ranks"):
        _evaluator("fid", world=World(0, 3, 0, CPU)).feature_stats(_images_of(Linear()), range(2))


def test_path_lengths_are_measured_where_a_student_is_given() -> None:
    """With its student a suite gives ppl too, of each range of seeds; without, it leaves it out."""
    student = Linear()
    distance = evaluator.path_length.Distance(
        "square", "", lambda a, b: (a - b).square().sum((1, 2, 3))
    )
    measures = replace(_evaluator("fid", "ppl", images=20, seeds=2), distance=distance)
    found = measures.evaluate(_images_of(student), student=student)
    assert list(found) == ["fid", "ppl"] and found["ppl"].std > 0
    assert list(measures.evaluate(_images_of(student))) == ["fid"]


def test_a_measurement_tells_of_every_image() -> None:
    """Two ranges of 30 images are 60 in all, path lengths as many again; each is told of."""
    totals, done = list[int](), list[int]()

    @contextmanager
    def show(images: int) -> Iterator[Callable[[int], None]]:
        totals.append(images)
        yield done.append

    student = Linear()
    distance = evaluator.path_length.Distance(
        "square", "", lambda a, b: (a - b).square().sum((1, 2, 3))
    )
    measures = replace(_evaluator("fid", "ppl", images=30, seeds=2), distance=distance, show=show)
    measures.evaluate(_images_of(student), student=student)
    assert (totals, sum(done), max(done)) == ([120], 120, 7)


def test_while_training_only_what_few_images_can_give() -> None:
    """A KID of subsets of 10 needs as many; ppl waits; published names lose their counts."""
    names, images_of = ("fid50k_full", "kid", "ppl"), _images_of(Linear())
    few, enough = (_evaluator(*names, images_while_training=images) for images in (9, 10))
    assert list(few.evaluate_quick(images_of)) == ["fid"]
    assert list(enough.evaluate_quick(images_of)) == ["fid", "kid"]
    assert _evaluator("ppl", images_while_training=10).evaluate_quick(images_of) == {}


def test_a_quick_evaluation_that_is_asked_to_stop_is_cancelled() -> None:
    """No batch is begun after the request, and no metric of fewer images is returned."""
    batches = list[int]()

    def images_of(seeds: Sequence[int]) -> Tensor:
        batches.append(len(seeds))
        return _images_of(Linear())(seeds)

    with pytest.raises(EvaluationCancelled):
        _evaluator("fid").evaluate_quick(images_of, stop_requested=lambda: len(batches) == 2)
    assert batches == [7, 7]


def test_stored_statistics_give_the_distance_and_stored_features_the_rest() -> None:
    """Mean and covariance alone tell a FID; too few features for a subset tell no KID."""
    measures = _evaluator("fid", "kid", "recall", "inception_score")
    assert list(measures.evaluate_stored(_real(keeps=False))) == ["fid"]
    assert list(measures.evaluate_stored(_real())) == ["fid", "kid", "recall"]
    assert list(measures.evaluate_stored(_real(9))) == ["fid", "recall"]
    assert measures.evaluate_stored(_real())["fid"] == pytest.approx(0, abs=1e-9)


def test_without_a_reference_only_what_compares_with_nothing_is_measured() -> None:
    """The default asks for a FID, which needs a reference: without one nothing is loaded."""
    load = evaluator.load
    assert load(Config(extractor="pixels"), image_shape=(1, 3, 3), world=ALONE) is None
    config = Config(extractor="mnist32", metrics=("fid", "is", "ppl"))
    loaded = load(config, image_shape=(1, 32, 32), world=ALONE)
    assert loaded is not None and loaded.metrics == ("inception_score", "ppl")
    assert loaded.distance is not None and loaded.distance.name == "mnist32"


def test_what_stands_in_the_way_is_said_before_an_image_is_made() -> None:
    """Too few images, and a student with no W to walk in."""
    with pytest.raises(UserError, match="kid needs at least 10 generated images, got 9"):
        _evaluator("kid", images=9).check(student=Linear())
    with pytest.raises(UserError, match="a path in W needs a student with a mapping network"):
        _evaluator("ppl", images=9).check(student=nn.Module())


def test_a_name_that_is_no_metric_is_refused_by_the_recipe() -> None:
    """The error names the key and what is known."""
    with pytest.raises(ConfigError, match=r"metrics.*no metric 'fod': expected fid, kid"):
        validate(Config, {"metrics": ["fod"]}, source="recipe.yaml")
