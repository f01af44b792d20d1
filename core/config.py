"""Recipes: YAML and overrides in, frozen models out; every error names the key and the fix.

A YAML scalar stays the text that was written, and the *field's* type decides its meaning. So
`1e-4` is a number in a numeric field (YAML 1.1 alone says text), and a student named `no`
keeps its name (YAML 1.1 says false). Only an unquoted `null`, `~` or nothing is null. One limit
follows: a field must not be a union of free text and a number.

Each model lives in the file of the code that it configures. Left out: environment variables,
includes, references.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from core._config_errors import error_lines, is_model, leaves, shown
from core.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
Recipe = dict[str, object]


class ConfigError(UserError):
    """A recipe that does not fit its model: everything that is wrong with it, at once."""

    def __init__(self, source: str, lines: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{source} has {len(lines)} to correct:", *lines]))
        self.lines = tuple(lines)


class Section(BaseModel):
    """A part of a recipe: frozen, closed to unknown keys, a field's docstring describes it."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Earlier name of a key -> its name now: an old recipe is refused with the new name."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, data: object) -> object:
        """Return the fields, with texts parsed that pydantic alone cannot parse."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            key: _meant(value, fields[key].annotation) if key in fields else value
            for key, value in data.items()
        }


def read_yaml(path: Path) -> Recipe:
    """Return the recipe in a YAML file, its scalars as text. Raises UserError if unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_recipes_near(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from error
    recipe = _parse(text, source=str(path))
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: got {shown(recipe)}, expected lines of the form 'key: value'")
    return recipe


def with_overrides(recipe: Mapping[str, object], overrides: Sequence[str]) -> Recipe:
    """Return a copy of the recipe with each `key.path=value` set: YAML values, empty is null."""
    result = merged(recipe, {})
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(
                f"override {override!r}: expected key.path=value, such as training.seed=1"
            )
        section = result
        for depth, key in enumerate(keys[:-1], start=1):
            below = {} if section.get(key) is None else section[key]
            if not isinstance(below, dict):
                raise UserError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is {shown(below)}, "
                    "not a section with keys of its own"
                )
            section[key] = section = below
        section[keys[-1]] = _parse(text, source=f"override {override!r}")
    return result


def merged(base: Mapping[str, object], top: Mapping[str, object]) -> Recipe:
    """Return base with top laid over it: sections merge, all else is replaced. Shares nothing."""
    result = {key: _copied(value) for key, value in base.items()}
    for key, value in top.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = _copied(value)
    return result


def validate(model_class: type[Model], recipe: Mapping[str, object], *, source: str) -> Model:
    """Return the recipe as an instance. Raises ConfigError with a line for each thing wrong."""
    try:
        return model_class.model_validate(dict(recipe))
    except ValidationError as failure:
        raise ConfigError(source, error_lines(model_class, failure)) from None


def to_yaml(instance: BaseModel, *, without: Collection[str] = ()) -> str:
    """Return the instance as commented YAML that reads back to an equal instance.

    without: key paths to leave out where they have their default, such as training.score_lr.
    """
    return "\n".join(_section_lines(instance, without)) + "\n"


def schema(model_class: type[BaseModel]) -> dict[str, object]:
    """Return the JSON schema of a recipe, with its docstrings, for editors."""
    return model_class.model_json_schema(mode="validation")


# YAML


class _Loader(yaml.SafeLoader):
    """YAML whose scalars stay text, apart from null; keys are text and may occur once."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        """Return the mapping, after a look at the keys as they were written."""
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
                problem = "a key must be a name"
            elif key.value in seen:
                problem = f"the key {key.value!r} occurs twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse(text: str, *, source: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply for a recipe") from error


def _recipes_near(path: Path) -> str:
    """Return "; did you mean …" or a list of the recipes in the nearest folder that exists."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    recipes = [
        file for pattern in ("*.yaml", "*.yml", "*/*.yaml") for file in sorted(folder.glob(pattern))
    ]
    by_stem = {file.stem: file for file in recipes}
    near = difflib.get_close_matches(path.stem, list(by_stem), n=1)
    if near:
        return f"; did you mean {path.parent / by_stem[near[0]].name}?"
    names = ", ".join(str(file.relative_to(folder)) for file in recipes[:12])
    return f"; in {folder} there are: {names}" if recipes else f"; there is none in {folder}"


def _copied(value: object) -> object:
    if isinstance(value, Mapping):
        return merged(value, {})
    return [_copied(item) for item in value] if isinstance(value, list) else value


# What a text means, by the field's type

_WHOLE_WITH_EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d*)?[eE]\+?\d{1,2}")


def _meant(value: object, annotation: object) -> object:
    """Return the value of a text in a field: {}, a choice, a whole number, or itself."""
    if value is None and is_model(annotation):
        return {}  # `training:` with nothing below it
    return _meant_text(value, set(leaves(annotation)))


def _meant_text(value: object, accepted: set[object]) -> object:
    if isinstance(value, list):
        return [_meant_text(item, accepted) for item in value]
    if not isinstance(value, str) or str in accepted:
        return value
    for choice in accepted:
        if isinstance(choice, bool | int) and str(choice).lower() == value.lower():
            return choice
    if int in accepted and _WHOLE_WITH_EXPONENT.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() else value
    return value


# Writing

_PLAIN = re.compile(r"[\w/.][\w/.+-]*")
_WIDTH = 100


def _section_lines(section: BaseModel, without: Collection[str] = ()) -> Iterator[str]:
    """Yield the fields in order, each below its docstring as a comment."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name in without and value == field.default:
            continue
        below = {key.removeprefix(f"{name}.") for key in without if key.startswith(f"{name}.")}
        if field.description:
            text = " ".join(field.description.split())
            yield from textwrap.wrap(text, _WIDTH - 20, initial_indent="# ", subsequent_indent="# ")
        yield from _entry_lines(name, value, below)


def _entry_lines(key: str, value: object, without: Collection[str] = ()) -> Iterator[str]:
    """Yield `key: value` on one line, or the key and the lines below it, indented."""
    below = _block_lines(value, without)
    if below:
        yield f"{_scalar(key)}:"
        yield from (f"  {line}" for line in below)
    else:
        yield f"{_scalar(key)}: {_inline(value)}"


def _block_lines(value: object, without: Collection[str] = ()) -> list[str]:
    """Return the lines of a section or of a list that holds one; none if it fits on one line."""
    if isinstance(value, BaseModel):
        return list(_section_lines(value, without))
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _entry_lines(str(key), item)]
    if not isinstance(value, list | tuple) or not any(map(_block_lines, value)):
        return []
    lines = []
    for item in value:
        first, *others = _block_lines(item) or [_inline(item)]
        lines += [f"- {first}", *(f"  {line}" for line in others)]
    return lines


def _inline(value: object) -> str:
    """Return a value on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, Mapping | BaseModel):
        return "{}"  # what is not empty is a block
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        text = repr(value)  # with a point before the exponent, so that YAML 1.1 too reads a number
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    return str(value) if isinstance(value, int) else _scalar(str(value))


def _scalar(text: str) -> str:
    """Return a text as a YAML scalar, quoted if a reader might take it for something else."""
    if _PLAIN.fullmatch(text) and not text.endswith(".") and yaml.safe_load(text) == text:
        return text
    quoted = yaml.safe_dump(text, default_style='"', width=2**31, allow_unicode=True)
    return quoted.strip()
