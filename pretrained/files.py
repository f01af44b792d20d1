"""Read and write network files: ours (safetensors), the pickles that NVIDIA publishes, and the
checkpoints of torch.save (torch_checkpoint.py).

The format is detected from a file's content, never from its name. Our format is a safetensors file
whose metadata has "format" (gan-refinement-toolkit/1), "network" (JSON: family, config) and,
optionally, "provenance" (JSON). Networks are built from the data by their families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from core.disk import atomic_write, parsed_json
from core.errors import UserError
from pretrained import nvidia_pickle, torch_checkpoint
from pretrained.nvidia_pickle import NetworkRecord

_FORMAT = "gan-refinement-toolkit/1"
_LONGEST_HEADER_BYTES = 100_000_000
"""Limit in the specification of safetensors."""
_TORCH_SAVE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of torch.save's legacy format, before its zip archives."""


@dataclass(frozen=True, eq=False)
class SavedNetwork:
    """One network in our own format."""

    path: Path
    family: str
    """Its module in generators/ or teachers/, such as "stylegan2" or "edm"."""
    config: dict[str, object]
    """The fields of that module's Config."""
    tensors: dict[str, Tensor] = field(repr=False)
    """The state dict, on the CPU, with the dtypes of the file."""
    provenance: dict[str, object] = field(default_factory=dict)
    """Origin of the weights, as written by the program that saved them."""


@dataclass(frozen=True, eq=False)
class PublishedPickle:
    """The networks of a StyleGAN or EDM pickle, as data."""

    path: Path
    records: dict[str, NetworkRecord]
    """By their names in the file: "G", "D", "G_ema"; "ema"."""
    beside: tuple[str, ...] = ()
    """Names of the other objects in the file: losses, augmentations, options."""

    def record(self, name: str) -> NetworkRecord:
        """Return the network of this name. Raises UserError that lists those in the file."""
        if name not in self.records:
            names = ", ".join(self.records) or "none"
            raise UserError(f"{self.path} has no network {name}. The networks in it: {names}.")
        return self.records[name]


def read(path: str | Path) -> SavedNetwork | PublishedPickle:
    """Return a network file as data; the format is detected from its content.

    Raises UserError if the file is missing, damaged or of another format.
    """
    path = Path(path)
    start = _start(path)
    if _is_safetensors(start):
        return _read_saved(path)
    if _is_pickle(start):
        return _read_pickle(path)
    if is_torch_checkpoint(path):
        return PublishedPickle(path, torch_checkpoint.read(path))
    raise UserError(f"{path} {_problem(start, path.stat().st_size)}")


def is_pickle(path: str | Path) -> bool:
    """Return whether a file starts like a published pickle; UserError if it is unreadable."""
    return _is_pickle(_start(Path(path)))


def is_torch_checkpoint(path: str | Path) -> bool:
    """Return whether a file is of torch.save, in its zip archive or its format before that.

    Raises UserError if it cannot be read.
    """
    start = _start(Path(path))
    if start.startswith(_TORCH_SAVE):
        return True
    return start.startswith(b"PK\x03\x04") and b"/data.pkl" in start


def _read_pickle(path: Path) -> PublishedPickle:
    content = nvidia_pickle.read(path)
    records = content.networks
    present = (name for name, value in content.top.items() if value is not None)
    beside = tuple(name for name in present if name not in records)
    return PublishedPickle(path, records, beside)


def save(
    path: str | Path,
    *,
    family: str,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Write one network in our format, atomically.

    config and provenance are plain JSON data. Raises UserError if the file cannot be written; an
    existing file at the path is then unchanged.
    """
    metadata = {"format": _FORMAT, "network": _json({"family": family, "config": dict(config)})}
    if provenance is not None:
        metadata["provenance"] = _json(dict(provenance))
    own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    content = safetensors.torch.save({k: v.contiguous() for k, v in own.items()}, metadata)
    with atomic_write(Path(path)) as partial:
        partial.write_bytes(_in_order(content))


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with sorted metadata: the library's order is random."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = parsed_json(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _is_pickle(start: bytes) -> bool:
    return start[:1] == b"\x80" and not start.startswith(_TORCH_SAVE)


def _is_safetensors(start: bytes) -> bool:
    header_bytes = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 2 <= header_bytes <= _LONGEST_HEADER_BYTES


def _read_saved(path: Path) -> SavedNetwork:
    # tensors and metadata
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or damaged: it starts as a safetensors file and does not go on "
            "as one. Get it again."
        ) from error

    # family and config
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} is a safetensors file of another origin: expected the format {_FORMAT}, found "
            f"{metadata.get('format', 'none')}. Give a file that this version saved, or a pickle."
        )
    try:
        network = parsed_json(metadata["network"])
        family, config = network["family"], dict(network["config"])
        provenance = dict(parsed_json(metadata.get("provenance", "{}")))
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} says that its format is {_FORMAT}, but its metadata names no family and "
            "config. Save it again."
        ) from error
    return SavedNetwork(path, family, config, tensors, provenance)


def _problem(start: bytes, size: int) -> str:
    """Return the problem of a file without a network and its fix, to follow the file's name."""
    # well-known other files
    text = start.lstrip().lower()
    if size == 0:
        return "is empty. Get it again."
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not weights: its link led to a page. Download the file itself."
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights. Run `git lfs pull` where it comes from."
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive, and no checkpoint of torch.save: images in a zip are no weights."

    if size < 16:
        return f"is truncated: it has {size} bytes. Get it again."
    return (
        "is no network file: expected our safetensors, a StyleGAN or EDM pickle, or a torch.save."
    )
