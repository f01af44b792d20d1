"""Evaluation: images per second of sampling, of features, and of a FID in all.

    python -m benchmarks.evaluation --images 64 --batch 16              on the CPU
    python -m benchmarks.evaluation --device cuda
    python -m benchmarks.evaluation --device cuda --extractor inception  with the published weights

Images are those of a StyleGAN2 of 32x32 pixels with drawn weights, features those of Inception v3,
whose weights are drawn too unless an extractor is named: time does not depend on them. The FID is
measured as a run's is, against drawn features.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import torch
from torch import nn

from benchmarks.generators import CASES
from core.distributed import World
from eval import evaluator
from eval.evaluator import Evaluator
from eval.feature_stats import FeatureStatistics
from eval.metrics.frechet import frechet_distance
from eval.samples import images_of_seeds

PUBLISHED_IMAGES = 50_000
"""Generated images of a published FID."""


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--images", type=click.IntRange(2), default=10_000, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=250, show_default=True)
@click.option("--extractor", help="Default: Inception v3 with drawn weights.")
def main(device: str, images: int, batch: int, extractor: str | None) -> None:
    """Print the table."""
    torch.manual_seed(0)
    case = CASES["stylegan2-32"]
    student = case.family.build(case.family.Config.model_validate(case.settings)).to(device)
    images_of = images_of_seeds(student, device=device)
    measured = _fid_evaluator(extractor, device, batch)
    batches = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    pixels = images_of(batches[0])
    measured.extractor(pixels)  # warms up

    click.echo(f"| evaluation | images | s | images/s | s for {PUBLISHED_IMAGES:,} |")
    click.echo("|---|---:|---:|---:|---:|")
    _print("sampling", images, _seconds(lambda: [images_of(seeds) for seeds in batches], device))
    features = _seconds(lambda: [measured.extractor(pixels[: len(b)]) for b in batches], device)
    _print("features", images, features)
    found = []
    collecting = _seconds(
        lambda: found.append(measured.feature_stats(images_of, range(images))), device
    )
    _print("sampling, features and their sums", images, collecting)
    real = FeatureStatistics.of(torch.randn(4096, measured.extractor.dimensions or 0).relu())
    distance = _seconds(lambda: frechet_distance(found[0], real), device)
    whole = collecting / images * PUBLISHED_IMAGES + distance
    click.echo(f"| Fréchet distance | | {distance:.3g} | | {distance:.3g} |")
    rate = PUBLISHED_IMAGES / whole
    click.echo(f"| FID of {PUBLISHED_IMAGES:,}, from these | | | {rate:.4g} | {whole:.3g} |")


def _fid_evaluator(extractor: str | None, device: str, batch: int) -> Evaluator:
    """Return what measures a FID with an extractor; None: Inception with drawn weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = evaluator.Config(
            metrics=("fid",),
            reference="drawn",
            extractor=extractor or f"inception:{drawn_inception(Path(folder))}",
            batch_size=batch,
        )
        world = World.single(torch.device(device))
        measured = evaluator.load(config, image_shape=(3, 32, 32), world=world)
    assert measured is not None
    return measured


def drawn_inception(folder: Path) -> Path:
    """Return a file of drawn Inception v3 weights, which keep the size of activations."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = folder / "inception.pth"
    torch.save({}, path)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def _seconds(run: Callable[[], object], device: str) -> float:
    """Return how long it takes, the GPU's work included."""
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _print(name: str, images: int, seconds: float) -> None:
    rate = images / seconds
    click.echo(
        f"| {name} | {images} | {seconds:.3g} | {rate:.4g} | {PUBLISHED_IMAGES / rate:.3g} |"
    )


if __name__ == "__main__":
    main()
