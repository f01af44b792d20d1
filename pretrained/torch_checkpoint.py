"""Checkpoints of torch.save: state dicts by name, read as data (weights_only) and written back.

A checkpoint is a dict of state dicts (`g_ema`, `state_dict`, …), or one state dict. Of a state
dict, `module.` of DataParallel is taken off, and the names of rosinality's StyleGAN2 (`style.1`,
`convs.0.conv`, …; StyleGAN-NADA, e4e and pSp have them too) become NVIDIA's, whose settings a
family infers from the shapes.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from torch import Tensor

from core.disk import atomic_write
from core.errors import UserError
from pretrained.nvidia_pickle import NetworkRecord

STATE_DICT = "state dict"
"""Class name of a record that is a bare state dict, without constructor arguments."""
_RECORDS = {
    "G_ema": ("g_ema", "G_ema", "generator_ema", "ema", "params_ema", "state_dict", "generator"),
    "G": ("g", "G"),
}
"""Name of a record -> keys of a checkpoint that hold it, by priority."""
_WHOLE = ""
"""Key of a checkpoint that is one state dict itself."""
_DECODER = "decoder."
"""Prefix of the generator in the checkpoints of encoders (e4e, pSp)."""
_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, UnpicklingError)


def read(path: Path) -> dict[str, NetworkRecord]:
    """Return the generators of a checkpoint by their names, G_ema and G.

    Raises UserError if the file is damaged, holds other objects than tensors and plain data, or no
    state dict.
    """
    content = _loaded(path)
    records = {}
    for name, keys in _RECORDS.items():
        key = next((key for key in (*keys, _WHOLE) if _is_state(_part(content, key))), None)
        if key is None or (key == _WHOLE and name != "G_ema"):
            continue
        state = _generator(_plain(_part(content, key)))
        average = content.get("latent_avg")
        if _is_rosinality(state):
            state = from_rosinality(state, average if isinstance(average, Tensor) else None)
        records[name] = NetworkRecord(STATE_DICT, tensors=state)
    if not records:
        raise UserError(
            f"{path} is a checkpoint of torch.save without a generator: expected a state dict, or "
            f"one under {', '.join(key for keys in _RECORDS.values() for key in keys)}; it has "
            f"{', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    return records


def write_refined(original: Path, out: Path, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a copy of a checkpoint with the tensors of these records, all else as it was.

    networks: record -> state dict with NVIDIA's names. Raises UserError if a tensor has no place.
    """
    content = _loaded(original)
    for name, tensors in networks.items():
        key = next(k for k in (*_RECORDS[name], _WHOLE) if _is_state(_part(content, k)))
        state = cast(dict[str, Tensor], _part(content, key))
        for own_name, own in state.items():
            refined = _refined(own_name, own, state, tensors)
            state[own_name] = refined.to(own.dtype).reshape(own.shape)
        average = content.get("latent_avg")
        if isinstance(average, Tensor) and "mapping.w_avg" in tensors:
            content["latent_avg"] = tensors["mapping.w_avg"].cpu().reshape(average.shape)
    with atomic_write(out) as partial:
        torch.save(content, partial)


def _refined(
    name: str, own: Tensor, state: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return the new value of a checkpoint's tensor: itself where no network has it."""
    plain = name.removeprefix("module.").removeprefix(_DECODER)
    is_rosinality = any("style.1." in key for key in state)
    theirs = rosinality_name(plain) if is_rosinality else plain
    if theirs is None or theirs not in tensors:
        return own
    return tensors[theirs].detach().cpu()


# rosinality's names


def from_rosinality(state: Mapping[str, Tensor], average: Tensor | None) -> dict[str, Tensor]:
    """Return a state dict of rosinality's StyleGAN2 with NVIDIA's names and shapes.

    average: mean of w, [D]; None: 0, which truncation then pulls to.
    """
    tensors: dict[str, Tensor] = {}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    blur = taps.outer(taps) / taps.sum().square()
    for name, tensor in state.items():
        theirs = rosinality_name(name)
        if theirs is None:
            continue  # constant buffers of blurs
        tensors[theirs] = _nvidia_shape(theirs, tensor)
        if theirs.endswith(("const", "conv0.weight", "conv1.weight")):
            block_or_layer = theirs.rpartition(".")[0]
            if not theirs.endswith("noise_const"):
                tensors[f"{block_or_layer}.resample_filter"] = blur
    for block in sorted({name.split(".")[1] for name in tensors if name.startswith("synthesis.b")}):
        tensors[f"synthesis.{block}.resample_filter"] = blur
    width = tensors["mapping.fc0.weight"].shape[0]
    tensors["mapping.w_avg"] = torch.zeros(width) if average is None else average.reshape(width)
    return tensors


def rosinality_name(name: str) -> str | None:
    """Return NVIDIA's name of a tensor of rosinality's StyleGAN2; None for constant buffers."""
    layer, _, rest = name.partition(".")
    if layer == "style":
        index, _, kind = rest.partition(".")
        return f"mapping.fc{int(index) - 1}.{kind}"
    if name == "input.input":
        return "synthesis.b4.const"
    if layer == "noises":
        index = int(rest.removeprefix("noise_"))
        block = 4 * 2 ** ((index + 1) // 2)
        return f"synthesis.b{block}.conv{1 if index % 2 == 0 else 0}.noise_const"

    # layers of a block
    index, _, inner = rest.partition(".") if layer in ("convs", "to_rgbs") else ("0", "", rest)
    place = {
        "conv1": "b4.conv1",
        "to_rgb1": "b4.torgb",
        "convs": f"b{8 * 2 ** (int(index) // 2)}.conv{int(index) % 2}",
        "to_rgbs": f"b{8 * 2 ** int(index)}.torgb",
    }.get(layer)
    kind = {
        "conv.weight": "weight",
        "conv.modulation.weight": "affine.weight",
        "conv.modulation.bias": "affine.bias",
        "noise.weight": "noise_strength",
        "activate.bias": "bias",
        "bias": "bias",
    }.get(inner)
    return None if place is None or kind is None else f"synthesis.{place}.{kind}"


def _nvidia_shape(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor without rosinality's leading dimensions of one."""
    kind = name.rpartition(".")[2]
    if kind in ("const", "weight") and name.startswith("synthesis") and tensor.ndim in (4, 5):
        return tensor[0] if kind == "const" or tensor.ndim == 5 else tensor
    if kind == "noise_const":
        return tensor[0, 0]
    if kind == "noise_strength":
        return tensor.reshape(())
    return tensor.flatten() if kind == "bias" else tensor


def _is_rosinality(state: Mapping[str, Tensor]) -> bool:
    return "style.1.weight" in state and "input.input" in state


# Containers


def _loaded(path: Path) -> dict[str, object]:
    """Return the content of a checkpoint: tensors and plain data, argparse's settings among it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]}, an object of code" if asked else "it is cut off or damaged"
        if "TorchScript" in str(error):
            why = "it is a TorchScript program"
        raise UserError(
            f"{path} is a checkpoint of torch.save that is not read as plain tensors: {why}. Save "
            "its state dict alone: torch.save(network.state_dict(), PATH)"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is a checkpoint of torch.save that holds no dict of tensors")
    return content


def _part(content: Mapping[str, object], key: str) -> object:
    return content if key == _WHOLE else content.get(key)


def _is_state(value: object) -> bool:
    """Return whether a value is a state dict: tensors by name, and nothing else."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _plain(state: object) -> dict[str, Tensor]:
    assert isinstance(state, Mapping)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _generator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the generator of an encoder's state dict, or the state dict itself."""
    inside = {k.removeprefix(_DECODER): v for k, v in state.items() if k.startswith(_DECODER)}
    return inside or state
