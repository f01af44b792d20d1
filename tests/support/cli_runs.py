"""The command `refine.py`, called in this process, and a recipe that it runs in a moment."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import refine

TINY = """
student:
  family: stylegan2
  config:
    img_resolution: 8
    img_channels: 1
    z_dim: 8
    w_dim: 8
    mapping: {num_layers: 1}
    channel_base: 64
    channel_max: 8
teacher:
  family: gaussian
  config: {image_shape: [1, 8, 8], components: 2, seed: 1}
objective: {name: diff_instruct}
training:
  duration_kimg: 0.08
  batch_size: 8
  student_lr: 1e-3
  score_lr: 1e-3
  ema_halflife_kimg: 0.01
  stats_every_kimg: 0.016
  checkpoint_every_kimg: 0.032
evaluation:
  reference: teacher
  extractor: pixels
  images: 200
  seeds: 2
  every_kimg: 0.032
  images_while_training: 100
  pairs: 4
device: cpu
"""
"""Ten iterations: stats after every second, checkpoints and evaluations after every fourth."""


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def call(*arguments: str | Path) -> Outcome:
    """Return exit code and output of the command; an exception that it lets through is raised."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with redirect_stdout(stdout), redirect_stderr(stderr), _logging_kept():
        try:
            refine.main([str(argument) for argument in arguments], prog_name="refine.py")
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), code
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def tiny_recipe(folder: Path) -> Path:
    """Return the path of the tiny recipe in a folder, after writing it."""
    path = folder / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by its path from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Give pytest its handlers back: the command sets up logging for itself."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
