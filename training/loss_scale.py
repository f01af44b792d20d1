"""Loss scaling, which keeps small gradients from vanishing in float16 (Micikevicius et al., 2018,
arXiv 1710.03740, Section 3.2), with the dynamic factor of Section 3.2.1 there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

_GROWS_AFTER: Final = 2000


@dataclass
class LossScale:
    """The factor on the loss of one phase: doubled after 2000 good updates, halved whenever a
    gradient overflows, which leaves that update out.
    """

    value: float = 2.0**16
    good_updates: int = 0
    """Since the factor last changed."""
    is_fixed: bool = False
    """Whether it never changes, and is not logged."""

    def loss_factor(self, *, batch_size: int, ranks: int) -> float:
        """Return the factor on a rank's sum of losses; gradients are averaged over ranks.

        In float16 the number of ranks is divided out later, so that no gradient grows with it.
        """
        return ranks / batch_size if self.is_fixed else self.value / batch_size

    def unscale(self, networks: Iterable[nn.Module], *, ranks: int) -> None:
        """Turn gradients averaged over ranks into those of the global batch's mean loss."""
        if self.is_fixed:
            return
        for network in networks:
            gradients: list[Tensor] = [p.grad for p in network.parameters() if p.grad is not None]
            factor = ranks / self.value
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]

    def count_finite(self) -> None:
        """Count an update with finite gradients; the factor doubles after 2000 of them."""
        if self.is_fixed:
            return
        self.good_updates += 1
        if self.good_updates == _GROWS_AFTER:
            self.value, self.good_updates = self.value * 2, 0

    def lower(self) -> bool:
        """Halve the factor and return True; at 1 the overflow has another cause: False."""
        if self.is_fixed or self.value <= 1:
            return False
        self.value, self.good_updates = self.value / 2, 0
        return True

    def stats(self, name: str, *, skipped: bool, device: torch.device) -> dict[str, Tensor]:
        """Return the factor, and the share of updates left out, of the phase of that name."""
        if self.is_fixed:
            return {}
        values = {f"{name}_loss_scale": self.value, f"{name}_skipped": float(skipped)}
        return {key: torch.full((), value, device=device) for key, value in values.items()}


ONE: Final = LossScale(1.0, is_fixed=True)
"""Loss scale of precisions without underflow."""
