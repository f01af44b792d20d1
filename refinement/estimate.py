"""Preview of a recipe: do its networks fit, and what will the run take? Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import torch

from core.distributed import World
from core.file import File
from eval.provenance import hardware
from refinement.components import Components, load_components
from refinement.recipe import Recipe
from refinement.run import first_state
from training import checkpoint
from training.state import TrainState
from training.step import training_iteration, wrap_for_ranks

_CPU_IMAGES = 8
"""Images of the measured iteration on a CPU, at most: there, time goes with their number."""
_LONGEST_SECONDS = 20
"""Seconds of an iteration of the whole batch that is measured on a CPU, at most."""
_EVALUATED_IMAGES = 16
_GB = 1e9


def preview(recipe: Recipe, world: World) -> Iterator[str]:
    """Yield lines on what a run of the recipe takes, after one iteration of it in memory.

    Networks and images are loaded as a run loads them, so UserError says what does not fit. If a
    file is still to be downloaded or is missing, one line says so and nothing is loaded.
    """
    absent = [file for file in _needed(recipe) if not file.is_here]
    if absent:
        names = ", ".join(file.shown for file in absent)
        yield f"neither checked nor estimated, not here yet: {names}"
        return

    # one iteration, of a run without a folder
    components = load_components(recipe, world)
    state = first_state(recipe, components, world)
    images, seconds, memory = _measured_iteration(state, components, recipe, world)
    yield f"by one iteration of {images} images on {hardware(world.device, world.size)}:"

    # time
    total = recipe.training.total_images
    yield f"training: {_duration(total * seconds / images)} for {total:,} images"
    yield from _evaluation(components, recipe)

    # memory and disk
    state_bytes = checkpoint.size_bytes(state)
    keep = recipe.training.keep
    kept = keep.newest + (keep.best and recipe.evaluation.every_kimg > 0)
    yield f"memory: {memory}"
    yield (
        f"disk: {kept * state_bytes / _GB:.2f} GB, {kept} checkpoints of {state_bytes / _GB:.2f} GB"
    )


def _needed(recipe: Recipe) -> list[File]:
    """Return the files that a run reads."""
    files, extractor = recipe.files, recipe.files.extractor
    named = [files.student, files.teacher, files.images, files.reference, files.teacher_samples]
    measured = [] if recipe.evaluation.reference is None else [extractor]
    return [file for file in (*named, *measured) if file is not None]


def _measured_iteration(
    state: TrainState, components: Components, recipe: Recipe, world: World
) -> tuple[int, float, str]:
    """Return images and seconds of one iteration with all phases, and the memory that it takes."""
    batch, device = recipe.training.batch_size, world.device
    images = batch if device.type == "cuda" else min(batch, _CPU_IMAGES)
    _iterate(state, components, recipe, world, images=images)  # warms up
    seconds = _iterate(state, components, recipe, world, images=images)
    if images < batch and seconds * batch / images < _LONGEST_SECONDS:
        images, seconds = batch, _iterate(state, components, recipe, world, images=batch)

    memory = (
        f"{checkpoint.size_bytes(state) / _GB:.2f} GB of weights that learn and their optimizers"
    )
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / _GB:.2f} GB of the GPU at the peak"
    return images, seconds, memory


def _iterate(
    state: TrainState, components: Components, recipe: Recipe, world: World, *, images: int
) -> float:
    """Return the seconds of one iteration, the last one of the run, of so many images."""
    settings = recipe.training
    micro = settings.micro_batch_size and min(settings.micro_batch_size, images)
    config = settings.model_copy(
        update={"batch_size": images, "micro_batch_size": micro, "compile": None}
    )
    networks = wrap_for_ranks(state.networks, state, world)
    state.images_seen = max(0, settings.total_images - images)
    started = time.perf_counter()
    for stats in training_iteration(
        state, components.objective, config, trained=networks, world=world
    ):
        _ = [value.item() for value in stats.values()]  # waits for the device
    return time.perf_counter() - started


def _evaluation(components: Components, recipe: Recipe) -> Iterator[str]:
    """Yield the time of all evaluations, by some images, if there are any."""
    loaded, config = components.evaluator, recipe.evaluation
    if loaded is None:
        return
    seeds = range(min(_EVALUATED_IMAGES, config.images))
    images_of = components.images_of(components.student)
    started = time.perf_counter()
    loaded.features(images_of, seeds)
    each = (time.perf_counter() - started) / len(seeds)

    # before and after, and while training
    full = 2 * config.seeds * config.images
    times = int(recipe.training.duration_kimg / config.every_kimg) if config.every_kimg else 0
    quick = times * config.images_while_training
    yield f"evaluation: {_duration(each * (full + quick))} for {full + quick:,} images"


def _duration(seconds: float) -> str:
    return f"about {timedelta(seconds=max(1, round(seconds)))}"
