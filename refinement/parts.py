"""What a recipe names, loaded and checked against each other before anything is written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

import generators
import teachers
from core import distributed, networks, plugins
from core.distributed import World
from core.downloads import local_file
from core.errors import UserError
from core.protocols import Objective
from core.run_folder import RunFolder
from custom_ops import backend
from eval import features, reference, samples
from generators import one_step_edm
from refinement import adapter
from refinement.recipe import NetworkSection, Recipe, family_config
from teachers import sampling

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = "sample"
"""As evaluation.teacher: the teacher is sampled in this run."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Everything a recipe names, loaded and checked against each other."""

    student: nn.Module
    teacher: nn.Module
    """A bare module where the student learns from real images."""
    adapter: nn.Module
    """From the student's images to the teacher's."""
    objective: Objective
    sampler: samples.Sampler
    """How a denoiser is sampled."""
    extractor: features.Extractor | None
    reference: reference.Reference | None
    """None too where it is the teacher's samples, until `with_teacher_samples` made them."""
    kernel_backend: str
    teacher_samples: reference.Reference | None = None
    """Statistics of the teacher's own samples, where the recipe asks for them."""

    def images_of(self, network: nn.Module) -> samples.ImagesOf:
        """Return a function from seeds to a network's images: a denoiser is sampled."""
        device = next(network.parameters()).device
        sampler = None if hasattr(network, "latent_shape") else self.sampler
        return samples.images_of_seeds(network, sampler, device=device)


def load_parts(recipe: Recipe, world: World) -> Parts:
    """Return the parts of a recipe, networks on this rank's device.

    Raises UserError where a file cannot be used, or student, teacher and reference do not fit each
    other.
    """
    with distributed.main_first(world):
        teacher, student = _networks(recipe)
        fitted = _adapter(recipe, student, teacher)
        objective = _objective(recipe, student)
        extractor = _load_extractor(recipe.evaluation, student, world)
        real = _statistics(recipe.evaluation.reference, student, extractor)
        teacher_samples = _statistics(recipe.evaluation.teacher, student, extractor)
    layout = torch.channels_last
    return Parts(
        student.to(world.device, memory_format=layout),
        teacher.to(world.device, memory_format=layout),
        fitted,
        objective,
        partial(sampling.sample, config=recipe.sampler),
        extractor,
        real,
        backend.choose(recipe.kernels, world.device),
        teacher_samples,
    )


def _networks(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Return teacher and student; a student that is to begin as the teacher is a copy of it."""
    section, seed = recipe.student, recipe.training.seed
    if recipe.teacher is None:
        return nn.Module(), _network(recipe.student_folder, section, seed=seed)
    teacher = _network("teachers", recipe.teacher, seed=seed)
    if section.config is not None and section.family == "one_step_edm":
        settings = cast(one_step_edm.Config, family_config("generators", section))
        if settings.network is None:
            return teacher, one_step_edm.from_teacher(teacher, settings)
    return teacher, _network("generators", section, seed=seed)


def _network(folder: str, section: NetworkSection, *, seed: int) -> nn.Module:
    if section.weights is None:
        torch.manual_seed(seed)
        return plugins.load(folder, cast(str, section.family)).build(family_config(folder, section))
    if folder == "teachers" and teachers.located(section.weights) != section.weights:
        _log.info("%s: %s", section.weights, teachers.LICENCE)
    path = local_file(found(section.weights), sha256=section.sha256)
    loaded = {"generators": generators.load, "teachers": teachers.load}[folder](path)
    family = networks.family_of(cast(nn.Module, loaded))
    if section.family not in (None, family):
        raise UserError(
            f"{section.weights} holds {family} weights, the recipe says {section.family}"
        )
    return cast(nn.Module, loaded)


def _adapter(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return what turns the student's images into the teacher's.

    Raises UserError where the two differ in resolution, channels or classes, and nothing does.
    """
    if recipe.teacher is None:
        return nn.Identity()
    if student.num_classes != teacher.num_classes:
        raise UserError(
            f"the student has {student.num_classes} classes, the teacher {teacher.num_classes} "
            "(0 = unconditional): choose a teacher of the same classes"
        )
    if tuple(student.image_shape) == tuple(teacher.image_shape):
        return nn.Identity()
    if recipe.teacher.adapter is None:
        made, known = (size(network.image_shape) for network in (student, teacher))
        raise UserError(
            f"the student makes images of {made}, the teacher denoises images of {known}: "
            "choose a teacher of the same resolution and channels, or shrink the student's images "
            "for it with teacher.adapter=downsample"
        )
    if recipe.evaluation.reference == "teacher" or recipe.evaluation.teacher is not None:
        raise UserError(
            "the teacher's samples have another size than the student's images, so there is no "
            "distance between them: set evaluation.reference to real images of the student's size, "
            "or to null, and evaluation.teacher to null"
        )
    return adapter.downsample(tuple(student.image_shape), tuple(teacher.image_shape))


def _objective(recipe: Recipe, student: nn.Module) -> Objective:
    """Return the objective; one that learns from images has read them, and they fit the student."""
    settings = recipe.objective
    build = plugins.load("objectives", settings.name).build
    if recipe.mode != "teach":
        return build(settings)
    built = build(settings.model_copy(update={"images": str(local_file(found(settings.images)))}))
    built.check_fit(student)
    return built


def size(image_shape: tuple[int, int, int]) -> str:
    channels, height, width = image_shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


def _load_extractor(
    settings: samples.Config, student: nn.Module, world: World
) -> features.Extractor | None:
    """Return the extractor, or nothing where the recipe names no reference to measure against."""
    if settings.reference is None:
        return None
    extractor = features.load(settings.extractor, world.device)
    extractor(torch.zeros(1, *student.image_shape, dtype=torch.uint8))  # refuses what cannot fit
    return extractor


def _statistics(
    source: str | None, student: nn.Module, extractor: features.Extractor | None
) -> reference.Reference | None:
    """Return the statistics of a source, fit for the student; none where they come later."""
    if source in (None, SAMPLED, "teacher") or extractor is None:
        return None
    known = reference.reference_statistics(found(source), extractor)
    if known.image_shape not in (None, tuple(student.image_shape)):
        raise UserError(
            f"{source} holds images of {size(known.image_shape)}, "
            f"the student makes images of {size(student.image_shape)}: "
            "choose a reference of the same resolution and channels"
        )
    return known


def with_teacher_samples(
    parts: Parts, settings: samples.Config, folder: RunFolder, world: World
) -> Parts:
    """Return the parts with the teacher's own samples measured, where the recipe asks for that.

    They are kept in the run's folder, so that a run samples its teacher once.
    """
    is_reference = settings.reference == "teacher"
    made, extractor = parts.teacher_samples, parts.extractor
    if extractor is None or not (is_reference or settings.teacher):
        return parts
    if made is None and distributed.from_main(folder.teacher_samples.exists(), world):
        made = reference.read_npz(folder.teacher_samples, extractor)
    elif made is None:
        made = _sampled(parts, extractor, settings, world)
        if world.is_main:
            reference.save_npz(folder.teacher_samples, made)
    return replace(parts, teacher_samples=made, reference=made if is_reference else parts.reference)


def _sampled(
    parts: Parts, extractor: features.Extractor, settings: samples.Config, world: World
) -> reference.Reference:
    _log.info("sampling %d images of the teacher", settings.images)
    made = samples.generated_statistics(
        parts.images_of(parts.teacher),
        range(settings.images),
        extractor,
        batch_size=settings.batch_size,
        world=world,
    )
    shape = parts.teacher.image_shape
    source = "the teacher's own samples"
    return reference.of_samples(made, source=source, extractor=extractor, shape=shape)


def found(source: str) -> str:
    """Return a relative path as one that exists: from where the user is, else from this project.

    The short name of a published teacher is its URL.
    """
    if source in teachers.CATALOGUE:
        return teachers.CATALOGUE[source]
    beside = ROOT / source
    return str(beside) if not Path(source).exists() and beside.exists() else source
