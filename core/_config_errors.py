"""Errors of a recipe that does not fit its model: key, value and expectation in a sentence.

pydantic reports a location among its own validators (with the chosen member of a union as a step)
and a message per validator. Here both are told in the words of the recipe: the dotted path that the
user wrote, and the values that the field's annotation accepts.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """Return how a value of a recipe is named in a sentence, of bounded length."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def leaves(annotation: object) -> Iterator[object]:
    """Yield the plain types and literal values that an annotation is made of."""
    if get_origin(annotation) is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif arguments := get_args(annotation):
        for argument in arguments:
            yield from leaves(argument)
    else:
        yield annotation


def is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Return whether an annotation is a section by itself, not an optional one."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def error_lines(model_class: type[BaseModel], failure: ValidationError) -> list[str]:
    """Return one line for each thing that is wrong, in the order of the model's fields."""
    lines: dict[str, str] = {}
    for error in failure.errors():
        place = _place(model_class, error["loc"])
        path, sentence = _explained(place, error)
        lines.setdefault(path, f"{path}: {sentence}" if path else sentence)
    # Where a union holds a section and, say, a number, only what is wrong inside the section helps.
    return [line for path, line in lines.items() if not _is_opened(path, lines)]


class _Place(NamedTuple):
    path: str
    accepts: object
    """Annotation of that place; object if the key is unknown."""
    owner: type[BaseModel]
    """The innermost section on the way."""


def _place(model_class: type[BaseModel], location: Sequence[str | int]) -> _Place:
    """Return the place of a pydantic location in the recipe, without labels of union members."""
    path, owner = "", model_class
    here: object = model_class
    for step in location:
        bare, discriminator = _bare(here)
        if _members(bare):
            here = _member(bare, label=step, discriminator=discriminator) or here
        elif is_model(bare):
            owner, path = bare, f"{path}.{step}".lstrip(".")
            field = bare.model_fields.get(str(step))
            here = Annotated[field.annotation, field] if field else object
        elif isinstance(step, int):
            path = f"{path}[{step}]"
            here = _item(bare, step)
        elif get_origin(bare) is dict:
            path, here = f"{path}.{step}", get_args(bare)[1]
    return _Place(path, here, owner)


def _bare(annotation: object) -> tuple[object, str | None]:
    """Return an annotation without metadata and without null, and the discriminator it carried."""
    discriminator = None
    while True:
        if get_origin(annotation) is Annotated:
            for extra in get_args(annotation)[1:]:
                if isinstance(extra, FieldInfo) and isinstance(extra.discriminator, str):
                    discriminator = extra.discriminator
            annotation = get_args(annotation)[0]
            continue
        others = [member for member in _members(annotation) if member is not types.NoneType]
        if len(others) != 1:
            return annotation, discriminator
        annotation = others[0]


def _members(annotation: object) -> tuple[object, ...]:
    """Return the members of a union, or nothing for any other annotation."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _member(union: object, *, label: str | int, discriminator: str | None) -> object | None:
    """Return the section of a union that pydantic names by its tag or its class."""
    for member in _members(union):
        section, _ = _bare(member)
        if not is_model(section):
            continue
        tags = {section.__name__}
        if discriminator in section.model_fields:
            tags = set(leaves(section.model_fields[discriminator].annotation))
        if label in tags:
            return section
    return None


def _item(annotation: object, index: int) -> object:
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    return arguments[min(index, len(arguments) - 1)] if arguments else object


def _is_opened(path: str, paths: Iterable[str]) -> bool:
    return bool(path) and any(other.startswith((f"{path}.", f"{path}[")) for other in paths)


def _explained(place: _Place, error: ErrorDetails) -> tuple[str, str]:
    """Return the path of an error and the sentence that names the remedy."""
    context = error.get("ctx", {})
    known = list(place.owner.model_fields)
    match error["type"]:
        case "extra_forbidden":
            key = str(error["loc"][-1])
            renamed: Mapping[str, str] = getattr(place.owner, "renamed", {})
            if key in renamed:
                return place.path, f"this key is now called {renamed[key]!r}"
            near = did_you_mean(key, known)
            return place.path, f"unknown key{near or '; the keys here are ' + ', '.join(known)}"
        case "missing":
            return place.path, f"missing; expected {_wanted(place.accepts)}"
        case "union_tag_invalid" | "union_tag_not_found":
            return _explained_tag(place, error)
        case "value_error" | "assertion_error":
            return place.path, str(context.get("error", error["msg"]))
        case "literal_error":
            names = [name for name in leaves(place.accepts) if isinstance(name, str)]
            near = did_you_mean(str(error["input"]), names)
        case _:
            near = ""

    # any other value of a wrong type or range
    wanted = _wanted(place.accepts)
    sentence = f"expected {wanted}" if wanted else error["msg"]
    return place.path, f"got {shown(error['input'])}, {sentence}{near}"


def _explained_tag(place: _Place, error: ErrorDetails) -> tuple[str, str]:
    """Return the path of the key that chooses among several kinds of section, and its choices."""
    bare, discriminator = _bare(place.accepts)
    tags = _tags(bare, str(discriminator))
    tag = error.get("ctx", {}).get("tag")
    came = "missing;" if tag is None else f"got {shown(tag)},"
    near = did_you_mean(str(tag), map(str, tags))
    return f"{place.path}.{discriminator}", f"{came} expected {_either(map(repr, tags))}{near}"


def _tags(union: object, discriminator: str) -> list[object]:
    sections = [member for member in leaves(union) if is_model(member)]
    return [tag for each in sections for tag in leaves(each.model_fields[discriminator].annotation)]


_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
    None: "null",
    list: "a list",
    tuple: "a list",
    dict: "a section",
}


def _wanted(annotation: object) -> str:
    """Return the values that an annotation accepts, in words; empty for those without words."""
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        _, discriminator = _bare(annotation)
        if discriminator:
            tags = _either(map(repr, _tags(inner, discriminator)))
            return f"a section whose {discriminator} is {tags}"
        bare, bounds = _bare(inner)[0], " and ".join(_bounds(extras))
        words = f"{_wanted(bare)} {bounds}".strip()
        return f"{words} or null" if types.NoneType in _members(inner) else words
    if get_origin(annotation) is Literal:
        return _either(map(repr, get_args(annotation)))
    if members := _members(annotation):
        return _either(filter(None, map(_wanted, members)))
    if is_model(annotation):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    return _wanted_list(annotation) or _WORDS.get(get_origin(annotation) or annotation, "")


def _wanted_list(annotation: object) -> str:
    """Return "a list of 3, each a whole number" for a tuple or list, else nothing."""
    arguments = get_args(annotation)
    if get_origin(annotation) not in (list, tuple) or not arguments:
        return ""
    fixed = get_origin(annotation) is tuple and Ellipsis not in arguments
    count = f" of {len(arguments)}" if fixed else ""
    each = _wanted(arguments[0])
    return f"a list{count}, each {each}" if each else f"a list{count}"


def _bounds(extras: Iterable[object]) -> Iterator[str]:
    """Yield ">= 1" and the like for the constraints among an annotation's metadata."""
    for extra in extras:
        match extra:
            case FieldInfo():
                yield from _bounds(extra.metadata)
            case annotated_types.Ge(ge=bound):
                yield f">= {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"> {bound}"
            case annotated_types.Le(le=bound):
                yield f"<= {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"< {bound}"
            case annotated_types.MultipleOf(multiple_of=bound):
                yield f"a multiple of {bound}"
            case annotated_types.MinLen(min_length=bound):
                yield f"at least {bound} long"
            case annotated_types.MaxLen(max_length=bound):
                yield f"at most {bound} long"
            case _:
                continue


def _either(words: Iterable[str]) -> str:
    *first, last = list(dict.fromkeys(words)) or [""]
    return f"{', '.join(first)} or {last}" if first else last
