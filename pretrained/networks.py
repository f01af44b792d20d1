"""Loading and saving of networks: the only conversion between weights files and our modules.

A family (a plug-in of generators/ or teachers/) has a `Config`, a `build`, and `from_record`, which
returns the Config of a published pickle's network, or None for a network of another family.
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
from pretrained import files, patch_pickle, torch_checkpoint
from pretrained.files import PublishedPickle, SavedNetwork
from pretrained.nvidia_pickle import NetworkRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Origin of a network: file, record and family, and the other contents of the file."""

    path: Path
    family: str
    """Its module in generators/ or teachers/, such as "stylegan2" or "edm"."""
    record: str | None = None
    """Name in a published pickle; None in our own format of one network a file."""
    beside: tuple[str, ...] = ()
    """Names of the other objects in the pickle."""

    def __str__(self) -> str:
        """Return a sentence for the log."""
        if self.record is None:
            return f"{self.path}: {self.family} network in our format"
        others = f"also in it: {', '.join(self.beside)}" if self.beside else "nothing else in it"
        return f"{self.path}: its {self.record}, {self.family} network; {others}"


class LoadedNetwork(NamedTuple):
    """A network and its origin."""

    network: nn.Module
    source: Source


def load(folder: str, source: str | Path, *, records: Sequence[str]) -> nn.Module:
    """Return the network of a weights file as `open_file` does, and log its origin."""
    network, described = open_file(folder, source, records=records)
    _log.info("%s", described)
    return network


def open_file(folder: str, source: str | Path, *, records: Sequence[str]) -> LoadedNetwork:
    """Return the network of a weights file, in eval mode on the CPU, float32, and its origin.

    folder: "generators" or "teachers". source: path or URL of our safetensors or of a published
    pickle. records: names in a pickle, by priority; the first that exists is loaded. Raises
    UserError if the file or its network does not fit.
    """
    # our own format
    file = files.read(local_file(source))
    if isinstance(file, SavedNetwork):
        if file.family not in plugins.names(folder):
            raise _unknown(folder, f"{file.family} weights", file.path)
        network = _rebuild(folder, file.family, file.config, file.tensors, path=file.path)
        return LoadedNetwork(network, Source(file.path, file.family))

    # a published pickle
    name = next((name for name in records if name in file.records), records[0])
    record = file.record(name)
    family, shape = _match_family(folder, record, file)
    network = _rebuild(folder, family, shape, record.tensors, path=file.path)
    beside = (*(other for other in file.records if other != name), *file.beside)
    return LoadedNetwork(network, Source(file.path, family, name, beside))


def save(path: Path, network: nn.Module, *, provenance: Mapping[str, object] | None = None) -> None:
    """Write a network of ours in our format. Raises UserError if the file cannot be written."""
    shape = config_of(network)
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
    """Write a copy of a published pickle, or of a checkpoint of torch.save, with a network of ours;
    return the replaced records.

    Each of `records` in the pickle gets the network's tensors, everything else is unchanged
    (`patch_pickle.write_refined`, `torch_checkpoint.write_refined`). Raises UserError if the file
    has none of them or a network of other tensors, or if the copy cannot be written.
    """
    file = files.read(original)
    if isinstance(file, SavedNetwork):
        raise UserError(f"{original} is in our own format: only a published pickle is copied")
    replaced = tuple(name for name in records if name in file.records)
    if not replaced:
        file.record(records[0])  # raises, and lists the records of the file

    tensors = network.state_dict()
    for name in replaced:
        if lost := next((key for key in file.record(name).tensors if key not in tensors), None):
            raise UserError(f"{original}: its {name} has {lost}, which the refined network has not")
    write = torch_checkpoint if files.is_torch_checkpoint(original) else patch_pickle
    write.write_refined(original, out, dict.fromkeys(replaced, tensors))
    return replaced


def config_of(network: nn.Module) -> BaseModel:
    """Return the Config that a network of ours was built from."""
    config = network.config
    assert isinstance(config, BaseModel), type(network)
    return config


def family_of(network: nn.Module) -> str:
    """Return the plug-in name of a network of ours."""
    return type(network).__module__.rpartition(".")[2]


def _match_family(
    folder: str, record: NetworkRecord, file: PublishedPickle
) -> tuple[str, dict[str, object]]:
    """Return the family of a record, and its Config as plain data."""
    for family in plugins.names(folder):
        try:
            shape = plugins.load(folder, family).from_record(record)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error
        if shape is not None:
            return family, shape.model_dump(mode="json")
    raise _unknown(folder, f"a network of class {record.class_name}", file.path)


def _unknown(folder: str, content: str, path: Path) -> UserError:
    families = ", ".join(plugins.names(folder))
    return UserError(f"{path} holds {content}, which none of {folder}/ knows: {families}")


def _rebuild(
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
