"""`torchrun refine.py`, and the same under Slurm: what ends one process ends all, and what starts
the command again goes on with its run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runs import tiny_recipe
from core.run_folder import RunFolder
from refinement.job_restart import begun_run, note_job
from repository import ROOT

BROKEN = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import torch
from core.errors import UserError
from training import checkpoint, trainer
how, counters = sys.argv.pop(1), ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
first = all(os.environ.get(name, "0") == "0" for name in counters)
rank, play = int(os.environ["RANK"]), trainer.training_iteration

def play_and_break(state, *arguments, **options):
    yield from play(state, *arguments, **options)
    if state.images_seen == 48 and first:
        if how == "raises" and rank == 1:
            raise ValueError("three is not four")
        if how == "is killed" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is warned":
            os.kill(os.getpid(), signal.SIGUSR1)

def save(content, path):
    raise OSError(28, "No space left on device")

trainer.training_iteration = play_and_break
if how == "has a full disk":
    torch.save = save
runpy.run_path("refine.py", run_name="__main__")
"""
"""The command, whose rank 1 raises, or rank 0 is killed or cannot write its checkpoints, or that is
warned by Slurm: after 48 images, of which 32 are saved.
"""


def broken(folder: Path, how: str, *settings: str) -> list[str]:
    """Return the command that breaks in this way, without what runs it."""
    folder.mkdir(exist_ok=True)
    script = folder / "broken.py"
    script.write_text(BROKEN, encoding="utf-8")
    command = ["--gan", str(tiny_recipe(folder)), *settings, "--outdir", str(folder / "runs")]
    return [str(script), how, *command]


def torchrun(
    folder: Path, how: str, *settings: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Return a run of the command on two processes."""
    launcher = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command = [*launcher, *broken(folder, how, *settings)]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def srun(
    folder: Path, how: str, *settings: str, restarts: int
) -> list[subprocess.CompletedProcess[str]]:
    """Return a run of the command as each of two processes that Slurm starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts), "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *broken(folder, how, *settings)],
            cwd=ROOT,
            env={**os.environ, **job, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, stderr=each)
        for process, each in zip(ranks, said, strict=True)
    ]


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


def test_a_job_that_slurm_warns_and_requeues_goes_on_with_its_run(tmp_path: Path) -> None:
    """At SIGUSR1 all ranks save and leave with the code that says so; requeued, the same command
    goes on from there.
    """
    warned = srun(tmp_path, "is warned", *UNMEASURED, restarts=0)
    assert [process.returncode for process in warned] == [75, 75], warned
    assert "stopped; the state after 48 images is saved; go on with" in warned[0].stderr
    assert warned[1].stderr == ""
    requeued = srun(tmp_path, "is warned", *UNMEASURED, restarts=1)
    assert [process.returncode for process in requeued] == [0, 0], requeued
    (path,) = (tmp_path / "runs").iterdir()
    assert f"this job was started again: it goes on with {path}" in requeued[0].stderr
    assert "found 000000000048.pt: 48 images seen" in requeued[0].stderr
    assert RunFolder(path).student.exists()


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
