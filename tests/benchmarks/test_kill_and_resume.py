"""benchmarks/kill_and_resume.py: what it would notice."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kill_and_resume
from benchmarks.kill_and_resume import IMAGES, _difference, _kill_one, _Left, _place
from core.run_folder import RunFolder
from core.run_log import Divergence, Evaluation

POINT = Evaluation(images_seen=64, when="training", metrics={"fid": (2.0,)})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Return a run with its weights, its curve and a checkpoint of 64 images."""
    folder = RunFolder.create(tmp_path, "x")
    folder.recipe.touch()
    folder.student.write_bytes(b"weights")
    folder.log.append(POINT)
    (folder.checkpoints / "000000000064.pt").touch()
    return folder


def test_ends_that_differ_are_told_apart(folder: RunFolder, tmp_path: Path) -> None:
    """One byte of the weights, or one number of the curve; other rows may come twice."""
    other = RunFolder.create(tmp_path, "y")
    other.student.write_bytes(b"weights")
    other.log.append(POINT)
    other.log.append(Divergence(images_seen=64, why=""))
    assert _difference(folder, other) == "same"
    other.log.append(POINT)
    assert _difference(folder, other) == "same weights, another curve"
    other.student.write_bytes(b"Weights")
    assert _difference(folder, other) == "other weights"


def test_the_place_of_a_kill_is_read_from_what_it_left(folder: RunFolder, tmp_path: Path) -> None:
    """By the checkpoints before and after, among them one that was only begun."""
    outdir = folder.path.parent
    assert _place(tmp_path / "nothing", _Left.of(tmp_path / "nothing")) == "before there was a run"
    before = _Left.of(outdir)
    assert before.images_saved == 64
    assert _place(outdir, before) == "before its first checkpoint"
    assert _place(outdir, _Left(0, frozenset())) == "between checkpoints"
    begun = folder.checkpoints / ".000000000128.pt.0123abcd.partial"
    begun.mkdir()
    assert _place(outdir, before) == "while a checkpoint was written"
    assert _place(outdir, _Left.of(outdir)) == "before its first checkpoint"
    (folder.checkpoints / f"{IMAGES:012d}.pt").touch()
    assert _place(outdir, _Left.of(outdir)) == "after the last checkpoint"
    assert kill_and_resume._damaged(outdir) == 2  # both are empty


def test_a_kill_counts_only_where_it_met_the_run_alive() -> None:
    """A process that ended before is none; one that sleeps is killed, and gone."""
    draw = random.Random(0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert _kill_one(ended, 1, draw) is None
    asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    kill = _kill_one(asleep, 1, draw)
    assert kill is not None and kill.rank == 0 and asleep.returncode == -9
