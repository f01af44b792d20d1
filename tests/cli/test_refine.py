"""`python refine.py`: what a run leaves, what it prints, and that nothing is done twice."""

from __future__ import annotations

import io
import json
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import generators
import refine
from cli_runs import Outcome, call, contents, tiny_recipe
from core.distributed import World
from core.run_folder import RunFolder
from core.run_log import Evaluation, ImageComparison
from eval import samples
from eval.evaluator import Evaluator
from refinement.components import load_components, with_teacher_samples
from refinement.recipe import read_recipe
from reports import figures

ALONE = World.single()


class Finished(NamedTuple):
    outcome: Outcome
    recipe: Path
    folder: RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of the tiny recipe that nothing disturbed. Tests leave it as it is."""
    place = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(place)
    outcome = call("--gan", recipe, "--outdir", place / "runs")
    return Finished(outcome, recipe, RunFolder(place / "runs" / "00000-tiny"))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, for tests that work in it."""
    return RunFolder(Path(shutil.copytree(finished.folder.path, tmp_path / "00000-tiny")))


# What a run leaves and prints ---------------------------------------------------------------------


def test_a_run_leaves_its_files_and_no_others(finished: Finished) -> None:
    """Recipe, log, the newest two checkpoints, samples, refined weights and report."""
    expected = [
        *("checkpoints/000000000064.pt", "checkpoints/000000000080.pt"),
        *(".lock", "inputs.json", "stats.jsonl", "recipe.yaml", "report/curve.png"),
        "report/pairs.png",
        *(f"report/report.{kind}" for kind in ("html", "json", "md", "png")),
        *(f"samples/{images:012d}.png" for images in (0, 32, 64, 80)),
        *("student.safetensors", "teacher-samples.npz"),
    ]
    assert finished.outcome.code == 0
    assert list(contents(finished.folder.path)) == sorted(expected)


def test_a_run_ends_with_a_table_and_the_path_of_its_report(finished: Finished) -> None:
    """Standard output holds the table before and after, and where the report is."""
    header, row, *_ = finished.outcome.stdout.strip().splitlines()
    assert header.split() == ["pixels", "features", "before", "after", "change"]
    assert row.startswith("FID ↓ ")
    assert f"report: {finished.folder.report / 'report.html'}" in finished.outcome.stdout


def test_a_run_speaks_of_what_it_does(finished: Finished) -> None:
    """Where the output is no terminal, plain lines name images, rate, time left, losses, FID."""
    text = finished.outcome.stderr
    for word in ("run folder: ", "measuring before", "80/80 images", " images/s ", " left "):
        assert word in text
    assert "score_loss" in text and "ikl_gradient" in text and "last fid" in text


def test_the_resolved_recipe_reads_back_to_an_equal_recipe(finished: Finished) -> None:
    """recipe.yaml alone says all that the recipe and the defaults said, the name included."""
    assert read_recipe(finished.folder.recipe) == read_recipe(finished.recipe)


def test_what_the_command_line_sets_is_in_the_resolved_recipe(
    finished: Finished, tmp_path: Path
) -> None:
    """Settings of the form key.path=value win over the file and are kept with the run."""
    brief = ("training.duration_kimg=0.008", "evaluation.every_kimg=0", "name=other")
    assert call("--gan", finished.recipe, *brief, "--outdir", tmp_path).code == 0
    recipe = read_recipe(tmp_path / "00000-other" / "recipe.yaml")
    assert recipe.training.duration_kimg == 0.008


def test_the_report_gives_mean_and_spread_over_seeds(finished: Finished) -> None:
    """before and after in report.json are mean, standard deviation and values of each metric."""
    document = json.loads((finished.folder.report / "report.json").read_text())
    for when in ("before", "after"):
        fid = document[when]["fid"]
        assert len(fid["values"]) == 2
        assert fid["mean"] == pytest.approx(statistics.mean(fid["values"]))
        assert fid["std"] == pytest.approx(statistics.stdev(fid["values"]))
    assert document["before"]["fid"] != document["after"]["fid"]


def test_the_refined_weights_measure_as_the_report_says(finished: Finished) -> None:
    """generators.load opens student.safetensors, and its FID is the report's "after"."""
    recipe = read_recipe(finished.recipe)
    parts = load_components(recipe, ALONE)
    parts = with_teacher_samples(parts, recipe, finished.folder, ALONE)
    assert parts.evaluator is not None
    images_of = parts.images_of(generators.load(finished.folder.student))
    found = parts.evaluator.evaluate(images_of)
    document = json.loads((finished.folder.report / "report.json").read_text())
    assert list(found["fid"].values) == pytest.approx(document["after"]["fid"]["values"], rel=1e-6)


def test_the_teacher_is_sampled_once_with_the_steps_of_the_recipe(
    finished: Finished, tmp_path: Path
) -> None:
    """Other steps, other samples; a new report reads those of the run's folder."""
    outdir = tmp_path / "runs"
    call("--gan", finished.recipe, "--outdir", outdir, "sampler.steps=2")
    kept = RunFolder(outdir / "00000-tiny").teacher_samples.read_bytes()
    assert kept != finished.folder.teacher_samples.read_bytes()
    again = call("--report", outdir / "00000-tiny")
    assert again.code == 0 and "sampling" not in again.stderr


def test_the_refined_weights_make_the_images_of_the_picture(finished: Finished) -> None:
    """The report's picture, pixel for pixel, is what the student before and after makes."""
    recipe = read_recipe(finished.recipe)
    parts = load_components(recipe, ALONE)
    before, after = map(parts.images_of, (parts.student, generators.load(finished.folder.student)))
    seeds = samples.pair_seeds(parts.student, recipe.evaluation.pairs)
    pairs = samples.pairs(before, after, seeds, labels=None)
    again = Image.open(io.BytesIO(figures.pairs_picture(pairs)))
    kept = Image.open(finished.folder.report / "report.png")
    assert not torch.equal(pairs.before, pairs.after)
    assert again.tobytes() == kept.tobytes()


def test_a_second_run_gets_the_next_number(copied: RunFolder, finished: Finished) -> None:
    """Runs are numbered, and an earlier run keeps every byte."""
    before = contents(copied.path)
    again = call("--gan", finished.recipe, "--outdir", copied.path.parent)
    assert again.code == 0
    assert (copied.path.parent / "00001-tiny" / "student.safetensors").exists()
    assert contents(copied.path) == before


def test_the_same_recipe_gives_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    """Two runs of one recipe end with equal weights: every draw follows from the seed."""
    call("--gan", finished.recipe, "--outdir", tmp_path)
    again = RunFolder(tmp_path / "00000-tiny")
    assert again.student.read_bytes() == finished.folder.student.read_bytes()


def test_without_a_reference_a_run_says_that_it_measured_nothing(
    finished: Finished, tmp_path: Path
) -> None:
    """evaluation.reference: null trains and makes pictures, and neither loads nor claims a FID."""
    outcome = call("--gan", finished.recipe, "evaluation.reference=", "--outdir", tmp_path)
    document = json.loads((tmp_path / "00000-tiny" / "report" / "report.json").read_text())
    assert outcome.code == 0
    assert document["before"] == document["after"] == {}
    assert "nothing was measured" in outcome.stdout and "before" not in outcome.stdout


# Without a run ------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_recipe_and_writes_nothing(finished: Finished, tmp_path: Path) -> None:
    """--dry-run prints the resolved recipe, which reads back equal, and leaves no file."""
    outcome = call("--gan", finished.recipe, "--dry-run", "--outdir", tmp_path / "runs")
    assert outcome.code == 0
    assert not any(tmp_path.iterdir())
    printed = tmp_path / "printed.yaml"
    printed.write_text(outcome.stdout)
    assert read_recipe(printed) == read_recipe(finished.recipe)


def test_a_dry_run_says_what_would_be_loaded(finished: Finished, tmp_path: Path) -> None:
    """Each file and URL is named, with its size, where it would be kept, or that it is missing."""
    weights = shutil.copy(finished.folder.student, tmp_path)
    outcome = call(
        *("--gan", finished.recipe, "--dry-run", "student={weights: " + str(weights) + "}"),
        *("teacher={weights: 'https://example.org/teacher.pkl'}", "evaluation.extractor=inception"),
        "evaluation.reference=nowhere.npz",
    )
    loaded = outcome.stdout.partition("# would be loaded:")[2]
    assert f"# student: {weights} ({Path(weights).stat().st_size:,} bytes)" in loaded
    assert "# teacher: https://example.org/teacher.pkl, to be downloaded to " in loaded
    assert "# reference: nowhere.npz (MISSING)" in loaded
    assert "# extractor: https://" in loaded


def test_a_dry_run_estimates_what_a_run_takes(finished: Finished) -> None:
    """One iteration in memory tells time, memory and disk."""
    outcome = call("--gan", finished.recipe, "--dry-run")
    told = outcome.stdout.partition("# by one iteration of ")[2]
    for line in ("# training: about 0:00:", "# evaluation: about 0:00:", "# memory: ", "# disk: "):
        assert f"\n{line}" in told, outcome.stdout
    assert "GB, 3 checkpoints of" in told


def test_a_dry_run_says_what_does_not_fit(finished: Finished, tmp_path: Path) -> None:
    """It opens the networks: a mismatch is not left to the run."""
    outcome = call("--gan", finished.recipe, "--dry-run", "student.config.img_resolution=16")
    assert outcome.code == 2
    assert "the student makes images of 16x16" in outcome.stderr


@pytest.mark.parametrize(("ratio", "says"), [(4.5, True), (0.6, False)])
def test_a_precision_that_is_slower_here_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, says: bool
) -> None:
    """With the ratio that was measured; the run goes on."""
    monkeypatch.setattr(refine, "slowdown", lambda *_: ratio)
    settings = ("training.precision=bfloat16", "training.duration_kimg=0.008")
    outcome = call("--gan", tiny_recipe(tmp_path), *settings, "--outdir", tmp_path / "runs")
    assert outcome.code == 0
    assert ("convolutions take 4.5 times as long as in float32" in outcome.stderr) == says


def test_the_help_names_every_option_and_shows_examples() -> None:
    """--help is enough for a newcomer to start, to go on and to find the report."""
    outcome = call("--help")
    assert outcome.code == 0
    for word in (
        "--gan",
        "--resume",
        "--report",
        "--outdir",
        "--dry-run",
        "python refine.py --gan",
    ):
        assert word in outcome.stdout


def test_the_bare_command_says_what_to_give() -> None:
    """`python refine.py` is one sentence with the options to choose from, and exit code 2."""
    outcome = call()
    assert outcome.code == 2
    assert outcome.stderr.startswith(
        "error: give one of --gan, --distill, --teach, --resume RUN, --report RUN and --export RUN"
    )
    assert outcome.stderr.count("\n") == 1


# Again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_a_finished_run_is_only_reported_again(
    copied: RunFolder, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume and --report change no byte beside the report, measure nothing, and remake it."""
    before = contents(copied.path)
    shutil.rmtree(copied.report)
    monkeypatch.setattr(Evaluator, "evaluate", _not_again)
    monkeypatch.setattr(Evaluator, "features", _not_again)
    outcome = call(option, copied.path)
    after = contents(copied.path)
    assert outcome.code == 0, outcome.stderr
    assert f"report: {copied.report / 'report.html'}" in outcome.stdout
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] in ([], ["report/report.json"])
    was, now = (json.loads(files["report/report.json"]) for files in (before, after))
    assert {**now, "environment": None} == {**was, "environment": None}  # commits may come between


def test_the_log_holds_every_row_once(finished: Finished) -> None:
    """One row for each kind at each image count."""
    kinds = Counter(
        (row.images_seen, row.when if isinstance(row, Evaluation) else row.kind)
        for row in finished.folder.log.rows()
        if not isinstance(row, ImageComparison)
    )
    assert set(kinds.values()) == {1}
    assert kinds.keys() >= {(0, "before"), (0, "training"), (80, "training"), (80, "after")}


def _not_again(*_: object, **__: object) -> None:
    raise AssertionError("measured again")
