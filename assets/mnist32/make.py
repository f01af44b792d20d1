"""Program that builds the embedded default from a zip of 32x32 digits, one command for each part.

    python -m assets.mnist32.make features DIGITS.zip    the feature network, and its accuracy
    python -m assets.mnist32.make reference DIGITS.zip   statistics of the real digits, the floor
    python -m assets.mnist32.make student DIGITS.zip     the GAN, adversarially, and its curve
    python -m assets.mnist32.make teacher-samples        statistics of its samples

`features` is first and `reference` second: the other commands evaluate with them. Each writes its
files to this folder. The teacher is trained by `refine.py --teach`. README.md has the commands that
were run and their results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teachers
from assets.mnist32 import adversarial
from core.disk import atomic_write
from core.distributed import World
from core.roles import Generator
from data.images import Images
from eval import edm_sampler, features, reference
from eval.evaluator import Config, Evaluator
from eval.metrics import registry
from eval.samples import images_of_seeds
from generators import stylegan2
from pretrained import networks

HERE = Path(__file__).parent
STUDENT = stylegan2.Config(
    z_dim=64,
    w_dim=64,
    c_dim=10,
    img_resolution=32,
    img_channels=1,
    mapping=stylegan2.MappingConfig(num_layers=2),
    channel_base=256,
    channel_max=64,
)
IMAGE = (1, 32, 32)
HELD_OUT = 1000
"""Number of test digits for the accuracy of the feature network."""
_source = click.argument("source", type=click.Path(exists=True, path_type=Path))


@click.group()
def main() -> None:
    """Rebuild the embedded default."""


@main.command("features")
@_source
@click.option("--epochs", default=14, show_default=True)
def make_features(source: Path, epochs: int) -> None:
    """Train the digit classifier whose penultimate features serve the FID."""
    images, labels = _digits(source)
    torch.manual_seed(0)
    classifier = features.Classifier(features.Config())
    classifier.to(memory_format=torch.channels_last)
    rows = list(_fit(classifier, images[HELD_OUT:], labels[HELD_OUT:], epochs=epochs))
    accuracy = _accuracy(classifier, images[:HELD_OUT], labels[:HELD_OUT])
    result = {"accuracy": accuracy, "held_out": HELD_OUT, "epochs": epochs, "losses": rows}
    click.echo(f"{accuracy:.2%} of {HELD_OUT} digits it has not seen")
    features.save_classifier(HERE / "features.safetensors", classifier, provenance=result)


@main.command("reference")
@_source
def make_reference(source: Path) -> None:
    """Compute the reference of the real digits, and the FID between its halves: the floor."""
    digits = Images(source)
    statistics = reference.measure(digits, features.load("mnist32"), keep=registry.Config())
    reference.save_npz(HERE / "reference.npz", statistics)
    half = len(digits) // 2
    click.echo(f"FID of {half} real digits against {half} others: {statistics.halves_fid:.3f}")


@main.command("student")
@_source
@click.option("--digits", default=100, show_default=True, help="How many of them it sees.")
@click.option("--kimg", default=400.0, show_default=True, help="Length in thousands of digits.")
@click.option("--every-kimg", default=20.0, show_default=True, help="Between measurements.")
def make_student(source: Path, digits: int, kimg: float, every_kimg: float) -> None:
    """Train the GAN to its plateau on a few digits; keep the moving average with the best FID."""
    images, labels = (tensor[:digits] for tensor in _digits(source))
    torch.manual_seed(0)
    student = stylegan2.build(STUDENT).to(memory_format=torch.channels_last)
    steps = adversarial.train(student, images, labels, adversarial.Settings(total_kimg=kimg))
    fid = _student_fid(count=5000)
    _keep_best("student", steps, fid, every_kimg=every_kimg)


@main.command("teacher-samples")
@click.option("--images", default=10_000, show_default=True, help="How many.")
def make_teacher_samples(images: int) -> None:
    """Compute the statistics of samples of the teacher with 18 steps, for the reports."""
    measures = _evaluator("fid", "kid", "precision", "recall", images=images)
    teacher = teachers.load(HERE / "teacher.safetensors")
    images_of = images_of_seeds(
        teacher, partial(edm_sampler.sample, config=edm_sampler.Config()), device="cpu"
    )
    statistics = reference.of_samples(
        measures.feature_stats(images_of, range(images)),
        source="the embedded teacher",
        extractor=measures.extractor,
        shape=IMAGE,
    )
    reference.save_npz(HERE / "teacher-samples.npz", statistics)
    click.echo(
        f"{images} samples of the teacher: {json.dumps(measures.evaluate_stored(statistics))}"
    )


Steps = Iterator[tuple[int, nn.Module, dict[str, float]]]


def _keep_best(
    part: str, steps: Steps, fid: Callable[[nn.Module], float], *, every_kimg: float
) -> None:
    """Evaluate at intervals; write the network with the lowest FID so far, and the curve."""
    curve: list[dict[str, float]] = []
    started = time.monotonic()
    due = every_kimg * 1000
    for images_seen, network, readings in steps:
        if images_seen < due:
            continue
        due += every_kimg * 1000
        row = {"images_seen": images_seen, "fid": fid(network), **readings}
        row["seconds"] = round(time.monotonic() - started, 1)
        click.echo(json.dumps(row))
        if row["fid"] < min((old["fid"] for old in curve), default=float("inf")):
            networks.save(HERE / f"{part}.safetensors", network, provenance=row)
        curve.append(row)
        _write_json(HERE / f"{part}-curve.json", curve)


def _student_fid(*, count: int) -> Callable[[nn.Module], float]:
    """Return a function from a student to its FID on the images of the first seeds."""
    measures = _evaluator("fid", images=count)

    def fid(student: nn.Module) -> float:
        assert isinstance(student, Generator), type(student)
        images_of = images_of_seeds(student, device="cpu")
        return measures.evaluate(images_of)["fid"].mean

    return fid


def _evaluator(*metrics: str, images: int) -> Evaluator:
    """Return an evaluator of these metrics against the real digits."""
    config = Config(metrics=metrics, extractor="mnist32", images=images, batch_size=100)
    extractor = features.load(config.extractor)
    return Evaluator(
        config=config,
        requests=registry.parse(metrics),
        extractor=extractor,
        distance=None,
        world=World.single(extractor.device),
        real=reference.read_npz(HERE / "reference.npz", extractor),
    )


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _digits(source: Path) -> tuple[Tensor, Tensor]:
    """Return images [N, 1, 32, 32] float32 in [-1, 1] and labels [N]."""
    images = Images(source)
    if images.image_shape != (1, 32, 32) or images.labels is None:
        raise click.UsageError(f"{source}: expected labelled 32x32 grey images")
    pixels = images.load_all().float() / 127.5 - 1
    return pixels.to(memory_format=torch.channels_last), images.labels


def _fit(
    classifier: features.Classifier, images: Tensor, labels: Tensor, *, epochs: int, size: int = 64
) -> Iterator[float]:
    """Yield the mean loss of each epoch: Adam, one-cycle learning rate, random affine maps."""
    # optimizer and schedule
    adam = torch.optim.Adam(classifier.parameters(), lr=1e-3, weight_decay=1e-5)
    steps = len(images) // size
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=4e-3, total_steps=epochs * steps)

    # epochs over random batches
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images))[: steps * size].split(size):
            loss = F.cross_entropy(
                classifier(_augment(images[batch])), labels[batch], label_smoothing=0.05
            )
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            cycle.step()
            total += loss.item()
        yield total / steps


def _augment(images: Tensor) -> Tensor:
    """Return images rotated by up to 0.2 rad, scaled by up to 10 %, moved by up to 2 pixels."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * 0.2
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    move = (torch.rand(count, 2) * 2 - 1) * (2 / 16)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).reshape(count, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def _accuracy(classifier: features.Classifier, images: Tensor, labels: Tensor) -> float:
    return float((classifier.eval()(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
