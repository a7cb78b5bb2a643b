"""The settings search: the same number of trials for every method, on seeds and scenes that are never reported."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from danceopd.comparison.results import Results
from danceopd.comparison.runner import Report, run_suite
from danceopd.comparison.search_file import RULE, MethodSearch, SearchFile, Trial, choose
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


def search(path: Path, root: Path, *, jobs: int = 1, report: Report = print) -> Path:
    """Run every trial that ``root`` does not hold yet, choose, and write ``NAME.search.json`` beside the suite.

    Raises:
        SuiteError: if the suite declares no search; for the rest see ``load_suite`` and ``run_suite``.
    """
    content = read_suite_file(path)
    if content.search is None:
        raise SuiteError(f"{path} declares no search")
    suite = load_suite(path, with_search=False)
    trials = {method: _combinations(grid) for method, grid in content.search.grid.items()}
    searching = _trial_suite(path, content, content.search, suite, trials)
    results = run_suite(searching, root, jobs=jobs, report=report)
    best = {c: max(results.source(name, c).mean() for name in results.sources) for c in content.search.capabilities}
    methods = {}
    for method, tried in trials.items():
        scored = tuple(
            _trial(settings, results, _trial_name(method, index), best) for index, settings in enumerate(tried)
        )
        methods[method] = MethodSearch(trials=scored, chosen=choose(scored).settings)
        for edge in methods[method].edges:
            report(f"{method}: {edge} tried; a better one may lie beyond")
    found = SearchFile(
        suite=suite.name,
        fits=search_fingerprint(content),
        rule=RULE,
        updates=content.search.updates,
        seeds=content.search.seeds,
        scenes_seed=content.search.scenes_seed,
        scenes_per_task=content.search.scenes_per_task,
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


def _trial_suite(
    path: Path, content: SuiteFile, part: SearchPart, suite: Suite, trials: dict[str, list[dict[str, Any]]]
) -> Suite:
    """The suite with every trial as a method, on the search's own seeds, scenes and updates."""
    scenes = {"seed": part.scenes_seed, "scenes_per_task": part.scenes_per_task}
    recipes = {}
    for method, tried in trials.items():
        for index, settings in enumerate(tried):
            recipe = method_recipe(path, content, method, settings)
            recipes[_trial_name(method, index)] = recipe.model_copy(
                update={"evaluate": recipe.evaluate.model_copy(update=scenes)}
            )
    require_shared(path, recipes)
    return replace(
        suite,
        seeds=part.seeds,
        reference=_trial_name(suite.reference, 0),
        recipes=recipes,
        updates=part.updates,
        compute=None,
        points=(),
        capabilities=part.capabilities,
        measures=MeasuresPart(),
        claims=(),
    )


def _trial(settings: dict[str, Any], results: Results, name: str, best: dict[str, float]) -> Trial:
    updates = results.views[name]["updates"]
    scores = {capability: float(results.scores(name, updates, capability).mean()) for capability in best}
    return Trial(
        settings=settings,
        scores={capability: round(value, 4) for capability, value in scores.items()},
        ratios={capability: round(value / best[capability], 4) for capability, value in scores.items()},
    )
