"""Checkpoints: a resumed run ends bit for bit like one that ran through; bad disks and files."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.distributed import World
from core.errors import UserError
from core.run_folder import RunFolder
from objectives import diff_instruct
from repository import ROOT
from tiny_states import BATCH, CONFIG, begin
from training import _checksum, checkpoint
from training.checkpoint import Retention, WatchedMetric
from training.state import TrainState
from training.trainer import Config, Interrupted, Trainer

ALONE = World.single()


def go(
    state: TrainState,
    folder: RunFolder,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    config: Config = CONFIG,
) -> TrainState:
    objective = diff_instruct.build(diff_instruct.Config(score_steps=2, head_start_kimg=0.005))
    return Trainer(
        state, objective, config, folder=folder, world=ALONE, stop_requested=stop_requested
    ).train()


def content_bytes(state: TrainState) -> dict[str, bytes | object]:
    """Return every tensor of a state as bytes and every number as it is, by a path."""
    found: dict[str, bytes | object] = {"images_seen": state.images_seen}

    def add(path: str, value: object) -> None:
        if isinstance(value, Tensor):
            found[path] = value.contiguous().numpy().tobytes()
        elif isinstance(value, dict):
            for key, below in value.items():
                add(f"{path}/{key}", below)
        elif isinstance(value, list):
            for index, below in enumerate(value):
                add(f"{path}/{index}", below)
        else:
            found[path] = value

    networks = state.networks
    modules: dict[str, nn.Module] = {
        "student": networks.student,
        "score": networks.score,
        "teacher": networks.teacher,
        "student_ema": state.student_ema,
    }
    for name, module in modules.items():
        add(name, dict(module.state_dict()))
    for name, optimizer in state.optimizers.items():
        add(f"optimizer/{name}", optimizer.state_dict())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, RunFolder]:
    """Return the state of a run that went through, and its folder."""
    folder = RunFolder.create(tmp_path_factory.mktemp("whole"), "run")
    return go(begin(), folder), folder


def newest(folder: RunFolder) -> Path:
    path = checkpoint.newest(folder)
    assert path is not None
    return path


# Resuming


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(
    whole: tuple[TrainState, RunFolder], folder: RunFolder, rounds: int
) -> None:
    """Stopped in the head start or half-way: every weight, average and moment of the optimizers."""
    answers = iter([False] * (rounds - 1) + [True])
    with pytest.raises(Interrupted):
        go(begin(), folder, stop_requested=lambda: next(answers))
    resumed = begin()
    checkpoint.restore(resumed, newest(folder))
    assert resumed.images_seen == rounds * BATCH
    torch.rand(5)  # torch's own generator has no say
    found, expected = content_bytes(go(resumed, folder)), content_bytes(whole[0])
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path] != expected[path]] == []


def test_the_comparison_can_fail(whole: tuple[TrainState, RunFolder], folder: RunFolder) -> None:
    """Another seed ends with other bytes in trained weights, their average and their moments."""
    other = go(begin(), folder, config=CONFIG.model_copy(update={"seed": 1}))
    found, expected = content_bytes(other), content_bytes(whole[0])
    differ = {path.rpartition("/")[0] for path in expected if found[path] != expected[path]}
    assert {"student", "score", "student_ema", "optimizer/student/state/0"} <= differ
    assert "teacher" not in differ


def test_a_restored_state_is_the_saved_one(whole: tuple[TrainState, RunFolder]) -> None:
    """Bytes and images seen, and the average still shares nothing with the student."""
    state, folder = whole
    restored = begin()
    checkpoint.restore(restored, newest(folder))
    assert content_bytes(restored) == content_bytes(state)
    pairs = zip(
        restored.student_ema.parameters(), restored.networks.student.parameters(), strict=True
    )
    assert all(p.data_ptr() != q.data_ptr() for p, q in pairs)


def test_the_newest_two_are_kept(folder: RunFolder) -> None:
    """Of five checkpoints the last two are left, and the newest is the newest."""
    state = begin()
    for images in (4, 8, 900, 1000, 10_000):
        state.images_seen = images
        checkpoint.save(state, folder)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["000000001000.pt", "000000010000.pt"]
    assert newest(folder).name == names[1] and checkpoint.images_saved(folder) == 10_000


def kept_of(
    folder: RunFolder,
    keep: Retention,
    scores: dict[int, float],
    watched: WatchedMetric | None = None,
) -> list[int]:
    """Return the image counts of the checkpoints left of those saved with these scores."""
    state = begin()
    for state.images_seen, score in scores.items():
        scores_now = {"fid": score, "recall": -score}
        checkpoint.save(state, folder, keep=keep, watched=watched, scores=scores_now)
    return sorted(int(path.stem) for path in folder.checkpoints.iterdir())


def test_the_best_is_kept(folder: RunFolder) -> None:
    """It stays until a better one comes; what is not a number is never the best."""
    keep, fid = Retention(newest=1), WatchedMetric("fid")
    assert kept_of(folder, keep, {4: 9.0, 8: 3.0, 12: math.nan, 16: 5.0, 20: 3.0}, fid) == [8, 20]
    assert kept_of(folder, keep, {24: 2.0, 28: 2.5}, fid) == [24, 28]
    assert kept_of(folder, Retention(newest=1, best=False), {32: 2.5}, fid) == [32]


def test_the_best_may_be_the_highest(folder: RunFolder) -> None:
    """The score of the highest recall; a metric that was not measured keeps nothing."""
    keep, recall = Retention(newest=1), WatchedMetric("recall", highest=True)
    assert kept_of(folder, keep, {4: 9.0, 8: 3.0, 12: 5.0, 16: 6.0}, recall) == [8, 16]
    assert kept_of(folder, keep, {20: 9.0}, WatchedMetric("kid")) == [20]


def test_one_of_every_so_many_images_is_kept(folder: RunFolder) -> None:
    """The first at or after each multiple stays, beside the newest, and none before the first."""
    keep = Retention(newest=1, every_kimg=0.1)
    counts = [4, 96, 104, 108, 200, 204, 420, 490]
    assert kept_of(folder, keep, dict.fromkeys(counts, 1.0)) == [104, 200, 420, 490]
    assert kept_of(folder, keep, {510: 1.0}) == [104, 200, 420, 510]


def test_an_old_one_that_cannot_be_removed_is_no_failure(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new checkpoint is written; the log tells of the one that stays."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert kept_of(folder, Retention(newest=1), {4: 1.0, 8: 1.0}) == [4, 8]
    assert "000000000004.pt cannot be removed: Operation not permitted" in caplog.text


def test_a_new_run_has_none(folder: RunFolder) -> None:
    """No checkpoint and no images."""
    assert checkpoint.newest(folder) is None and checkpoint.images_saved(folder) == 0


# Damaged files


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_named(
    whole: tuple[TrainState, RunFolder], tmp_path: Path, part: float
) -> None:
    """However little is missing, the sentence names the file and what to do; nothing changes."""
    content = newest(whole[1]).read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(part * len(content))])
    state = begin()
    with pytest.raises(UserError, match=r"cut\.pt is damaged.*delete it"):
        checkpoint.restore(state, path)
    assert content_bytes(state) == content_bytes(begin())


def test_a_bit_that_flipped_is_found(whole: tuple[TrainState, RunFolder], tmp_path: Path) -> None:
    """200 single bits anywhere in the file, and each bit of its last record and seal."""
    content = newest(whole[1]).read_bytes()
    path, draw = tmp_path / "flipped.pt", random.Random(0)
    path.write_bytes(content)
    assert _checksum.damage(path) is None
    bits = [draw.randrange(8 * len(content)) for _ in range(200)]
    unnoticed = []
    for bit in [*bits, *range(8 * (len(content) - 100), 8 * len(content))]:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
            file.flush()
            if _checksum.damage(path) is None:
                unnoticed.append(bit)
            file.seek(bit // 8)
            file.write(content[bit // 8 : bit // 8 + 1])
    assert unnoticed == []
    flip(path)
    with pytest.raises(UserError, match=r"flipped\.pt is damaged: its SHA-256 is not the one"):
        checkpoint.restore(begin(), path)


def flip(path: Path, *, byte: int = -5000) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 16
    path.write_bytes(content)


def test_a_checkpoint_of_before_there_were_seals_is_read(
    whole: tuple[TrainState, RunFolder], tmp_path: Path
) -> None:
    """It is what torch.save wrote; a bit of a tensor that flipped is found all the same."""
    path = tmp_path / "old.pt"
    torch.save(torch.load(newest(whole[1]), weights_only=True), path)
    restored = begin()
    checkpoint.restore(restored, path)
    assert content_bytes(restored) == content_bytes(whole[0])
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    flip(path, byte=largest.header_offset + largest.file_size)
    with pytest.raises(UserError, match=r"old\.pt is damaged: the checksum of .* is wrong"):
        checkpoint.restore(begin(), path)


def saved_at(folder: RunFolder, *images: int) -> None:
    """Write checkpoints whose weights tell when they are of."""
    state = begin()
    for state.images_seen in images:
        torch.nn.init.constant_(next(state.networks.score.parameters()), state.images_seen)
        checkpoint.save(state, folder)


def test_a_damaged_newest_is_named_and_the_one_before_used(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """It is set aside, so that it neither counts as saved nor takes the place of a whole one."""
    saved_at(folder, 4, 8)
    flip(newest(folder))
    state = begin()
    used = checkpoint.restore_newest(state, folder, ALONE)
    assert used == folder.checkpoints / "000000000004.pt" and state.images_seen == 4
    assert float(next(state.networks.score.parameters()).detach().flatten()[0]) == 4
    assert "000000000008.pt is damaged: its SHA-256" in caplog.text
    assert "000000000004.pt, the checkpoint before it, is used" in caplog.text
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert names == {"000000000004.pt", "000000000008.pt.damaged"}
    assert checkpoint.images_saved(folder) == 4


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(folder: RunFolder) -> None:
    """However often it is tried: a sentence, and the files stay. A new run has nothing to read."""
    assert checkpoint.restore_newest(begin(), folder, ALONE) is None
    saved_at(folder, 4, 8)
    for path in folder.checkpoints.iterdir():
        flip(path)
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
            checkpoint.restore_newest(begin(), folder, ALONE)


def test_a_checkpoint_of_other_networks_is_named(
    whole: tuple[TrainState, RunFolder], tmp_path: Path
) -> None:
    """Whichever part does not fit, the sentence names the file."""
    content = torch.load(newest(whole[1]), weights_only=True)
    path = tmp_path / "other.pt"
    for part in ("student", "score", "student_ema", "optimizers"):
        torch.save(content | {part: {}}, path)
        with pytest.raises(UserError, match=r"other\.pt is damaged or of another run"):
            checkpoint.restore(begin(), path)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [{}, [], torch.zeros(3), 7])
def test_something_else_that_torch_saved_is_named(tmp_path: Path, content: object) -> None:
    """A file of another form is as damaged as a truncated one."""
    path = tmp_path / "else.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"else\.pt is damaged or of another run"):
        checkpoint.restore(begin(), path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A pickled call in it is not made."""
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(trace),)

    path = tmp_path / "trap.pt"
    torch.save({"student": Trap()}, path)
    with pytest.raises(UserError, match=r"trap\.pt is damaged"):
        checkpoint.restore(begin(), path)
    assert not trace.exists()


# In the background


class Gate:
    """torch.save that waits until it is let through, and then does it or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.error = threading.Event(), None
        self._save = torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content: object, path: Path) -> None:
        assert self.opened.wait(timeout=30)
        if self.error is not None:
            raise self.error
        self._save(content, path)

    def refuse(self, number: int = errno.ENOSPC) -> None:
        self.error = OSError(number, os.strerror(number))
        self.opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def changed(state: TrainState) -> None:
    """Train on: every tensor of the state becomes another."""
    state.images_seen += 4
    for part in (state.networks.student, state.networks.score, state.student_ema):
        for tensor in part.state_dict().values():
            tensor.copy_(tensor + 1 if tensor.dtype != torch.bool else ~tensor)
    for optimizer in state.optimizers.values():
        for moments in optimizer.state.values():
            for tensor in moments.values():
                tensor += 1


def test_what_is_written_is_the_state_when_it_was_saved(
    whole: tuple[TrainState, RunFolder], folder: RunFolder, gate: Gate
) -> None:
    """Training goes on while it is written, also over the second copy, made where the first was;
    channels-last weights are read back as such.
    """
    state = begin()
    checkpoint.restore(state, newest(whole[1]))
    expected = []
    with checkpoint.Writer(folder) as writer:
        for _ in range(2):
            expected.append(content_bytes(state))
            writer.save(state)
            changed(state)
            gate.opened.set()
    assert content_bytes(state).keys() == expected[0].keys()
    for path, content in zip(sorted(folder.checkpoints.iterdir()), expected, strict=True):
        restored = begin()
        checkpoint.restore(restored, path)
        found = content_bytes(restored)
        assert [name for name in content if found[name] != content[name]] == []
        assert content != content_bytes(state)
    written = torch.load(newest(folder), weights_only=True)["score"]
    strides = {name: tensor.stride() for name, tensor in state.networks.score.state_dict().items()}
    assert strides == {name: tensor.stride() for name, tensor in written.items()}


def test_saving_does_not_wait_for_the_disk_but_leaving_does(folder: RunFolder, gate: Gate) -> None:
    """`save` returns before anything is written; behind the block all is."""
    with checkpoint.Writer(folder) as writer:
        writer.save(begin())
        assert checkpoint.newest(folder) is None
        gate.opened.set()
    assert newest(folder).name == "000000000000.pt"


@pytest.mark.parametrize("where", ["save", "wait", "end"])
def test_a_refusal_is_told_at_the_next_opportunity(
    folder: RunFolder, gate: Gate, where: str
) -> None:
    """Once, as a sentence; the checkpoint before is whole and no part of the other is left."""
    state = begin()
    gate.opened.set()
    with checkpoint.Writer(folder) as writer:
        writer.save(state)
        writer.wait()
        state.images_seen = 4
        gate.refuse()
        if where != "end":
            writer.save(state)
            with pytest.raises(UserError, match=r"0004\.pt: cannot be written: No space left"):
                writer.save(state) if where == "save" else writer.wait()
    if where == "end":
        with pytest.raises(UserError, match="No space"), checkpoint.Writer(folder) as writer:
            writer.save(state)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000000000000.pt"]
    assert checkpoint.restore_newest(state, folder, ALONE) == newest(folder)


def test_an_error_of_training_goes_before_one_of_the_disk(
    folder: RunFolder, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """What stopped the run is raised, the disk's refusal logged."""
    with pytest.raises(ZeroDivisionError), checkpoint.Writer(folder) as writer:
        writer.save(begin())
        gate.refuse()
        raise ZeroDivisionError
    assert "the last checkpoint is not written: " in caplog.text and "No space" in caplog.text


_KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch
sys.path.insert(0, "tests/support")
from core.run_folder import RunFolder
from tiny_states import begin
from training import checkpoint

def half(content, path, save=torch.save):
    save(content, path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

state, folder = begin(), RunFolder(Path(sys.argv[1]))
with folder.exclusive(), checkpoint.Writer(folder) as writer:
    writer.save(state)
    writer.wait()
    torch.save, state.images_seen = half, 4
    writer.save(state)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_killed_while_writing_leaves_the_checkpoint_before(folder: RunFolder) -> None:
    """It is the newest and whole; the next to hold the run clears away the half of the other."""
    arguments = [sys.executable, "-c", _KILLED, str(folder.path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.checkpoints.iterdir())) == 2
    with folder.exclusive():
        used = checkpoint.restore_newest(begin(), folder, ALONE)
    assert list(folder.checkpoints.iterdir()) == [used]


# Full disks


def test_a_full_disk_leaves_the_earlier_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the file; the one before is whole and no part of the new one is left."""
    state = begin()
    before = checkpoint.save(state, folder).read_bytes()

    def full(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    state.images_seen = 8
    with pytest.raises(UserError, match=r"000000000008\.pt: cannot be written: No space left"):
        checkpoint.save(state, folder)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000000000000.pt"]
    assert newest(folder).read_bytes() == before


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
sys.path.insert(0, "tests/support")
from core.errors import UserError
from core.run_folder import RunFolder
from tiny_states import begin
from training import checkpoint

state, folder = begin(), RunFolder(Path(sys.argv[1]))
checkpoint.save(state, folder)
state.images_seen = 4
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoint.save(state, folder)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_a_file_that_may_not_grow_is_no_traceback(folder: RunFolder) -> None:
    """Where the system itself refuses to write more, torch's own error becomes the sentence."""
    arguments = [sys.executable, "-c", _LIMITED, str(folder.path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "000000000004.pt: cannot be written: File too large" in done.stdout
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000000000000.pt"]
    checkpoint.restore(begin(), newest(folder))
