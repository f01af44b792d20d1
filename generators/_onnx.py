"""A student as an ONNX file, for programs without PyTorch: latents (and labels) to images.

Truncation is fixed when the file is written, and per-layer noise is at its stored constants, so
that an image is a function of its latent as everywhere in this project. The file is run once before
it appears, and refused if its images are not the student's. Needs onnx, onnxscript and
onnxruntime.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from core.disk import atomic_write
from core.errors import UserError
from core.roles import Generator
from custom_ops import backend
from generators._fixed import FixedStudent
from pretrained import networks

if TYPE_CHECKING:
    from onnx import ModelProto

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-4
"""Of an image's largest value."""


def export_onnx(student: Generator, path: str | Path, *, truncation: float = 1.0) -> float:
    """Write a student as an ONNX file; return the largest difference between its images and
    PyTorch's, as a part of the largest value.

    The file's inputs are "latents" [batch, *latent_shape] float32 and, if the student is
    conditional, "labels" [batch] int64; its output is "images" [batch, C, H, W] float32, about
    [-1, 1]. truncation: psi, 1 = none. Raises UserError if a package is missing, the student
    cannot be exported, the images differ, or the file cannot be written.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}: run `pip install {' '.join(missing)}`"
        )
    fixed = _Fixed(student, truncation).cpu().eval().requires_grad_(False)
    model = _converted(fixed)
    with atomic_write(Path(path)) as partial:
        partial.write_bytes(model.SerializeToString())
        difference = _largest_difference(fixed, partial)
        if not difference <= _TOLERANCE:
            raise UserError(
                f"{path} was not written: its images differ from PyTorch's by {difference:.1e} of "
                f"the largest value, expected at most {_TOLERANCE:.0e}"
            )
    return difference


class _Fixed(FixedStudent):
    """A copy of a student at one truncation; its shapes are the student's."""

    def __init__(self, student: Generator, truncation: float) -> None:
        copied = copy.deepcopy(student).to(memory_format=torch.contiguous_format)
        super().__init__(copied, truncation=truncation)

    def inputs(self, count: int) -> dict[str, Tensor]:
        """Return fixed latents, and labels if there are any, by the names in the file."""
        student = self.student
        draws = torch.Generator().manual_seed(0)
        latents = torch.randn(count, *student.latent_shape, generator=draws)
        if not student.num_classes:
            return {"latents": latents}
        return {"latents": latents, "labels": torch.arange(count) % student.num_classes}


def _converted(fixed: _Fixed) -> ModelProto:
    """Return the model, without the exporter's notes about this machine's files."""
    inputs = fixed.inputs(2)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    try:
        with backend.using("reference"), _quiet():
            traced = torch.export.export(  # strictly: otherwise len() makes the batch a constant
                fixed,
                tuple(inputs.values()),
                dynamic_shapes=({0: batch},) * len(inputs),
                strict=True,
            )
            program = torch.onnx.export(
                traced,
                input_names=list(inputs),
                output_names=["images"],
                dynamic_shapes=({0: "batch"},) * len(inputs),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, TorchDynamoException) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"this student cannot be exported: {reason}") from error

    # drop the exporter's notes, add ours
    assert program is not None
    model = program.model_proto
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for noted in (graph, *graph.node, *values):
        noted.ClearField("metadata_props")
    _describe(model, fixed)
    return model


def _describe(model: ModelProto, fixed: _Fixed) -> None:
    family = networks.family_of(fixed.student)
    model.producer_name = "gan-refinement-toolkit"
    for key, value in {"family": family, "truncation": repr(float(fixed.truncation))}.items():
        model.metadata_props.add(key=key, value=value)


def _largest_difference(fixed: _Fixed, path: Path) -> float:
    """Return how far the file's images are from the student's, over their largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = fixed.inputs(3)  # another batch size than it was exported with
    (images,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad(), backend.using("reference"):
        expected = fixed(*inputs.values())
    return float((torch.from_numpy(images) - expected).abs().max() / expected.abs().max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its own developers out of the output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
