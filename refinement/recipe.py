"""The recipe of a run: the one model that a YAML file and its overrides are read into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from core import config, plugins
from core.config import Section
from custom_ops import backend
from eval import samples
from training import loop


def _objective_type() -> object:
    """Return the union of every objective's Config, told apart by `name`."""
    kinds = [plugins.load("objectives", name).Config for name in plugins.names("objectives")]
    return (
        kinds[0] if len(kinds) == 1 else Annotated[reduce(or_, kinds), Field(discriminator="name")]
    )


class NetworkSection(Section):
    """Where a pretrained network comes from: a weights file, or a family and its settings."""

    family: str | None = None
    """Plug-in of generators/ or teachers/; null: as the weights file says."""
    weights: str | None = None
    """Path (absolute, or relative to where you are) or URL of an NVIDIA pickle or our safetensors.
    """
    sha256: str | None = None
    """Expected SHA-256 of the weights file; null: not checked."""
    config: dict[str, object] | None = None
    """Without weights: settings of the family, to start from freshly drawn weights."""

    @model_validator(mode="after")
    def _one_source(self) -> NetworkSection:
        if (self.weights is None) == (self.config is None):
            raise ValueError("give either weights (a file) or family and config (drawn afresh)")
        if self.config is not None and self.family is None:
            raise ValueError("config needs family: whose settings are these?")
        return self


class Recipe(Section):
    """A run: who learns (student) from whom (teacher), by what (objective), how, measured how."""

    name: str = "run"
    """Name of the run's folder."""
    student: NetworkSection
    """The one-step generator to refine."""
    teacher: NetworkSection
    """The diffusion model it learns from."""
    objective: _objective_type()  # pyright: ignore[reportInvalidTypeForm]
    """What is minimised."""
    training: loop.Config = loop.Config()
    """The loop."""
    evaluation: samples.Config = samples.Config()
    """What is measured before, while and after."""
    device: str = "auto"
    """auto (CUDA where there is some), cpu, cuda or cuda:N."""
    kernels: backend.KernelPolicy = "auto"
    """Custom operations: auto, native or reference."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with overrides on top. Raises UserError naming all that is
    wrong.
    """
    plain = config.with_overrides({"name": path.stem, **config.read_yaml(path)}, overrides)
    recipe = config.validate(Recipe, plain, source=str(path))
    for folder, section in (("generators", recipe.student), ("teachers", recipe.teacher)):
        if section.config is not None:
            family_config(folder, section)
    return recipe


def family_config(folder: str, section: NetworkSection) -> BaseModel:
    """Return the settings of a network without weights. Raises ConfigError naming all that is
    wrong.
    """
    module = plugins.load(folder, section.family or "")
    return config.validate(
        module.Config, section.config or {}, source=f"{section.family} in {folder}/"
    )
