"""Refine a pretrained GAN against a pretrained diffusion model, from a recipe to a report.

    python refine.py --gan                                    the embedded digits, on a laptop
    python refine.py --gan configs/gan/cifar10_uncond.yaml student.weights=mine.pkl training.seed=1
    torchrun --nproc_per_node=8 refine.py --gan …             the same on many GPUs
    python refine.py --distill                                a one-step generator of the teacher
    python refine.py --teach configs/teach/small32.yaml objective.images=mine.zip   a teacher
    python refine.py --resume runs/00000-mnist32              resume a run
    python refine.py --report runs/00000-mnist32              rebuild its report
    python refine.py --list                                   the runs, their state and metric

This file parses the command line and prints; refinement/ does the work.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torch is imported, Ctrl-C just ends

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import click
import torch

import teachers
from core import config, distributed
from core.cli import report_user_errors, set_up_logging
from core.disk import atomic_write
from core.distributed import World
from core.errors import UserError
from core.precision import DTYPES, Precision, allow_tf32, slowdown
from core.run_folder import RunFolder
from refinement import estimate
from refinement import export as exporting
from refinement.components import Components, load_components
from refinement.job_restart import begun_run, note_job
from refinement.pipeline import finish, train
from refinement.recipe import Recipe, read_recipe
from refinement.reopening import check_changes, check_inputs, with_paths
from refinement.run import Run, log_session, open_run
from refinement.runs_table import table as listed_runs
from refinement.signals import ending_at_once, leave, run_as_process
from reports import text
from reports.data import Report
from training import checkpoint, tensorboard, trainer

ROOT = Path(__file__).resolve().parent
EMBEDDED = {
    "gan": ROOT / "configs" / "gan" / "mnist32.yaml",
    "distill": ROOT / "configs" / "distill" / "mnist32.yaml",
}
"""The recipe of a mode that is given none."""
_STUDENTS = {
    "gan": "a GAN",
    "distill": "one_step_edm",
    "teach": "a diffusion model that learns from images",
}
SCHEMA = ROOT / "configs" / "recipe.schema.json"
_WITHOUT_EFFECT = {"teach": ("teacher", "training.score_lr")}
"""Mode -> settings that it has no use of: --dry-run leaves them out."""
_SLOWER = 1.2
"""Ratio of times above which a precision is called slower: below it lies the noise of timing."""
_log = logging.getLogger("refine")


HELP = """Refine a pretrained GAN against a pretrained diffusion model, or distil the diffusion
model itself to one step, and report before and after.

\b
python refine.py --gan
    refines the embedded digit GAN in minutes, on a CPU
python refine.py --gan RECIPE.yaml student.weights=mine.pkl training.seed=1
    refines yours; any setting of the recipe can be given as KEY.PATH=VALUE
python refine.py --distill
    makes a one-step generator of the embedded diffusion model
python refine.py --teach configs/teach/small32.yaml objective.images=mine.zip
    trains a diffusion model on your own images, to be a teacher
torchrun --nproc_per_node=8 refine.py --gan RECIPE.yaml
    the same on eight GPUs
python refine.py --resume runs/00000-NAME
    resumes a run that was stopped
python refine.py --resume runs/00000-NAME training.duration_kimg=2000
    makes a run longer
python refine.py --export runs/00000-NAME --at last
    writes the last weights of a run whose refined ones are better, earlier ones
python refine.py --list
    lists the runs with state, progress and metric

Each run has a folder of its own: the resolved recipe, its log, checkpoints, samples, the
refined weights (student.safetensors) and the report. The shipped recipes in configs/ explain
every setting.

Ctrl-C, SIGTERM and SIGUSR1 end a run after its current iteration, saved, with exit code 75:
go on with --resume. A second Ctrl-C ends it at once. Other errors end with code 2.
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gan", is_flag=True, help="Refine a GAN: the embedded digits, or RECIPE.")
@click.option(
    "--distill", is_flag=True, help="Distil a teacher to one step: the embedded one, or RECIPE."
)
@click.option("--teach", is_flag=True, help="Train a teacher on your own images: RECIPE.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Resume a run.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Rebuild a run's report.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Write the weights of a run as they were at another time, with --at.",
)
@click.option(
    "--at",
    metavar="best|last|IMAGES",
    help="For --export: the best checkpoint, the last one, or the one after so many images.",
)
@click.option(
    "--list", "listing", is_flag=True, help="List the runs with state, progress and metric."
)
@click.option(
    "--outdir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where run folders go.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and what would be loaded.")
@click.option("--write-schema", is_flag=True, help="Write configs/recipe.schema.json, for editors.")
@click.argument("arguments", nargs=-1, metavar="[RECIPE.yaml] [KEY.PATH=VALUE]...")
@report_user_errors(stopped="stopped before a run began")
def main(
    gan: bool,
    distill: bool,
    teach: bool,
    resume: Path | None,
    report: Path | None,
    export: Path | None,
    at: str | None,
    listing: bool,
    outdir: Path,
    dry_run: bool,
    write_schema: bool,
    arguments: tuple[str, ...],
) -> None:
    """Run, resume or list what the command line names; `HELP` explains it."""
    if write_schema:
        _write_schema()
        return
    if listing:
        click.echo(listed_runs(outdir))
        return

    # exactly one mode, or one earlier run
    asked = {"gan": gan, "distill": distill, "teach": teach}
    modes = [mode for mode, wanted in asked.items() if wanted]
    earlier = [run for run in (resume, report, export) if run is not None]
    if len(modes) + len(earlier) != 1:
        raise UserError(
            "give one of --gan, --distill, --teach, --resume RUN, --report RUN and --export RUN; "
            "--help explains them"
        )
    if earlier and arguments and resume is None:
        raise UserError(
            f"{arguments[0]!r}: a run keeps its recipe; --report and --export take no other"
        )
    if (export is None) != (at is None):
        raise UserError("--export RUN and --at best|last|IMAGES go together")

    # its recipe, then the work
    recipe = _recipe_of(modes[0], arguments) if modes else _recipe_in(earlier[0], arguments)
    if dry_run:
        _print_plan(recipe)
    elif resume is not None:
        resume_run(recipe, RunFolder.open_existing(resume))
    elif report is not None:
        rebuild_report(recipe, RunFolder.open_existing(report))
    elif export is not None and at is not None:
        export_weights(recipe, RunFolder.open_existing(export), at)
    else:
        run_recipe(recipe, outdir)


def run_recipe(recipe: Recipe, outdir: Path) -> None:
    """Run a recipe in a folder of its own, or go on with the one that this job began."""
    with _environment(recipe) as world:
        components = _load(recipe, world)
        folder = distributed.broadcast_from_main(_folder_of_job(recipe, outdir, world), world)
        assert folder is not None, "rank 0 has one"
        _train_and_report(recipe, components, folder, world)


def resume_run(recipe: Recipe, folder: RunFolder) -> None:
    """Train a run to its end from its newest checkpoint, and write its report.

    recipe: the run's, maybe with other settings of `reopening.CHANGEABLE`; it is written to the
    folder.
    """
    try:
        with _environment(recipe) as world:
            _train_and_report(recipe, _load(recipe, world), folder, world)
    except KeyboardInterrupt:
        leave(f"stopped; {_go_on(folder)}")


def rebuild_report(recipe: Recipe, folder: RunFolder) -> None:
    """Write the report of a run as it stands, with its weights; nothing is trained."""
    with _environment(recipe) as world, _exclusive(folder, world):
        run = _open(recipe, load_components(recipe, world), folder, world)
        with _telling_what_is_saved(run):
            _print_report(run, finish(run))


def export_weights(recipe: Recipe, folder: RunFolder, at: str) -> None:
    """Write a run's weights of that time into a folder of their own in it; nothing is evaluated."""
    with _environment(recipe) as world, _exclusive(folder, world):
        run = _open(recipe, load_components(recipe, world), folder, world)
        student, images_seen = exporting.student_at(run, exporting.chosen(run, at))
        if world.is_main:
            out = folder.exported(images_seen)
            exporting.write(run, student, images_seen, out)
            click.echo(f"wrote {out.student}: the weights after {images_seen:,} images")


def _train_and_report(
    recipe: Recipe, components: Components, folder: RunFolder, world: World
) -> None:
    with _exclusive(folder, world):
        run = _open(recipe, components, folder, world)
        if world.is_main:
            _write_recipe(recipe, folder)
        with _telling_what_is_saved(run):
            train(run)
            _print_report(run, finish(run))


def _open(recipe: Recipe, components: Components, folder: RunFolder, world: World) -> Run:
    """Return the run, whose input files are those that it began with."""
    check_inputs(recipe, folder, world)
    return open_run(recipe, components, folder, world)


def _write_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Write the resolved recipe, unless it is there."""
    resolved = config.to_yaml(recipe)
    if not folder.recipe.exists() or folder.recipe.read_text(encoding="utf-8") != resolved:
        with atomic_write(folder.recipe) as partial:
            partial.write_text(resolved, encoding="utf-8")


@contextmanager
def _environment(recipe: Recipe) -> Iterator[World]:
    """Yield the ranks of the recipe's device, with logging set up and float32 kept exact."""
    with (
        ending_at_once(),
        allow_tf32(False),  # evaluations are float32, on a GPU too
        distributed.process_group(recipe.device) as world,
    ):
        set_up_logging(world)
        yield world


def _load(recipe: Recipe, world: World) -> Components:
    """Return the components of a recipe that is going to be trained."""
    if recipe.training.tensorboard:
        tensorboard.require_package()
    if world.is_main and world.device.type == "cpu":
        _warn_if_slow(recipe.training.precision, world)
    return load_components(recipe, world)


def _warn_if_slow(precision: Precision, world: World) -> None:
    """Log a warning if this processor computes a precision slower than float32."""
    if DTYPES[precision] == torch.float32:
        return
    if (ratio := slowdown(precision, world.device)) > _SLOWER:
        _log.warning(
            "training.precision=%s: convolutions take %.1f times as long as in float32 on this "
            "processor, which has no arithmetic for it; float32 is faster here",
            *(precision, ratio),
        )


def _exclusive(folder: RunFolder, world: World) -> AbstractContextManager[None]:
    """Hold the run's folder, on rank 0 for all."""
    return folder.exclusive() if world.is_main else nullcontext()


def _print_report(run: Run, report: Report) -> None:
    if run.world.is_main:
        click.echo(f"\n{text.summary(report)}\n\nreport: {run.folder.report / 'report.html'}")


def _recipe_in(run: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of an earlier run, with those settings changed that a run may change.

    Raises UserError if there is no such run, or for another setting.
    """
    check_changes(overrides)
    folder = RunFolder.open_existing(run)
    return with_paths(read_recipe(folder.recipe, overrides), folder)


def _recipe_of(mode: str, arguments: Sequence[str]) -> Recipe:
    """Return the recipe of the command line: a file or the mode's own, with overrides on top."""
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise UserError(
            f"got two recipes, {files[0]} and {files[1]}: expected one, "
            "then settings of the form key.path=value"
        )

    # a file, or the mode's own recipe
    overrides = [argument for argument in arguments if "=" in argument]
    if not files and mode not in EMBEDDED:
        shipped = sorted(
            str(path.relative_to(ROOT)) for path in ROOT.glob(f"configs/{mode}/*.yaml")
        )
        raise UserError(f"--{mode} needs a recipe; begin with one of {', '.join(shipped)}")

    # the mode must be that of its student
    recipe = read_recipe(
        Path(teachers.resolve(files[0]).location) if files else EMBEDDED[mode], overrides
    )
    if recipe.mode != mode:
        raise UserError(
            f"the student of this recipe is {_STUDENTS[recipe.mode]}: run it with --{recipe.mode}"
        )
    return recipe


@contextmanager
def _telling_what_is_saved(run: Run) -> Iterator[None]:
    """Run the body; a stop or an error also tells how far the run is saved, and how to go on.

    A request to stop reaches all ranks, of which rank 0 prints; of an error on all ranks,
    core.distributed prints the first.
    """
    try:
        yield
    except (trainer.Interrupted, KeyboardInterrupt):
        if not run.world.is_main:
            leave()
        log_session(run)
        leave(f"stopped; {_saved(run)}; {_go_on(run.folder)}")
    except trainer.Diverged as error:
        how = f"see how good that is with: python refine.py --report {run.folder.path}"
        raise UserError(f"{error}\n{_saved(run)}; {how}") from error
    except UserError as error:
        raise UserError(f"{error}\n{_saved(run)}; {_go_on(run.folder)}") from error


def _saved(run: Run) -> str:
    return f"the state after {checkpoint.images_saved(run.folder)} images is saved"


def _go_on(folder: RunFolder) -> str:
    return f"go on with: python refine.py --resume {folder.path}"


def _folder_of_job(recipe: Recipe, outdir: Path, world: World) -> RunFolder | None:
    """Return the run folder that an earlier start of this job began, or else a new one with the
    resolved recipe in it; None but on rank 0.
    """
    if not world.is_main:
        return None
    resolved = config.to_yaml(recipe)
    if (begun := begun_run(outdir, resolved)) is not None:
        _log.info("this job was started again: it goes on with %s", begun.path)
        return begun
    folder = RunFolder.create(outdir, recipe.name)
    try:
        note_job(folder)
        _write_recipe(recipe, folder)
    except UserError:
        shutil.rmtree(folder.path)  # without its recipe it is no run folder
        raise
    _log.info("run folder: %s", folder.path)
    return folder


def _print_plan(recipe: Recipe) -> None:
    """Print the resolved recipe, the state of each file, and what a run would take."""
    files = {
        "student": recipe.files.student,
        "teacher": recipe.files.teacher,
        "images": recipe.files.images,
        "reference": recipe.files.reference,
        "teacher's samples": recipe.files.teacher_samples,
        "extractor": None if recipe.evaluation.reference is None else recipe.files.extractor,
    }
    lines = [f"# {name}: {file.status}" for name, file in files.items() if file is not None]
    resolved = config.to_yaml(recipe, without=_WITHOUT_EFFECT.get(recipe.mode, ()))
    click.echo("\n".join([resolved, "# would be loaded:", *lines]))
    with _environment(recipe) as world:
        for line in estimate.preview(recipe, world):
            if world.is_main:
                click.echo(f"# {line}")


def _write_schema() -> None:
    with atomic_write(SCHEMA) as partial:
        partial.write_text(json.dumps(config.schema(Recipe), indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {SCHEMA}")


if __name__ == "__main__":
    run_as_process(main)
