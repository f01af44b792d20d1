"""TensorBoard's event files, RUN/tensorboard: stats, evaluations and sample grids.

They are a copy of stats.jsonl and samples/, which also survive a crash.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import numpy as np
from PIL import Image

from core.errors import UserError
from core.run_folder import RunFolder

PACKAGE = "tensorboard"


def require_package() -> None:
    """Raise UserError if the package that writes event files is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"training.tensorboard is on, and the package {PACKAGE} is missing: "
            f"pip install {PACKAGE}, or leave the setting out"
        )


class Events:
    """Writes event files for a run that stands at images_seen: later steps of earlier files, which
    will be written again, are not shown any more.
    """

    def __init__(self, folder: RunFolder, *, images_seen: int) -> None:
        require_package()
        # Imported where it is wanted: the package is an extra, and slow to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        path = folder.path / "tensorboard"
        self._writer = SummaryWriter(path, purge_step=images_seen + 1 if path.exists() else None)

    def add(self, images_seen: int, values: Mapping[str, float], *, group: str) -> None:
        """Add a point to the curve of each value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, images_seen)
        self._writer.flush()

    def add_samples(self, images_seen: int) -> None:
        """Add the sample grid of this point, if one was written."""
        path = self.folder.samples / f"{images_seen:012d}.png"
        if path.exists():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("samples", pixels, images_seen, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        """Have everything in the file."""
        self._writer.close()
