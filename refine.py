"""Refine a pretrained GAN against a pretrained diffusion model, from a recipe to a report.

    python refine.py --gan                                    the embedded digits, on a laptop
    python refine.py --gan configs/gan/cifar10_uncond.yaml student.weights=mine.pkl training.seed=1
    torchrun --nproc_per_node=8 refine.py --gan …             the same on many GPUs
    python refine.py --resume runs/00000-mnist32              go on where a run stopped
    python refine.py --report runs/00000-mnist32              make its report again

This file reads the recipe, wires the parts and runs them; what they do stands in their folders.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, cast

import click
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import generators
import teachers
from core import config, distributed, networks, plugins
from core.config import Section
from core.distributed import World
from core.downloads import cache_path, local_file, sha256_of
from core.errors import UserError
from core.protocols import Networks, Objective
from core.run_folder import RunFolder, atomic_write
from custom_ops import backend
from eval import features, reference, report, samples
from eval.metrics import MetricResult
from teachers import sampling
from training import checkpoint, loop
from training import state as training_state
from training.state import TrainState

ROOT = Path(__file__).resolve().parent
DEFAULT_RECIPE = ROOT / "configs" / "gan" / "mnist32.yaml"
SCHEMA = ROOT / "configs" / "recipe.schema.json"
_log = logging.getLogger("refine")


# The recipe


def _objective_type() -> object:
    """Return the union of every objective's Config, told apart by `name`."""
    kinds = [plugins.load("objectives", name).Config for name in plugins.names("objectives")]
    return kinds[0] if len(kinds) == 1 else Annotated[reduce(or_, kinds), Field(discriminator="name")]


class NetworkSection(Section):
    """Where a pretrained network comes from: a weights file, or a family and its settings."""

    family: str | None = None
    """Plug-in of generators/ or teachers/; null: as the weights file says."""
    weights: str | None = None
    """Path (absolute, or relative to where you are) or URL of an NVIDIA pickle or our safetensors."""
    sha256: str | None = None
    """Expected SHA-256 of the weights file; null: not checked."""
    config: dict[str, object] | None = None
    """Without weights: settings of the family, to start from freshly drawn weights."""

    @model_validator(mode="after")
    def _one_source(self) -> NetworkSection:
        if (self.weights is None) == (self.config is None):
            raise ValueError("give either weights (a file) or family and config (drawn afresh)")
        if self.config is not None and self.family is None:
            raise ValueError("config needs family: whose settings are these?")
        return self


class Recipe(Section):
    """A run: who learns (student) from whom (teacher), by what (objective), how, measured how."""

    name: str = "run"
    """Name of the run's folder."""
    student: NetworkSection
    """The one-step generator to refine."""
    teacher: NetworkSection
    """The diffusion model it learns from."""
    objective: _objective_type()  # pyright: ignore[reportInvalidTypeForm]
    """What is minimised."""
    training: loop.Config = loop.Config()
    """The loop."""
    evaluation: samples.Config = samples.Config()
    """What is measured before, while and after."""
    device: str = "auto"
    """auto (CUDA where there is some), cpu, cuda or cuda:N."""
    kernels: backend.KernelPolicy = "auto"
    """Custom operations: auto, native or reference."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with overrides on top. Raises UserError naming all that is wrong."""
    plain = config.with_overrides({"name": path.stem, **config.read_yaml(path)}, overrides)
    recipe = config.validate(Recipe, plain, source=str(path))
    for folder, section in (("generators", recipe.student), ("teachers", recipe.teacher)):
        if section.config is not None:
            _family_config(folder, section)
    return recipe


def _family_config(folder: str, section: NetworkSection) -> Section:
    module = plugins.load(folder, cast(str, section.family))
    return config.validate(module.Config, section.config or {}, source=f"{section.family} in {folder}/")


# The parts


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

    Raises UserError where a file cannot be used, or student, teacher and reference do not fit each other.
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
        return plugins.load(folder, cast(str, section.family)).build(_family_config(folder, section))
    path = local_file(_found(section.weights), sha256=section.sha256)
    loaded = {"generators": generators.load, "teachers": teachers.load}[folder](path)
    family = networks.family_of(cast(nn.Module, loaded))
    if section.family not in (None, family):
        raise UserError(f"{section.weights} holds a {family} network, the recipe says {section.family}")
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
    real = reference.reference_statistics(_found(settings.reference), extractor)
    if real.image_shape not in (None, tuple(student.image_shape)):
        raise UserError(
            f"{settings.reference} holds images of {_size(real.image_shape)}, "
            f"the student makes {_size(student.image_shape)}"
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


def _found(source: str) -> str:
    """Return a relative path as one that exists: from where the user is, else from this project."""
    beside = ROOT / source
    return str(beside) if not Path(source).exists() and beside.exists() else source


# The run


@dataclass
class Run:
    """One run in its folder: what it was given, and where it stands."""

    recipe: Recipe
    parts: Parts
    folder: RunFolder
    world: World
    original: nn.Module
    """The student before any training."""
    state: TrainState
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of this process's work -> how long it took."""
    started_at: str = field(default_factory=lambda: _now())


def open_run(recipe: Recipe, parts: Parts, folder: RunFolder, world: World) -> Run:
    """Return the run where its newest checkpoint left it, or at its start."""
    original = copy.deepcopy(parts.student).eval().requires_grad_(False)
    trio = Networks(parts.student, copy.deepcopy(parts.teacher), parts.teacher)
    settings = recipe.training
    state = training_state.start(
        trio,
        student_lr=settings.student_lr,
        score_lr=settings.score_lr,
        optimizer=settings.optimizer,
    )
    newest = distributed.from_main(checkpoint.newest(folder), world)
    if newest is not None:
        checkpoint.restore(state, newest)
        _log.info("going on from %s: %d images seen", newest.name, state.images_seen)
    if world.is_main:
        folder.keep_readings_until(state.images_seen)
    distributed.barrier(world)
    return Run(recipe, parts, folder, world, original, state)


def train(run: Run) -> None:
    """Train to the end of the recipe. Raises loop.Interrupted, with the state saved, when asked to stop."""
    with _timed(run, "before"):
        _measured(run, "before", run.original)
        if run.state.images_seen == 0 and run.recipe.evaluation.every_kimg > 0:
            _append(run, {"measured": _measure_while_training(run, run.state)})
    with _timed(run, "training"), _stop_signal() as stop_requested:
        loop.train(
            run.state,
            run.parts.objective,
            run.recipe.training,
            folder=run.folder,
            world=run.world,
            measure=lambda state: _measure_while_training(run, state),
            measure_every_kimg=run.recipe.evaluation.every_kimg,
            stop_requested=stop_requested,
        )


def finish(run: Run) -> report.Report:
    """Return the report of the run as it stands, after writing it and the refined weights."""
    student = copy.deepcopy(run.state.student_ema)
    if hasattr(student, "settle"):
        student.settle()
    if run.world.is_main:
        provenance = {"refined_from": _file(run.recipe.student), "images_seen": run.state.images_seen}
        networks.save(run.folder.student, student, provenance=provenance)
    with _timed(run, "after"):
        _measured(run, "after", student)
    _append(run, {"session": _session(run)})
    made = _report(run)
    if run.world.is_main:
        evaluation = run.recipe.evaluation
        pictures = samples.pairs(
            run.original, student, count=evaluation.pairs, device=run.world.device
        )
        report.write(run.folder.report, made, pictures)
    return made


def _measured(run: Run, when: str, student: nn.Module) -> None:
    """Measure on all seeds and write it down, unless that was done at this point of the run."""
    images_seen = 0 if when == "before" else run.state.images_seen
    if run.parts.extractor is None or run.parts.reference is None:
        return
    if distributed.from_main(_noted(run.folder, when, images_seen), run.world) is not None:
        return
    settings = run.recipe.evaluation
    _log.info("measuring %s: %d x %d images", when, settings.seeds, settings.images)
    fid = samples.fid_over_seeds(
        student,
        run.parts.extractor,
        run.parts.reference,
        images=settings.images,
        seeds=settings.seeds,
        batch_size=settings.batch_size,
        world=run.world,
    )
    if run.world.is_main:
        row = {"images_seen": images_seen, when: {"fid": list(fid.values)}}
        run.folder.append_reading(row)


def _noted(folder: RunFolder, when: str, images_seen: int) -> dict[str, MetricResult] | None:
    """Return the metrics that the readings hold for this point of the run, if any."""
    for row in reversed(folder.read_readings()):
        if when in row and row["images_seen"] == images_seen:
            values = cast(Mapping[str, list[float]], row[when])
            return {name: MetricResult.of(found) for name, found in values.items()}
    return None


def _measure_while_training(run: Run, state: TrainState) -> dict[str, float]:
    """Return the metrics of fewer images, and write a sample grid."""
    settings = run.recipe.evaluation
    if run.world.is_main:
        grid = samples.grid(state.student_ema, count=64, device=run.world.device)
        with atomic_write(run.folder.samples / f"{state.images_seen:012d}.png") as partial:
            grid.save(partial)
    if run.parts.extractor is None or run.parts.reference is None:
        return {}
    fid = samples.fid_over_seeds(
        state.student_ema,
        run.parts.extractor,
        run.parts.reference,
        images=settings.images_while_training,
        seeds=1,
        batch_size=settings.batch_size,
        world=run.world,
    )
    return {"fid": fid.mean}


def _report(run: Run) -> report.Report:
    """Return the report's data, from the readings and what was loaded."""
    recipe, parts = run.recipe, run.parts
    rows = run.folder.read_readings()
    sessions = [cast(dict, row["session"]) for row in rows if "session" in row]
    points = [
        report.CurvePoint(cast(int, row["images_seen"]), cast(dict, row["measured"])["fid"])
        for row in rows
        if "fid" in cast(dict, row.get("measured", {}))
    ]
    student = _file(recipe.student)
    return report.Report(
        name=recipe.name,
        before=_noted(run.folder, "before", 0) or {},
        after=_noted(run.folder, "after", run.state.images_seen) or {},
        images=recipe.evaluation.images,
        first_seed=0,
        reference=parts.reference and report.ReferenceName.of(parts.reference),
        extractor=parts.extractor and report.ExtractorName.of(parts.extractor),
        environment=report.Environment.here(run.world.device),
        kernel_backend=parts.kernel_backend,
        student=report.File(**student),
        teacher=report.File(**_file(recipe.teacher)),
        images_seen=run.state.images_seen,
        started_at=min((session["started_at"] for session in sessions), default=run.started_at),
        finished_at=max((session["finished_at"] for session in sessions), default=_now()),
        durations_seconds=_total_seconds(sessions),
        curve=report.Curve(tuple(points), recipe.evaluation.images_while_training),
        pair_seeds=tuple(_pair_seeds(run)),
        recipe=recipe.model_dump(mode="json"),
    )


def _pair_seeds(run: Run) -> list[int]:
    student = run.original
    return samples.pair_seeds(
        run.recipe.evaluation.pairs,
        latent_shape=student.latent_shape,
        num_classes=student.num_classes,
    )


def _file(section: NetworkSection) -> dict[str, str | None]:
    """Return path and hash of a network's file, or the family whose weights were drawn."""
    if section.weights is None:
        return {"path": f"freshly drawn {section.family}", "sha256": None}
    return {"path": section.weights, "sha256": sha256_of(local_file(_found(section.weights)))}


def _append(run: Run, row: Mapping[str, object]) -> None:
    if run.world.is_main:
        run.folder.append_reading({"images_seen": run.state.images_seen, **row})


def _session(run: Run) -> dict[str, object]:
    return {"started_at": run.started_at, "finished_at": _now(), "seconds": run.seconds}


def _total_seconds(sessions: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the time of each part of the work, over all processes that worked on the run."""
    parts = dict.fromkeys(name for session in sessions for name in session["seconds"])
    return {part: sum(s["seconds"].get(part, 0.0) for s in sessions) for part in parts}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _timed(run: Run, part: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        run.seconds[part] = round(time.monotonic() - started, 1)


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM came; a second one acts at once."""
    came: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        came.append(number)
        for later, handler in previous.items():
            signal.signal(later, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# The command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gan", "mode", flag_value="gan", help="Refine a GAN: the embedded digits, or RECIPE.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run.")
@click.option("--report", "again", type=click.Path(path_type=Path), metavar="RUN", help="Make a run's report again.")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and what would be loaded.")
@click.option("--write-schema", is_flag=True, help="Write configs/recipe.schema.json, for editors.")
@click.argument("arguments", nargs=-1, metavar="[RECIPE.yaml] [KEY.PATH=VALUE]...")
def main(
    mode: str | None,
    resume: Path | None,
    again: Path | None,
    outdir: Path,
    dry_run: bool,
    write_schema: bool,
    arguments: tuple[str, ...],
) -> None:
    """Refine a pretrained GAN against a pretrained diffusion model, and report before and after.

    \b
    python refine.py --gan
        refines the embedded digit GAN in minutes, on a CPU
    python refine.py --gan RECIPE.yaml student.weights=mine.pkl training.seed=1
        refines yours; any setting of the recipe can be given as KEY.PATH=VALUE
    torchrun --nproc_per_node=8 refine.py --gan RECIPE.yaml
        the same on eight GPUs
    python refine.py --resume runs/00000-NAME
        goes on where a run was stopped

    Each run has a folder of its own: the resolved recipe, readings, checkpoints, samples, the refined
    weights (student.safetensors) and the report. The shipped recipes in configs/ explain every setting.
    """
    sys.exit(_outcome(lambda: _command(mode, resume, again, outdir, dry_run, write_schema, arguments)))


def _outcome(command: Callable[[], None]) -> int:
    """Return the exit code: 0, or 2 after one sentence on what stood in the way."""
    try:
        command()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        return 2
    return 0


def _command(
    mode: str | None,
    resume: Path | None,
    again: Path | None,
    outdir: Path,
    dry_run: bool,
    write_schema: bool,
    arguments: tuple[str, ...],
) -> None:
    if write_schema:
        _write_schema()
        return
    chosen = [choice for choice in (mode, resume, again) if choice is not None]
    if len(chosen) != 1:
        raise UserError("give one of --gan, --resume RUN and --report RUN; --help explains them")
    earlier = resume or again
    if earlier is not None:
        if arguments:
            raise UserError(f"{arguments[0]!r}: a run keeps its recipe; --resume and --report take no other")
        folder = RunFolder.open_existing(earlier)
        recipe = read_recipe(folder.recipe)
    else:
        folder = None
        recipe = _recipe_of(arguments)
    if dry_run:
        click.echo(_plan(recipe))
        return
    _work(recipe, folder, outdir=outdir, training=again is None)


def _recipe_of(arguments: Sequence[str]) -> Recipe:
    """Return the recipe that the command line names: a file or the default, with overrides on top."""
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"got two recipes, {files[0]} and {files[1]}; expected one")
    overrides = [argument for argument in arguments if "=" in argument]
    return read_recipe(Path(files[0]) if files else DEFAULT_RECIPE, overrides)


def _work(recipe: Recipe, folder: RunFolder | None, *, outdir: Path, training: bool) -> None:
    """Do a run, new (folder None) or begun, or only its report."""
    with distributed.session(recipe.device) as world:
        _set_up_logging(world)
        parts = load_parts(recipe, world)
        if folder is None:
            folder = distributed.from_main(_new_folder(recipe, outdir, world), world)
        run = open_run(recipe, parts, folder, world)
        if training:
            _train_or_say_how_to_go_on(run)
        made = finish(run)
        if world.is_main:
            click.echo(f"\n{report.summary(made)}\n\nreport: {run.folder.report / 'report.md'}")


def _train_or_say_how_to_go_on(run: Run) -> None:
    resume = f"python refine.py --resume {run.folder.path}"
    try:
        train(run)
    except (loop.Interrupted, KeyboardInterrupt) as error:
        _append(run, {"session": _session(run)})
        raise UserError(
            f"stopped; saved up to {checkpoint.images_saved(run.folder)} images; go on with: {resume}"
        ) from error
    except loop.Diverged as error:
        raise UserError(f"{error}\nthe newest checkpoint is whole; see {run.folder.path}") from error


def _new_folder(recipe: Recipe, outdir: Path, world: World) -> RunFolder | None:
    """Return a new run folder with the resolved recipe in it; None on ranks other than the first."""
    if not world.is_main:
        return None
    folder = RunFolder.create(outdir, recipe.name)
    with atomic_write(folder.recipe) as partial:
        partial.write_text(config.to_yaml(recipe), encoding="utf-8")
    _log.info("run folder: %s", folder.path)
    return folder


def _plan(recipe: Recipe) -> str:
    """Return the resolved recipe, and for each file of it where it is."""
    sources = {
        "student": recipe.student.weights,
        "teacher": recipe.teacher.weights,
        "reference": recipe.evaluation.reference,
    }
    lines = [f"# {name}: {_whereabouts(source)}" for name, source in sources.items() if source]
    return "\n".join([config.to_yaml(recipe), "# would be loaded:", *lines])


def _whereabouts(source: str) -> str:
    if source.startswith(("http://", "https://")):
        kept = cache_path(source)
        return f"{source}, {'kept at' if kept.exists() else 'to be downloaded to'} {kept}"
    path = Path(_found(source))
    return f"{path} ({path.stat().st_size:,} bytes)" if path.exists() else f"{path} (MISSING)"


def _write_schema() -> None:
    with atomic_write(SCHEMA) as partial:
        partial.write_text(json.dumps(config.schema(Recipe), indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {SCHEMA}")


def _set_up_logging(world: World) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(distributed.main_only(world))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)


if __name__ == "__main__":
    main()
