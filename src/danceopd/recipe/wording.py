"""What is said of a recipe that does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

NAME = r"[A-Za-z][A-Za-z0-9_-]*"
"""Names of fields and of a suite's methods: they are also names of folders, files and keys."""


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file, the key, what was found and what is needed."""


def explain(item: Any, model: type[BaseModel]) -> str:
    """One of pydantic's errors on ``model``, in a sentence with the key's place."""
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, item["loc"][:-1])
        return f"unknown key {place!r}{nearest(str(item['loc'][-1]), known)}; known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"missing key {place!r}"
    message = item["msg"].removeprefix("Value error, ")
    hidden = isinstance(item["input"], dict | BaseModel) or item["type"] == "value_error"
    shown = "" if hidden else f", found {item['input']!r}"
    return f"{place + ': ' if place else ''}{message}{shown}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
