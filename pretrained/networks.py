"""Networks from files and into files: the one place that turns a weights file into a module of
ours.

A family (a plug-in of generators/ or teachers/) has a `Config`, a `build`, and `from_record`, which
gives the Config of a published pickle's network where that network is of this family.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel
from torch import Tensor, nn

from core import config, plugins
from core.downloads import local_file
from core.errors import UserError
from pretrained import files, patch_pickle
from pretrained.files import PublishedPickle, SavedNetwork
from pretrained.nvidia_pickle import NetworkRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Which part of which file a network is, and what else the file holds."""

    path: Path
    sha256: str
    family: str
    """The module that builds it, such as "stylegan2" or "edm"."""
    record: str | None = None
    """Its name in a published pickle; None in our own format, whose files hold one network."""
    beside: tuple[str, ...] = ()
    """Names of what else the pickle holds."""

    def __str__(self) -> str:
        """Return all of it as a sentence for a log."""
        if self.record is None:
            return f"{self.path}: {self.family} network in our format"
        others = f"also in it: {', '.join(self.beside)}" if self.beside else "nothing else in it"
        return f"{self.path}: its {self.record}, {self.family} network; {others}"


class Opened(NamedTuple):
    """A network, and where it comes from."""

    network: nn.Module
    source: Source


def load(folder: str, source: str | Path, *, records: Sequence[str]) -> nn.Module:
    """Return the network of a weights file as `open_file` does, and log what was taken from it."""
    network, described = open_file(folder, source, records=records)
    _log.info("%s", described)
    return network


def open_file(folder: str, source: str | Path, *, records: Sequence[str]) -> Opened:
    """Return the network of a weights file, in eval mode on the CPU, float32, and what it is there.

    folder: "generators" or "teachers". source: path or URL of our safetensors or of a published
    pickle, where the first of `records` that the file holds is taken. Raises UserError where the
    file or what it holds does not fit.
    """
    file = files.read(local_file(source))
    if isinstance(file, SavedNetwork):
        if file.family not in plugins.names(folder):
            raise _unknown(folder, f"{file.family} weights", file.path)
        network = _rebuilt(folder, file.family, file.config, file.tensors, path=file.path)
        return Opened(network, Source(file.path, file.sha256, file.family))
    name = next((name for name in records if name in file.records), records[0])
    record = file.record(name)
    family, shape = _claimed(folder, record, file)
    network = _rebuilt(folder, family, shape, record.tensors, path=file.path)
    beside = (*(other for other in file.records if other != name), *file.beside)
    return Opened(network, Source(file.path, file.sha256, family, name, beside))


def save(path: Path, network: nn.Module, *, provenance: Mapping[str, object] | None = None) -> None:
    """Write a network of ours for `load` to rebuild. Raises UserError where the disk refuses."""
    shape = network.config
    assert isinstance(shape, BaseModel), type(network)
    files.save(
        path,
        family=family_of(network),
        config=shape.model_dump(mode="json"),
        tensors=network.state_dict(),
        provenance=provenance,
    )


def save_refined(
    original: Path, out: Path, network: nn.Module, *, records: Sequence[str]
) -> tuple[str, ...]:
    """Write a copy of a published pickle that carries a network of ours; return where in it.

    Each of `records` that the pickle holds gets the network's tensors; all else stays as it is
    (`pickle_writing.write_refined`). Raises UserError where the pickle holds none of them or a
    network of other tensors, or the copy cannot be written.
    """
    file = files.read(original)
    if isinstance(file, SavedNetwork):
        raise UserError(f"{original} is in our own format: only a published pickle is copied")
    found = tuple(name for name in records if name in file.records)
    if not found:
        file.record(records[0])  # raises, and lists what is there
    tensors = network.state_dict()
    for name in found:
        if lost := next((key for key in file.record(name).tensors if key not in tensors), None):
            raise UserError(f"{original}: its {name} has {lost}, which the refined network has not")
    patch_pickle.write_refined(original, out, dict.fromkeys(found, tensors))
    return found


def family_of(network: nn.Module) -> str:
    """Return the name of the plug-in that a network of ours comes from."""
    return type(network).__module__.rpartition(".")[2]


def _claimed(
    folder: str, record: NetworkRecord, file: PublishedPickle
) -> tuple[str, dict[str, object]]:
    """Return the family that knows the record's class, and its Config as plain data."""
    for family in plugins.names(folder):
        try:
            shape = plugins.load(folder, family).from_record(record)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error
        if shape is not None:
            return family, shape.model_dump(mode="json")
    raise _unknown(folder, f"a network of class {record.class_name}", file.path)


def _unknown(folder: str, held: str, path: Path) -> UserError:
    known = ", ".join(plugins.names(folder))
    return UserError(f"{path} holds {held}, which none of {folder}/ knows: {known}")


def _rebuilt(
    folder: str,
    family: str,
    shape: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    path: Path,
) -> nn.Module:
    _check_finite(tensors, path=path, family=family)
    module = plugins.load(folder, family)
    network = module.build(config.validate(module.Config, shape, source=f"{path} ({family})"))
    try:
        network.load_state_dict(
            {name: tensor.float() for name, tensor in tensors.items()}, strict=True
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:600]
        raise UserError(
            f"{path}: its tensors are not those of a {family} network: {detail}"
        ) from error
    return network.eval()


def _check_finite(tensors: Mapping[str, Tensor], *, path: Path, family: str) -> None:
    """Raise UserError that names the tensors with NaN or infinite values."""
    damaged = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if damaged:
        others = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(
            f"{path}: {damaged[0]}{others} of its {family} network has values that are not finite "
            "(NaN or infinite): the training that wrote the file diverged; choose an earlier file"
        )
