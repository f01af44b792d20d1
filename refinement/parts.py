"""What a recipe names, loaded and checked against each other before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import generators
import teachers
from core import distributed, networks, plugins
from core.distributed import World
from core.downloads import local_file
from core.errors import UserError
from core.protocols import Objective
from custom_ops import backend
from eval import features, reference, samples
from refinement.recipe import NetworkSection, Recipe, family_config
from teachers import sampling

ROOT = Path(__file__).resolve().parents[1]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Everything a recipe names, loaded and checked against each other."""

    student: nn.Module
    teacher: nn.Module
    objective: Objective
    extractor: features.Extractor | None
    reference: reference.Reference | None
    kernel_backend: str


def load_parts(recipe: Recipe, world: World) -> Parts:
    """Return the parts of a recipe, networks on this rank's device.

    Raises UserError where a file cannot be used, or student, teacher and reference do not fit each
    other.
    """
    with distributed.main_first(world):
        student = _network("generators", recipe.student, seed=recipe.training.seed)
        teacher = _network("teachers", recipe.teacher, seed=recipe.training.seed)
        _check_fit(student, teacher)
        extractor, real = _load_reference(recipe.evaluation, student, teacher, world)
    layout = torch.channels_last
    return Parts(
        student.to(world.device, memory_format=layout),
        teacher.to(world.device, memory_format=layout),
        plugins.load("objectives", recipe.objective.name).build(recipe.objective),
        extractor,
        real,
        backend.choose(recipe.kernels),
    )


def _network(folder: str, section: NetworkSection, *, seed: int) -> nn.Module:
    if section.weights is None:
        torch.manual_seed(seed)
        return plugins.load(folder, cast(str, section.family)).build(family_config(folder, section))
    path = local_file(found(section.weights), sha256=section.sha256)
    loaded = {"generators": generators.load, "teachers": teachers.load}[folder](path)
    family = networks.family_of(cast(nn.Module, loaded))
    if section.family not in (None, family):
        raise UserError(
            f"{section.weights} holds a {family} network, the recipe says {section.family}"
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


def _load_reference(
    settings: samples.Config, student: nn.Module, teacher: nn.Module, world: World
) -> tuple[features.Extractor | None, reference.Reference | None]:
    """Return extractor and reference statistics, or nothing where the recipe names no reference."""
    if settings.reference is None:
        return None, None
    extractor = features.load(settings.extractor, world.device)
    if settings.reference == "teacher":
        return extractor, _teacher_reference(settings, teacher.to(world.device), extractor)
    extractor(torch.zeros(1, *student.image_shape, dtype=torch.uint8))  # refuses what cannot fit
    real = reference.reference_statistics(found(settings.reference), extractor)
    if real.image_shape not in (None, tuple(student.image_shape)):
        raise UserError(
            f"{settings.reference} holds images of {_size(real.image_shape)}, "
            f"the student makes images of {_size(student.image_shape)}: "
            "choose a reference of the same resolution and channels"
        )
    return extractor, real


def _teacher_reference(
    settings: samples.Config, teacher: nn.Module, extractor: features.Extractor
) -> reference.Reference:
    """Return the statistics of the teacher's own samples: what the student is drawn to."""
    _log.info("sampling %d images of the teacher as the reference", settings.images)

    def images_of(seeds: Sequence[int]) -> Tensor:
        latents, labels = samples.latents_and_labels(
            seeds, latent_shape=teacher.image_shape, num_classes=teacher.num_classes
        )
        labels = None if labels is None else labels.to(extractor.device)
        made = sampling.heun(teacher.eval(), latents.to(extractor.device), labels)
        return samples.to_uint8(made)

    found = samples.generated_statistics(
        images_of, range(settings.images), extractor, batch_size=settings.batch_size
    )
    return reference.Reference(
        mean=found.mean.cpu(),
        covariance=found.covariance.cpu(),
        source="the teacher's own samples",
        sha256="",
        images=settings.images,
        image_shape=teacher.image_shape,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
    )


def found(source: str) -> str:
    """Return a relative path as one that exists: from where the user is, else from this project."""
    beside = ROOT / source
    return str(beside) if not Path(source).exists() and beside.exists() else source
