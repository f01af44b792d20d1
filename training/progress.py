"""Progress and readings: means over the last rounds go to the run folder and to the terminal, and
to TensorBoard where that is wanted.

On a terminal a progress bar (tqdm); elsewhere a plain line once in a while. Readings stay tensors
until they are shown, so that a round never waits for the device.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor
from tqdm import tqdm

from core import distributed
from core.distributed import World
from core.run_folder import RunFolder
from training.tensorboard import Events

if sys.platform != "win32":
    import resource

_log = logging.getLogger(__name__)
_LINE_EVERY_SECONDS = 15.0


class Status:
    """Collects readings between rows of readings.jsonl, and shows how far the run is.

    Only rank 0 speaks, for all: readings are means over ranks.
    """

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        *,
        images_seen: int,
        total_images: int,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.world, self.total_images = folder, world, total_images
        self.speaks = world.is_main
        wants_events = tensorboard and self.speaks
        self._events = Events(folder, images_seen=images_seen) if wants_events else None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._measured: dict[str, float] = {}
        self._started_at, self._started_images = time.monotonic(), images_seen
        self._line_at = self._started_at
        bar = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images {postfix}"
        self._bar = (
            tqdm(initial=images_seen, total=total_images, bar_format=bar, dynamic_ncols=True)
            if self.speaks and sys.stderr.isatty()
            else None
        )

    def add(self, readings: Mapping[str, Tensor]) -> None:
        """Take in the readings of one update: name -> 0-dim tensor."""
        for name, value in readings.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def measured(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write down a measurement, and show it from now on."""
        if not self.speaks:
            return
        self._measured.update(metrics)
        self.folder.append_reading({"images_seen": images_seen, "measured": dict(metrics)})
        if self._events is not None:
            self._events.add(images_seen, metrics, group="measured")
            self._events.add_samples(images_seen)

    def row(self, images_seen: int) -> dict[str, float]:
        """Return the means since the last row, after writing them to readings.jsonl and showing
        them; all ranks call it, and get the same.
        """
        means = self._means()
        if self.speaks:
            rate = self._rate(images_seen)
            values = {"images_per_second": round(rate, 2), **means}
            self.folder.append_reading({"images_seen": images_seen, **values})
            if self._events is not None:
                self._events.add(images_seen, values, group="readings")
            self._show(images_seen, rate, means)
        return means

    def begin_again(self, images_seen: int) -> None:
        """Go on from an earlier point: what was collected since the last row is dropped."""
        self._sums, self._counts, self._measured = {}, {}, {}
        self._started_at, self._started_images = time.monotonic(), images_seen
        if self._bar is not None:
            self._bar.update(images_seen - self._bar.n)
        if self._events is not None:
            self._events.close()
            self._events = Events(self.folder, images_seen=images_seen)

    def _means(self) -> dict[str, float]:
        """Return the mean of each reading over rounds and ranks, and begin anew."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, distributed.mean(means, self.world).tolist(), strict=True))

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _rate(self, images_seen: int) -> float:
        return (images_seen - self._started_images) / (time.monotonic() - self._started_at)

    def _show(self, images_seen: int, rate: float, means: Mapping[str, float]) -> None:
        remaining = max(self.total_images - images_seen, 0)
        left = timedelta(seconds=round(remaining / max(rate, 1e-9)))
        shown = {**means, **{f"last {name}": value for name, value in self._measured.items()}}
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        text = f"{rate:.0f} images/s  {left} left  {_memory(self.world.device)}  {values}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(images_seen - self._bar.n)
            return
        now = time.monotonic()
        if now - self._line_at >= _LINE_EVERY_SECONDS or images_seen >= self.total_images:
            self._line_at = now
            _log.info("%d/%d images  %s", images_seen, self.total_images, text)


def _memory(device: torch.device) -> str:
    """Return the most memory so far: of the GPU, what torch had in use; else, of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    if sys.platform == "win32":
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.1f} GiB"
