"""Settings of a network that a recipe draws afresh: a family's Config, from texts and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

import teachers
from core import config, plugins
from core.config import ConfigError
from core.errors import UserError
from data.images import Images

_OF_IMAGES: dict[str, Callable[[Images], int]] = {
    "img_resolution": lambda images: images.image_shape[1],
    "img_channels": lambda images: images.image_shape[0],
    "label_dim": lambda images: images.num_classes,
}
"""Setting of a family -> its value from the images of a set."""


def family_config(folder: str, family: str, settings: Mapping[str, object]) -> BaseModel:
    """Return the Config of a family. Raises UserError naming all that is wrong."""
    module = plugins.load(folder, family)
    return config.validate(module.Config, settings, source=f"{family} in {folder}/")


def family_errors(role: str, folder: str, section: object) -> list[str]:
    """Return the errors of a section's family and its settings, a line each."""
    family, settings = _family_of(section)
    if family is None:
        return []  # the recipe's own validation says so
    try:
        plugins.load(folder, family)
        if settings is not None:
            family_config(folder, family, settings)
    except ConfigError as error:
        return [f"{role}.config.{line}" for line in error.lines]
    except UserError as error:
        return [f"{role}.family: {error}"]
    return []


def typed(folder: str, section: object) -> dict[str, object] | None:
    """Return the settings of a section with their types, as its family reads them; None without."""
    family, settings = _family_of(section)
    if family is None or settings is None:
        return None
    return family_config(folder, family, settings).model_dump(mode="json", exclude_unset=True)


def from_images(folder: str, section: object, source: object) -> dict[str, object]:
    """Return the settings of a section that are not given and that images tell: size, classes.

    source: the images, by name; without them, the family's defaults. Raises UserError if they
    cannot be read.
    """
    family, settings = _family_of(section)
    if family not in plugins.names(folder) or settings is None or not isinstance(source, str):
        return {}
    fields = plugins.load(folder, family).Config.model_fields
    wanted = [name for name in _OF_IMAGES if name in fields and settings.get(name) is None]
    file = teachers.resolve(source)
    if not wanted:
        return {}
    if not file.is_url and not Path(file.location).expanduser().exists():
        return {name: fields[name].default for name in wanted if not fields[name].is_required()}
    images = Images(file.path)
    return {name: _OF_IMAGES[name](images) for name in wanted}


def _family_of(section: object) -> tuple[str | None, Mapping[str, object] | None]:
    """Return family and settings of a section that may be anything a user wrote."""
    if not isinstance(section, Mapping):
        return None, None
    family, settings = section.get("family"), section.get("config")
    return (
        family if isinstance(family, str) else None,
        settings if isinstance(settings, Mapping) else None,
    )
