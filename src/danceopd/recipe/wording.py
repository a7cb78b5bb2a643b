"""What is said of a recipe that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from danceopd.errors import UserError, nearest_word

NAME = r"[A-Za-z][A-Za-z0-9_-]*"
"""Names of fields and of a suite's methods: they are also names of folders, files and keys."""


KEY_ERRORS = ("missing", "extra_forbidden")
"""Pydantic's errors that are about a key and not its value."""


class RecipeError(UserError, ValueError):
    """A recipe cannot be used; the message names the file, the key, what was found and what is needed."""


def explain(error: ValidationError, model: type[BaseModel], content: Any) -> str:
    """Pydantic's error on ``model`` in a sentence for each key, with the key's place in ``content``."""
    items = error.errors()
    places = [_place(item, content) for item in items]
    sentences: dict[str, list[str]] = {}
    for item, place in zip(items, places, strict=True):
        inside = any(other[: len(place)] == place and len(other) > len(place) for other in places)
        if inside:  # a list that counts its valid members alone, or another member of a union
            continue
        if item["type"] in KEY_ERRORS and place and place[-1] == item["loc"][-1]:
            sentences[_key_error(item["type"], place, model)] = []
        else:
            sentences.setdefault(".".join(map(str, place)), []).append(_value_error(item))
    return "; ".join(
        ": ".join(filter(None, [place, ", or ".join(dict.fromkeys(said))])) for place, said in sentences.items()
    )


def _place(item: Any, content: Any) -> tuple[str | int, ...]:
    """Where an error is, without pydantic's names for the members of a union."""
    place: list[str | int] = []
    here = content
    for position, part in enumerate(item["loc"], start=1):
        known = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list | tuple) else ()
        if part in known:
            here = here[part]
            place.append(part)
        elif position == len(item["loc"]) and item["type"] in KEY_ERRORS and isinstance(here, dict):
            place.append(part)
    return tuple(place)


def _key_error(kind: str, place: Sequence[str | int], model: type[BaseModel]) -> str:
    whole, key = ".".join(map(str, place)), str(place[-1])
    if kind == "missing":
        return f"missing key {whole!r}"
    known, homes = _known_keys(model, place[:-1]), sorted(_homes(model, key))
    near = nearest_word(key, known, cutoff=0.5)
    hints = ([f"a key of {', '.join(homes)}"] if homes else []) + ([f"did you mean {near!r}?"] if near else [])
    told = f" ({'; or '.join(hints)})" if hints else ""
    return f"unknown key {whole!r}{told}; known here: {', '.join(known)}"


def _value_error(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("model_type", "dict_type"):
        message = "needs keys and values"
    elif item["loc"][-1:] == ("[key]",):
        message = "a name is needed before the colon"
    elif item["type"] == "missing":
        message = "needs more entries"
    elif item["type"] == "tuple_type":
        message = "needs a list"
    elif item["type"] == "too_short":
        message = f"needs at least {item['ctx']['min_length']}"
    hidden = isinstance(item["input"], dict | BaseModel) or item["type"] == "value_error"
    return message + ("" if hidden else f", found {item['input']!r}")


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Keys of the part of ``model`` at a location."""
    here: Any = model
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation
        else:  # a list's index, or a name in a mapping
            here = next(member for member in get_args(here) if member not in (str, Ellipsis))
        if NoneType in get_args(here):
            here = next(member for member in get_args(here) if member is not NoneType)
    return list(here.model_fields)


def _homes(model: type[BaseModel], key: str, place: str = "") -> Iterator[str]:
    """The parts of ``model`` that have a key of this name; the whole is called the top level."""
    for name, field in model.model_fields.items():
        if name == key:
            yield place or "the top level"
        for part, many in _parts(field.annotation):
            inner = f"{place}.{name}" if place else name
            yield from _homes(part, key, f"{inner}.{many}" if many else inner)


def _parts(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The models that an annotation holds, with what stands for a name or an index before each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    for member in get_args(annotation):
        for part, many in _parts(member):
            origin = get_origin(annotation)
            yield part, many or ("NAME" if origin is dict else "N" if origin is tuple else "")
