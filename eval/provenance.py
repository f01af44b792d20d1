"""Provenance of a measurement: reference, extractor, versions, code and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from eval.features import Extractor
from eval.reference import Reference

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ReferenceName:
    """Real images of the comparison."""

    name: str
    sha256: str
    images: int | None

    @classmethod
    def of(cls, reference: Reference) -> ReferenceName:
        """Return the name of a reference."""
        return cls(reference.source, reference.sha256, reference.images)


@dataclass(frozen=True)
class ExtractorName:
    """Extractor of the compared features."""

    name: str
    sha256: str

    @classmethod
    def of(cls, extractor: Extractor) -> ExtractorName:
        """Return the name of an extractor."""
        return cls(extractor.name, extractor.sha256)


@dataclass(frozen=True)
class Environment:
    """Versions, code and hardware of a run."""

    versions: Mapping[str, str]
    git_commit: str | None
    """None outside a git checkout."""
    git_dirty: bool | None
    """Whether the checkout differed from its commit."""
    hardware: str
    """Processor or accelerator, in words."""

    @classmethod
    def here(cls, device: torch.device | str = "cpu", *, processes: int = 1) -> Environment:
        """Return the environment of this process, one of so many on like devices."""
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--untracked-files=no")
        return cls(
            _versions(),
            commit,
            None if status is None else bool(status),
            hardware(device, processes),
        )


def _versions() -> dict[str, str]:
    ours = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return {
        ours["name"]: ours["version"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cu128
        **{name: metadata.version(name) for name in ("torch-fidelity", "numpy")},
    }


def _git(*arguments: str) -> str | None:
    """Return git's output about this checkout; None if git cannot tell."""
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware(device: torch.device | str, processes: int) -> str:
    """Return the hardware of the processes, each on a GPU of its own or all on CPUs."""
    device = torch.device(device)
    cores = f"{os.cpu_count()} CPU cores ({_processor()})"
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}, {cores}"
    return cores if processes == 1 else f"{processes} processes, {cores}"


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
