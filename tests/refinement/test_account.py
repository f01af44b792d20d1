"""What a report says of a run: every metric of its recipe, single images, and what happened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli_runs import call, tiny_recipe
from core.run_log import Divergence, EarlyStop, Evaluation, Rollback, Stats
from data.images import Images
from eval.features import load
from eval.metrics.registry import Config
from eval.reference import measure, save_npz
from refinement import build_report


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Sixty grey images of the tiny student's size."""
    folder = tmp_path / "real"
    folder.mkdir()
    pixels = np.random.RandomState(1).randint(0, 256, (60, 8, 8)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("kind", ["images", "statistics"])
def test_every_metric_of_the_recipe_is_in_the_report(
    digits: Path, tmp_path: Path, kind: str
) -> None:
    """Against real images: each metric before and after, halves of them, neighbours as pictures;
    against their kept features too, where only the pictures are not at hand.
    """
    recipe, source = tiny_recipe(tmp_path), digits
    if kind == "statistics":
        source = tmp_path / "real.npz"
        save_npz(source, measure(Images(digits), load("pixels"), keep=Config()))
    outcome = call(
        *("--gan", recipe, f"evaluation.reference={source}", "evaluation.teacher=sample"),
        *("evaluation.metrics=[kid,fid,precision,recall]", "evaluation.definitions.kid_subsets=4"),
        *("evaluation.definitions.kid_subset_size=30", "evaluation.images=60"),
        *("evaluation.images_while_training=20", "--outdir", tmp_path / "runs"),
    )
    assert outcome.code == 0, outcome.stderr
    folder = tmp_path / "runs" / "00000-tiny" / "report"
    document = json.loads((folder / "report.json").read_text())
    metrics = ["kid", "fid", "precision", "recall"]
    assert list(document["before"]) == list(document["after"]) == metrics
    assert set(document["teacher_samples"]["metrics"]) == set(metrics)
    assert document["real_halves"]["images"] == 30 and document["real_halves"]["metrics"]["fid"] > 0
    assert document["curve"]["metric"] == "fid"  # 20 images are too few for a subset of 30
    assert document["drift"]["images"] == 60 and document["nearness"]["real_images"] == 60
    pictures = (folder / "report.html").read_text().count('alt="real"')
    assert pictures == {"images": 8, "statistics": 0}[kind]


def test_what_does_not_fit_the_metrics_is_said_before_anything_is_written(
    digits: Path, tmp_path: Path
) -> None:
    """A KID of 1,000 images of 60 real ones cannot be: said at once, no run folder is left."""
    outcome = call(
        *("--gan", tiny_recipe(tmp_path), f"evaluation.reference={digits}"),
        *("evaluation.metrics=[kid]", "--outdir", tmp_path / "runs"),
    )
    assert outcome.code == 2
    assert "kid needs at least 1,000 real images, got 60" in outcome.stderr
    assert not (tmp_path / "runs").exists()


def test_what_happened_while_training_is_told() -> None:
    """A rollback, an early end, a divergence: a sentence each."""
    score = {"images_seen": 9, "metric": "fid", "value": 3.25, "at_images_seen": 8000}
    rows = [
        Rollback(images_seen=7000, why="fid rose", from_images_seen=9000, lr_scale=0.25),
        EarlyStop(**score),
        Divergence(images_seen=9, why="score_loss is 900"),
    ]
    told = list(build_report.notes(rows, 9))
    assert "went back from 9,000 to 7,000 images (fid rose)" in told[0] and "0.25 times" in told[0]
    assert "ended early" in told[1] and "since 8,000 images" in told[1]
    assert told[2] == "Training stopped because it diverged: score_loss is 900."
    assert (
        list(build_report.notes([Evaluation(images_seen=3, when="training", metrics={})], 9)) == []
    )
    assert not any("early" in note for note in build_report.notes(rows, 10))


def test_a_reference_that_is_not_there_is_named_before_an_extractor_is_fetched(
    tmp_path: Path,
) -> None:
    """Inception would be downloaded; the path is what the user can mend."""
    outcome = call(
        *("--gan", tiny_recipe(tmp_path), f"evaluation.reference={tmp_path / 'none.zip'}"),
        *("evaluation.extractor=inception", "--outdir", tmp_path / "runs"),
    )
    assert outcome.code == 2 and "none.zip" in outcome.stderr
    assert "inception" not in outcome.stderr and not (tmp_path / "runs").exists()


def test_updates_that_float16_lost_are_told() -> None:
    """Their share over all rows; nothing where none was left out."""
    rows = [
        Stats(images_seen=n, images_per_second=1.0, values={"both_skipped": share})
        for n, share in ((1, 0.5), (2, 0.0))
    ]
    (told,) = build_report.notes(rows, 10**6)
    assert told.startswith("25.0% of the updates were left out")
    assert list(build_report.notes(rows[1:], 10**6)) == []
