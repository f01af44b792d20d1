"""Process group, world and device of this process, and the collective operations of a run.

Under torchrun there is a process group, nccl on CUDA and gloo on a CPU. A single process has none,
and every function here is then the identity. Each rank holds whole networks; sharding.py spreads
networks over ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from core._lifeline import exit_together
from core.errors import UserError

T = TypeVar("T")
_TIMEOUT = timedelta(hours=2)
"""Timeout of a collective operation: rank 0 alone may evaluate for a long time."""
_REST_SECONDS = 0.05
"""Pause before the group is destroyed. In torch 2.9 a gloo thread that frees its last work needs
the interpreter lock, which the group's destructor holds while it waits for that thread.
"""
_START_TIMEOUT = timedelta(minutes=10)
"""Timeout of the rendezvous with rank 0."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    """Rank among the processes of this machine."""
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> World:
        """Return the world of a single process without a process group."""
        return cls(rank=0, size=1, local_rank=0, device=torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and logs."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Join the process group if a launcher started several ranks; yield this process's world.

    A launcher is torchrun, or any program that sets the same environment variables. If a rank fails
    or is killed, the other ranks report it and exit within seconds, even out of a collective call.

    device: auto (CUDA if there is any), cpu, cuda or cuda:N. Raises UserError if there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield _world(device, rank=rank, size=size, local_rank=local_rank)
        return

    # rendezvous of all ranks
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_START_TIMEOUT))
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {size}, but the processes cannot find each other: {error}"
        ) from error

    # the group, under the lifeline that ends all ranks together
    with exit_together(store, rank=rank, size=size, local_rank=local_rank) as fresh_store:
        world = _world(device, rank=rank, size=size, local_rank=local_rank)
        is_cuda = world.device.type == "cuda"
        with _stdout_to_stderr():
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=fresh_store,
                rank=rank,
                world_size=size,
                timeout=_TIMEOUT,
                device_id=world.device if is_cuda else None,
            )

        yield world

        time.sleep(_REST_SECONDS)
        dist.destroy_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect file descriptor 1 to stderr in the body: gloo of torch 2.9 prints its greetings to
    stdout, which programs parse as a command's result.
    """
    sys.stdout.flush()
    stdout_copy = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout_copy, 1)
        os.close(stdout_copy)


def mean(tensor: Tensor, world: World) -> Tensor:
    """Return the mean over ranks of a floating-point tensor, the same on every rank, detached."""
    total = tensor.detach().clone()
    if world.size > 1:
        dist.all_reduce(total)
        total /= world.size
    return total


def all_gather_rows(tensor: Tensor, world: World) -> Tensor:
    """Return the rows of all ranks in rank order, on every rank: [N, …] -> [sum of N, …], detached.

    N may differ between ranks and may be 0.
    """
    rows = tensor.detach().contiguous()
    if world.size == 1:
        return rows

    # row counts of all ranks
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)

    # all_gather needs equal shapes: pad to the longest, cut afterwards
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(gathered, padded)
    parts = zip(gathered, counts, strict=True)
    return torch.cat([part[: int(count)] for part, count in parts])


def broadcast_from_main(value: T, world: World) -> T:
    """Return rank 0's value on every rank; values of other ranks are ignored."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def any_rank(flag: bool, world: World) -> bool:
    """Return the logical or of a flag over all ranks. A collective operation."""
    return bool(mean(torch.tensor(float(flag), device=world.device), world) > 0)


def local_range(total: int, world: World) -> range:
    """Return this rank's part of range(total): contiguous, in rank order, sizes differ by 1."""
    return range(total * world.rank // world.size, total * (world.rank + 1) // world.size)


def wrap(network: nn.Module, world: World) -> nn.Module:
    """Wrap a network in DistributedDataParallel: gradients are averaged, buffers stay local."""
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions of torch rename the argument, which the older ones do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, or the network itself."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def barrier(world: World) -> None:
    """Wait until every rank calls this."""
    if world.size > 1:
        dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Run the block on rank 0 first, then on the other ranks, which read the cache that rank 0
    filled. If rank 0 fails, the others never enter the block.
    """
    if not world.is_main:
        barrier(world)
    yield
    if world.is_main:
        barrier(world)


def main_only(world: World) -> Callable[[logging.LogRecord], bool]:
    """Return a filter for a logging handler that drops the records of all ranks but 0."""
    return lambda record: world.is_main


def _world(device: str, *, rank: int, size: int, local_rank: int) -> World:
    world = World(rank, size, local_rank, _device(device, local_rank=local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    return world


def _device(name: str, *, local_rank: int) -> torch.device:
    """Return the torch device for a name; `cuda` is the GPU with this process's local rank."""
    # parse the name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")

    # one GPU for each process of this machine
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"device {name!r} is one GPU for all processes of this machine: let each take its own, "
            "with device cuda"
        )
    index = local_rank if device.index is None else device.index
    available = torch.cuda.device_count()
    if index >= available:
        raise UserError(
            f"device {name!r}: GPU {index} was asked for, {available} found; "
            "start fewer processes, or use device cpu"
        )
    return torch.device("cuda", index)
