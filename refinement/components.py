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
from core import distributed, plugins
from core.distributed import World
from core.downloads import local_file
from core.errors import UserError
from core.roles import Objective
from core.run_folder import RunFolder
from custom_ops import backend
from eval import edm_sampler, evaluator, reference, samples
from eval.evaluator import Evaluator, size
from eval.metrics.registry import Planned
from eval.reference import Reference
from generators import one_step_edm
from pretrained import networks
from refinement import adapter
from refinement.recipe import NetworkSection, Recipe, family_config

ROOT = Path(__file__).resolve().parents[1]
_TEACHER_SEED = 2**31
"""First seed of the teacher's samples: a student of the same latents is not measured on them."""
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
    evaluator: Evaluator | None
    """What is measured; None: nothing. Without reference where that is the teacher's samples, until
    `with_teacher_samples` made them.
    """
    kernel_backend: str
    teacher_samples: Reference | None = None
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
        measures = _measures(recipe.evaluation, student, world)
    measures, teacher_samples = _with_references(measures, recipe.evaluation, student)
    layout = torch.channels_last
    return Parts(
        student.to(world.device, memory_format=layout),
        teacher.to(world.device, memory_format=layout),
        fitted,
        objective,
        partial(edm_sampler.sample, config=recipe.sampler),
        measures,
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


def _measures(settings: evaluator.Config, student: nn.Module, world: World) -> Evaluator | None:
    """Return what is measured, without its reference; None: nothing."""
    for source in (settings.reference, settings.teacher):
        if source not in (None, "teacher", SAMPLED):
            local_file(found(source))  # a wrong path is said before an extractor is fetched
    return evaluator.load(settings, image_shape=tuple(student.image_shape), world=world)


def _with_references(
    loaded: Evaluator | None, settings: evaluator.Config, student: nn.Module
) -> tuple[Evaluator | None, Reference | None]:
    """Return what is measured with its reference, and the teacher's own samples; nothing where that
    comes later. The ranks share the work.

    Raises UserError where reference, samples or student do not serve the metrics.
    """
    if loaded is None:
        return None, None
    shape, made = tuple(student.image_shape), None
    if settings.reference == "teacher":
        kept = min(settings.images, settings.definitions.kept_images)
        planned = Planned(settings.images, kept)
        loaded.check(student=student, real=planned)
    elif settings.reference is None:
        loaded.check(student=student)
    else:
        real = evaluator.read_reference(found(settings.reference), loaded, image_shape=shape)
        loaded = loaded.with_real(real)
        loaded.check(student=student)
    if settings.teacher not in (None, SAMPLED):
        made = evaluator.read_reference(found(settings.teacher), loaded, image_shape=shape)
    return loaded, made


def with_teacher_samples(
    parts: Parts, settings: evaluator.Config, folder: RunFolder, world: World
) -> Parts:
    """Return the parts with the teacher's own samples measured, where the recipe asks for that.

    They are kept in the run's folder, so that a run samples its teacher once.
    """
    is_reference = settings.reference == "teacher"
    made, measures = parts.teacher_samples, parts.evaluator
    if measures is None or not (is_reference or settings.teacher):
        return parts
    if made is None and distributed.broadcast_from_main(folder.teacher_samples.exists(), world):
        made = reference.read_npz(folder.teacher_samples, measures.extractor)
    elif made is None:
        made = _sampled(parts, measures, settings)
        if world.is_main:
            reference.save_npz(folder.teacher_samples, made)
    if is_reference:
        measures = measures.with_real(made)
    return replace(parts, teacher_samples=made, evaluator=measures)


def _sampled(parts: Parts, measures: Evaluator, settings: evaluator.Config) -> Reference:
    _log.info("sampling %d images of the teacher", settings.images)
    seeds = range(_TEACHER_SEED, _TEACHER_SEED + settings.images)
    images_of = parts.images_of(parts.teacher)
    return reference.of_samples(
        measures.feature_stats(images_of, seeds, also={"moments"}),
        source="the teacher's own samples",
        extractor=measures.extractor,
        shape=parts.teacher.image_shape,
    )


def found(source: str) -> str:
    """Return a relative path as one that exists: from where the user is, else from this project.

    The short name of a published teacher is its URL.
    """
    if source in teachers.CATALOGUE:
        return teachers.CATALOGUE[source]
    beside = ROOT / source
    return str(beside) if not Path(source).exists() and beside.exists() else source
