"""Run a suite: every method and seed trained once, measured where its updates and its compute are the suite's."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from danceopd.comparison.measures import MEASURES, measured, scores
from danceopd.comparison.parallel import in_parallel
from danceopd.comparison.results import Point, Results
from danceopd.comparison.suite import Suite, digest, updates_within
from danceopd.errors import NonFiniteValue, UserError
from danceopd.evaluation.scorers import scorer
from danceopd.files import write_text
from danceopd.recipe import Recipe
from danceopd.runs import train
from danceopd.states import NetworkCalls
from danceopd.training.assemble import Assembly, assemble, load_models
from danceopd.training.checkpoint import RunStateError, checkpoints, keep_averaged, load_checkpoint_state
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_velocities
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run

Report = Callable[[str], None]
SCORING: int | None = None
"""Raised when code changes what a measure finds of the same weights, so that no suite mixes old figures with new."""


class ComparisonError(UserError, RuntimeError):
    """A comparison cannot go on; the message names the folder and the way out."""


def run_suite(
    suite: Suite, root: Path, *, only: list[str] | None = None, jobs: int = 1, report: Report = print
) -> Results:
    """Train and measure whatever is not there yet; a killed comparison goes on where it stopped.

    jobs: runs at a time, each in a process of its own; 1 stays in this one.

    Raises:
        RecipeError: if the suite's family has no scorer.
        ComparisonError: if ``only`` names an unknown method, the suite's search was made with other sources, a cached
            run cannot serve, or one diverges.
        Interrupted: on SIGINT or SIGTERM.
    """
    scorer(suite.recipes[suite.reference].family)
    unknown = [name for name in only or () if name not in suite.recipes]
    if unknown:
        raise ComparisonError(f"suite {suite.name!r} has no method {unknown[0]!r}; it has {', '.join(suite.recipes)}")
    methods = [name for name in suite.recipes if only is None or name in only]
    views, expected, hashes = {}, {}, {}
    for name in methods:
        assembly = assemble(suite.recipes[name], device=pick_device())
        views[name], hashes[name] = comparison_updates(suite, name, assembly), assembly.hashes
        expected[name] = expected_compute(views[name], assembly)
    _require_searched_with(suite, hashes)
    runs = [(method, seed) for seed in suite.seeds for method in methods]
    folders = {suite.run_folder(method, seed=seed, root=root): hashes[method] for method, seed in runs}
    lengths = {name: _lengths(suite, name, views[name]) for name in methods}
    sources = _sources(suite, root, folders, report)  # before hours are spent
    _require_within_reach(suite, lengths, root, runs)
    work = partial(_run_points, suite, lengths, root)
    if jobs > 1:
        try:
            in_parallel(partial(_finish, work), runs, jobs, report)  # its points are files, which are read below
        except BrokenProcessPool as error:
            raise ComparisonError(
                "a run's process was killed, as happens where memory runs out; nothing that was saved is lost: go on "
                "with --resume, perhaps with fewer --jobs"
            ) from error
    points: dict[str, dict[int, list[Point]]] = {method: {} for method in methods}
    for method, seed in runs:
        for updates, point in work((method, seed), report).items():
            points[method].setdefault(updates, []).append(point)
    _require_made_with(folders)  # no source may have changed in the meantime
    return Results(points, views, sources, expected)


def _require_searched_with(suite: Suite, hashes: dict[str, dict[str, str]]) -> None:
    """The search has the hashes of its reference's recipe, in their order; its names are those of where it was made."""
    if suite.searched is None:
        return
    found = hashes.get(suite.reference) or assemble(suite.recipes[suite.reference], device=pick_device()).hashes
    if list(suite.searched.hashes.values()) != list(found.values()):
        raise ComparisonError(f"the search of suite {suite.name!r} was made with other sources; search again")


def _require_made_with(present: dict[Path, dict[str, str]]) -> None:
    """Refuse what was made with other sources or data than there are now, all of it at once.

    present: by run folder or file, the hashes of what is there now.
    """
    changed = {path: names for path, hashes in present.items() if (names := _changed(path, hashes))}
    if changed:
        raise ComparisonError(
            f"made with other sources or data: {', '.join(map(str, changed))}; remove these to compare the present "
            f"ones, or put back {', '.join(sorted(set().union(*changed.values())))}"
        )


def _changed(path: Path, hashes: dict[str, str]) -> set[str]:
    """The names under which a run folder, or a file, has other hashes; what is damaged is refused where it is read."""
    names = set()
    for file in [*path.glob("points/*.json"), *path.rglob("state.json")] if path.is_dir() else [path]:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            recorded = json.loads(file.read_text(encoding="utf-8"))["hashes"]
            names |= {name for name in recorded.keys() | hashes.keys() if recorded.get(name) != hashes.get(name)}
    return names


def _finish(work: Callable[[tuple[str, int], Report], dict[int, Point]], run: tuple[str, int]) -> str:
    work(run, print)
    return f"{run[0]}, seed {run[1]}: done"


def _lengths(suite: Suite, method: str, views: dict[str, int]) -> dict[int, list[str]]:
    """By updates at which a method is scored, in order, the measures that are taken there."""
    taken = [name for name in measured(suite) if MEASURES[name].take is not None]
    further = suite.points if suite.recipes[method].train.steps else ()
    return {
        updates: [name for name in taken if MEASURES[name].everywhere or updates == views.get("updates")]
        for updates in sorted({*views.values(), *further})
    }


def _require_within_reach(
    suite: Suite, lengths: dict[str, dict[int, list[str]]], root: Path, runs: list[tuple[str, int]]
) -> None:
    """Refuse runs that went past an update whose weights were not kept, all of them before one is trained."""
    past = []
    for method, seed in runs:
        folder = suite.run_folder(method, seed=seed, root=root)
        unmeasured = [
            updates for updates, names in lengths[method].items() if not _is_kept(suite, method, folder, updates, names)
        ]
        try:
            reached = _saved(RunFolder(folder)) if unmeasured else {}
        except RunStateError as error:
            raise ComparisonError(f"{method}, seed {seed}, in {folder}: {error}") from error
        lost = [updates for updates in unmeasured if updates not in reached and updates < max(reached, default=0)]
        if lost:
            past.append(f"{folder} is already at update {max(reached)} and its weights at {lost[0]} were not kept")
    if past:
        listed = "; ".join(past)
        raise ComparisonError(f"{listed}; remove {'it' if len(past) == 1 else 'these'} to train again")


def _run_points(
    suite: Suite, lengths: dict[str, dict[int, list[str]]], root: Path, run: tuple[str, int], report: Report
) -> dict[int, Point]:
    """Every point of one method and seed, by its updates."""
    method, seed = run
    return {
        updates: _point(suite, method, seed, updates, root, names, report) for updates, names in lengths[method].items()
    }


def comparison_updates(suite: Suite, method: str, assembly: Assembly) -> dict[str, int]:
    """Updates of a method in each view of the suite; a method without training has 0 in all."""
    recipe = suite.recipes[method]
    trained = recipe.train.steps > 0
    views = {}
    if suite.updates is not None:
        views["updates"] = suite.updates if trained else 0
    if suite.compute is not None:
        calls = assembly.method.expected_calls()
        per_update = recipe.train.batch_size * calls.forward_equivalents if trained else 0.0
        views["compute"] = updates_within(suite.compute, per_update, method, once=calls.once)
    return views


def expected_compute(views: dict[str, int], assembly: Assembly) -> dict[str, float]:
    """Forward-equivalents that the updates of each view are reckoned to cost, by the routes' first shares."""
    calls, batch_size = assembly.method.expected_calls(), assembly.recipe.train.batch_size
    return {view: round(calls.after(updates * batch_size), 1) for view, updates in views.items()}


def _point(
    suite: Suite,
    method: str,
    seed: int,
    updates: int,
    root: Path,
    names: list[str],
    report: Report,
) -> Point:
    recipe = suite.run_recipe(method, seed=seed, updates=updates, root=root)
    folder = RunFolder(Path(recipe.output))
    kept = _kept_weights(folder.path, updates)
    files = _files(suite, method, kept, names)
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        try:
            if not kept.exists():
                report(f"{method}, seed {seed}: to update {updates}")
                keep_averaged(_trained_to(recipe, folder), kept)
            assembly, state = load_run(folder, device=pick_device(), purpose="scored", checkpoint=kept)
        except (RunStateError, NonFiniteValue) as error:
            raise ComparisonError(f"{method}, seed {seed}, in {folder.path}: {error}") from error
        assembly = replace(assembly, recipe=recipe)  # the recorded one may be further on, or of another folder
        spent = {
            "updates": updates,
            "compute": NetworkCalls(**state.calls).forward_equivalents,
            "seconds": round(state.seconds, 1),
            "hashes": assembly.hashes,
        }
        for name in missing:
            take = MEASURES[name].take
            assert take is not None
            content = {**spent, "taken": take(assembly, "student", suite)}
            write_text(files[name], json.dumps(content) + "\n")
    contents = {name: _kept(file, {"updates", "compute", "seconds", "hashes", "taken"}) for name, file in files.items()}
    first = contents[names[0]]
    taken = {name: content["taken"] for name, content in contents.items()}
    return Point(first["updates"], first["compute"], first["seconds"], taken)


def _kept_weights(folder: Path, updates: int) -> Path:
    """Where a run's weights at a point are kept."""
    return folder / "points" / f"{updates:06d}"


def _files(suite: Suite, method: str, kept: Path, names: list[str]) -> dict[str, Path]:
    """By measure, where what it takes at a point is kept: beside the weights."""
    return {name: kept.with_name(f"{kept.name}-{name}-{_key(suite, method, name)}.json") for name in names}


def _is_kept(suite: Suite, method: str, folder: Path, updates: int, names: list[str]) -> bool:
    """Whether a point is measured, or has its weights."""
    kept = _kept_weights(folder, updates)
    return kept.exists() or all(file.exists() for file in _files(suite, method, kept, names).values())


def _trained_to(recipe: Recipe, folder: RunFolder) -> Path:
    """The checkpoint at the recipe's last update, which is trained unless the run is there."""
    reached = _saved(folder)
    if recipe.train.steps not in reached:
        train(recipe, resume=True)
        reached = _saved(folder)
    return reached[recipe.train.steps]


def _saved(folder: RunFolder) -> dict[int, Path]:
    """A run's checkpoints by their updates."""
    return {load_checkpoint_state(path).step: path for path in checkpoints(folder.checkpoints)}


def _sources_file(suite: Suite, root: Path) -> Path:
    """Where the scores of the sources themselves are kept."""
    recipe = suite.recipes[suite.reference]
    named = recipe.model_dump(mode="json", include={"base", "fields"})
    return root / f"sources-{digest([named, recipe.train.precision, _key(suite, suite.reference, 'scores')])}.json"


def _sources(suite: Suite, root: Path, runs: dict[Path, dict[str, str]], report: Report) -> dict[str, dict[str, Any]]:
    """Every source's own scores on the suite's scenes; nothing there may have been made with others.

    runs: by folder, the hashes of what each run has now.
    """
    models = load_models(suite.recipes[suite.reference], device=pick_device())
    file = _sources_file(suite, root)
    _require_made_with(runs | {file: models.hashes})
    if not file.exists():
        names = [name for name in model_velocities(models) if name != "student"]
        report(f"sources: {', '.join(names)}")
        scored = {name: scores.take(models, name, suite) for name in names}
        write_text(file, json.dumps({"hashes": models.hashes, "scores": scored}) + "\n")
    return _kept(file, {"hashes", "scores"})["scores"]


def _kept(file: Path, keys: set[str]) -> dict[str, Any]:
    """What an earlier comparison measured and wrote.

    Raises:
        ComparisonError: if the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ComparisonError(f"{file} is damaged: {error}; remove it to measure again") from error
    if not isinstance(content, dict) or content.keys() != keys or not isinstance(content["hashes"], dict):
        raise ComparisonError(f"{file} is damaged: needs {', '.join(sorted(keys))}; remove it to measure again")
    return content


def _key(suite: Suite, method: str, name: str) -> str:
    """Ten hexadecimal digits of what a measure takes, and on which scenes."""
    taken = [suite.recipes[method].evaluate.model_dump(mode="json"), MEASURES[name].settings(suite)]
    return digest(taken if SCORING is None else [*taken, SCORING])
