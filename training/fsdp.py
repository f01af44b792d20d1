"""Networks spread over the processes, for those too large for one GPU: FSDP2, torch's
`fully_shard` (Zhao et al., 2023, arXiv 2304.11277).

A process keeps a part of each parameter, with that part's gradient and optimizer state. Layers are
gathered one after the other while the network runs and dropped again behind it, so that all
processes must run it, equally often. A single process keeps all. FSDP is imported if it is
used, which takes half a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from core.distributed import World
from core.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(network: nn.Module, world: World) -> None:
    """Shard a network's parameters over the processes, in place.

    Each entry of its lists of layers is gathered by itself, the rest together. The network cannot
    be copied any more. Raises UserError if a parameter has no dimension to split.
    """
    parameters = dict(network.named_parameters())
    if world.size == 1 or not parameters:
        return
    if undivided := [name for name, value in parameters.items() if value.dim() == 0]:
        raise UserError(
            f"training.shard: {type(network).__name__} has numbers for parameters "
            f"({undivided[0]}, …), which cannot be sharded: leave that network out"
        )

    # layer by layer, then the rest
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in list(network.modules()):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for layer in module.children():
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def gather(network: nn.Module) -> None:
    """Undo the sharding for good: full parameters on each process; all call it."""
    for module in network.modules():
        if _is_fsdp(module):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


@contextmanager
def sharding(networks: Iterable[nn.Module], world: World) -> Iterator[None]:
    """Shard the networks within the body, and gather them when it ends without an error."""
    listed = list(networks)
    for network in listed:
        shard(network, world)
    yield
    for network in listed:
        gather(network)


def is_sharded(network: nn.Module) -> bool:
    """Return whether the network's parameters are sharded."""
    return _is_fsdp(network)


def set_gradient_sync(network: nn.Module, wanted: bool) -> None:
    """Set whether a sharded network averages gradients over processes in the next backward pass."""
    if _is_fsdp(network):
        network.set_requires_gradient_sync(wanted)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard; all processes call it."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, full on all processes, sharded like another of its shape."""
    if not _is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    on_device = value.to(like.device_mesh.device_type)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def distribute_state_like(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a full state dict with its tensors sharded like the network's."""
    present = network.state_dict()
    return {k: distribute_like(v, present[k]) if k in present else v for k, v in state.items()}


def _is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def _is_fsdp(network: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(network, "set_requires_gradient_sync")
