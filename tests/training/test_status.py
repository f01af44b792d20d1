"""Progress: the line of a running training, and TensorBoard's files beside the log."""

from __future__ import annotations

import importlib.util
import logging
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_runs import call, tiny_recipe
from core.distributed import World
from core.run_folder import RunFolder
from core.run_log import Evaluation, Stats
from training import progress as status_module
from training.progress import Progress

ALONE = World.single()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def test_a_line_of_progress_names_rate_time_memory_and_stats(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """100 of 400 images in 10 s: 10 a second, half a minute left; memory is this process's peak."""
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(status_module.time, "monotonic", lambda: next(now))
    with (
        caplog.at_level(logging.INFO),
        Progress(folder, ALONE, images_seen=0, total_images=400) as s,
    ):
        s.add({"score_loss": torch.tensor(2.5)})
        s.log(100)
    line = caplog.messages[-1]
    assert line.startswith("100/400 images  10 images/s  0:00:30 left  ")
    gibibytes = float(re.search(r"left  ([\d.]+) GiB  score_loss 2\.5$", line)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert gibibytes == pytest.approx(peak, abs=0.06)


def test_after_a_rollback_the_rate_and_the_means_begin_anew(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was collected before is no part of the next row."""
    now = iter([0.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr(status_module.time, "monotonic", lambda: next(now))
    with Progress(folder, ALONE, images_seen=0, total_images=400) as status:
        status.add({"score_loss": torch.tensor(1e9)})
        status.restart(50)
        status.add({"score_loss": torch.tensor(2.0)})
        assert status.log(100) == {"score_loss": 2.0}
    assert folder.log.last(Stats).images_per_second == 5.0


# TensorBoard --------------------------------------------------------------------------------------


def curves(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return each curve as TensorBoard shows it."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    found = event_accumulator.EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    shown = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in tags["scalars"]}
    return shown | {
        name: [(e.step, e.width) for e in found.Images(name)] for name in tags["images"]
    }


def test_tensorboard_shows_the_rows_of_the_log(tmp_path: Path) -> None:
    """Every reading and measurement of a run, and its sample grids, by images seen; once each, also
    where the run was resumed.
    """
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe(tmp_path)
    settings = ["training.tensorboard=true", "training.duration_kimg=0.08"]
    assert call("--gan", recipe, *settings, "--outdir", tmp_path).code == 0
    folder = RunFolder(tmp_path / "00000-tiny")
    for path in sorted(folder.checkpoints.glob("*.pt"))[1:]:
        path.unlink()
    assert call("--resume", folder.path).code == 0
    shown = curves(folder)
    stats = [(row.images_seen, row.values["score_loss"]) for row in folder.log.all(Stats)]
    evaluations = [
        (row.images_seen, row.means["fid"])
        for row in folder.log.all(Evaluation)
        if row.when == "training" and row.images_seen
    ]
    for name, logged in (("stats/score_loss", stats), ("evaluation/fid", evaluations)):
        assert len(logged) > 2
        assert [step for step, _ in shown[name]] == [step for step, _ in logged]
        assert [value for _, value in shown[name]] == pytest.approx([v for _, v in logged])
    assert [step for step, _ in shown["samples"]] == [32, 64, 80]


def test_a_run_that_goes_back_shows_no_step_twice(folder: RunFolder) -> None:
    """Steps later than where an event file begins are those of that file alone."""
    pytest.importorskip("tensorboard")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(folder.samples / f"{20:012d}.png")
    with Progress(folder, ALONE, images_seen=0, total_images=99, tensorboard=True) as status:
        for images_seen, value in ((10, 1.0), (20, 2.0), (30, 3.0)):
            status.add_evaluation(images_seen, {"fid": value})
        status.restart(10)
        status.add_evaluation(20, {"fid": 5.0})
    shown = curves(folder)
    assert shown["evaluation/fid"] == [(10, 1.0), (20, 5.0)]
    assert shown["samples"] == [(20, 6)]


def test_without_the_package_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the command that installs it; no run folder is made."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "tensorboard" else find_spec(n, *a)
    )
    settings = ["training.tensorboard=true", "--outdir", tmp_path / "runs"]
    outcome = call("--gan", tiny_recipe(tmp_path), *settings)
    assert outcome.code == 2 and "pip install tensorboard" in outcome.stderr
    assert not (tmp_path / "runs").exists()


def test_only_rank_0_writes_events(folder: RunFolder) -> None:
    """Another rank makes no folder."""
    other = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    with Progress(folder, other, images_seen=0, total_images=9, tensorboard=True) as status:
        status.add_evaluation(3, {"fid": 1.0})
    assert not (folder.path / "tensorboard").exists()
