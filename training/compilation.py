"""Networks compiled by torch.compile, for as long as they train.

Each is compiled whole, for each shape, precision and mode that it is called in: that takes minutes
once, and seconds once results lie in torch's cache. The compiled network's output equals
the network's own up to rounding; dropout draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import nn

from core.errors import UserError
from core.roles import Networks

Mode = Literal["default", "reduce-overhead", "max-autotune"]
"""torch.compile's modes. reduce-overhead is default with CUDA graphs; max-autotune tries several
kernels as well, so that a resumed run may use others than the one before.
"""
_FORMS = 64
"""Recompilation limit per class of network: shapes, precisions and modes."""


@contextmanager
def compiled_networks(
    networks: Networks, mode: Mode | None, device: torch.device
) -> Iterator[Networks]:
    """Yield the networks compiled: others, that share their parameters. None: just the networks.

    Raises UserError if nothing can be compiled for the device.
    """
    if mode is None:
        yield networks
        return

    # torch.compile of each network that has parameters
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    _check_compiler(device)

    def of(network: nn.Module) -> nn.Module:
        if not any(True for _ in network.parameters()):
            return network
        return cast(nn.Module, torch.compile(network, dynamic=False, options=options))

    # within the body, more forms than expected are an error
    with torch._dynamo.config.patch(recompile_limit=_FORMS, fail_on_recompile_limit_hit=True):
        yield replace(
            networks,
            student=of(networks.student),
            score=of(networks.score),
            teacher=of(networks.teacher),
        )


def replays(mode: Mode | None) -> bool:
    """Return whether CUDA graphs are replayed, which reuse the memory of their results."""
    return mode in ("reduce-overhead", "max-autotune")


def _check_compiler(device: torch.device) -> None:
    """Raise UserError if not even a sum can be compiled."""
    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever compilers, drivers and torch say of it
        said = str(error).strip().splitlines()
        raise UserError(
            f"training.compile: torch.compile does not work here ({type(error).__name__}: "
            f"{said[0] if said else 'no reason given'}): a C++ compiler is needed on a CPU, Triton "
            "on a GPU; or leave the setting out"
        ) from error
