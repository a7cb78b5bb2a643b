"""Recipes as files: strict YAML in, overrides, and the resolved recipe out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from danceopd.fields.hub import parse_hub_reference
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.sources import RoutePart
from danceopd.recipe.training import EvaluatePart
from danceopd.recipe.wording import RecipeError, explain

Validated = TypeVar("Validated", bound=BaseModel)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply ``a.b=c`` overrides (values in YAML), and validate it whole.

    Raises:
        RecipeError: for a missing file, broken YAML, or any key or value that does not fit.
    """
    if not path.is_file():
        raise RecipeError(f"recipe not found: {path}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of keys, found {type(content).__name__}")
    for override in overrides or []:
        _override(content, override)
    recipe = parse_recipe(content, where=str(path))
    return with_absolute_files(recipe, path.parent)


def with_absolute_files(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its manifests, weight files and cache, relative to ``folder``, written so that a copy finds them
    too."""

    def absolute(file: str) -> str:
        return os.path.abspath(folder / file)  # links stay: what a link is called says what it is, and its neighbours

    def weights(reference: str | None) -> str | None:
        if reference is None:
            return None
        meant = reference.endswith(".safetensors") and parse_hub_reference(reference) is None
        if meant or (folder / reference).exists():
            return absolute(reference)
        if Path(reference).exists():
            raise RecipeError(
                f"{reference!r} is in {Path.cwd()}, but a recipe's paths, in --set too, are relative to its own "
                f"folder, {folder.resolve()}; write an absolute one"
            )
        return reference

    def route(part: RoutePart) -> RoutePart:
        files = {key: absolute(file) for key in ("manifest", "images") if (file := getattr(part.data, key)) is not None}
        return part.model_copy(update={"data": part.data.model_copy(update=files)})

    fields = {
        name: part.model_copy(update={kind: weights(reference) for kind, reference in part.references.items()})
        for name, part in recipe.fields.items()
    }
    routes = tuple(route(part) for part in recipe.routes)
    files = {"base": weights(recipe.base), "fields": fields, "routes": routes}
    if recipe.data_cache:
        files["data_cache"] = absolute(recipe.data_cache)
    return recipe.model_copy(update=files)


def parse_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """Validate a recipe's content; ``where`` names it in errors."""
    return _validated(Recipe, content, where)


def evaluate_part(content: dict[str, Any]) -> EvaluatePart:
    """Validate evaluation settings given outside a recipe.

    Raises:
        RecipeError: for a value that does not fit.
    """
    return _validated(EvaluatePart, content, "evaluate")


def with_evaluate(recipe: Recipe, changes: dict[str, Any], *, where: str) -> Recipe:
    """The recipe with evaluation settings changed; ``where`` names it in errors.

    Raises:
        RecipeError: for a value that does not fit, by itself or with the rest of the recipe.
    """
    content = recipe.model_dump(mode="json")
    return parse_recipe(content | {"evaluate": content["evaluate"] | changes}, where=where)


def _validated(model: type[Validated], content: dict[str, Any], where: str) -> Validated:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, model, content)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once and ``1e-3`` is a number (as in YAML 1.2)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is one word or number", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """YAML in which a key stands once and ``1e-3`` is a number; raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # such as a date that is none
        raise yaml.YAMLError(str(error)) from error


def _override(content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set needs KEY=VALUE, found {text!r}")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: the value is not valid YAML: {error}") from error
    override(content, key, parsed)


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key of a recipe's content; numbers index lists, missing parts are made.

    Raises:
        RecipeError: if the key leads nowhere.
    """
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        if isinstance(here, list) and parent.isdigit() and int(parent) < len(here):
            here = here[int(parent)]
        elif isinstance(here, dict):
            if here.get(parent) is None:
                here[parent] = {}
            here = here[parent]
        else:
            raise RecipeError(f"cannot set {key}: {parent!r} is not a part of the recipe")
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError(f"cannot set {key}: {last!r} is not a part of the recipe")
