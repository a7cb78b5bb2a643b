"""A suite: several methods on one set of sources, data, student and evaluation."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danceopd.recipe import Recipe, RecipeError, override, parse_recipe, read_yaml

VIEWS = ("updates", "compute")
"""Where methods are compared: at equal optimiser updates, and at equal network forward-equivalents."""


class SuiteError(ValueError):
    """A suite cannot be run; the message names the file, what was found and what is needed."""


class SuiteFile(BaseModel):
    """The content of a suite's YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int = Field(ge=1, le=1, description="Version of this format.")
    title: str = Field(description="A line for the report.")
    recipe: dict[str, Any] = Field(description="The recipe that all methods share; output is the suite's own.")
    updates: int = Field(ge=1, description="Optimiser updates at which methods are compared.")
    compute: float = Field(gt=0, description="Network forward-equivalents at which they are compared, per run.")
    seeds: int = Field(ge=1, description="Training seeds 0..n-1.")
    reference: str = Field(description="The method that all others are compared with.")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="Each method's changes to the shared recipe: {dotted key: value}."
    )


@dataclass(frozen=True)
class Suite:
    """A suite, validated. recipes: by method; updates_at: by method, the updates at each of ``VIEWS``."""

    name: str
    title: str
    seeds: int
    reference: str
    recipes: dict[str, Recipe]
    updates: int
    compute: float

    def fingerprint(self, method: str) -> str:
        """Ten hexadecimal digits of everything in the method's recipe that its weights depend on."""
        content = self.recipes[method].model_dump(mode="json")
        for key in ("output", "evaluate"):
            del content[key]
        for key in ("steps", "seed"):
            del content["train"][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]

    def run_recipe(self, method: str, *, seed: int, updates: int, root: Path) -> Recipe:
        """The recipe of one run, trained as far as ``updates``."""
        recipe = self.recipes[method]
        train = recipe.train.model_copy(update={"seed": seed, "steps": updates})
        output = root / f"{method}-{self.fingerprint(method)}" / f"seed-{seed}"
        return recipe.model_copy(update={"train": train, "output": str(output)})


def load_suite(path: Path) -> Suite:
    """Read and validate a suite file.

    Raises:
        SuiteError: for a missing or broken file, unknown keys or methods, recipes that do not share sources, data or
            evaluation, or a learning rate that depends on the run's length.
    """
    if not path.is_file():
        raise SuiteError(f"suite not found: {path}")
    try:
        content = SuiteFile.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        listed = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SuiteError(f"{path}: {listed}") from error
    if content.reference not in content.methods:
        raise SuiteError(f"{path}: reference {content.reference!r} is none of {', '.join(content.methods)}")
    recipes = {name: _recipe(path, content, name) for name in content.methods}
    _require_shared(path, recipes)
    return Suite(
        name=path.stem,
        title=content.title,
        seeds=content.seeds,
        reference=content.reference,
        recipes=recipes,
        updates=content.updates,
        compute=content.compute,
    )


def updates_within(compute: float, calls_per_update: float, method: str) -> int:
    """Updates that a budget of forward-equivalents pays for.

    Raises:
        SuiteError: if it does not pay for one.
    """
    if calls_per_update == 0:
        return 0
    updates = math.floor(compute / calls_per_update)
    if updates < 1:
        raise SuiteError(
            f"method {method!r} needs {calls_per_update:.0f} forward-equivalents an update; "
            f"the budget of {compute:.0f} does not pay for one"
        )
    return updates


def _recipe(path: Path, content: SuiteFile, method: str) -> Recipe:
    where = f"{path}, method {method!r}"
    merged = json.loads(json.dumps(content.recipe)) | {"output": "unused"}
    for key, value in content.methods[method].items():
        override(merged, key, value)
    try:
        recipe = parse_recipe(merged, where=where)
    except RecipeError as error:
        raise SuiteError(str(error)) from error
    if recipe.train.lr_scheduler != "constant":
        raise SuiteError(
            f"{where}: train.lr_scheduler must be 'constant': one run serves several lengths, "
            f"found {recipe.train.lr_scheduler!r}"
        )
    return recipe


def _require_shared(path: Path, recipes: dict[str, Recipe]) -> None:
    (first, one), *others = recipes.items()
    for name, recipe in others:
        for part in ("family", "base", "evaluate"):
            if getattr(recipe, part) != getattr(one, part):
                raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share {part!r}")
        shared = {field for field in recipe.fields if field in one.fields}
        if any(recipe.fields[field] != one.fields[field] for field in shared):
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share their sources")
        if [route.data for route in recipe.routes] != [route.data for route in one.routes]:
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share their training data")
        if recipe.train.batch_size != one.train.batch_size:
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share train.batch_size")
