"""A denoiser as a pickle that EDM's own programs open: generate.py, fid.py, train.py --transfer.

EDM's pickles carry the source of the network's class, which is run where they are opened. The
source in ours is short and ours: it takes the class from the checkout that opens the file, builds
it from the recorded arguments, and loads the tensors. EDM's source is not in the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from pickle import dumps

from torch import Tensor, nn

from core.disk import atomic_write
from core.errors import UserError
from pretrained import networks
from teachers import edm

_SOURCE = '''"""Network of a GAN refinement toolkit run; the class is that of the checkout."""

from training import networks


class {name}(networks.{name}):
    def __setstate__(self, state):
        if state.get("_modules"):  # written again, by EDM's programs
            return super().__setstate__(state)
        networks.{name}.__init__(self, **state["_init_kwargs"])
        self.load_state_dict(state["_parameters"])
        self.eval().requires_grad_(False)
'''
_PROTOCOL = 3
"""Of pickle: the newest without frames, so that one pickle can be put into another."""
_RECONSTRUCT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
"""GLOBAL: the function that EDM's programs rebuild a network with."""


def write(network: nn.Module, path: Path) -> None:
    """Write a denoiser of the family edm as an EDM pickle, under the name ema.

    Raises UserError for another family, or if the file cannot be written.
    """
    config = networks.config_of(network)
    if not isinstance(config, edm.Config):
        raise UserError(
            "only networks of the family edm have a pickle of EDM's, this one is of "
            f"{networks.family_of(network)}"
        )
    name = f"{config.preconditioning}Precond"
    tensors: dict[str, Tensor] = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in network.state_dict().items()
    }
    meta = {
        "type": "class",
        "version": 6,
        "module_src": _SOURCE.format(name=name),
        "class_name": name,
        "state": {
            "_init_args": (),
            "_init_kwargs": constructor_arguments(config),
            "_parameters": tensors,
        },
    }
    with atomic_write(path) as partial:
        partial.write_bytes(_as_network("ema", meta))


def constructor_arguments(config: edm.Config) -> dict[str, object]:
    """Return the keyword arguments of EDM's constructor for a network of this Config."""
    own = set(edm.OWN_ARGUMENTS[config.preconditioning])
    foreign = {"preconditioning"}.union(*edm.OWN_ARGUMENTS.values()) - own
    foreign |= edm.SONG_ONLY if config.model_type == "DhariwalUNet" else set()
    arguments = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config
        if name not in foreign
    }
    if arguments.get("sigma_max", 0.0) is None:
        arguments["sigma_max"] = math.inf
    return {**arguments, "use_fp16": False}


def _as_network(name: str, meta: dict[str, object]) -> bytes:
    """Return the pickle of {name: reconstruct(meta)}, without the function at hand."""
    start, end = b"\x80\x03", b"."
    body = dumps(meta, protocol=_PROTOCOL).removeprefix(start).removesuffix(end)
    key = dumps(name, protocol=_PROTOCOL).removeprefix(start).removesuffix(end)
    key = key[: key.index(b"q\x00")]  # without its place in the memo, which is of the body
    return start + b"}" + key + _RECONSTRUCT + body + b"\x85R" + b"s" + end
