"""A function run as each of several gloo processes on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

import torch
from torch import multiprocessing

from core import distributed


def run_as_ranks(
    body: Callable[..., None], *arguments: object, size: int = 2, preload: Sequence[str] = ()
) -> None:
    """Call body(world, *arguments) in each of `size` processes; the first error ends all.

    body: a function of a module. preload: modules that are imported once for all processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch.distributed", *preload])
    multiprocessing.start_processes(
        _as_rank, args=(body, arguments, size, port), nprocs=size, start_method="forkserver"
    )


def _as_rank(
    rank: int, body: Callable[..., None], arguments: Sequence[object], size: int, port: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.process_group("cpu") as world:
        body(world, *arguments)
