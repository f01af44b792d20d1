"""Which process this is, on which device, and the few things that processes do together.

Under torchrun there is a process group, nccl on CUDA and gloo on a CPU. A single process has none,
and every function here is then the identity. Each rank holds whole networks; sharding.py has those
that are spread over ranks.
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

from core._lifeline import ending_together
from core.errors import UserError

T = TypeVar("T")
_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for another: rank 0 alone may measure a long time."""
_REST_SECONDS = 0.05
"""In torch 2.9 a thread of gloo that still frees its last work needs the interpreter, while the
group's destructor holds that and waits for the thread: it is given the time to end.
"""
_START_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for rank 0 to be there."""


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
        """Return whether this is the one process that writes and speaks."""
        return self.rank == 0


@contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """Yield this process's world, in a process group where torchrun, or what sets the same
    variables, started several. Those end together: where one fails or is killed, the others say so
    and end within seconds, whatever they wait for.

    device: auto (CUDA if there is any), cpu, cuda or cuda:N. Raises UserError if there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield _world(device, rank=rank, size=size, local_rank=local_rank)
        return
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_START_TIMEOUT))
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {size}, but the processes cannot find each other: {error}"
        ) from error
    with ending_together(store, rank=rank, size=size, local_rank=local_rank) as fresh_store:
        world = _world(device, rank=rank, size=size, local_rank=local_rank)
        is_cuda = world.device.type == "cuda"
        with _saying_nothing_on_stdout():
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
def _saying_nothing_on_stdout() -> Iterator[None]:
    """Run the body with what its libraries print to stdout on stderr: gloo's greetings of torch 2.9
    would stand in the way of a program that reads a command's result.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def mean(tensor: Tensor, world: World) -> Tensor:
    """Return the mean over ranks of a floating-point tensor, equal on every rank, no graph."""
    total = tensor.detach().clone()
    if world.size > 1:
        dist.all_reduce(total)
        total /= world.size
    return total


def gather_rows(tensor: Tensor, world: World) -> Tensor:
    """Return the rows of all ranks, in rank order, on every rank: [sum of N, …] from [N, …].

    N may differ from rank to rank and may be 0. Without graph.
    """
    rows = tensor.detach().contiguous()
    if world.size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(gathered, padded)
    parts = zip(gathered, counts, strict=True)
    return torch.cat([part[: int(count)] for part, count in parts])


def from_main(value: T, world: World) -> T:
    """Return rank 0's value on every rank; what the others gave is dropped."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is up on any rank; the same answer on all, which all wait for."""
    return bool(mean(torch.tensor(float(flag), device=world.device), world) > 0)


def shard(total: int, world: World) -> range:
    """Return this rank's share of range(total): contiguous, in rank order, as even as can be."""
    return range(total * world.rank // world.size, total * (world.rank + 1) // world.size)


def wrap(network: nn.Module, world: World) -> nn.Module:
    """Return the network whose gradients are averaged over ranks; buffers stay each rank's own."""
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions of torch rename the argument, which the older ones do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network itself, whether or not it was wrapped."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let rank 0 run the block before the others do: it fills a cache, they find it filled. Where
    it fails, they do not begin.
    """
    if not world.is_main:
        barrier(world)
    yield
    if world.is_main:
        barrier(world)


def main_only(world: World) -> Callable[[logging.LogRecord], bool]:
    """Return a filter for a logging handler that lets rank 0 alone speak."""
    return lambda record: world.is_main


def _world(device: str, *, rank: int, size: int, local_rank: int) -> World:
    world = World(rank, size, local_rank, _device(device, local_rank=local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    return world


def _device(name: str, *, local_rank: int) -> torch.device:
    """Return the device of a name, with this process's own GPU where several share a machine."""
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
