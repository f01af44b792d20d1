"""A state on the disk: written whole or not at all, checked and read back bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Final, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from core import distributed
from core.config import Section
from core.disk import atomic_write
from core.distributed import World
from core.errors import UserError
from core.run_folder import RunFolder
from training import fsdp
from training._checksum import damage, scores_of, seal
from training._host_copy import copy_to_host, tensors_in
from training.loss_scale import LossScale
from training.state import TrainState

_log = logging.getLogger(__name__)
_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)
"""Exceptions of reading bytes that are no intact checkpoint of this run."""


class Retention(Section):
    """Checkpoints that stay when a new one is written."""

    renamed: ClassVar[Mapping[str, str]] = {"best_is": "training.watch"}

    newest: int = Field(default=2, ge=1)
    """So many of the newest stay; with two, a damaged one costs little."""
    every_kimg: float = Field(default=0.0, ge=0)
    """The first after each so many thousand images stays for ever; 0: none does."""
    best: bool = True
    """The best by the watched metric (training.watch), measured while training, stays too."""


class WatchedMetric(NamedTuple):
    """The metric that tells divergence, early stop and the best checkpoint."""

    name: str
    highest: bool = False
    """Whether the highest value is the best."""


Content = dict[str, object]
_KEEP: Final = Retention()
_NO_SCORES: Final[Mapping[str, float]] = {}


def save(
    state: TrainState,
    folder: RunFolder,
    *,
    keep: Retention = _KEEP,
    watched: WatchedMetric | None = None,
    scores: Mapping[str, float] = _NO_SCORES,
) -> Path:
    """Return the path of the checkpoint of this state, after writing it and removing old ones.

    watched: the metric of the best checkpoint, which stays. scores: metrics of this state, if it
    was evaluated. Raises UserError if the disk
    refuses; earlier checkpoints are then untouched.
    """
    return _write(_content(state), folder, keep, watched, scores)


class Writer:
    """Writes checkpoints in the background: training waits only until its state is copied.

    All ranks save; the main one writes, one at a time. The next `save`, `wait` and the end of the
    block wait for it and raise what it met: UserError if the disk refuses, and earlier
    checkpoints are then untouched. The copy takes as much of the computer's memory as a checkpoint,
    and is used again for the next.
    """

    def __init__(
        self,
        folder: RunFolder,
        keep: Retention = _KEEP,
        *,
        watched: WatchedMetric | None = None,
        is_main: bool = True,
    ) -> None:
        self.folder, self.keep, self.watched, self.is_main = folder, keep, watched, is_main
        self._copy: Content = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, state: TrainState, *, scores: Mapping[str, float] = _NO_SCORES) -> None:
        """Begin to write the checkpoint of this state, which may change from now on."""
        self.wait()
        content = _content(state)
        if not self.is_main:
            for tensor in tensors_in(content):
                fsdp.full_tensor(tensor)  # the main one has no use of parts
            return
        self._copy = copy_to_host(content, self._copy)
        self._writing = self._thread.submit(
            _write, self._copy, self.folder, self.keep, self.watched, dict(scores)
        )

    def wait(self) -> None:
        """Wait for the pending write; re-raise its error, once."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except Exception:
            self._writing = None
            raise
        self._writing = None  # but not if Ctrl-C came: there is still something to wait for

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the pending write; after an error in the block, an error here is only logged."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            _log.error("the last checkpoint is not written: %s", error)
        finally:
            self._thread.shutdown()


def newest(folder: RunFolder) -> Path | None:
    """Return the path of the newest checkpoint, or None if there is none yet."""
    return next(reversed(kept(folder)), None)


def images_saved(folder: RunFolder) -> int:
    """Return the images seen of the newest checkpoint; 0 without any."""
    path = newest(folder)
    return 0 if path is None else int(path.stem)


def best(folder: RunFolder, watched: WatchedMetric | None) -> Path | None:
    """Return the checkpoint with the best value of the watched metric; None if none has one."""
    return _best(kept(folder), watched)


def best_intact(folder: RunFolder, keep: Retention, watched: WatchedMetric | None) -> Path | None:
    """Return the checkpoint for a rollback: the best if it is kept and intact, else the newest
    intact one. None without any.
    """
    chosen = best(folder, watched) if keep.best else None
    return chosen if chosen is not None and damage(chosen) is None else _newest_intact(folder)


def drop_after(path: Path, folder: RunFolder) -> None:
    """Remove the checkpoints later than this one, the newest first, so that a kill in
    between leaves a run whose newest checkpoint is one of them.
    """
    for later in reversed(kept(folder)):
        if later == path:
            break
        later.unlink()


def drop_newest(folder: RunFolder) -> None:
    """Remove the newest checkpoint, if there is one before it."""
    *before, last = kept(folder)
    if before:
        last.unlink()


def restore_newest(state: TrainState, folder: RunFolder, world: World) -> Path | None:
    """Restore the newest intact checkpoint and return its path; None without any.

    Those that are damaged are named in the log and set aside (NAME.pt.damaged). All ranks call it;
    the main one chooses. Raises UserError if none is whole, or if the newest does not fit.
    """
    path = distributed.broadcast_from_main(_newest_intact(folder) if world.is_main else None, world)
    if path is not None:
        restore(state, path)
    return path


def restore(state: TrainState, path: Path) -> None:
    """Restore the state from a checkpoint.

    Raises UserError if the file is damaged (the state is then as it was) or does not fit (the
    state is then of no more use).
    """
    with _opened(path) as content:
        for name in ("student", "score"):
            network = getattr(state.networks, name)
            network.load_state_dict(fsdp.distribute_state_like(content[name], network))
        state.student_ema.load_state_dict(content["student_ema"])
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(_distribute_state(content["optimizers"][name], optimizer))
        scales = content.get("loss_scales", {})
        state.loss_scales = {phase: LossScale(*known) for phase, known in scales.items()}
        state.images_seen = content["images_seen"]


def restore_average(student: nn.Module, path: Path) -> int:
    """Load the student's moving average of a checkpoint; return the images that it has seen.

    Raises UserError as `restore` does.
    """
    with _opened(path) as content:
        student.load_state_dict(content["student_ema"])
        return content["images_seen"]


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of a checkpoint. Raises UserError if it is damaged or does not fit."""
    wrong = damage(path)
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong}; delete it to go on from the one before")
    try:
        yield torch.load(path, map_location="cpu", weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or of another run ({type(error).__name__}); "
            "delete it to go on from the one before"
        ) from error


def _distribute_state(saved: Content, optimizer: torch.optim.Optimizer) -> Content:
    """Return an optimizer's saved state with its tensors sharded like their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = cast(Mapping[int, Mapping[str, Tensor]], saved["state"])
    distributed_state = {
        index: {
            name: fsdp.distribute_like(value, parameters[index]) for name, value in values.items()
        }
        for index, values in state.items()
    }
    return {**saved, "state": distributed_state}


def _newest_intact(folder: RunFolder) -> Path | None:
    """Return the newest intact checkpoint, after renaming the damaged ones after it."""
    # newest first, until one is intact
    damaged: list[Path] = []
    for path in reversed(kept(folder)):
        wrong = damage(path)
        if wrong is None:
            break
        _log.warning("%s is damaged: %s", path, wrong)
        damaged.append(path)
    else:
        if damaged:
            raise UserError(
                f"{folder.checkpoints}: none of its {len(damaged)} checkpoints is whole; bring one "
                "back from a copy, or begin a new run"
            )
        return None

    # out of the way, so that none is read again
    for each in damaged:
        with suppress(OSError):  # to read is enough for a report
            each.rename(each.with_name(f"{each.name}.damaged"))
        _log.warning("%s, the checkpoint before it, is used", path.name)
    return path


def _write(
    content: Content,
    folder: RunFolder,
    keep: Retention,
    watched: WatchedMetric | None,
    scores: Mapping[str, float],
) -> Path:
    path = folder.checkpoints / f"{content['images_seen']:012d}.pt"
    folder.log.flush()
    with atomic_write(path) as partial:
        torch.save(content, partial)
        seal(partial, scores)
    paths = kept(folder)
    for old in set(paths) - _retained_paths(paths, keep, watched):
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # the new one is written all the same
            _log.warning("%s cannot be removed: %s", old, error.strerror)
    return path


def _retained_paths(
    paths: Sequence[Path], keep: Retention, watched: WatchedMetric | None
) -> set[Path]:
    """Return those checkpoints that stay, of all, oldest first."""
    retained = set(paths[-keep.newest :])
    if step := round(keep.every_kimg * 1000):
        first = {int(path.stem) // step: path for path in reversed(paths)}
        retained |= {path for multiple, path in first.items() if multiple > 0}
    chosen = _best(paths, watched) if keep.best else None
    return retained if chosen is None else retained | {chosen}


def _best(paths: Sequence[Path], watched: WatchedMetric | None) -> Path | None:
    """Return the checkpoint with the best score, of all, oldest first; the first of equals."""
    if watched is None:
        return None
    scored = {path: scores_of(path) for path in paths}
    name = watched.name
    values = {path: scores[name] for path, scores in scored.items() if name in scores}
    choose = max if watched.highest else min
    return choose(values, key=values.__getitem__, default=None)


def size_bytes(state: TrainState) -> int:
    """Return the size of the tensors in a checkpoint of this state, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(_content(state)))


def _content(state: TrainState) -> Content:
    return {
        "images_seen": state.images_seen,
        "student": state.networks.student.state_dict(),
        "score": state.networks.score.state_dict(),
        "student_ema": state.student_ema.state_dict(),
        "optimizers": {name: value.state_dict() for name, value in state.optimizers.items()},
        "loss_scales": {
            phase: (scale.value, scale.good_updates) for phase, scale in state.loss_scales.items()
        },
    }


def kept(folder: RunFolder) -> list[Path]:
    """Return the paths of the checkpoints, oldest first."""
    return sorted(folder.checkpoints.glob("[0-9]*.pt"))
