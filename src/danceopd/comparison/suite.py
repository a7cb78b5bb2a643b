"""A suite: several methods on one set of sources, data, student and evaluation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from danceopd.comparison.search_file import SearchFile, SearchMismatch, read_search
from danceopd.comparison.suite_file import VIEWS, ClaimPart, MeasuresPart, PaperPart, SearchPart, SuiteFile, View
from danceopd.errors import UserError
from danceopd.recipe import IDLE, METHODS, Recipe, RecipeError, override, parse_recipe, read_yaml, with_absolute_files
from danceopd.recipe.wording import explain

_DEFAULTS = 1
"""Raised when a recipe's default changes, which no fingerprint holds: new keys leave old runs their folders."""
REVISIONS: dict[str, int] = {}
"""By a recipe's ``method``: raised when its code changes what it trains, so that no suite mixes old runs with new."""
UNSET = "set by the suite"
"""A suite's recipe has no output of its own; each run's is ``Suite.run_recipe``'s."""


class SuiteError(UserError, ValueError):
    """A suite cannot be run; the message names the file, what was found and what is needed."""


@dataclass(frozen=True)
class Suite:
    """A suite, validated. recipes: by method, with what the search chose; searched: where that came from.

    kept_as: the names under which runs are kept, of methods that are trials of another.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    reference: str
    recipes: dict[str, Recipe]
    updates: int | None
    compute: float | None
    points: tuple[int, ...]
    capabilities: tuple[str, ...]
    measures: MeasuresPart
    claims: tuple[ClaimPart, ...]
    paper: PaperPart | None
    search: SearchPart | None
    searched: SearchFile | None
    kept_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def views(self) -> tuple[View, ...]:
        """At what methods are compared."""
        return tuple(view for view in VIEWS if getattr(self, view) is not None)

    def fingerprint(self, method: str) -> str:
        """Ten hexadecimal digits of the method's recipe but its length, seed, output and evaluation."""
        train = self.recipes[method].train.model_dump(mode="json", exclude_defaults=True, exclude={"steps", "seed"})
        content = self.recipes[method].model_dump(mode="json", exclude_defaults=True, exclude={"output", "evaluate"})
        revised = REVISIONS.get(self.recipes[method].method)
        return digest([_DEFAULTS, content | {"train": train}] + ([] if revised is None else [revised]))

    def run_folder(self, method: str, *, seed: int, root: Path) -> Path:
        """Where a run is kept: by what it is trained with, so that changed settings find no old run."""
        return root / f"{self.kept_as.get(method, method)}-{self.fingerprint(method)}" / f"seed-{seed}"

    def run_recipe(self, method: str, *, seed: int, updates: int, root: Path) -> Recipe:
        """The recipe of one run, trained as far as ``updates``."""
        recipe = self.recipes[method]
        train = recipe.train.model_copy(update={"seed": seed, "steps": updates})
        return recipe.model_copy(update={"train": train, "output": str(self.run_folder(method, seed=seed, root=root))})


def digest(content: Any) -> str:
    """Ten hexadecimal digits of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def search_path(path: Path) -> Path:
    """Where a suite's search stands: ``NAME.search.json`` beside ``NAME.yaml``."""
    return path.with_suffix(".search.json")


def read_suite_file(path: Path) -> SuiteFile:
    """A suite file's content.

    Raises:
        SuiteError: for a missing or broken file, or unknown keys or values that do not fit.
    """
    if not path.is_file():
        raise SuiteError(f"suite not found: {path}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path} is not valid YAML: {error}") from error
    try:
        return SuiteFile.model_validate(content)
    except ValidationError as error:
        raise SuiteError(f"{path}: {explain(error, SuiteFile, content)}") from error


def load_suite(path: Path, *, with_search: bool = True) -> Suite:
    """Read and validate a suite file, and apply what its search chose where one was made.

    with_search: False leaves the search's choices out, to search again.

    Raises:
        SuiteError: for a file that cannot be used (``read_suite_file``), methods that no recipe knows, recipes that do
            not share sources, data or evaluation, a learning rate that depends on the run's length, a precision that is
            left to each run, a trained method that is not searched beside others that are, figures or a teacher that
            belong to no source, a guidance that is none of its field's, or a search file of another suite.
    """
    content = read_suite_file(path)
    searched = None
    if with_search and content.search is not None and search_path(path).exists():
        try:
            searched = read_search(
                search_path(path), fits=search_fingerprint(content), methods=content.search.grid.keys()
            )
        except SearchMismatch as error:
            raise SuiteError(str(error)) from error
    chosen = {} if searched is None else {name: method.chosen for name, method in searched.methods.items()}
    recipes = {name: method_recipe(path, content, name, chosen.get(name, {})) for name in content.methods}
    require_shared(path, recipes)
    for name, recipe in recipes.items():
        if content.search is not None and recipe.train.steps and name not in content.search.grid:
            raise SuiteError(
                f"{path}: search.grid: every method that is trained is searched alike, {name!r} is not there"
            )
        _require_sources(path, content, recipe)
    scenes_seed = recipes[content.reference].evaluate.seed
    if content.search is not None and content.search.scenes_seed == scenes_seed:
        raise SuiteError(f"{path}: search.scenes_seed {scenes_seed} is the evaluation's own; choose another")
    return Suite(
        name=path.stem,
        title=content.title,
        seeds=content.training_seeds,
        reference=content.reference,
        recipes=recipes,
        updates=content.updates,
        compute=content.compute,
        points=content.points,
        capabilities=content.capabilities,
        measures=content.measures,
        claims=content.claims,
        paper=content.paper,
        search=content.search,
        searched=searched,
    )


def _require_measurable_guidance(path: Path, recipe: Recipe) -> None:
    """``measures.guidance`` is of one route that the base teaches under its field's own guidance."""
    for route in recipe.routes:
        if len(recipe.routes) > 1 or (route.guidance_scale, route.negative_prompt) != (None, None):
            raise SuiteError(
                f"{path}: measures.guidance needs one route, taught by its field as that is scored: without a "
                "guidance_scale or negative_prompt of the route's own"
            )
        taught_by = recipe.fields[route.field]
        if taught_by.base is not True or (taught_by.negative_prompt, taught_by.prompt_prefix) != ("", ""):
            raise SuiteError(
                f"{path}: measures.guidance goes by the base's own guidance, and field {route.field!r} is not the "
                "base, or has a negative_prompt or prompt_prefix"
            )
    if recipe.evaluate.guidance_scale != 1.0:
        raise SuiteError(
            f"{path}: measures.guidance has scales of its own and needs evaluate.guidance_scale 1, found "
            f"{recipe.evaluate.guidance_scale:g}"
        )
    if recipe.rollout.substeps > 1:
        raise SuiteError(f"{path}: measures.guidance compares velocities, and rollout.substeps teaches their means")


def _require_sources(path: Path, content: SuiteFile, recipe: Recipe) -> None:
    """Whatever a suite says of its sources must be about one that is scored."""
    if content.measures.guidance is not None:
        _require_measurable_guidance(path, recipe)
    if content.measures.exposure is not None and any(route.data.generator is None for route in recipe.routes):
        raise SuiteError(f"{path}: measures.exposure draws inputs apart from the training's, and needs generators")
    sources = ["base", *(name for name, part in recipe.fields.items() if not part.is_base)]
    teacher = None if content.measures.realism is None else content.measures.realism.teacher
    if teacher is not None and teacher not in sources[1:]:
        raise SuiteError(f"{path}: measures.realism.teacher {teacher!r} is none of {', '.join(sources[1:])}")
    for name in {} if content.paper is None else content.paper.figures:
        if name not in [*content.methods, *sources]:
            raise SuiteError(
                f"{path}: paper.figures: {name!r} is none of {', '.join([*content.methods, *sources])}; "
                "a field that is the base itself stands in the tables as 'base'"
            )


def search_fingerprint(content: SuiteFile) -> str:
    """Ten hexadecimal digits of everything in a suite file that its search depends on, which has scenes of its own."""
    found = content.model_dump(mode="json", include={"recipe", "methods", "search"})
    found["methods"] = {name: changes for name, changes in found["methods"].items() if name in found["search"]["grid"]}
    if isinstance(found["recipe"].get("evaluate"), dict):
        for key in ("seed", "scenes_per_task"):
            found["recipe"]["evaluate"].pop(key, None)
    for key in ("final_updates", "compute", "final_compute"):  # younger keys, which leave older searches their own
        if found["search"][key] is None:
            del found["search"][key]
    return digest(found)


def updates_within(compute: float, calls_per_update: float, method: str, *, once: float = 0.0) -> int:
    """Updates that a budget of forward-equivalents pays for, ``once`` of it being spent before the first.

    Raises:
        SuiteError: if it does not pay for one.
    """
    if calls_per_update == 0:
        return 0
    updates = math.floor((compute - once) / calls_per_update)
    if updates < 1:
        before = f" and {once:.0f} before the first" if once else ""
        raise SuiteError(
            f"method {method!r} needs {calls_per_update:.0f} forward-equivalents an update{before}; "
            f"the budget of {compute:.0f} does not pay for one"
        )
    return updates


def method_recipe(path: Path, content: SuiteFile, method: str, settings: dict[str, Any]) -> Recipe:
    """The recipe of a method, under {dotted key: value} that a search tries or chose.

    Raises:
        SuiteError: if the outcome is no recipe, its learning rate depends on the run's length, or its precision on the
            run.
    """
    where = f"{path}, method {method!r}"
    merged: dict[str, Any] = deepcopy(content.recipe) | {"output": UNSET}
    changes = deepcopy(content.methods[method] | settings)
    kind = str(changes.get("method", merged.get("method", "danceopd")))
    if kind in METHODS:
        for part in set(chain(*METHODS.values())).difference(METHODS[kind]):
            merged.pop(part, None)
    for part, idle in IDLE.get(kind, {}).items():
        if isinstance(merged.get(part), dict):
            merged[part] = {key: value for key, value in merged[part].items() if key not in idle}
    try:
        for key, value in changes.items():  # a later key may lead into it
            override(merged, key, value)
    except RecipeError as error:
        raise SuiteError(f"{where}: {error}") from error
    _require_own(where, merged, content.recipe)
    try:
        recipe = with_absolute_files(parse_recipe(merged, where=where), path.parent)
    except RecipeError as error:
        raise SuiteError(str(error)) from error
    if recipe.train.lr_scheduler != "constant":
        raise SuiteError(
            f"{where}: train.lr_scheduler must be 'constant': one run serves several lengths, "
            f"found {recipe.train.lr_scheduler!r}"
        )
    if recipe.train.precision == "auto":
        raise SuiteError(f"{where}: train.precision must be 'bf16' or 'fp32', for 'auto' is measured by every run anew")
    return recipe


def _require_own(where: str, merged: dict[str, Any], shared: dict[str, Any]) -> None:
    """Refuse what the suite sets itself, which would be lost."""
    train = merged["train"] if isinstance(merged.get("train"), dict) else {}
    given = {
        "output": merged["output"] != UNSET or "output" in shared,
        "train.seed": "seed" in train,
        "train.steps": train.get("steps", 0) != 0,
    }
    for key in (key for key, is_given in given.items() if is_given):
        raise SuiteError(f"{where}: {key} is not set here: a suite has updates and seeds, and folders of its own")


def require_shared(path: Path, recipes: dict[str, Recipe]) -> None:
    """Refuse recipes that compare unlike things.

    Raises:
        SuiteError: naming the first two methods that differ, and in what.
    """
    (first, one), *others = recipes.items()
    for name, recipe in others:
        for part in ("family", "base", "evaluate"):
            if getattr(recipe, part) != getattr(one, part):
                raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share {part!r}")
        if recipe.fields != one.fields:
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share their sources")
        if [route.data for route in recipe.routes] != [route.data for route in one.routes]:
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share their training data")
        if recipe.train.precision != one.train.precision:
            raise SuiteError(f"{path}: methods {first!r} and {name!r} do not share train.precision")
    trained = {name: recipe.train.batch_size for name, recipe in recipes.items() if recipe.train.steps}
    if len(set(trained.values())) > 1:
        raise SuiteError(f"{path}: methods do not share train.batch_size, found {trained}")
