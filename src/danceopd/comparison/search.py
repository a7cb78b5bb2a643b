"""The settings search: the same number of trials for every method, on seeds and scenes that are never reported."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from danceopd.comparison.results import Results
from danceopd.comparison.runner import Report, run_suite
from danceopd.comparison.search_file import FINALS, RULE, MethodSearch, SearchFile, Trial, choose, finalists
from danceopd.comparison.suite import (
    Suite,
    SuiteError,
    load_suite,
    method_recipe,
    read_suite_file,
    require_shared,
    search_fingerprint,
    search_path,
)
from danceopd.comparison.suite_file import MeasuresPart, SearchPart, SuiteFile
from danceopd.files import write_text
from danceopd.training.assemble import assemble
from danceopd.training.hardware import pick_device

Tried = dict[int, dict[str, Any]]
"""A method's trials: {index in its grid: settings}."""


def search(path: Path, root: Path, *, jobs: int = 1, report: Report = print) -> Path:
    """Run every trial that ``root`` does not hold yet, choose, and write ``NAME.search.json`` beside the suite.

    Raises:
        SuiteError: if the suite declares no search; for the rest see ``load_suite`` and ``run_suite``.
    """
    content = read_suite_file(path)
    if content.search is None:
        raise SuiteError(f"{path} declares no search")
    part, suite = content.search, load_suite(path, with_search=False)
    tried = {method: dict(enumerate(_combinations(grid))) for method, grid in part.grid.items()}

    def scored(tried: dict[str, Tried], updates: int | None, compute: float | None) -> dict[str, tuple[Trial, ...]]:
        searching = replace(_trial_suite(path, content, part, suite, tried), updates=updates, compute=compute)
        return _trials(run_suite(searching, root, jobs=jobs, report=report), tried, part.capabilities)

    trials, finals = scored(tried, part.updates, part.compute), {}
    if part.has_finals:
        going_on = {method: {index: tried[method][index] for index in finalists(trials[method])} for method in tried}
        report("to the final length: " + ", ".join(_trial_names(going_on)))
        finals = scored(going_on, part.final_updates, part.final_compute)
    methods = {}
    for method in tried:
        last = finals.get(method, ())
        methods[method] = MethodSearch(
            trials=trials[method], finals=last, chosen=choose(last or trials[method]).settings
        )
        for edge in methods[method].edges:
            report(f"{method}: {edge}; a better one may lie beyond")
    found = SearchFile(
        suite=suite.name,
        fits=search_fingerprint(content),
        rule=f"{RULE} {FINALS}" if part.has_finals else RULE,
        updates=part.updates,
        final_updates=part.final_updates,
        compute=part.compute,
        final_compute=part.final_compute,
        seeds=part.seeds,
        scenes_seed=part.scenes_seed,
        scenes_per_task=part.scenes_per_task,
        hashes=assemble(suite.recipes[suite.reference], device=pick_device()).hashes,
        methods=methods,
    )
    write_text(search_path(path), found.model_dump_json(indent=1) + "\n")
    return search_path(path)


def _combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid's values, the last key changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _trial_name(method: str, index: int) -> str:
    return f"{method}-{index}"


def _trial_names(tried: dict[str, Tried]) -> list[str]:
    return [_trial_name(method, index) for method, settings in tried.items() for index in settings]


def _trial_suite(path: Path, content: SuiteFile, part: SearchPart, suite: Suite, tried: dict[str, Tried]) -> Suite:
    """The suite with every trial as a method, on the search's own seeds and scenes."""
    scenes = {"seed": part.scenes_seed, "scenes_per_task": part.scenes_per_task}
    recipes, kept_as = {}, {}
    for method, trials in tried.items():
        for index, settings in trials.items():
            recipe, name = method_recipe(path, content, method, settings), _trial_name(method, index)
            recipes[name] = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=scenes)})
            kept_as[name] = method  # whatever its place in the grid
    require_shared(path, recipes)
    searching = replace(
        suite,
        seeds=part.seeds,
        reference=next(iter(recipes)),
        recipes=recipes,
        points=(),
        capabilities=part.capabilities,
        measures=MeasuresPart(),
        claims=(),
        kept_as=kept_as,
    )
    kept: dict[str, str] = {}
    for name, method in kept_as.items():
        same = kept.setdefault(f"{method}-{searching.fingerprint(name)}", name)
        if same != name:
            raise SuiteError(f"{path}: search.grid.{method}: trials {same} and {name} are the same recipe")
    return searching


def _trials(results: Results, tried: dict[str, Tried], capabilities: tuple[str, ...]) -> dict[str, tuple[Trial, ...]]:
    best = {c: max(results.source(name, c).mean() for name in results.sources) for c in capabilities}
    return {
        method: tuple(_trial(settings, results, _trial_name(method, index), best) for index, settings in trials.items())
        for method, trials in tried.items()
    }


def _trial(settings: dict[str, Any], results: Results, name: str, best: dict[str, float]) -> Trial:
    (updates,) = results.views[name].values()
    scores = {capability: float(results.scores(name, updates, capability).mean()) for capability in best}
    return Trial(
        settings=settings,
        scores={capability: round(value, 4) for capability, value in scores.items()},
        ratios={capability: round(value / best[capability], 4) for capability, value in scores.items()},
    )
