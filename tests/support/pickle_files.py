"""Pickles in the form of the published networks, written without their code."""

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class EasyDict(dict):
    """Stands for dnnlib.util.EasyDict."""


def _reconstruct_persistent_obj(meta: object) -> object:
    raise AssertionError("the published loader must not be called")


@contextmanager
def published_modules() -> Iterator[None]:
    """Make the published module names importable for as long as a pickle is written."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = (
        persistence.__name__,
        util.__name__,
    )
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    parents = (types.ModuleType("torch_utils"), persistence, types.ModuleType("dnnlib"), util)
    sys.modules.update(zip(names, parents, strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Persistent(nn.Module):
    """Pickles like a class under the published decorator."""

    source = "raise SystemExit('embedded source ran')"

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._init_args, self._init_kwargs = args, kwargs

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": type(self).__name__,
            "state": dict(self.__dict__),
        }
        return _reconstruct_persistent_obj, (meta,)


class Layer(Persistent):
    def __init__(self, channels):
        super().__init__(channels)
        self.weight = nn.Parameter(
            torch.randn(channels, 2, 3, 3).to(memory_format=torch.channels_last)
        )
        self.bias = None
        self.register_buffer("scratch", torch.zeros(7), persistent=False)
        self.register_buffer("filter", torch.rand(4, 4).half().t())
        self.weight_gain = 1 / np.sqrt(channels)
        self.size = np.broadcast_to(np.asarray(16), [2])


class Generator(Persistent):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.z_dim = 8
        self.blocks = nn.ModuleDict({"b4": Layer(4), "b8": Layer(2)})
        self.register_buffer("w_avg", torch.zeros([]))
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.scale = nn.Parameter(torch.randn(10)[2:7])


class Loss:
    """A published loss: persistent, but no module."""

    __reduce__ = Persistent.__reduce__
    source = ""

    def __init__(self):
        self._init_args, self._init_kwargs, self.P_mean = (), {}, -1.2


def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(8, c_dim=3, mapping_kwargs=EasyDict(num_layers=2))


def dump(content: object, protocol: int = 4) -> bytes:
    with published_modules():
        return pickle.dumps(content, protocol=protocol)


class Reduced:
    """Pickles as what __reduce__ may give: a function, its arguments and perhaps a state."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts
