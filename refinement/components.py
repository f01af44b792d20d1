"""The components of a run: networks, objective and evaluator of a recipe, checked together.

Everything that can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import generators
import teachers
from core import distributed, plugins
from core.distributed import World
from core.errors import UserError
from core.file import File
from core.roles import Denoiser, Generator, Objective
from core.run_folder import RunFolder
from custom_ops import backend
from eval import edm_sampler, evaluator, features, reference, samples
from eval.evaluator import Evaluator, size
from eval.metrics.registry import Planned
from eval.reference import Reference
from generators import one_step_edm
from pretrained import networks
from refinement import adapter
from refinement.families import family_config
from refinement.recipe import TEACHER, NetworkSection, Recipe

_TEACHER_SEED = 2**31
"""First seed of the teacher's samples: no student of the same latents is evaluated on them."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Components:
    """Everything that a recipe names, loaded and checked against each other."""

    student: Generator | Denoiser
    """A denoiser if it learns from real images."""
    teacher: nn.Module
    """A Denoiser; a bare module if the student learns from real images."""
    adapter: nn.Module
    """From the student's images to the teacher's."""
    objective: Objective
    sampler: samples.Sampler
    """Sampler of a denoiser."""
    evaluator: Evaluator | None
    """None: nothing is evaluated. Without real images if those are the teacher's samples, until
    `with_teacher_samples` adds them.
    """
    kernel_backend: str
    teacher_samples: Reference | None = None
    """Statistics of the teacher's own samples, if the recipe asks for them."""

    def images_of(self, network: nn.Module) -> samples.ImagesOf:
        """Return a function from seeds to a network's images: a denoiser is sampled."""
        device = next(network.parameters()).device
        assert isinstance(network, Generator | Denoiser), type(network)
        sampler = self.sampler if isinstance(network, Denoiser) else None
        return samples.images_of_seeds(network, sampler, device=device)


def load_components(recipe: Recipe, world: World) -> Components:
    """Return the components of a recipe, networks on this rank's device.

    Raises UserError if a file cannot be used, or student, teacher and reference do not fit each
    other.
    """
    # rank 0 downloads what is not here yet
    with distributed.main_first(world):
        check_files(recipe)
        teacher, student = load_networks(recipe)
        fitted = build_adapter(recipe, student, teacher)
        objective = build_objective(recipe, student)
        loaded = load_evaluator(recipe, student, world)

    # the ranks share the images of a reference
    layout = torch.channels_last
    teacher_samples = None
    if loaded is not None:
        loaded = add_reference(loaded, recipe, student)
        teacher_samples = read_teacher_samples(loaded, recipe, student)
    return Components(
        student=student.to(world.device).to(memory_format=layout),
        teacher=teacher.to(world.device).to(memory_format=layout),
        adapter=fitted,
        objective=objective,
        sampler=partial(edm_sampler.sample, config=recipe.sampler),
        evaluator=loaded,
        kernel_backend=backend.choose(recipe.kernels, world.device),
        teacher_samples=teacher_samples,
    )


def check_files(recipe: Recipe) -> None:
    """Raise UserError for a short name or a local file that does not exist; nothing is loaded."""
    files = recipe.files

    # names of the published teachers, for whatever holds a teacher's network
    for file in (files.teacher, files.student if recipe.mode == "teach" else None):
        if file is not None:
            teachers.check_name(file.shown)

    # local files in the order of their use
    for file in (
        files.teacher,
        files.student,
        files.images,
        files.reference,
        files.teacher_samples,
    ):
        if file is not None and not file.is_url:
            _ = file.path


def load_networks(recipe: Recipe) -> tuple[nn.Module, Generator | Denoiser]:
    """Return teacher and student; a one-step student without a network of its own copies it."""
    section, seed, files = recipe.student, recipe.training.seed, recipe.files
    if recipe.teacher is None:
        return nn.Module(), load_network(recipe.student_folder, section, files.student, seed=seed)
    teacher = load_network("teachers", recipe.teacher, files.teacher, seed=seed)
    if section.config is not None and section.family == "one_step_edm":
        settings = family_config("generators", section.family, section.config)
        assert isinstance(settings, one_step_edm.Config)
        if settings.network is None:
            return teacher, one_step_edm.from_teacher(teacher, settings)
    return teacher, load_network("generators", section, files.student, seed=seed)


def load_network(
    folder: str, section: NetworkSection, file: File | None, *, seed: int
) -> Generator | Denoiser:
    """Return the network of a weights file, or one with weights drawn from the seed."""
    if file is None:
        assert section.family is not None and section.config is not None, "the recipe says so"
        torch.manual_seed(seed)
        settings = family_config(folder, section.family, section.config)
        return plugins.load(folder, section.family).build(settings)
    if file.licence is not None:
        _log.info("%s: %s", file, file.licence)
    load = {"generators": generators.load, "teachers": teachers.load}[folder]
    network = load(file.path)
    _ = file.sha256  # of the bytes that were loaded, for a report that may be days away
    family = networks.family_of(network)
    if section.family not in (None, family):
        raise UserError(f"{file} holds {family} weights, the recipe says {section.family}")
    return network


def build_adapter(recipe: Recipe, student: Generator | Denoiser, teacher: nn.Module) -> nn.Module:
    """Return the map from the student's images to the teacher's.

    Raises UserError if the two differ in resolution, channels or classes, and nothing maps them.
    """
    if recipe.teacher is None:
        return nn.Identity()
    assert isinstance(teacher, Denoiser), type(teacher)
    is_ignored = recipe.teacher.labels == "ignore" and teacher.num_classes == 0
    if student.num_classes != teacher.num_classes and not is_ignored:
        way_out = "" if teacher.num_classes else ", or set teacher.labels=ignore"
        raise UserError(
            f"the student has {student.num_classes} classes, the teacher {teacher.num_classes} "
            f"(0 = unconditional): choose a teacher of the same classes{way_out}"
        )

    # images of one shape need no map
    if student.image_shape == teacher.image_shape:
        return nn.Identity()
    if recipe.teacher.adapter is None:
        sizes = [size(network.image_shape) for network in (student, teacher)]
        raise UserError(
            f"the student makes images of {sizes[0]}, the teacher denoises images of {sizes[1]}: "
            "choose a teacher of the same resolution and channels, or shrink the student's images "
            "for it with teacher.adapter=downsample"
        )

    # a smaller teacher's samples cannot be compared
    if recipe.evaluation.reference == TEACHER or recipe.evaluation.teacher is not None:
        raise UserError(
            "the teacher's samples have another size than the student's images, so there is no "
            "distance between them: set evaluation.reference to real images of the student's size, "
            "or to null, and evaluation.teacher to null"
        )
    return adapter.downsample(student.image_shape, teacher.image_shape)


def build_objective(recipe: Recipe, student: Generator | Denoiser) -> Objective:
    """Return the objective; one that learns from images has read them, and they fit the student.

    An objective may have `check_fit(student)`, which raises UserError.
    """
    settings, images = recipe.objective, recipe.files.images
    build = plugins.load("objectives", settings.name).build
    if images is not None:
        settings = settings.model_copy(update={"images": str(images.path)})
    objective = build(settings)
    if hasattr(objective, "check_fit"):
        objective.check_fit(student)
    return objective


def load_evaluator(recipe: Recipe, student: Generator | Denoiser, world: World) -> Evaluator | None:
    """Return the evaluator without its real images; None: nothing is evaluated."""
    for file in (recipe.files.reference, recipe.files.teacher_samples):
        if file is not None:
            _ = file.path  # a wrong path is said before an extractor is fetched

    # an extractor's file may be one of the project's
    config, file = recipe.evaluation, recipe.files.extractor
    if file is not None and file.location != file.shown:
        extractor = features.with_weights(config.extractor, file.location)
        config = config.model_copy(update={"extractor": extractor})
    return evaluator.load(config, image_shape=student.image_shape, world=world)


def add_reference(loaded: Evaluator, recipe: Recipe, student: Generator | Denoiser) -> Evaluator:
    """Return the evaluator with its real images, unless those are samples yet to be made.

    The ranks share the work. Raises UserError if reference or student do not serve the metrics.
    """
    config, file = recipe.evaluation, recipe.files.reference
    walks = student if isinstance(student, Generator) else None
    if config.reference == TEACHER:
        kept = min(config.images, config.definitions.kept_images)
        loaded.check(student=walks, real=Planned(config.images, kept))
        return loaded
    if file is not None:
        shape = student.image_shape
        loaded = loaded.with_real(evaluator.read_reference(file, loaded, image_shape=shape))
    loaded.check(student=walks)
    return loaded


def read_teacher_samples(
    loaded: Evaluator, recipe: Recipe, student: Generator | Denoiser
) -> Reference | None:
    """Return the statistics of the teacher's samples if the recipe names their file."""
    file = recipe.files.teacher_samples
    if file is None:
        return None
    return evaluator.read_reference(file, loaded, image_shape=student.image_shape)


def with_teacher_samples(
    components: Components, recipe: Recipe, folder: RunFolder, world: World
) -> Components:
    """Return the components with statistics of the teacher's own samples, if the recipe asks.

    They are kept in the run's folder, so that a run samples its teacher once.
    """
    config, loaded, statistics = (
        recipe.evaluation,
        components.evaluator,
        components.teacher_samples,
    )
    is_reference = config.reference == TEACHER
    if loaded is None or not (is_reference or config.teacher):
        return components

    # read them from the run's folder, or sample
    is_kept = distributed.broadcast_from_main(folder.teacher_samples.exists(), world)
    if statistics is None and is_kept:
        statistics = reference.read_npz(folder.teacher_samples, loaded.extractor)
    elif statistics is None:
        statistics = sample_teacher(components, loaded)
        if world.is_main:
            reference.save_npz(folder.teacher_samples, statistics)

    if is_reference:
        loaded = loaded.with_real(statistics)
    return replace(components, teacher_samples=statistics, evaluator=loaded)


def sample_teacher(components: Components, loaded: Evaluator) -> Reference:
    """Return the statistics of as many samples of the teacher as the recipe evaluates."""
    images, teacher = loaded.config.images, components.teacher
    assert isinstance(teacher, Denoiser), type(teacher)
    _log.info("sampling %d images of the teacher", images)
    seeds = range(_TEACHER_SEED, _TEACHER_SEED + images)
    images_of = components.images_of(teacher)
    return reference.of_samples(
        loaded.feature_stats(images_of, seeds, also={"moments"}),
        source="the teacher's own samples",
        extractor=loaded.extractor,
        shape=teacher.image_shape,
    )
