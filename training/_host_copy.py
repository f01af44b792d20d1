"""Host copies of a state's tensors, in the memory of the previous copies.

New memory is slow to come by: the system clears each page when it is first written to.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from training.fsdp import full_tensor

T = TypeVar("T")


def copy_to_host(value: T, before: object = None) -> T:
    """Return a CPU copy of the tensors in dicts and lists, with their strides; shards become
    full tensors.

    before: an earlier copy, whose tensors are overwritten if they fit; the copy may hold them.
    """
    return cast(T, _copy_value(value, before))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in dicts and lists, in the order in which they are copied."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(below)


def _copy_value(value: object, before: object) -> object:
    if isinstance(value, Tensor):
        return _tensor(full_tensor(value.detach()), before)
    if isinstance(value, dict):
        earlier = before if isinstance(before, Mapping) else {}
        result = copy.copy(value)  # keeps a state dict's `_metadata`
        result.update({key: _copy_value(below, earlier.get(key)) for key, below in value.items()})
        return result
    if isinstance(value, (list, tuple)):
        earlier = before if isinstance(before, Sequence) else ()
        pairs = zip(value, itertools.chain(earlier, itertools.repeat(None)), strict=False)
        return type(value)(_copy_value(*pair) for pair in pairs)
    return value


def _tensor(value: Tensor, before: object) -> Tensor:
    """Return a copy of a tensor: the earlier one overwritten if it has the same form."""
    if (
        isinstance(before, Tensor)
        and (before.dtype, before.shape) == (value.dtype, value.shape)
        and before.stride() == value.stride()
    ):
        return before.copy_(value)
    return torch.empty_like(value, device="cpu").copy_(value)
