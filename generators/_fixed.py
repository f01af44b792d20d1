"""A student with its options fixed: what an export and sample images are made of."""

from __future__ import annotations

import inspect

from torch import Tensor

from core.errors import UserError
from core.roles import Generator
from pretrained import networks


class FixedStudent(Generator):
    """A student at one truncation, and of one class if one is given."""

    def __init__(
        self, student: Generator, *, truncation: float = 1.0, label: int | None = None
    ) -> None:
        """Raises UserError if the student has no truncation, or no such class.

        truncation: psi, 1 = none. label: the class of all images; None: as they are asked for.
        """
        super().__init__()
        if truncation != 1 and "truncation" not in inspect.signature(student.forward).parameters:
            raise UserError(
                f"a {networks.family_of(student)} student has no truncation: expected 1"
            )
        if label is not None and not 0 <= label < student.num_classes:
            raise UserError(f"--class {label}: the student has {student.num_classes} classes")
        self.latent_shape, self.image_shape = student.latent_shape, student.image_shape
        self.num_classes = student.num_classes
        self.student, self.truncation, self.label = student, truncation, label
        self.settings = {} if truncation == 1 else {"truncation": truncation}

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images [N, C, H, W] of latents and labels."""
        if self.label is not None and labels is not None:
            labels = labels.new_full(labels.shape, self.label)
        return self.student(latents, labels, **self.settings)
