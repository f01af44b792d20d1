"""Dropout while a loss is computed, with masks that follow from the draws.

A network is in eval mode between losses. Its masks come from torch's own generators, which are
seeded here and put back: a resumed run drops the same features. They are drawn for a whole
micro-batch at once, so another micro-batch size or number of ranks drops others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from core.randomness import Draws


@contextmanager
def dropping(network: nn.Module, draws: Draws, *, wanted: bool = True) -> Iterator[None]:
    """Run the body with the network in train mode if wanted, then return to eval mode.

    Networks of one architecture drop the same features under the same draws.
    """
    if not wanted:
        yield
        return
    devices = [draws.device] if draws.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(draws.generator_seed("dropout"))
        network.train()
        try:
            yield
        finally:
            network.eval()
