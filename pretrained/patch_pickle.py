"""Write a user's own network pickle again with other values in it, so that every tool that opened
the original opens the copy.

Nothing is unpickled and nothing is pickled: the file is copied byte for byte, and then the values
of the storages that change are written over those there. A storage stands in the file as it is in
memory, at the end of a torch.save, so that with dtype and shape kept no length and no other byte
changes. What several networks share in the file they go on sharing; where they would have to differ
there, or where anything else would change with them, the copy is refused.
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
    """Write a copy of a network pickle in which the named tensors have these values.

    networks: record name ("G_ema") -> name in its state dict -> tensor of the shape there, which is
    converted to the dtype there. Whatever is not named stays as it is. The copy is read again
    before it appears, whole or not at all. Raises UserError where a name, a shape or a dtype does
    not fit the file, where the values cannot be changed one without the other, where `out` is the
    original, and as `pickles.read` and `atomic_write` do.
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
    """What each stored tensor of the file is afterwards, in the order of the file."""


def _changes(
    content: Content, networks: Mapping[str, Mapping[str, Tensor]], *, path: Path
) -> _Changes:
    """Return what is to be written where. Raises UserError where that cannot be."""
    names = _names(content)
    wanted = _agreed(_requests(content, networks, path=path), names, path=path)
    expected = [wanted.get(id(use.tensor), use.tensor) for use in content.stored]
    storages = []
    for uses in _by_storage(content.stored):
        if any(id(use.tensor) in wanted for use in uses):
            storages.append(_storage_change(uses, wanted, names, path=path))
    return _Changes(storages, expected)


def _names(content: Content) -> dict[int, list[str]]:
    """Return all names in the file's networks of each tensor object, by its id."""
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
    """Yield what is asked for, as it would stand in the file."""
    stored = {id(use.tensor) for use in content.stored}
    for record_name, tensors in networks.items():
        if record_name not in content.networks:
            held = ", ".join(content.networks) or "none"
            raise UserError(f"{path} has no network {record_name}. The networks in it: {held}.")
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


def _agreed(
    requests: Iterable[_Request], names: Mapping[int, list[str]], *, path: Path
) -> dict[int, Tensor]:
    """Return the new values by the id of the tensor there, where they are new, and one object under
    several names gets the same under each.
    """
    first: dict[int, _Request] = {}
    asked = set()
    for request in requests:
        earlier = first.setdefault(id(request.there), request)
        if not _same(earlier.value, request.value):
            raise _shared(earlier.name, request.name, path)
        asked.add(request.name)
    new = {key: found for key, found in first.items() if not _same(found.value, found.there)}
    for key, found in new.items():
        for name in names[key]:
            if name not in asked:
                raise _shared(found.name, name, path)
    return {key: found.value for key, found in new.items()}


def _as_there(tensor: Tensor, there: Tensor, *, name: str, path: Path) -> Tensor:
    """Return new values in the dtype of the file, contiguous on the CPU."""
    if tensor.shape != there.shape:
        raise UserError(
            f"{path}: {name} is {list(there.shape)} there, got {list(tensor.shape)}: "
            "these weights are of another network"
        )
    given = tensor.detach().cpu()
    value = given.to(there.dtype).contiguous()
    if there.is_floating_point():
        fits = bool(torch.equal(value.isfinite(), given.isfinite()))
    else:
        fits = bool(torch.equal(value.to(given.dtype), given))
    if not fits:
        raise UserError(f"{path}: {name} is {there.dtype} there, which cannot hold the new values")
    return value


def _by_storage(stored: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    """Return the uses of each storage: the same bytes of the file are one, however often read."""
    groups: dict[object, list[StoredTensor]] = {}
    for use in stored:
        position = use.storage.position
        groups.setdefault(id(use.storage) if position is None else (position,), []).append(use)
    return list(groups.values())


def _storage_change(
    uses: list[StoredTensor],
    wanted: Mapping[int, Tensor],
    names: Mapping[int, list[str]],
    *,
    path: Path,
) -> _StorageChange:
    """Return the new values of one storage, with all that uses it as it is to be."""
    storage = uses[0].storage
    changed = {names[id(use.tensor)][0]: use for use in uses if id(use.tensor) in wanted}
    if storage.position is None or not _lies_at(path, storage.position, storage.values):
        raise UserError(
            f"{path}: the values of {next(iter(changed))} do not stand there as they are in memory "
            "(in pickle protocol 2 they are text): this file cannot be written back"
        )
    values = storage.values.clone()
    for use in changed.values():
        values[_places(use, values)] = wanted[id(use.tensor)].reshape(-1)
    for use in uses:
        if not _same(values[_places(use, values)], wanted.get(id(use.tensor), use.tensor)):
            name = names.get(id(use.tensor), [_UNNAMED])[0]
            others = [other for other in changed if other != name]
            raise _shared(name, others[0] if others else "itself", path)
    return _StorageChange(storage.position, values)


def _places(use: StoredTensor, values: Tensor) -> Tensor:
    """Return the index in its storage of each element of a tensor, flat."""
    return torch.arange(len(values)).as_strided(use.size, use.stride, use.offset).reshape(-1)


def _shared(name: str, other: str, path: Path) -> UserError:
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


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same values bit for bit, not-a-numbers too."""
    return torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def _check_written(path: Path, expected: list[Tensor]) -> None:
    """Raise where the file just written does not read as it should: that is a bug of ours."""
    written = nvidia_pickle.read(path).stored
    assert len(written) == len(expected), path
    for use, value in zip(written, expected, strict=True):
        assert _same(use.tensor, value), path
