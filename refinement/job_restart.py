"""A job that is started again goes on with the run that it began, though its command begins one.

torchrun --max-restarts starts the same command again if a process is lost, and Slurm does where
a job is requeued. Both tell which job it is, and that it is not its first start. Each run folder
notes the job that began it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from core.disk import atomic_write
from core.run_folder import RunFolder

_RESTARTS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "Slurm": "SLURM_RESTART_COUNT"}
"""Starter -> the variable that counts its starts of this job, from 0."""
_NO_ID = "none"
"""torchrun's name of a job without an id."""


def note_job(folder: RunFolder) -> None:
    """Write down in a run's folder which job begins it, if any does."""
    if jobs := _jobs():
        with atomic_write(folder.job) as partial:
            partial.write_text("".join(f"{job}\n" for job in jobs.values()), encoding="utf-8")


def begun_run(outdir: Path, recipe: str) -> RunFolder | None:
    """Return the newest run of this recipe that an earlier start of this job began, if any did.

    recipe: the resolved one, as it stands in the run's folder.
    """
    restarted = {job for starter, job in _jobs().items() if _restarts(starter) > 0}
    for path in sorted(outdir.glob("*/recipe.yaml"), reverse=True) if restarted else ():
        folder = RunFolder(path.parent)
        if path.read_text(encoding="utf-8") == recipe and restarted & _noted(folder):
            return folder
    return None


def _jobs() -> dict[str, str]:
    """Return starter -> the job that this process belongs to."""
    jobs = {}
    if torchrun := os.environ.get("TORCHELASTIC_RUN_ID"):
        its_process = f"process {os.getppid()} on {socket.gethostname()}"
        jobs["torchrun"] = f"torchrun {its_process if torchrun == _NO_ID else torchrun}"
    if slurm := os.environ.get("SLURM_JOB_ID"):
        jobs["Slurm"] = f"Slurm {slurm}"
    return jobs


def _restarts(starter: str) -> int:
    return int(os.environ.get(_RESTARTS[starter], "0"))


def _noted(folder: RunFolder) -> set[str]:
    return (
        set(folder.job.read_text(encoding="utf-8").splitlines()) if folder.job.exists() else set()
    )
