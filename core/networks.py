"""Networks from files and into files: the one place that turns a weights file into a module of
ours.

A family (a plug-in of generators/ or teachers/) has a `Config`, a `build`, and `from_record`, which
gives the Config of a published pickle's network where that network is of this family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor, nn

from core import config, plugins, weights
from core.downloads import local_file
from core.errors import UserError
from core.pickles import NetworkRecord
from core.weights import PublishedPickle, SavedNetwork


def load(folder: str, source: str | Path, *, records: Sequence[str]) -> nn.Module:
    """Return the network of a weights file, in eval mode on the CPU, float32.

    folder: "generators" or "teachers". source: path or URL of our safetensors or of a published
    pickle, where the first of `records` that the file holds is taken. Raises UserError where the
    file or what it holds does not fit.
    """
    file = weights.read(local_file(source))
    if isinstance(file, SavedNetwork):
        if file.family not in plugins.names(folder):
            raise _unknown(folder, f"a {file.family} network", file.path)
        return _rebuilt(folder, file.family, file.config, file.tensors, path=file.path)
    name = next((name for name in records if name in file.records), records[0])
    record = file.record(name)
    family, shape = _claimed(folder, record, file)
    return _rebuilt(folder, family, shape, record.tensors, path=file.path)


def save(path: Path, network: nn.Module, *, provenance: Mapping[str, object] | None = None) -> None:
    """Write a network of ours for `load` to rebuild. Raises UserError where the disk refuses."""
    shape = network.config
    assert isinstance(shape, BaseModel), type(network)
    weights.save(
        path,
        family=family_of(network),
        config=shape.model_dump(mode="json"),
        tensors=network.state_dict(),
        provenance=provenance,
    )


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
