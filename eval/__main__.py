"""`python -m eval`: metrics of any weights or images, and statistics of reference images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch

import generators
import teachers
from core import config, distributed, plugins
from core.cli import report_user_errors, set_up_logging
from core.distributed import World
from core.errors import UserError
from core.file import File
from core.precision import allow_tf32
from eval import edm_sampler, evaluator, features, progress, scorecard, standalone
from eval import reference as references
from eval.metrics import registry
from eval.metrics.display import image_count
from eval.standalone import Kind, Subject
from pretrained import files
from pretrained.files import SavedNetwork

_log = logging.getLogger(__name__)
_TITLES = {
    "all": "All of them, as far as they can be measured",
    **{
        group: " and ".join(registry.metrics()[name].title for name in members)
        for group, members in registry.groups().items()
    },
}


class _Commands(click.Group):
    """Commands, among them every name that asks for metrics."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["all", *standalone.all_names(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        try:
            registry.parse(_names(cmd_name))
        except UserError as error:
            known = ", ".join(self.commands)
            raise click.UsageError(f"{error}; or one of the commands {known}") from error
        command = copy.copy(_measure)
        command.name, command.short_help = cmd_name, _TITLES.get(cmd_name, cmd_name)
        return command


def _names(command: str) -> tuple[str, ...]:
    """Return the metrics that a command asks for: all, one, or several with commas between."""
    return standalone.all_names() if command == "all" else tuple(command.split(","))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="METRIC|reference …",
)
def main() -> None:
    """Measure the quality of weights or images by FID and other metrics.

    \b
    python -m eval fid student.safetensors --reference mine.zip
    python -m eval fid50k_full,kid50k_full mine.pkl --reference cifar10.zip --json
    python -m eval all edm-cifar10-32x32-uncond-vp --reference cifar10.zip --sampler steps=18
    python -m eval fid,pr images.zip --reference mine.zip --extractor dinov2-vit-b-14
    torchrun --nproc_per_node=8 -m eval all student.safetensors --reference mine.zip
    python -m eval reference mine.zip mine.npz

    A METRIC is one of those below, a published name such as fid50k_full, kid50k_full, is50k,
    pr50k3_full or ppl2_wend, which also says of how many images, or several with commas between.
    docs/evaluating.md explains each number; `python -m reports` compares runs.
    """


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="WEIGHTS|IMAGES")
@click.option(
    "--reference",
    metavar="SOURCE",
    help="Real images (zip, folder, cifar-10-python.tar.gz) or their statistics (.npz, .pkl).",
)
@click.option(
    "--images",
    type=click.IntRange(min=2),
    metavar="N",
    help="Generated images of each value.  [default: as the name says, else 50,000]",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    metavar="N",
    help="Values, each of images of its own: they give mean and spread.  [default: 1]",
)
@click.option(
    "--first-seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    metavar="N",
    help="Seed of the first image.  [default: 0]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=250, show_default=True, metavar="N"
)
@click.option(
    "--extractor",
    metavar="NAME",
    help="What features are compared: inception, vgg16, clip-vit-b-32, dinov2-vit-b-14, mnist32, "
    "pixels or a classifier's weights file.  [default: that of published values]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--set",
    "definitions",
    multiple=True,
    metavar="KEY=VALUE",
    help="A definition of the metrics, such as kid_subsets=10.",
)
@click.option(
    "--sampler",
    "sampler",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a teacher is sampled, such as steps=18.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, and nothing else.")
@click.pass_context
@report_user_errors(stopped="stopped; nothing was measured to its end")
def _measure(
    context: click.Context,
    source: str,
    reference: str | None,
    images: int | None,
    seeds: int | None,
    first_seed: int | None,
    batch_size: int,
    extractor: str | None,
    device: str,
    definitions: tuple[str, ...],
    sampler: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure WEIGHTS (a student or a teacher: a pickle of StyleGAN, EDM or EDM2, or our own file;
    path, URL, short name of a published teacher, or a run's folder) or IMAGES (a zip or folder).

    A student's image follows from its seed alone; a teacher is sampled from the seed's noise, with
    its authors' settings unless --sampler gives others. Images are compared as they are, all of
    them. Everything that cannot be evaluated is refused before an image is made.

    Exit code 2: bad input. Progress and remarks go to stderr.
    """
    name = str(context.info_name)
    names = _names(name)
    settings = _settings(
        metrics=names,
        reference=reference,
        extractor=extractor or standalone.usual_extractor(names),
        images=images or standalone.usual_images(names),
        seeds=seeds or 1,
        batch_size=batch_size,
        definitions=config.with_overrides({}, definitions),
    )

    # evaluate on all ranks, print on rank 0
    seeded = {"--images": images, "--seeds": seeds, "--first-seed": first_seed}
    with allow_tf32(False), distributed.process_group(device) as world:
        set_up_logging(world)
        with distributed.main_first(world):
            subject = _subject(source, sampler, world)
        _check_options(subject, seeded)
        evaluation = standalone.prepare(
            subject,
            settings,
            world=world,
            first_seed=first_seed or 0,
            leaving_out=name == "all",
        )
        card = standalone.scorecard(evaluation)
        if world.is_main:
            click.echo(scorecard.to_json(card) if as_json else scorecard.table(card))


def _settings(**settings: object) -> evaluator.Config:
    given = {key: value for key, value in settings.items() if value is not None}
    return config.validate(evaluator.Config, given, source="the command line")


def _check_options(subject: Subject, seeded: dict[str, int | None]) -> None:
    """Raise UserError for an option of generated images if images lie in files."""
    given = [option for option, value in seeded.items() if value is not None]
    if subject.files is not None and given:
        raise UserError(
            f"{subject.source} is a set of images, all {subject.files:,} of which are measured: "
            f"leave out {' and '.join(given)}"
        )


def _subject(source: str, sampler: Sequence[str], world: World) -> Subject:
    """Return the network or the images behind a path, a URL or a short name."""
    settings = config.validate(
        edm_sampler.Config, config.with_overrides({}, sampler), source="--sampler"
    )
    file = _resolve(source)
    path, kind = file.path, _kind(file.path)
    if sampler and kind != "teacher":
        raise UserError(f"--sampler is of a teacher, and {source} holds {_HELD[kind]}")
    if kind == "images":
        return standalone.of_images(references.image_set(path), source=source)
    sha256, layout = str(file.sha256), torch.channels_last
    if kind == "student":
        student = generators.load(path)
        student.to(world.device).to(memory_format=layout)
        return standalone.of_student(student, source=source, sha256=sha256, device=world.device)
    teacher = teachers.load(path)
    teacher.to(world.device).to(memory_format=layout)
    return standalone.of_teacher(
        teacher,
        partial(edm_sampler.sample, config=settings),
        described=edm_sampler.describe(teacher, settings),
        source=source,
        sha256=sha256,
        device=world.device,
    )


_HELD = {"student": "a student", "images": "images"}


def _resolve(source: str) -> File:
    """Return the file of a path, a URL or a short name; of a run's folder, its student."""
    teachers.check_name(source)
    file = teachers.resolve(source)
    if file.licence is not None:
        _log.info("%s: %s", source, file.licence)
    return file


def _kind(path: Path) -> Kind:
    """Return the kind of a file or folder, by its content. Raises UserError for anything else."""
    if references.is_image_set(path):
        return "images"
    file = files.read(path)
    if isinstance(file, SavedNetwork):
        return "teacher" if file.family in plugins.names("teachers") else "student"
    return "teacher" if "ema" in file.records else "student"


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.npz")
@click.option("--extractor", default="inception", show_default=True, metavar="NAME")
@click.option(
    "--keep-features/--no-keep-features",
    default=True,
    show_default=True,
    help="Also keep features of images, which KID, precision and recall need.",
)
@click.option(
    "--kept-images",
    type=click.IntRange(min=2),
    default=registry.Config().kept_images,
    show_default=True,
    metavar="N",
    help="Features of so many images at most, drawn at random.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=250, show_default=True, metavar="N"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.npz if it exists.")
@report_user_errors(stopped="stopped; nothing was written")
def reference(
    source: str,
    out: Path,
    extractor: str,
    keep_features: bool,
    kept_images: int,
    batch_size: int,
    device: str,
    overwrite: bool,
) -> None:
    """Write the statistics of real images to OUT.npz, which --reference and a recipe's
    evaluation.reference take in place of the images.

    SOURCE is a zip or folder of images, CIFAR-10 as published for Python (cifar-10-python.tar.gz),
    or statistics as EDM (.npz) and StyleGAN (.pkl) keep them. OUT.npz holds mu and sigma under
    these names, so that EDM's programs read it too.
    """
    if out.suffix != ".npz":
        raise UserError(f"{out}: a file of statistics must be named .npz to be known as one")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: give another name, or --overwrite")

    # compute the statistics on all ranks, write on rank 0
    with allow_tf32(False), distributed.process_group(device) as world:
        set_up_logging(world)
        with distributed.main_first(world):
            network = features.load(extractor, world.device)
        statistics = references.reference_statistics(
            source,
            network,
            keep=registry.Config(kept_images=kept_images) if keep_features else None,
            batch_size=batch_size,
            world=world,
            show=progress.for_rank(world),
        )
        if world.is_main:
            references.save_npz(out, statistics)

    # print what was written
    if not world.is_main:
        return
    kept = "none" if statistics.features is None else f"{len(statistics.features):,}"
    click.echo(
        f"wrote {out}: {len(statistics.mean):,} features of {image_count(statistics.images)} "
        f"by {statistics.extractor}, those of {kept} images kept"
    )


@main.command()
@click.argument("extractors", nargs=-1, metavar="[EXTRACTOR]...")
@report_user_errors(stopped="stopped; files that are whole are kept")
def fetch(extractors: tuple[str, ...]) -> None:
    """Download the weights of feature extractors, for a machine without a network.

    Without a name, those of the usual metrics: inception and vgg16. Files go to the cache
    (GAN_REFINE_CACHE, by default ~/.cache/gan-refine): copy that folder to the other machine.

    \b
    python -m eval fetch
    python -m eval fetch inception dinov2-vit-b-14
    """
    for name in extractors or ("inception", "vgg16"):
        click.echo(f"{name}: {features.fetch(name)}")


if __name__ == "__main__":
    main()
