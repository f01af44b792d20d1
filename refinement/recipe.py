"""The recipe of a run: the one model that a YAML file and its overrides are read into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

import teachers
from core import config, plugins
from core.config import ConfigError, Section
from core.file import File
from custom_ops import backend
from eval import edm_sampler, evaluator, features
from eval.metrics.registry import metrics, parse
from refinement.families import family_errors, from_images, typed
from training import trainer
from training.checkpoint import WatchedMetric

Mode = Literal["gan", "distill", "teach"]
"""Purpose of a recipe: refine a GAN, distil a teacher, or train one."""


def _objective_type() -> object:
    """Return the union of every objective's Config, told apart by `name`."""
    kinds = [plugins.load("objectives", name).Config for name in plugins.names("objectives")]
    return (
        kinds[0] if len(kinds) == 1 else Annotated[reduce(or_, kinds), Field(discriminator="name")]
    )


class NetworkSection(Section):
    """Source of a network: a weights file, or a family and its settings."""

    family: str | None = None
    """Plug-in of generators/ or teachers/; null: as the weights file says."""
    weights: str | None = None
    """Path (absolute, or relative to the current folder) or URL of an NVIDIA pickle or our
    safetensors, or a run's folder;
    a published teacher's short name, such as edm-cifar10-32x32-uncond-vp.
    """
    sha256: str | None = None
    """Expected SHA-256 of the weights file; null: not checked."""
    config: dict[str, object] | None = None
    """Without weights: settings of the family, to start from freshly drawn weights. A student that
    learns from images takes img_resolution, img_channels and label_dim (classes) from them where
    they are not given or null.
    """

    def file(self) -> File | None:
        """Return the weights file; None for freshly drawn weights."""
        if self.weights is None:
            return None
        return teachers.resolve(self.weights, sha256=self.sha256)

    @model_validator(mode="after")
    def _one_source(self) -> NetworkSection:
        if (self.weights is None) == (self.config is None):
            raise ValueError("give either weights (a file) or family and config (drawn afresh)")
        if self.config is not None and self.family is None:
            raise ValueError("config needs family: whose settings are these?")
        if self.sha256 is not None and self.weights is None:
            raise ValueError("sha256 is that of a weights file, and none is given")
        return self


class TeacherSection(NetworkSection):
    """Source of the teacher, and the map from the student's images to its own."""

    adapter: Literal["downsample"] | None = None
    """downsample: the student's images, larger than the teacher's or in other colours, are shrunk
    and recoloured for it; null: they must fit.
    """
    labels: Literal["ignore"] | None = None
    """ignore: an unconditional teacher for a conditional student, which keeps its classes and is
    pulled towards the images of all of them; null: both have the same classes.
    """


SAMPLE = "sample"
"""As evaluation.teacher: the teacher is sampled in this run."""
TEACHER = "teacher"
"""As evaluation.reference: the teacher's own samples are the reference."""


@dataclass(frozen=True)
class RecipeFiles:
    """The files that a recipe names; None if it names none."""

    student: File | None
    teacher: File | None
    images: File | None
    """Of an objective that learns from real images."""
    reference: File | None
    teacher_samples: File | None
    extractor: File | None
    """None if its weights are embedded."""


class Recipe(Section):
    """A run: student, teacher, objective, training and evaluation."""

    name: str = "run"
    """Name of the run's folder."""
    student: NetworkSection
    """The network that learns: a one-step generator, or a diffusion model for denoising."""
    teacher: TeacherSection | None = None
    """The diffusion model that it learns from; null for denoising, from real images."""
    objective: _objective_type()  # pyright: ignore[reportInvalidTypeForm]
    """The training objective."""
    training: trainer.Config = trainer.Config()
    """The loop."""
    evaluation: evaluator.Config = evaluator.Config()
    """Evaluations before, while and after training."""
    sampler: edm_sampler.Config = edm_sampler.Config()
    """Sampler of a diffusion model that is evaluated itself."""
    device: str = "auto"
    """auto (CUDA if there is any), cpu, cuda or cuda:N."""
    kernels: backend.KernelPolicy = "auto"
    """Custom operations: auto, native or reference."""

    _began_with: dict[str, str] = PrivateAttr(default_factory=dict)

    def begun_with(self, paths: Mapping[str, str]) -> Recipe:
        """Return the recipe with the absolute paths that its files had when the run began.

        paths: name of a file as the recipe has it -> path.
        """
        recipe = self.model_copy()
        vars(recipe).pop("files", None)  # found anew
        recipe._began_with = dict(paths)
        return recipe

    @model_validator(mode="after")
    def _learns_from_someone(self) -> Recipe:
        if self.mode != "teach":
            if self.teacher is None:
                raise ValueError(
                    "teacher is missing: the diffusion model that the student learns from"
                )
        elif self.teacher is not None:
            raise ValueError(
                f"objective {self.objective.name} learns from images: leave teacher out"
            )
        elif self.evaluation.reference == TEACHER or self.evaluation.teacher is not None:
            raise ValueError(
                f"evaluation names a teacher, and objective {self.objective.name} has none"
            )
        dropout = getattr(self.objective, "dropout", None)
        if self.mode == "gan" and getattr(dropout, "student", False):
            raise ValueError("objective.dropout.student is for one_step_edm: a GAN drops nothing")
        return self

    @model_validator(mode="after")
    def _watches_what_it_measures(self) -> Recipe:
        watch, stops = self.training.watch, self.training.early_stop_kimg is not None
        if watch is None and not stops:
            return self
        asks = "training.watch" if watch is not None else "training.early_stop_kimg"
        if not self.evaluation.every_kimg:
            raise ValueError(
                f"{asks} needs measurements while training: set evaluation.every_kimg, or leave it "
                "out"
            )

        watched, known = self._watched_name, self._evaluated_while_training()
        if watched not in known:
            raise ValueError(
                f"{asks} watches {watched!r}, which is not measured while training: choose one of "
                f"{', '.join(known) or 'none'} as training.watch; what is measured follows "
                "from evaluation.metrics, reference and images_while_training"
            )
        return self

    def _evaluated_while_training(self) -> list[str]:
        """Return the metrics of the evaluations while training."""
        config = self.evaluation
        names = [metric for request in parse(config.metrics) for metric in request.metrics]
        return [
            name
            for name in names
            if evaluator.gives_quick(name, config)
            and (config.reference is not None or not metrics()[name].compares)
        ]

    @cached_property
    def files(self) -> RecipeFiles:
        """The files that the recipe names, each resolved once."""
        evaluation, images = self.evaluation, getattr(self.objective, "images", None)
        reference = None if evaluation.reference == TEACHER else evaluation.reference
        samples = None if evaluation.teacher == SAMPLE else evaluation.teacher
        named = {
            "student": self.student.file(),
            "teacher": self.teacher and self.teacher.file(),
            "images": _file(images),
            "reference": _file(reference),
            "teacher_samples": _file(samples),
            "extractor": _file(features.weights_of(evaluation.extractor)),
        }
        return RecipeFiles(**{role: self._found(file) for role, file in named.items()})

    def _found(self, file: File | None) -> File | None:
        """Return a file, at the place where the run began if it is not where it is looked for."""
        if file is None or file.is_here or file.shown not in self._began_with:
            return file
        began = replace(file, location=self._began_with[file.shown])
        return began if began.is_here else file

    @property
    def watched_metric(self) -> WatchedMetric:
        """The metric that tells divergence, early stop and the best checkpoint.

        That of training.watch, or else the headline: the first of evaluation.metrics.
        """
        name = self._watched_name
        return WatchedMetric(name, highest=metrics()[name].better == "higher")

    @property
    def _watched_name(self) -> str:
        return self.training.watch or parse(self.evaluation.metrics)[0].metrics[0]

    @property
    def mode(self) -> Mode:
        """Return the purpose of the recipe."""
        if self.student_folder == "teachers":
            return "teach"
        return "distill" if self.student.family == "one_step_edm" else "gan"

    @property
    def student_folder(self) -> str:
        """Return the folder of the student's family."""
        return student_folder(self.objective.name)


def _file(source: str | None) -> File | None:
    return None if source is None else teachers.resolve(source)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with overrides on top. Raises UserError naming all that is
    wrong.
    """
    plain = config.with_overrides({"name": path.stem, **config.read_yaml(path)}, overrides)
    source = f"{path}, with what the command line sets," if overrides else str(path)
    objective = plain.get("objective")
    objective = objective if isinstance(objective, Mapping) else {}
    folders = {"student": student_folder(objective.get("name")), "teacher": "teachers"}

    # what the images tell
    told = from_images(folders["student"], plain.get("student"), objective.get("images"))
    if told:
        plain = config.merged(plain, {"student": {"config": told}})

    # all that is wrong, at once
    lines = [
        line
        for role, folder in folders.items()
        for line in family_errors(role, folder, plain.get(role))
    ]
    try:
        config.validate(Recipe, plain, source=source)
    except ConfigError as error:
        raise ConfigError(source, [*error.lines, *lines]) from None
    if lines:
        raise ConfigError(source, lines)

    # the settings of families, as they are meant
    settled = {
        role: {"config": settings}
        for role, folder in folders.items()
        if (settings := typed(folder, plain.get(role))) is not None
    }
    return config.validate(Recipe, config.merged(plain, settled), source=source)


def student_folder(objective: object) -> str:
    """Return the folder of the families that an objective trains: that of generators, unless its
    Config says `trains = "denoiser"`.
    """
    if not isinstance(objective, str) or objective not in plugins.names("objectives"):
        return "generators"
    trains = getattr(plugins.load("objectives", objective).Config, "trains", "generator")
    return "teachers" if trains == "denoiser" else "generators"
