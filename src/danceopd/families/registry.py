"""Families by the names that recipes give them. What a family itself imports is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from danceopd.errors import nearest
from danceopd.families.family import Family
from danceopd.fields.weights import WeightsError
from danceopd.recipe.wording import RecipeError

PIPELINE_OPTIONS = {"resolution": "size", "base_dtype": "dtype"}


@dataclass(frozen=True)
class Entry:
    """Where a family is. options: by the recipe's key, the argument of the family that it becomes."""

    module: str
    name: str
    extra: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


FAMILIES = {
    "shapes": Entry("danceopd.families.shapes", "ShapesFamily"),
    "sd3": Entry("danceopd.families.sd3", "SD3Family", "diffusers", PIPELINE_OPTIONS),
    "flux": Entry(
        "danceopd.families.flux",
        "FluxFamily",
        "diffusers",
        {**PIPELINE_OPTIONS, "embedded_guidance": "embedded_guidance"},
    ),
    "z_image": Entry("danceopd.families.z_image", "ZImageFamily", "diffusers", PIPELINE_OPTIONS),
}


def takes(family: str, key: str) -> bool:
    """Whether a family has a use for the recipe's key."""
    return key in _entry(family).options


def is_over_a_pipeline(family: str) -> bool:
    """Whether a family's base is a diffusers pipeline."""
    return _entry(family).extra == "diffusers"


def family_class(family: str) -> Any:
    """A family's class.

    Raises:
        RecipeError: for an unknown family, or one whose extra is not installed.
    """
    entry = _entry(family)
    try:
        return getattr(import_module(entry.module), entry.name)
    except ImportError as error:
        raise RecipeError(
            f"family {family!r} needs more than the core: pip install 'danceopd[{entry.extra}]' ({error})"
        ) from error


def load_family(family: str, base: str, options: Mapping[str, Any]) -> Family:
    """A family by its name, on the base that a recipe names.

    options: by the recipe's keys; None is the family's default.

    Raises:
        RecipeError: for an unknown family, one whose extra is not installed, or an option that it does not take.
        WeightsError: if the base is not one of the family's.
    """
    entry = _entry(family)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in entry.options:
            raise RecipeError(f"{key}: family {family!r} takes none")
    cls = family_class(family)
    try:
        return cls(base, **{entry.options[key]: value for key, value in given.items()})
    except WeightsError:
        raise
    except ValueError as error:
        raise RecipeError(f"family {family!r}: {error}") from error


def _entry(family: str) -> Entry:
    if family not in FAMILIES:
        raise RecipeError(f"unknown family {family!r}{nearest(family, FAMILIES)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family]
