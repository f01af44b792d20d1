"""Conversion of StyleGAN2's TensorFlow networks to the names and layouts of the PyTorch ones.

A pickle of `dnnlib.tflib.network.Network` objects holds for each network its constructor arguments
and its variables, with the mapping and synthesis networks as components (StyleGAN2, and StyleGAN2-
ADA for TensorFlow). Layouts: dense weights [in, out], convolutions [height, width, in, out], and
those that upsample rotated by 180 degrees; style biases lack the 1 that they start from.
StyleGAN (2018), ProGAN, configurations A to D of StyleGAN2 and its labels before ADA are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from pretrained._allowed_globals import expect_type

_Layout = Callable[[np.ndarray], np.ndarray]
_OLDEST_VERSION = 4
"""Of the networks' own count; StyleGAN wrote 2 and 3."""


@dataclass(frozen=True, eq=False)
class TensorflowNetwork:
    """State of a pickled Network, as data."""

    state: dict[str, object] = field(default_factory=dict)

    @property
    def function(self) -> str:
        """Return the name of the function that builds it, such as "G_main"."""
        return expect_type(self.state["build_func_name"], str)

    @property
    def arguments(self) -> dict[str, object]:
        """Return the arguments of that function."""
        return expect_type(self.state["static_kwargs"], dict)

    @property
    def module_source(self) -> str:
        """Return its embedded source code, which must not be run."""
        return expect_type(self.state["build_module_src"], str)

    def variables(self) -> dict[str, np.ndarray]:
        """Return its variables and those of its components by name, float32.

        Raises UserError if it is older than StyleGAN2 or its components have components.
        """
        version = expect_type(self.state["version"], int)
        if version < _OLDEST_VERSION:
            raise UserError(
                f"its TensorFlow networks are of version {version}, from before StyleGAN2: "
                f"expected {_OLDEST_VERSION} or later"
            )
        variables = dict(_own_variables(self))
        for prefix, component in expect_type(self.state.get("components", {}), dict).items():
            below = expect_type(component, TensorflowNetwork)
            if below.state.get("components"):
                raise UserError(f"its TensorFlow network {prefix} is made of others, unlike any")
            variables.update((f"{prefix}/{name}", value) for name, value in _own_variables(below))
        return variables


def _own_variables(network: TensorflowNetwork) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in expect_type(network.state["variables"], list):
        yield expect_type(name, str), np.asarray(value, dtype=np.float32)


class Generator(NamedTuple):
    """A generator as the PyTorch implementation would hold it."""

    arguments: dict[str, object]
    tensors: dict[str, Tensor]


def generator(network: TensorflowNetwork) -> Generator:
    """Return arguments and state dict of a StyleGAN2 generator under the published PyTorch names.

    Raises UserError that names the first argument or variable without an equivalent.
    """
    arguments = _arguments(network.arguments)
    tensors = {}
    for name, value in network.variables().items():
        if name == "lod" or (name.startswith("synthesis/noise") and not arguments["use_noise"]):
            continue
        key, layout = _pytorch_name(name)
        tensors[key] = torch.from_numpy(np.array(layout(value), order="C"))
    return Generator(arguments, {**tensors, **_filters(tensors, arguments["resample_filter"])})


# Arguments --------------------------------------------------------------------------------------


_USUAL_TAPS = (1, 3, 3, 1)
_DEFAULTS: dict[str, tuple[str, object]] = {
    "latent_size": ("z_dim", 512),
    "label_size": ("c_dim", 0),
    "dlatent_size": ("w_dim", 512),
    "resolution": ("img_resolution", 1024),
    "num_channels": ("img_channels", 3),
    "fmap_base": ("channel_base", 16384),
    "fmap_max": ("channel_max", 512),
    "num_fp16_res": ("num_fp16_res", 0),
    "conv_clamp": ("conv_clamp", None),
    "architecture": ("architecture", "skip"),
    "resample_kernel": ("resample_filter", _USUAL_TAPS),
    "use_noise": ("use_noise", True),
    "nonlinearity": ("activation", "lrelu"),
}
"""TensorFlow's name of an argument -> PyTorch's name, and the default."""
_MAPPING_DEFAULTS: dict[str, tuple[str, object]] = {
    "mapping_layers": ("num_layers", 8),
    "label_fmaps": ("embed_features", None),
    "mapping_fmaps": ("layer_features", None),
    "mapping_nonlinearity": ("activation", "lrelu"),
    "mapping_lrmul": ("lr_multiplier", 0.01),
    "w_avg_beta": ("w_avg_beta", 0.995),
}
_WITHOUT_EFFECT = frozenset(
    (
        *("truncation_psi", "truncation_cutoff", "style_mixing_prob"),
        *("structure", "conditioning", "fused_modconv"),
    )
)
"""Arguments about sampling, training or speed."""


def _arguments(given: Mapping[str, object]) -> dict[str, object]:
    names = {*_DEFAULTS, *_MAPPING_DEFAULTS, *_WITHOUT_EFFECT}
    for name in given:
        if name not in names:
            raise UserError(f"its TensorFlow generator has the argument {name!r}, unknown here")
    arguments = {new: given.get(old, default) for old, (new, default) in _DEFAULTS.items()}
    mapping = {new: given.get(old, default) for old, (new, default) in _MAPPING_DEFAULTS.items()}
    arguments["channel_base"] = (
        expect_type(arguments["channel_base"], int) * 2
    )  # of half the resolution
    return {**arguments, "mapping_kwargs": mapping}


# Variables --------------------------------------------------------------------------------------


def _as_is(value: np.ndarray) -> np.ndarray:
    return value


def _dense(value: np.ndarray) -> np.ndarray:
    return value.transpose(1, 0)


def _convolution(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1)


def _rotated_convolution(value: np.ndarray) -> np.ndarray:
    return value[::-1, ::-1].transpose(3, 2, 0, 1)


def _style_bias(value: np.ndarray) -> np.ndarray:
    return value + np.float32(1)


def _noise(value: np.ndarray) -> np.ndarray:
    return value[0, 0]


def _constant(value: np.ndarray) -> np.ndarray:
    return value[0]


_LAYERS = {
    "Conv": "conv1",
    "Conv0_up": "conv0",
    "Conv1": "conv1",
    "ToRGB": "torgb",
    "Skip": "skip",
}
_PARTS: dict[str, tuple[str, _Layout]] = {
    "weight": ("weight", _convolution),
    "bias": ("bias", _as_is),
    "noise_strength": ("noise_strength", _as_is),
    "mod_weight": ("affine.weight", _dense),
    "mod_bias": ("affine.bias", _style_bias),
}
_UPSAMPLING = ("Conv0_up", "Skip")


def _pytorch_name(name: str) -> tuple[str, _Layout]:
    """Return the published PyTorch name of a variable, and the conversion of its layout."""
    # mapping network
    if name == "dlatent_avg":
        return "mapping.w_avg", _as_is
    if match := re.fullmatch(r"mapping/(?:(LabelEmbed)|Dense(\d+))/(weight|bias)", name):
        layer = "embed" if match[1] else f"fc{match[2]}"
        return f"mapping.{layer}.{match[3]}", _dense if match[3] == "weight" else _as_is

    # synthesis network
    if match := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        index = int(match[1])  # 0 at 4x4, then two for each resolution
        return f"synthesis.b{2 ** ((index + 5) // 2)}.conv{1 - index % 2}.noise_const", _noise
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const", _constant
    if (match := re.fullmatch(r"synthesis/(\d+)x\1/(\w+)/(\w+)", name)) and (
        match[2] in _LAYERS and match[3] in _PARTS
    ):
        part, layout = _PARTS[match[3]]
        if layout is _convolution and match[2] in _UPSAMPLING:
            layout = _rotated_convolution
        return f"synthesis.b{match[1]}.{_LAYERS[match[2]]}.{part}", layout

    raise UserError(
        f"its TensorFlow generator has the variable {name!r}: it is no StyleGAN2 of configuration "
        "E or F, or StyleGAN2-ADA"
    )


def _filters(tensors: Mapping[str, Tensor], taps: object) -> dict[str, Tensor]:
    """Return the low-pass filters, which TensorFlow does not store with the weights.

    Every block and convolution has one. Convolutions without a change of resolution do not use
    theirs, which has the usual taps.
    """
    owners = (re.match(r"(synthesis\.b\d+)(\.(?:conv\d|skip))?", key) for key in tensors)
    names = dict.fromkeys(name for match in owners if match for name in (match[1], match[0]))
    return {
        f"{name}.resample_filter": _filter(_USUAL_TAPS if name.endswith(".conv1") else taps)
        for name in names
    }


def _filter(taps: object) -> Tensor:
    """Return the filter of the taps with sum 1; 2D, or 1D from 8 taps on."""
    line = torch.as_tensor(np.asarray(taps, dtype=np.float32))
    kernel = line if line.ndim != 1 or len(line) >= 8 else torch.outer(line, line)
    return kernel / kernel.sum()
