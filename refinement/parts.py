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
    objective: Objective
    extractor: features.Extractor | None
    reference: reference.Reference | None
    """None too where it is the teacher's samples, until `with_teacher_samples` made them."""
    kernel_backend: str
    teacher_samples: reference.Reference | None = None
    """Statistics of the teacher's own samples, where the recipe asks for them."""

    def teacher_images(self, settings: samples.Config) -> samples.ImagesOf:
        """Return a function from seeds to the teacher's own samples."""
        device = next(self.teacher.parameters()).device
        sampler = partial(sampling.heun, steps=settings.teacher_steps)
        return samples.teacher_images(self.teacher, sampler, device=device)


def load_parts(recipe: Recipe, world: World) -> Parts:
    """Return the parts of a recipe, networks on this rank's device.

    Raises UserError where a file cannot be used, or student, teacher and reference do not fit each
    other.
    """
    with distributed.main_first(world):
        teacher = _network("teachers", recipe.teacher, seed=recipe.training.seed)
        student = _student(recipe.student, teacher, seed=recipe.training.seed)
        _check_fit(student, teacher)
        extractor = _load_extractor(recipe.evaluation, student, world)
        real = _statistics(recipe.evaluation.reference, student, extractor)
        teacher_samples = _statistics(recipe.evaluation.teacher, student, extractor)
    layout = torch.channels_last
    return Parts(
        student.to(world.device, memory_format=layout),
        teacher.to(world.device, memory_format=layout),
        plugins.load("objectives", recipe.objective.name).build(recipe.objective),
        extractor,
        real,
        backend.choose(recipe.kernels, world.device),
        teacher_samples,
    )


def _student(section: NetworkSection, teacher: nn.Module, *, seed: int) -> nn.Module:
    """Return the student of a recipe; one that is to begin as the teacher is a copy of it."""
    if section.config is not None and section.family == "one_step_edm":
        settings = cast(one_step_edm.Config, family_config("generators", section))
        if settings.network is None:
            return one_step_edm.from_teacher(teacher, settings)
    return _network("generators", section, seed=seed)


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


def _check_fit(student: nn.Module, teacher: nn.Module) -> None:
    """Raise UserError where student and teacher differ in resolution, channels or classes."""
    sizes = [_size(network.image_shape) for network in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the student makes images of {sizes[0]}, the teacher denoises images of {sizes[1]}: "
            "choose a teacher of the same resolution and channels"
        )
    if student.num_classes != teacher.num_classes:
        raise UserError(
            f"the student has {student.num_classes} classes, the teacher {teacher.num_classes} "
            "(0 = unconditional): choose a teacher of the same classes"
        )


def _size(image_shape: tuple[int, int, int]) -> str:
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
            f"{source} holds images of {_size(known.image_shape)}, "
            f"the student makes images of {_size(student.image_shape)}: "
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
        parts.teacher_images(settings),
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
