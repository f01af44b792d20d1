"""`torchrun refine.py`: what ends one process ends the command, and what restarts it goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from refine_command import ROOT, tiny_recipe

from core.run_folder import RunFolder
from refinement.restarts import begun_run, note_job

BROKEN = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import torch
from core.errors import UserError
from training import checkpoint, loop
how, first = sys.argv.pop(1), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
rank, play = int(os.environ["RANK"]), loop.play_round

def play_and_break(state, *arguments, **options):
    yield from play(state, *arguments, **options)
    if state.images_seen == 48 and first:
        if how == "raises" and rank == 1:
            raise ValueError("three is not four")
        if how == "is killed" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save(content, path):
    raise OSError(28, "No space left on device")

loop.play_round = play_and_break
if how == "has a full disk":
    torch.save = save
runpy.run_path("refine.py", run_name="__main__")
"""
"""The command, whose rank 1 raises, or rank 0 is killed or cannot write its checkpoints: after 48
images, of which 32 are saved.
"""


def torchrun(
    folder: Path, how: str, *settings: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Return a run of the command on two processes that breaks in this way."""
    folder.mkdir(exist_ok=True)
    script = folder / "broken.py"
    script.write_text(BROKEN, encoding="utf-8")
    launcher = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command = ["--gan", str(tiny_recipe(folder)), *settings, "--outdir", str(folder / "runs")]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(script), how, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


UNMEASURED = ("evaluation.reference=null", "evaluation.every_kimg=0")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("raises", "rank 1 on {} failed: ValueError: three is not four; so rank 0 ends too"),
        (
            "is killed",
            "rank 0 on {} is gone without a word: killed, perhaps for want of memory; so",
        ),
        ("has a full disk", "rank 0 on {} failed: {}/runs/00000-tiny/checkpoints/000000000032.pt"),
    ],
)
def test_the_command_names_the_rank_that_broke(tmp_path: Path, how: str, sentence: str) -> None:
    """Once, with its error, beside what torchrun says; no other rank gives a traceback."""
    done = torchrun(tmp_path, how, *UNMEASURED)
    assert done.returncode == 1
    assert done.stderr.count(sentence.format(socket.gethostname(), tmp_path)) == 1, done.stderr
    ours = done.stderr.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    assert ours.count("Traceback") == (how == "raises")
    assert "gloo" not in done.stderr


def test_a_restarted_command_goes_on_with_its_run(tmp_path: Path) -> None:
    """Where rank 0 is killed, torchrun begins the same command again: it comes back from the newest
    checkpoint of the run that it had begun, and ends like one that nothing stopped.
    """
    done = torchrun(tmp_path, "is killed", *UNMEASURED, restarts=1)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert f"this job was started again: it goes on with {path}" in done.stderr
    assert "found 000000000032.pt: 32 images seen" in done.stderr
    torchrun(whole := tmp_path / "whole", "goes through", *UNMEASURED)
    assert (
        RunFolder(path).student.read_bytes()
        == RunFolder(whole / "runs" / path.name).student.read_bytes()
    )


JOB = {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("again", "found"),
    [
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({}, False),
        ({"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "18"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "other"}, False),
    ],
)
def test_a_run_is_found_by_the_job_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: dict[str, str], found: bool
) -> None:
    """At another start of the same job of Slurm or torchrun, and with the same recipe."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    runs = [RunFolder.create(tmp_path, "x") for _ in range(3)]
    for folder, recipe in zip(runs, ("a", "a", "b"), strict=True):
        note_job(folder)
        folder.recipe.write_text(recipe)
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    assert begun_run(tmp_path, "a") == (runs[1] if found else None)
    assert begun_run(tmp_path, "c") is None


def test_without_a_job_no_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything noted, nor is an outdir needed."""
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    folder = RunFolder.create(tmp_path, "x")
    folder.recipe.write_text("a")
    note_job(folder)
    assert not folder.job.exists() and begun_run(tmp_path, "a") is None
    assert begun_run(tmp_path / "nowhere", "a") is None
