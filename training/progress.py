"""Stats and progress: means over the last iterations, for the log, the terminal, TensorBoard.

A terminal gets a progress bar (tqdm), anything else a plain line once in a while. Stats stay
tensors until they are logged, so that no iteration waits for the device.
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
from core.run_log import Evaluation, Stats
from training.tensorboard import Events

if sys.platform != "win32":
    import resource

_log = logging.getLogger(__name__)
_LINE_EVERY_SECONDS = 15.0


class Progress:
    """Averages stats between rows of the log, and shows the progress of the run.

    Only rank 0 logs and shows them; they are means over ranks.
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

        # sums since the last row, and the rate since the start
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._evaluated: dict[str, float] = {}
        self._started_at, self._started_images = time.monotonic(), images_seen
        self._line_at = self._started_at

        # a bar on a terminal
        bar = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images {postfix}"
        self._bar = (
            tqdm(initial=images_seen, total=total_images, bar_format=bar, dynamic_ncols=True)
            if self.speaks and sys.stderr.isatty()
            else None
        )

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Add the stats of one optimizer step: name -> 0-dim tensor."""
        for name, value in stats.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_evaluation(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Log an evaluation, and show it from now on."""
        if not self.speaks:
            return
        self._evaluated.update(metrics)
        values = {name: (value,) for name, value in metrics.items()}
        self.folder.log.append(Evaluation(images_seen=images_seen, when="training", metrics=values))
        if self._events is not None:
            self._events.add(images_seen, metrics, group="evaluation")
            self._events.add_samples(images_seen)

    def log(self, images_seen: int) -> dict[str, float]:
        """Return the means since the last row of stats, after logging and showing them.

        All ranks call it, and get the same.
        """
        means = self._means()
        if self.speaks:
            rate = self._rate(images_seen)
            row = Stats(images_seen=images_seen, images_per_second=round(rate, 2), values=means)
            self.folder.log.append(row)
            if self._events is not None:
                rates = {"images_per_second": row.images_per_second}
                self._events.add(images_seen, {**rates, **means}, group="stats")
            self._show(images_seen, rate, means)
        return means

    def restart(self, images_seen: int) -> None:
        """Go on from an earlier count of images; stats since the last row are dropped."""
        self._sums, self._counts, self._evaluated = {}, {}, {}
        self._started_at, self._started_images = time.monotonic(), images_seen
        if self._bar is not None:
            self._bar.update(images_seen - self._bar.n)
        if self._events is not None:
            self._events.close()
            self._events = Events(self.folder, images_seen=images_seen)

    def _means(self) -> dict[str, float]:
        """Return the mean of each value over iterations and ranks, and reset the sums."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, distributed.mean(means, self.world).tolist(), strict=True))

    def __enter__(self) -> Progress:
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
        shown = {**means, **{f"last {name}": value for name, value in self._evaluated.items()}}
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
    """Return the peak memory so far: torch's on a GPU, else this process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    if sys.platform == "win32":
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.1f} GiB"
