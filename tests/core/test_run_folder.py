"""core/run_folder.py and core/disk.py: numbered folders, whole files or none, one
writer at a time.
"""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from core import _lock
from core.disk import atomic_write
from core.errors import UserError
from core.run_folder import RunFolder
from repository import ROOT

_OWN_MOUNTS = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
"""Begins a shell command whose mounts nobody else sees."""


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    """Each run takes the number after the largest, whatever else lies there."""
    (tmp_path / "00007-old").mkdir()
    (tmp_path / "notes.txt").touch()
    first, second = (RunFolder.create(tmp_path, "mnist32") for _ in range(2))
    assert (first.path.name, second.path.name) == ("00008-mnist32", "00009-mnist32")
    assert first.checkpoints.is_dir() and first.samples.is_dir() and first.report.is_dir()


def test_many_callers_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    """Threads that create runs of different names at the same moment never share a number."""
    start = threading.Barrier(8)

    def create(name: str) -> None:
        start.wait()
        for _ in range(5):
            RunFolder.create(tmp_path, name)

    threads = [threading.Thread(target=create, args=(f"run-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = [folder.name for folder in tmp_path.iterdir()]
    assert len({name[:5] for name in folders}) == len(folders) == 40
    assert all("-run-" in name for name in folders)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\\b", "end ", "two\nlines"])
def test_a_run_name_leaves_no_folder(tmp_path: Path, name: str) -> None:
    """A name that would leave the folder or hide it is refused before anything is made."""
    with pytest.raises(UserError, match="run name"):
        RunFolder.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["two words", "Gesichter für Öl", "u\u0308ben", "mine (2)", "x"])
def test_a_run_is_named_as_an_outdir_may_be(tmp_path: Path, name: str) -> None:
    """Spaces and accents, however the system writes them."""
    folder = RunFolder.create(tmp_path, name)
    assert folder.path.name == "00000-" + unicodedata.normalize("NFC", name)


def test_an_outdir_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    """The user hears the path and what to do."""
    (tmp_path / "runs").touch()
    for outdir in (tmp_path / "runs", tmp_path / "runs" / "below"):
        with pytest.raises(UserError, match=r"runs.*cannot be written: .*--outdir"):
            RunFolder.create(outdir, "x")


def test_only_a_folder_with_a_recipe_is_a_run(tmp_path: Path) -> None:
    """Another folder is refused; one that holds runs leads to the newest."""
    run = RunFolder.create(tmp_path, "x")
    with pytest.raises(UserError, match=r"not a run folder, it has no recipe.yaml$"):
        RunFolder.open_existing(run.path)
    run.recipe.write_text("{}")
    assert RunFolder.open_existing(run.path) == run
    with pytest.raises(UserError, match=r"did you mean .*00000-x\?"):
        RunFolder.open_existing(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.open_existing(tmp_path / "nowhere")


def test_a_run_of_an_earlier_version_is_named_as_such(tmp_path: Path) -> None:
    """Its log has another name and other rows: it is refused before anything is read."""
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "readings.jsonl").touch()
    with pytest.raises(UserError, match=r"earlier version .* readings.jsonl \(now stats.jsonl\)"):
        RunFolder.open_existing(tmp_path)


def test_a_write_appears_whole_and_keeps_the_mode_and_name(tmp_path: Path) -> None:
    """Until the block ends the old file stands; after it the new one, and nothing else."""
    path = tmp_path / "below" / "state.npz"
    with atomic_write(path) as partial:
        assert partial.name == path.name
        partial.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert list(path.parent.glob("*.npz")) == [path]
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()
    assert list(path.parent.iterdir()) == [path]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failure", [ValueError("ours"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_trace(
    tmp_path: Path, failure: BaseException
) -> None:
    """An error or Ctrl-C in the block passes through unchanged."""
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic_write(path) as partial:
        partial.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_is_a_sentence(tmp_path: Path, number: int) -> None:
    """The user hears the path, the cause and what to do."""
    with (
        pytest.raises(UserError, match=r"state: cannot be written: .*; .*--outdir"),
        atomic_write(tmp_path / "state"),
    ):
        raise OSError(number, "the disk says no")
    assert not list(tmp_path.iterdir())


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: a full disk without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_a_disk_that_fills_up_under_a_library_is_a_sentence_too(tmp_path: Path, save) -> None:
    """torch and safetensors raise errors of their own there; the old file stays all the same."""
    path = tmp_path / "weights"
    path.write_text("old")
    with (
        pytest.raises(UserError, match="weights: cannot be written: File too large"),
        _largest_file(1 << 20),
        atomic_write(path) as partial,
    ):
        save({"w": torch.zeros(1 << 20)}, partial)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# One writer at a time ----------------------------------------------------------------------------

_HOLDER = """
import sys, time
from pathlib import Path
from core.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_held_by_one_process_until_that_is_killed(tmp_path: Path) -> None:
    """Another hears which process and machine it is; after SIGKILL the run is free, and what was
    half written is gone.
    """
    folder = RunFolder.create(tmp_path, "x")
    arguments = [sys.executable, "-c", _HOLDER, str(folder.path)]
    holder = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        partial = folder.checkpoints / ".000000000004.pt.0123abcd.partial"
        partial.mkdir()
        who = rf"process {holder.pid} on {socket.gethostname()} writes to this run"
        with pytest.raises(UserError, match=who), folder.exclusive():
            pass
        assert partial.exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with folder.exclusive():
        assert not partial.exists()


def test_a_process_does_not_hold_a_run_twice(tmp_path: Path) -> None:
    """Two runs in one notebook are as bad; after the block, or an error in it, the run is free."""
    folder = RunFolder.create(tmp_path, "x")
    with pytest.raises(ZeroDivisionError), folder.exclusive():
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), folder.exclusive():
            pass
        raise ZeroDivisionError
    with folder.exclusive():
        pass


def test_where_there_are_no_locks_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and nothing is cleared away that another process may be writing."""
    folder = RunFolder.create(tmp_path, "x")
    (folder.checkpoints / ".4.pt.0123abcd.partial").mkdir()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_lock.fcntl, "flock", refuse)
    with folder.exclusive():
        assert len(list(folder.checkpoints.iterdir())) == 1
    assert [record.message for record in caplog.records] == [
        f"{folder.path}: no locks here; let no other process write there"
    ]


_FULL = """
import sys
from pathlib import Path
from core.errors import UserError
from core.disk import atomic_write
from core.run_folder import RunFolder
from core.run_log import Divergence
folder = RunFolder.create(Path(sys.argv[1]), "x")
folder.log.append(Divergence(images_seen=64, why=""))
path = folder.path / "state"
for size in (10_000, 10_000_000):
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(bytes(size))
    except UserError as error:
        print(error)
(folder.checkpoints / ".4.pt.0123abcd.partial").mkdir()
(folder.path / "ballast").open("wb", buffering=0).write(bytes(10_000_000))
try:
    folder.log.append(Divergence(images_seen=128, why=10_000 * "x"))
except UserError as error:
    print(error)
begun = folder.checkpoints / ".4.pt.0123abcd.partial"
with folder.exclusive():
    assert begun.exists() is False
(folder.path / "ballast").unlink()
folder.log.append(Divergence(images_seen=192, why=""))
print(path.stat().st_size, [row.images_seen for row in folder.log.rows()])
print(sorted(path.name for path in folder.path.iterdir() if path.is_file()))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a disk of one megabyte: sentences, the file before, and a log that goes on cleanly. The
    run can be held, to clear away what a killed process filled the disk with.
    """
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    if subprocess.run([*_OWN_MOUNTS, mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs user namespaces")
    command = f'{mount} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        [*_OWN_MOUNTS, command, _FULL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *sentences, sizes, names = done.stdout.splitlines()
    assert len(sentences) == 2 and "state: cannot be written: No space" in sentences[0]
    assert "stats.jsonl: cannot be written: No space left on device; free some" in sentences[1]
    assert sizes == "10000 [64, 192]" and names == "['.lock', 'state', 'stats.jsonl']"
