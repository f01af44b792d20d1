"""Copies of network pickles with other tensor values, for every tool that opens the original.

Nothing is unpickled or pickled: the file is copied byte for byte, then the values of the changed
storages are overwritten in place. A storage has the same bytes in the file as in memory, at the end
of a torch.save, so with equal dtypes and shapes no length and no other byte changes. Shared tensors
stay shared. The copy is refused if sharing networks would have to differ, or if any other tensor
would change too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.disk import atomic_write
from core.errors import UserError
from pretrained import nvidia_pickle
from pretrained.nvidia_pickle import Content, StoredTensor

_UNNAMED = "a tensor that is in no network"


def write_refined(
    original: str | Path, out: str | Path, networks: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a copy of a network pickle with new values of the named tensors, atomically.

    networks: record name ("G_ema") -> name in its state dict -> tensor of the same shape, which is
    converted to the dtype of the file. All other tensors are unchanged. The copy is read again and
    checked before it is renamed to `out`. Raises UserError if a name, a shape or a dtype does not
    fit the file, if a storage is shared with an unchanged tensor, if `out` is the original, and as
    `nvidia_pickle.read` and `atomic_write` do.
    """
    original, out = Path(original), Path(out)
    content = nvidia_pickle.read(original)
    if out.exists() and out.samefile(original):
        raise UserError(f"{out} is the original itself: give another name for the refined file")
    changes = _changes(content, networks, path=original)
    with atomic_write(out) as partial:
        shutil.copyfile(original, partial)
        with partial.open("r+b") as file:
            for change in changes.storages:
                file.seek(change.position)
                file.write(_bytes_of(change.values))
        _check_written(partial, changes.expected)


@dataclass(frozen=True, eq=False)
class _StorageChange:
    position: int
    values: Tensor


@dataclass(frozen=True, eq=False)
class _Changes:
    storages: list[_StorageChange]
    expected: list[Tensor]
    """New value of each stored tensor, in the order of the file."""


def _changes(
    content: Content, networks: Mapping[str, Mapping[str, Tensor]], *, path: Path
) -> _Changes:
    """Return the new bytes of each changed storage. Raises UserError if they conflict."""
    names = _names(content)
    new_values = _new_values(_requests(content, networks, path=path), names, path=path)
    expected = [new_values.get(id(use.tensor), use.tensor) for use in content.stored]
    storages = []
    for uses in _by_storage(content.stored):
        if any(id(use.tensor) in new_values for use in uses):
            storages.append(_storage_change(uses, new_values, names, path=path))
    return _Changes(storages, expected)


def _names(content: Content) -> dict[int, list[str]]:
    """Return tensor id -> all its names in the file's networks."""
    names: dict[int, list[str]] = {}
    for record_name, record in content.networks.items():
        for key, tensor in record.tensors.items():
            names.setdefault(id(tensor), []).append(f"{record_name}.{key}")
    return names


class _Request(NamedTuple):
    name: str
    there: Tensor
    value: Tensor


def _requests(
    content: Content, networks: Mapping[str, Mapping[str, Tensor]], *, path: Path
) -> Iterator[_Request]:
    """Yield the requested values, converted to the dtypes of the file."""
    stored = {id(use.tensor) for use in content.stored}
    for record_name, tensors in networks.items():
        if record_name not in content.networks:
            records = ", ".join(content.networks) or "none"
            raise UserError(f"{path} has no network {record_name}. The networks in it: {records}.")

        there = content.networks[record_name].tensors
        for key, tensor in tensors.items():
            name = f"{record_name}.{key}"
            if key not in there:
                raise UserError(
                    f"{path} has no tensor {name}: these weights are of another network"
                )
            if id(there[key]) not in stored:
                raise UserError(
                    f"{path}: {name} is not kept as a torch storage there: TensorFlow's networks "
                    "are not written back. Convert the file with the published legacy.py first"
                )
            yield _Request(name, there[key], _as_there(tensor, there[key], name=name, path=path))


def _new_values(
    requests: Iterable[_Request], names: Mapping[int, list[str]], *, path: Path
) -> dict[int, Tensor]:
    """Return tensor id in the file -> new value, for the tensors that change.

    Raises UserError unless all names of one tensor get the same value.
    """
    # equal values under all requested names
    first: dict[int, _Request] = {}
    requested = set()
    for request in requests:
        earlier = first.setdefault(id(request.there), request)
        if not _same(earlier.value, request.value):
            raise _sharing_error(earlier.name, request.name, path)
        requested.add(request.name)

    # a changed tensor must be requested under all its names
    new = {key: request for key, request in first.items() if not _same(*request[1:])}
    for key, request in new.items():
        for name in names[key]:
            if name not in requested:
                raise _sharing_error(request.name, name, path)
    return {key: request.value for key, request in new.items()}


def _as_there(tensor: Tensor, there: Tensor, *, name: str, path: Path) -> Tensor:
    """Return new values in the dtype of the file, contiguous on the CPU."""
    if tensor.shape != there.shape:
        raise UserError(
            f"{path}: {name} is {list(there.shape)} there, got {list(tensor.shape)}: "
            "these weights are of another network"
        )
    tensor = tensor.detach().cpu()
    value = tensor.to(there.dtype).contiguous()
    if there.is_floating_point():
        fits = bool(torch.equal(value.isfinite(), tensor.isfinite()))
    else:
        fits = bool(torch.equal(value.to(tensor.dtype), tensor))
    if not fits:
        raise UserError(f"{path}: {name} is {there.dtype} there, which cannot hold the new values")
    return value


def _by_storage(stored: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    """Return the stored tensors grouped by storage; a storage read twice is one group."""
    groups: dict[object, list[StoredTensor]] = {}
    for use in stored:
        position = use.storage.position
        groups.setdefault(id(use.storage) if position is None else (position,), []).append(use)
    return list(groups.values())


def _storage_change(
    uses: list[StoredTensor],
    new_values: Mapping[int, Tensor],
    names: Mapping[int, list[str]],
    *,
    path: Path,
) -> _StorageChange:
    """Return a storage's new values. Raises UserError if an unchanged tensor would change."""
    # the storage must be in the file as in memory
    storage = uses[0].storage
    changed = {names[id(use.tensor)][0]: use for use in uses if id(use.tensor) in new_values}
    if storage.position is None or not _lies_at(path, storage.position, storage.values):
        raise UserError(
            f"{path}: the values of {next(iter(changed))} do not stand there as they are in memory "
            "(in pickle protocol 2 they are text): this file cannot be written back"
        )

    # write all changed tensors, then compare all tensors of the storage
    values = storage.values.clone()
    for use in changed.values():
        values[_indices(use, values)] = new_values[id(use.tensor)].reshape(-1)
    for use in uses:
        if not _same(values[_indices(use, values)], new_values.get(id(use.tensor), use.tensor)):
            name = names.get(id(use.tensor), [_UNNAMED])[0]
            others = [other for other in changed if other != name]
            raise _sharing_error(name, others[0] if others else "itself", path)
    return _StorageChange(storage.position, values)


def _indices(use: StoredTensor, values: Tensor) -> Tensor:
    """Return the index of each element of a tensor in its storage, flat."""
    return torch.arange(len(values)).as_strided(use.size, use.stride, use.offset).reshape(-1)


def _sharing_error(name: str, other: str, path: Path) -> UserError:
    return UserError(
        f"{path}: {name} and {other} share values there, and would have to differ now: "
        "this file cannot be written back"
    )


def _lies_at(path: Path, position: int, values: Tensor) -> bool:
    with path.open("rb") as file:
        file.seek(position)
        return file.read(values.nbytes) == _bytes_of(values)


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, including NaNs."""
    return torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    )


def _check_written(path: Path, expected: list[Tensor]) -> None:
    """Assert that the new file reads as expected."""
    written = nvidia_pickle.read(path).stored
    assert len(written) == len(expected), path
    for use, value in zip(written, expected, strict=True):
        assert _same(use.tensor, value), path
