"""`refine.py` stopped: killed, interrupted, out of disk, diverged; and on two processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from refine_command import ROOT, call, contents, tiny_recipe
from torch import Tensor

import generators
from core.run_folder import RunFolder
from eval import features, samples
from training import checkpoint

SIGNALLED = """
import os, sys, refine
from training.status import Status
number, row = int(sys.argv.pop(1)), Status.row
def row_with_a_signal(self, images_seen):
    row(self, images_seen)
    if images_seen == 48:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
Status.row = row_with_a_signal
refine.main(sys.argv[1:], prog_name="refine.py")
"""
"""The command, sent a signal once 48 images are read off, 16 after the checkpoint at 32.

It comes twice, as Ctrl-C does under torchrun: from the terminal and from torchrun.
"""


class Stopped(NamedTuple):
    process: subprocess.CompletedProcess[str]
    folder: RunFolder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> RunFolder:
    """A run that nothing stopped."""
    assert call("--gan", recipe, "--outdir", recipe.parent / "runs").code == 0
    return RunFolder(recipe.parent / "runs" / "00000-tiny")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A process started in the background ignores Ctrl-C, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(number: int, recipe: Path, outdir: Path) -> Stopped:
    """Return a run of the command in a process of its own, sent this signal."""
    arguments = [str(int(number)), "--gan", str(recipe), "--outdir", str(outdir)]
    process = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Stopped(process, RunFolder(outdir / "00000-tiny"))


def rows_of(folder: RunFolder) -> Counter[tuple[object, str]]:
    """Return how often each kind of reading stands at each image count; sessions are left out."""
    rows = folder.read_readings()
    kinds = [(row["images_seen"], next(k for k in row if k != "images_seen")) for row in rows]
    return Counter(kind for kind in kinds if kind[1] != "session")


# Stopped from outside -----------------------------------------------------------------------------


def test_a_killed_run_is_reported_and_resumed_as_if_nothing_was(
    recipe: Path, whole: RunFolder, tmp_path: Path
) -> None:
    """After SIGKILL, --report tells of the newest checkpoint, and --resume ends with the same
    bytes, every reading once.
    """
    process, folder = signalled(signal.SIGKILL, recipe, tmp_path)
    assert process.returncode == -signal.SIGKILL
    assert rows_of(folder)[48, "images_per_second"] == 1 and not folder.student.exists()

    assert call("--report", folder.path).code == 0
    document = json.loads((folder.report / "report.json").read_text())
    assert document["images_seen"] == 32 and document["after"] != document["before"]
    assert rows_of(folder)[48, "images_per_second"] == 1  # only --resume drops what it does again

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole) + Counter({(32, "after"): 1})


def test_ctrl_c_saves_and_says_how_to_go_on(recipe: Path, whole: RunFolder, tmp_path: Path) -> None:
    """After SIGINT the round is ended and saved; --resume ends with the same bytes."""
    process, folder = signalled(signal.SIGINT, recipe, tmp_path)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert "the state after 56 images is saved" in process.stderr
    assert f"python refine.py --resume {folder.path}" in process.stderr
    assert checkpoint.images_saved(folder) == 56

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole) + Counter({(56, "images_per_second"): 1})


@pytest.mark.parametrize(
    ("module", "name", "begun"),
    [
        (features, "load", False),
        (samples, "generated_statistics", True),
        (samples, "fid_over_seeds", True),
    ],
    ids=["loading", "sampling the teacher", "measuring before"],
)
def test_ctrl_c_before_training_is_no_traceback(
    recipe: Path,
    tmp_path: Path,
    module: ModuleType,
    name: str,
    begun: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While parts are loaded no run is left; while something is measured, one to go on with."""
    monkeypatch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    outcome = call("--gan", recipe, "--outdir", tmp_path / "runs")
    monkeypatch.undo()
    folder = tmp_path / "runs" / "00000-tiny"
    assert outcome.code == 2
    assert "stopped" in outcome.stderr and "Traceback" not in outcome.stderr
    assert folder.exists() == begun == (f"--resume {folder}" in outcome.stderr)


def test_a_run_stopped_before_training_goes_on(
    recipe: Path, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that got no further than its recipe is resumed from the start."""
    monkeypatch.setattr(
        samples, "fid_over_seeds", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    )
    call("--gan", recipe, "--outdir", tmp_path)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "00000-tiny")
    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole)


# Stopped from inside ------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_checkpoint(
    recipe: Path, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that the disk refuses is a sentence, and the one before is gone on with."""
    save, limits = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    paths: list[Path] = []

    def save_on_a_disk_that_fills(content: object, path: Path) -> None:
        paths.append(path)
        if len(paths) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        save(content, path)

    monkeypatch.setattr(torch, "save", save_on_a_disk_that_fills)
    try:
        outcome = call("--gan", recipe, "--outdir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "00000-tiny")
    assert outcome.code == 2 and "Traceback" not in outcome.stderr
    assert "000000000064.pt: cannot be written" in outcome.stderr
    assert (
        f"the state after 32 images is saved; go on with: python refine.py --resume {folder.path}"
        in outcome.stderr
    )
    assert list(contents(folder.checkpoints)) == ["000000000032.pt"]

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()


def test_a_diverging_run_says_where_and_keeps_finite_weights(recipe: Path, tmp_path: Path) -> None:
    """The sentence names phase, image count and a remedy; what is saved holds finite numbers."""
    sgd = ("training.optimizer.name=SGD", "training.score_lr=1e-5")
    settings = (*sgd, "training.student_lr=1000")
    often = "training.checkpoint_every_kimg=0.008"
    outcome = call("--gan", recipe, *settings, often, "--outdir", tmp_path)
    folder = RunFolder(tmp_path / "00000-tiny")
    images = checkpoint.images_saved(folder)
    assert outcome.code == 2 and "Traceback" not in outcome.stderr
    assert "error: the score phase gave a loss of " in outcome.stderr
    assert f" after {images} images; no weight was changed by it. Try a smaller" in outcome.stderr
    newest = checkpoint.newest(folder)
    assert newest is not None
    content = torch.load(newest, weights_only=True)
    for network in ("student", "score", "student_ema"):
        assert all(tensor.isfinite().all() for tensor in content[network].values())


# Two processes ------------------------------------------------------------------------------------


def test_torchrun_trains_the_weights_of_one_process(recipe: Path, tmp_path: Path) -> None:
    """Two gloo processes: one run folder, one set of lines, and the same weights to rounding."""
    settings = ["training.optimizer.name=SGD", "training.score_lr=1e-5"]
    arguments = ["refine.py", "--gan", str(recipe), *settings, "--outdir", str(tmp_path / "two")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("measuring before") == process.stdout.count("report: ") == 1
    assert "Warning" not in process.stderr
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["00000-tiny"]

    assert call("--gan", recipe, *settings, "--outdir", tmp_path / "one").code == 0
    one, two = (weights(tmp_path / name / "00000-tiny") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)


def weights(folder: Path) -> dict[str, Tensor]:
    student = generators.load(RunFolder(folder).student)
    assert isinstance(student, torch.nn.Module)
    return student.state_dict()


def test_two_commands_do_not_write_one_run(tmp_path: Path) -> None:
    """While one process holds a run, another is told by whom, and changes nothing in it."""
    outcome = call("--gan", tiny_recipe(tmp_path), "--outdir", tmp_path / "runs")
    assert outcome.code == 0, outcome.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-tiny")
    before = contents(folder.path)
    with folder.exclusive():
        refused = call("--resume", folder.path)
    assert refused.code == 2 and f"process {os.getpid()}" in refused.stderr
    assert contents(folder.path) == before
    assert call("--resume", folder.path).code == 0
