"""`refine.py` stopped: killed, interrupted, out of disk, diverged; and on two processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import generators
from cli_runs import call, contents, tiny_recipe
from core.run_folder import RunFolder
from core.run_log import Evaluation, ImageComparison, Row, Session
from eval import features
from eval.evaluator import Evaluator
from refinement import signals
from repository import ROOT
from training import checkpoint

SIGNALLED = """
import os, sys, time, refine
from training.progress import Progress
number, row = int(sys.argv.pop(1)), Progress.log
def row_with_a_signal(self, images_seen):
    means = row(self, images_seen)
    if images_seen == 48:
        while not any(self.folder.checkpoints.glob("*32.pt")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    return means
Progress.log = row_with_a_signal
refine.main(sys.argv[1:], prog_name="refine.py")
"""
"""The command, sent a signal once 48 images are read off, 16 after the checkpoint at 32, and once
that is written, which happens in the background.

It comes twice, as Ctrl-C does under torchrun: from the terminal and from torchrun.
"""

MEASURING = """
import os, sys, refine
from eval.evaluator import Evaluator
number, evaluate_quick, evaluations = int(sys.argv.pop(1)), Evaluator.evaluate_quick, []
def evaluate_with_a_signal(self, images_of, *, stop_requested=lambda: False):
    evaluations.append(self)
    def signalling(seeds):
        assert not stop_requested(), "no batch is begun after the signal"
        if len(evaluations) == 2 and 50 in seeds:
            os.kill(os.getpid(), number)
        return images_of(seeds)
    return evaluate_quick(self, signalling, stop_requested=stop_requested)
Evaluator.evaluate_quick = evaluate_with_a_signal
refine.main(sys.argv[1:], prog_name="refine.py")
"""
"""The command, sent a signal in its second evaluation while training: the first after a step."""

TIMED = """
import runpy, sys, time
from training.progress import Progress
file, row = sys.argv.pop(1), Progress.log
def row_with_its_time(self, images_seen):
    means = row(self, images_seen)
    with open(file, "a") as ends:
        ends.write(f"{images_seen} {time.time()}\\n")
    return means
Progress.log = row_with_its_time
runpy.run_path("refine.py", run_name="__main__")
"""
"""The command, which notes when each row of stats was written: at the end of each iteration."""


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


def signalled(
    number: int, recipe: Path, outdir: Path, *settings: str, program: str = SIGNALLED
) -> Stopped:
    """Return a run of the command in a process of its own, sent this signal."""
    arguments = [str(int(number)), "--gan", str(recipe), *settings, "--outdir", str(outdir)]
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Stopped(process, RunFolder(outdir / "00000-tiny"))


def rows_of(folder: RunFolder) -> Counter[tuple[object, str]]:
    """Return how often each kind of row stands at each image count; sessions are left out."""
    rows = [row for row in folder.log.rows() if not isinstance(row, Session)]
    return Counter((row.images_seen, _kind(row)) for row in rows)


def _kind(row: Row) -> str:
    if isinstance(row, Evaluation):
        return row.when
    return row.name if isinstance(row, ImageComparison) else row.kind


# Stopped from outside -----------------------------------------------------------------------------


def test_a_killed_run_is_reported_and_resumed_as_if_nothing_was(
    recipe: Path, whole: RunFolder, tmp_path: Path
) -> None:
    """After SIGKILL, --report tells of the newest checkpoint, and --resume ends with the same
    bytes, every reading once.
    """
    process, folder = signalled(signal.SIGKILL, recipe, tmp_path)
    assert process.returncode == -signal.SIGKILL
    assert rows_of(folder)[48, "stats"] == 1 and not folder.student.exists()

    assert call("--report", folder.path).code == 0
    document = json.loads((folder.report / "report.json").read_text())
    assert document["images_seen"] == 32 and document["after"] != document["before"]
    assert rows_of(folder)[48, "stats"] == 1  # only --resume drops what it does again

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole) + Counter({(32, "after"): 1, (32, "drift"): 1})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(
    recipe: Path, whole: RunFolder, tmp_path: Path, number: int
) -> None:
    """After Ctrl-C, SIGTERM or Slurm's warning the round is ended and saved, the exit code says
    "resume me", and --resume ends with the same bytes.
    """
    process, folder = signalled(number, recipe, tmp_path)
    assert process.returncode == 75
    assert "Traceback" not in process.stderr
    assert "the state after 56 images is saved" in process.stderr
    assert f"python refine.py --resume {folder.path}" in process.stderr
    assert checkpoint.images_saved(folder) == 56

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole) + Counter({(56, "stats"): 1})


def test_a_signal_while_measuring_does_not_wait_for_its_end(
    recipe: Path, whole: RunFolder, tmp_path: Path
) -> None:
    """The measurement is given up after the batch that it came in, the state saved; --resume makes
    up for it and ends with the same bytes and stats.
    """
    small = "evaluation.batch_size=20"
    process, folder = signalled(signal.SIGTERM, recipe, tmp_path, small, program=MEASURING)
    assert process.returncode == 75, process.stderr
    assert "the state after 32 images is saved" in process.stderr
    assert checkpoint.images_saved(folder) == 32
    assert (32, "training") not in rows_of(folder)

    assert call("--resume", folder.path).code == 0
    assert folder.student.read_bytes() == whole.student.read_bytes()
    assert rows_of(folder) == rows_of(whole)


@pytest.mark.parametrize(
    ("module", "name", "begun"),
    [
        (features, "load", False),
        (Evaluator, "feature_stats", True),
        (Evaluator, "evaluate", True),
    ],
    ids=["loading", "sampling the teacher", "measuring before"],
)
def test_ctrl_c_before_training_is_no_traceback(
    recipe: Path,
    tmp_path: Path,
    module: object,
    name: str,
    begun: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While parts are loaded no run is left; while something is measured, one to go on with."""
    monkeypatch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    outcome = call("--gan", recipe, "--outdir", tmp_path / "runs")
    monkeypatch.undo()
    folder = tmp_path / "runs" / "00000-tiny"
    assert outcome.code == (75 if begun else 2)
    assert "stopped" in outcome.stderr and "Traceback" not in outcome.stderr
    assert folder.exists() == begun == (f"--resume {folder}" in outcome.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_stops_a_resumed_run_while_it_loads_is_told_to_resume(
    whole: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where nothing is trained yet, any signal ends at once; the named run stays as it is."""
    monkeypatch.setattr(features, "load", lambda *_, **__: os.kill(os.getpid(), number))
    before = contents(whole.path)
    outcome = call("--resume", whole.path)
    assert outcome.code == 75 and f"--resume {whole.path}" in outcome.stderr
    assert contents(whole.path) == before


def test_only_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM after SIGUSR1 is the same request, at any time; Ctrl-C a second later is not."""
    now = iter([0.0, 100.0, 100.5, 102.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_signal() as asked:
        assert not asked()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_under_load_is_saved_and_gone_soon_after_its_round(
    recipe: Path, tmp_path: Path
) -> None:
    """SIGTERM while a run trains, beside processes that keep every core busy: it is gone within
    5 s of the end of the round that it met, and that round is saved.
    """
    settings = ["training.duration_kimg=1000", "training.checkpoint_every_kimg=0"]
    settings += ["training.stats_every_kimg=0.008", "evaluation.every_kimg=0"]
    arguments = ["--gan", str(recipe), *settings, "--outdir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", TIMED, str(tmp_path / "ends"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    ends = tmp_path / "ends"
    burning: list[subprocess.Popen[bytes]] = []
    try:
        wait_for(lambda: ends.exists() and ends.read_text().count("\n") >= 10, process)
        for _ in range(os.cpu_count() or 1):
            burning.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        gone = time.time()
    finally:
        for each in (process, *burning):
            each.kill()
            each.wait()
    assert process.returncode == 75, said
    images_seen, ended = ends.read_text().split("\n")[-2].split()
    assert int(images_seen) == checkpoint.images_saved(RunFolder(tmp_path / "00000-tiny"))
    assert gone - float(ended) < 5


def wait_for(come: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not come():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_stopped_before_training_goes_on(
    recipe: Path, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that got no further than its recipe is resumed from the start."""
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
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
