"""How much memory is in use, and at most was: of a GPU, or of this process."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> float | None:
    """Forget the peak so far; return the MiB in use, None if the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken anew
        Path("/proc/self/clear_refs").write_text("5")
    return in_use(device)


def in_use(device: torch.device, *, peak: bool = False) -> float | None:
    """Return the MiB in use, or at most in use since `reset_peak`."""
    if device.type == "cuda":
        of = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return of() / 2**20
    if sys.platform != "linux":
        return None
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(key))
