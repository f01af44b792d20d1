"""Which implementation of the custom operations runs, for those who report it.

The kernel policy is `auto | native | reference`. This version ships the reference only (plain
PyTorch, on any device, differentiable to any order), so `native` is refused with that reason and
`auto` is the reference.
"""

from __future__ import annotations

from typing import Literal

from core.errors import UserError

KernelPolicy = Literal["auto", "native", "reference"]


def choose(policy: KernelPolicy) -> str:
    """Return the name of the implementation that runs under this policy, for the report.

    Raises UserError for `native`, which this version does not have.
    """
    if policy == "native":
        raise UserError(
            "kernels: native was asked for, but this version has no native kernels; "
            "use auto or reference"
        )
    return "reference"
