"""A recipe's metrics, measured on sets of images that seeds stand for, or on files of images.

    suite = load(config, image_shape=(3, 32, 32), world=world)
    suite.over_seeds(images_of, images=50_000, seeds=3)      {"fid": MetricResult, ...}

Everything that can be refused is refused by `load` and `check`, before an image is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from core.config import Section
from core.distributed import World, any_rank, gather_rows, shard
from core.errors import EvaluationCancelled, UserError
from eval import features, measuring, path_length, progress, reference
from eval.collecting import Collected, Need, merged_over_ranks
from eval.features import Extractor
from eval.measuring import METRICS, Request, parse
from eval.metrics import MetricResult, frechet_distance
from eval.path_length import WALKS, Distance
from eval.progress import Advance, Show, silent
from eval.reference import Reference
from eval.samples import ImagesOf, evaluating


class Config(Section):
    """The `evaluation` section of a recipe."""

    reference: str | None = None
    """Real images (zip, folder) or statistics (.npz), path or URL; "teacher": the teacher's own
    samples; null: nothing is compared with real images.
    """
    teacher: str | None = None
    """The teacher's own samples, for the report: "sample", or their statistics (.npz); null: no."""
    metrics: tuple[str, ...] = Field(default=("fid",), min_length=1)
    """fid, kid, inception_score, precision, recall, ppl, or published names such as fid50k_full;
    the first one is the headline.
    """
    extractor: str = "inception"
    """What features are compared: inception, vgg16, clip-vit-b-32, dinov2-vit-b-14, mnist32, pixels
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
    """Generated images of a measurement while training; metrics that need more, and ppl, wait."""
    pairs: int = Field(default=16, ge=1)
    """Pairs of images, before and after from one latent, in the report's picture."""
    definitions: measuring.Config = measuring.Config()
    """Subsets, splits and neighbours of the metrics."""

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse(names)
        except UserError as error:
            raise ValueError(str(error)) from error
        return names


@dataclass(frozen=True)
class Suite:
    """Which metrics, of which features, compared with what."""

    requests: tuple[Request, ...]
    definitions: measuring.Config
    extractor: Extractor
    real: Reference | None
    """Real images; None where nothing compares, or before they are there."""
    distance: Distance | None
    """Between images, for path lengths."""
    batch_size: int
    world: World
    show: Show = silent
    """Shows how far a measurement is."""
    stop_requested: Callable[[], bool] = lambda: False
    """Asked before each batch of generated images: whether to give the measurement up."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics' names in METRICS, in the order asked for."""
        return tuple(metric for request in self.requests for metric in request.metrics)

    def collected(
        self, images_of: ImagesOf, seeds: Sequence[int], *, also: Collection[Need] = ()
    ) -> Collected:
        """Return what the metrics need of these seeds' images, the work shared by all ranks.

        also: what is needed besides. Every rank gets the same; the number of ranks and the batch
        size change it by rounding only.
        """
        with self.show(len(seeds)) as advance:
            return self._collected(images_of, seeds, also=also, advance=advance)

    def _collected(
        self,
        images_of: ImagesOf,
        seeds: Sequence[int],
        *,
        also: Collection[Need] = (),
        advance: Advance,
    ) -> Collected:
        taken = measuring.collector(
            self.requests,
            self.definitions,
            images=len(seeds),
            head=self.extractor.head,
            first=shard(len(seeds), self.world).start,
            also=also,
        )
        for batch in self._features(images_of, seeds, advance):
            taken.add(batch)
        if any_rank(self.stop_requested(), self.world):
            raise EvaluationCancelled
        return merged_over_ranks(taken.collected, self.world)

    def features(self, images_of: ImagesOf, seeds: Sequence[int]) -> Tensor:
        """Return the features [N, D] of these seeds' images, on the CPU, the same on every rank."""
        with self.show(len(seeds)) as advance:
            found = torch.cat(list(self._features(images_of, seeds, advance)))
        return gather_rows(found, self.world).cpu()

    def _features(
        self, images_of: ImagesOf, seeds: Sequence[int], advance: Advance
    ) -> Iterator[Tensor]:
        """Yield the features of this rank's share of the seeds, batch by batch."""
        if len(seeds) < self.world.size:
            raise UserError(
                f"{len(seeds)} images are fewer than {self.world.size} ranks: measure on more"
            )
        share = shard(len(seeds), self.world)
        for start in range(share.start, share.stop, self.batch_size):
            if self.stop_requested():
                return
            batch = seeds[start : min(start + self.batch_size, share.stop)]
            yield self.extractor(images_of(batch))
            advance(len(batch) * self.world.size)  # the other ranks are about as far

    def measured(self, made: Collected, *, real: Reference | None = None) -> dict[str, float]:
        """Return the metrics of what was collected, apart from path lengths.

        real: what it is compared with, if not the suite's own.
        """
        return measuring.measure(
            self.requests,
            made,
            self.real if real is None else real,
            config=self.definitions,
            device=self.extractor.device,
        )

    def over_seeds(
        self,
        images_of: ImagesOf,
        *,
        images: int,
        seeds: int = 1,
        first_seed: int = 0,
        student: nn.Module | None = None,
    ) -> dict[str, MetricResult]:
        """Return each metric on `seeds` disjoint sets of images.

        Set k holds the images of seeds first_seed + k * images and following. student: whose
        latents are walked for path lengths; None leaves them out. Raises EvaluationCancelled.
        """
        looks_at_features = set(self.metrics) != {"ppl"}
        walks = student is not None and "ppl" in self.metrics
        found: dict[str, list[float]] = {}
        with self.show(seeds * images * (looks_at_features + walks)) as advance:
            for start in range(first_seed, first_seed + seeds * images, images):
                values: dict[str, float] = {}
                if looks_at_features:
                    of_range = range(start, start + images)
                    values = self.measured(self._collected(images_of, of_range, advance=advance))
                if walks:
                    values["ppl"] = self._path_length(
                        student, images=images, first_seed=start, advance=advance
                    )
                for metric, value in values.items():
                    found.setdefault(metric, []).append(value)
        return {m: MetricResult.of(found[m]) for m in self.metrics if m in found}

    def while_training(self, *, images: int) -> Suite | None:
        """Return the metrics that so few images can give, under their plain names; None: none."""
        possible = [
            Request(metric, (metric,))
            for metric in self.metrics
            if metric != "ppl" and measuring.least_images(metric, self.definitions) <= images
        ]
        return replace(self, requests=tuple(possible)) if possible else None

    def of_stored(self, made: Reference) -> dict[str, float]:
        """Return those metrics of stored statistics and features that they tell."""
        real, found = self.real, dict[str, float]()
        if real is None:
            return found
        if "fid" in self.metrics:
            found["fid"] = frechet_distance(made, real)
        if made.features is not None and real.features is not None:
            fewest = min(len(made.features), len(real.features))
            found |= measuring.of_features(
                [m for m in self.metrics if measuring.least_images(m, self.definitions) <= fewest],
                made.features,
                real.features,
                config=self.definitions,
                device=self.extractor.device,
            )
        return found

    def check(
        self, *, images: int, student: nn.Module | None, real: measuring.Real | None = None
    ) -> None:
        """Raise a UserError that says what stands in the way of these metrics, if anything does.

        real: what they will be compared with, if not the suite's own.
        """
        for walk in _walks(self.requests):
            if student is not None:
                path_length.check(student, WALKS[walk])
        measuring.check(
            self.requests,
            images=images,
            real=self.real if real is None else real,
            can_classify=self.extractor.head is not None,
            config=self.definitions,
        )

    def _path_length(
        self, student: nn.Module, *, images: int, first_seed: int, advance: Advance
    ) -> float:
        assert self.distance is not None
        between = self.distance.function

        def counted(first: Tensor, second: Tensor) -> Tensor:
            advance(len(first) * self.world.size)
            return between(first, second)

        with evaluating(student):
            return path_length.perceptual_path_length(
                student,
                self.distance._replace(function=counted),
                WALKS[_walks(self.requests)[0]],
                images=images,
                first_seed=first_seed,
                batch_size=self.batch_size,
                world=self.world,
            )


def load(config: Config, *, image_shape: tuple[int, int, int], world: World) -> Suite | None:
    """Return the suite without its reference; None where nothing is to be measured.

    Without a reference only what compares with nothing is. Raises UserError where the extractor
    cannot take images [C, H, W] of that shape.
    """
    requests = parse(config.metrics)
    if config.reference is None:
        requests = tuple(r for r in requests if not METRICS[r.metrics[0]].compares)
    if not requests:
        return None
    extractor = features.load(config.extractor, world.device)
    extractor(torch.zeros(1, *image_shape, dtype=torch.uint8))  # refuses what cannot fit
    return Suite(
        requests,
        config.definitions,
        extractor,
        None,
        _distance(config, world) if _walks(requests) else None,
        config.batch_size,
        world,
        progress.of_rank(world),
    )


def read_reference(source: str, suite: Suite, *, image_shape: tuple[int, int, int]) -> Reference:
    """Return the reference of a source, with what the suite's metrics need of it; all ranks call
    this and share the work.

    Raises UserError where its images have another shape than [C, H, W].
    """
    keeps = "features" in measuring.needs(suite.requests)
    found = reference.reference_statistics(
        source,
        suite.extractor,
        keep=suite.definitions if keeps else None,
        world=suite.world,
        show=suite.show,
    )
    if found.image_shape not in (None, tuple(image_shape)):
        raise UserError(
            f"{source} holds images of {size(found.image_shape)}, the images to measure are of "
            f"{size(image_shape)}: choose a reference of the same resolution and channels"
        )
    return found


def size(image_shape: tuple[int, int, int]) -> str:
    """Return a shape [C, H, W] in words."""
    channels, height, width = image_shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _distance(config: Config, world: World) -> Distance:
    own = config.extractor == "mnist32" or config.extractor.endswith(".safetensors")
    return path_length.load_distance(
        config.definitions.path_distance or (config.extractor if own else "lpips"), world.device
    )


def _walks(requests: Sequence[Request]) -> list[str]:
    return [request.name for request in requests if request.name in WALKS]
