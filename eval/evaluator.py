"""Evaluator: a recipe's metrics, on the images of seeds or of files, the work shared by all ranks.

    evaluator = load(config, image_shape=(3, 32, 32), world=world)
    evaluator.evaluate(images_of)            {"fid": MetricResult, ...}
    evaluator.evaluate_quick(images_of)      {"fid": 3.1}, on fewer images, while training

Everything that can be refused is refused by `load` and `check`, before an image is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from core.config import Section
from core.distributed import World, all_gather_rows, any_rank, local_range
from core.errors import EvaluationCancelled, UserError
from core.file import File
from core.roles import Generator
from eval import features, progress, reference
from eval.feature_stats import Collected, Collector, Need, merged_over_ranks
from eval.features import Extractor
from eval.metrics import path_length, registry
from eval.metrics.frechet import FID
from eval.metrics.path_length import WALKS, Distance
from eval.metrics.registry import MetricResult, Request, metrics, parse
from eval.progress import Advance, Show, silent
from eval.reference import Reference
from eval.samples import ImagesOf, eval_mode

StopRequested = Callable[[], bool]


def _never() -> bool:
    return False


class Config(Section):
    """The `evaluation` section of a recipe."""

    reference: str | None = None
    """Real images (zip, folder) or statistics (.npz), path or URL; "teacher": the teacher's own
    samples; null: nothing is compared with real images.
    """
    teacher: str | None = None
    """The teacher's own samples, for the report: "sample", or their statistics (.npz); null: no."""
    metrics: tuple[str, ...] = Field(default=(FID.name,), min_length=1)
    """fid, kid, inception_score, precision, recall, ppl, or published names such as fid50k_full;
    the first one is the headline.
    """
    extractor: str = "inception"
    """Features that are compared: inception, vgg16, clip-vit-b-32, dinov2-vit-b-14, mnist32, pixels
    or a classifier's weights file.
    """
    images: int = Field(default=50_000, ge=2)
    """Generated images a measurement, before and after."""
    seeds: int = Field(default=1, ge=1)
    """Measurements before and after, each on images of its own: they give mean and spread."""
    batch_size: int = Field(default=250, ge=1)
    """Images generated at a time."""
    every_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images between measurements while training; 0 measures only before and after."""
    images_while_training: int = Field(default=5_000, ge=2)
    """Generated images of an evaluation while training, without path lengths and metrics that need
    more.
    """
    pairs: int = Field(default=16, ge=1)
    """Pairs of images, before and after from one latent, in the report's picture."""
    definitions: registry.Config = registry.Config()
    """Subsets, splits and neighbors of the metrics."""

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse(names)
        except UserError as error:
            raise ValueError(str(error)) from error
        return names


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The metrics of a Config, ready to be computed: extractor and distance are loaded."""

    config: Config
    requests: tuple[Request, ...]
    """Of config.metrics; without a reference only those that compare with nothing."""
    extractor: Extractor
    distance: Distance | None
    """Between images, for path lengths."""
    world: World
    real: Reference | None = None
    """Statistics of real images; None if no metric compares, or before they exist."""
    show: Show = silent
    """Shows the progress of an evaluation."""
    image_shape: tuple[int, int, int] | None = None
    """(C, H, W) of the images; None: no time is announced."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order asked for."""
        return tuple(metric for request in self.requests for metric in request.metrics)

    def with_real(self, real: Reference) -> Evaluator:
        """Return an evaluator that compares with these real images."""
        return replace(self, real=real)

    def check(self, *, student: Generator | None, real: registry.Real | None = None) -> None:
        """Raise a UserError that names everything in the way of these metrics.

        real: statistics that will be compared with, if not the evaluator's own.
        """
        for request in self.requests:
            for name in request.metrics:
                if metrics()[name].needs == "student" and request.name not in WALKS:
                    raise UserError(
                        f"{name} needs the student itself: only path lengths are computed from it"
                    )
        for walk in _walks(self.requests):
            if student is not None:
                path_length.check(student, WALKS[walk])
        registry.check(
            self.requests,
            images=self.config.images,
            real=self.real if real is None else real,
            can_classify=self.extractor.head is not None,
            config=self.config.definitions,
        )

    def evaluate(
        self, images_of: ImagesOf, *, student: Generator | None = None, first_seed: int = 0
    ) -> dict[str, MetricResult]:
        """Return each metric on `config.seeds` disjoint sets of `config.images` images.

        Set k holds the images of seeds first_seed + k * images and following. student: the network
        whose path lengths are computed; without it they are left out.
        """
        images, sets = self.config.images, self.config.seeds
        from_features = any(metrics()[name].needs != "student" for name in self.metrics)
        walks = _walks(self.requests) if student is not None else []
        values: dict[str, list[float]] = {}

        # say how long it will take, if it is long
        if from_features and self.image_shape is not None:
            features.announce(
                self.extractor, sets * images, self.image_shape, ranks=self.world.size
            )

        # each set of images
        with self.show(sets * images * (from_features + len(walks))) as advance:
            for start in range(first_seed, first_seed + sets * images, images):
                of_set: dict[str, float] = {}
                if from_features:
                    stats = self._feature_stats(
                        images_of, range(start, start + images), advance=advance
                    )
                    of_set |= self.compute(stats)
                for walk in walks:
                    of_set[path_length.PPL.name] = self._path_length(
                        student, walk, first_seed=start, advance=advance
                    )
                for name, value in of_set.items():
                    values.setdefault(name, []).append(value)
        return {name: MetricResult.of(values[name]) for name in self.metrics if name in values}

    def evaluate_quick(
        self, images_of: ImagesOf, *, stop_requested: StopRequested = _never
    ) -> dict[str, float]:
        """Return the metrics that `config.images_while_training` images can give, of those images.

        stop_requested: asked before each batch; raises EvaluationCancelled on all ranks if it
        says so on any.
        """
        images = self.config.images_while_training
        names = [name for name in self.metrics if gives_quick(name, self.config)]
        if not names:
            return {}
        quick = replace(self, requests=parse(names))
        with self.show(images) as advance:
            stats = quick._feature_stats(
                images_of, range(images), advance=advance, stop_requested=stop_requested
            )
        return quick.compute(stats)

    def evaluate_stored(self, stats: Reference) -> dict[str, float]:
        """Return the metrics that stored statistics and features of images can give."""
        real = self.real
        if real is None:
            return {}
        features = [each.features for each in (stats, real) if each.features is not None]
        fewest = min(map(len, features)) if len(features) == 2 else 0
        config = self.config.definitions
        names = [
            name
            for name in self.metrics
            if metrics()[name].needs == "moments"
            or (
                metrics()[name].needs == "features"
                and registry.least_images(name, config) <= fewest
            )
        ]
        return registry.compute(names, stats, real, config=config, device=self.extractor.device)

    def compute(self, stats: Collected, *, real: Reference | None = None) -> dict[str, float]:
        """Return the metrics of collected statistics, except path lengths.

        real: statistics to compare with, if not the evaluator's own.
        """
        return registry.evaluate(
            self.requests,
            stats,
            self.real if real is None else real,
            config=self.config.definitions,
            device=self.extractor.device,
        )

    def feature_stats(
        self, images_of: ImagesOf, seeds: Sequence[int], *, also: Collection[Need] = ()
    ) -> Collected:
        """Return the statistics that the metrics need of these seeds' images, on every rank.

        also: further statistics. Number of ranks and batch size change them by rounding only.
        """
        with self.show(len(seeds)) as advance:
            return self._feature_stats(images_of, seeds, also=also, advance=advance)

    def features(self, images_of: ImagesOf, seeds: Sequence[int]) -> Tensor:
        """Return the features [N, D] of these seeds' images, on the CPU, the same on every rank."""
        with self.show(len(seeds)) as advance:
            local = torch.cat(list(self._local_features(images_of, seeds, advance)))
        return all_gather_rows(local, self.world).cpu()

    def _feature_stats(
        self,
        images_of: ImagesOf,
        seeds: Sequence[int],
        *,
        advance: Advance,
        also: Collection[Need] = (),
        stop_requested: StopRequested = _never,
    ) -> Collected:
        collector = new_collector(
            registry.needs(self.requests) | frozenset(also),
            self.config.definitions,
            images=len(seeds),
            head=self.extractor.head,
            first=local_range(len(seeds), self.world).start,
        )
        for batch in self._local_features(images_of, seeds, advance, stop_requested):
            collector.add(batch)
        if any_rank(stop_requested(), self.world):
            raise EvaluationCancelled
        return merged_over_ranks(collector.collected, self.world)

    def _local_features(
        self,
        images_of: ImagesOf,
        seeds: Sequence[int],
        advance: Advance,
        stop_requested: StopRequested = _never,
    ) -> Iterator[Tensor]:
        """Yield the features of this rank's share of the seeds, batch by batch."""
        if len(seeds) < self.world.size:
            raise UserError(
                f"{len(seeds)} images are fewer than {self.world.size} ranks: measure on more"
            )
        share, size = local_range(len(seeds), self.world), self.config.batch_size
        for start in range(share.start, share.stop, size):
            if stop_requested():
                return
            batch = seeds[start : min(start + size, share.stop)]
            yield self.extractor(images_of(batch))
            advance(len(batch) * self.world.size)  # the other ranks are about as far

    def _path_length(
        self, student: Generator | None, walk: str, *, first_seed: int, advance: Advance
    ) -> float:
        """Return the path length of config.images steps, as the request named `walk` defines it."""
        assert self.distance is not None and student is not None
        between = self.distance.function

        def counted(first: Tensor, second: Tensor) -> Tensor:
            advance(len(first) * self.world.size)
            return between(first, second)

        with eval_mode(student):
            return path_length.perceptual_path_length(
                student,
                self.distance._replace(function=counted),
                WALKS[walk],
                images=self.config.images,
                first_seed=first_seed,
                batch_size=self.config.batch_size,
                world=self.world,
            )


def load(config: Config, *, image_shape: tuple[int, int, int], world: World) -> Evaluator | None:
    """Return the evaluator without real images; None if there is nothing to evaluate.

    Raises UserError if the extractor cannot take images [C, H, W] of that shape.
    """
    requests = parse(config.metrics)
    if config.reference is None:
        requests = tuple(r for r in requests if not metrics()[r.metrics[0]].compares)
    if not requests:
        return None
    extractor = features.load(config.extractor, world.device)
    extractor(torch.zeros(1, *image_shape, dtype=torch.uint8))  # refuses a shape that cannot fit
    return Evaluator(
        config=config,
        requests=requests,
        extractor=extractor,
        distance=_distance(config, world) if _walks(requests) else None,
        world=world,
        show=progress.for_rank(world),
        image_shape=image_shape,
    )


def gives_quick(metric: str, config: Config) -> bool:
    """Return whether a metric is part of the evaluations while training."""
    about = metrics()[metric]
    least = about.least_images(config.definitions)
    return about.needs != "student" and least <= config.images_while_training


def new_collector(
    needs: Collection[Need],
    config: registry.Config,
    *,
    images: int,
    head: Callable[[Tensor], Tensor] | None = None,
    first: int = 0,
) -> Collector:
    """Return the collector of a set of images, or of a rank's part of it that begins at `first`.

    images: of the whole set. head: the extractor's, if it has classes.
    """
    return Collector(
        needs,
        images=images,
        kept_images=config.kept_images,
        splits=config.score_splits,
        random_seed=config.random_seed,
        head=head,
        first=first,
    )


def read_reference(
    source: File | str, evaluator: Evaluator, *, image_shape: tuple[int, int, int]
) -> Reference:
    """Return the statistics of real images that the evaluator's metrics need.

    All ranks call it and share the work. Raises UserError if the images have another shape than
    [C, H, W].
    """
    keeps = "features" in registry.needs(evaluator.requests)
    real = reference.reference_statistics(
        source.path if isinstance(source, File) else source,
        evaluator.extractor,
        keep=evaluator.config.definitions if keeps else None,
        world=evaluator.world,
        show=evaluator.show,
    )
    if real.image_shape not in (None, tuple(image_shape)):
        raise UserError(
            f"{source} holds images of {size(real.image_shape)}, the images to measure are of "
            f"{size(image_shape)}: choose a reference of the same resolution and channels"
        )
    return real


def size(image_shape: tuple[int, int, int]) -> str:
    """Return a shape [C, H, W] in words, such as "32x32 with 3 channels"."""
    channels, height, width = image_shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _distance(config: Config, world: World) -> Distance:
    own = config.extractor == "mnist32" or config.extractor.endswith(".safetensors")
    name = config.definitions.path_distance or (config.extractor if own else "lpips")
    return path_length.load_distance(name, world.device)


def _walks(requests: Sequence[Request]) -> list[str]:
    return [request.name for request in requests if request.name in WALKS]
