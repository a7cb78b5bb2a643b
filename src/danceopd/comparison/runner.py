"""Run a suite: every method and seed trained once, scored where its updates and its compute are the suite's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.comparison.suite import VIEWS, Suite, updates_within
from danceopd.evaluation.shapes import CAPABILITIES, score_model
from danceopd.files import write_text
from danceopd.recipe import Recipe
from danceopd.runs import model_velocities, train
from danceopd.training.assemble import Assembly, assemble, autocast
from danceopd.training.checkpoint import checkpoints, load_checkpoint_state
from danceopd.training.hardware import pick_device
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run, prepare_recipe


class ComparisonError(RuntimeError):
    """A comparison cannot go on; the message names the folder and the way out."""


@dataclass(frozen=True)
class Point:
    """A scored state of a run. scores: {capability: [tasks, n]}; compute: forward-equivalents spent."""

    updates: int
    compute: float
    seconds: float
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """All scores of a suite. points: {method: {view: a point per seed}}; sources: {name: {capability: scores}}."""

    points: dict[str, dict[str, list[Point]]]
    sources: dict[str, dict[str, np.ndarray]]


def run_suite(
    suite: Suite,
    root: Path,
    *,
    seeds: int | None = None,
    only: list[str] | None = None,
    report: Callable[[str], None] = print,
) -> Results:
    """Train and score whatever is not there yet; a killed comparison goes on where it stopped.

    Raises:
        ComparisonError: if ``only`` names an unknown method, or a cached run cannot serve.
        CheckpointFailure: if a cached run's sources changed.
    """
    unknown = [name for name in only or () if name not in suite.recipes]
    if unknown:
        raise ComparisonError(f"suite {suite.name!r} has no method {unknown[0]!r}; it has {', '.join(suite.recipes)}")
    methods = [name for name in suite.recipes if only is None or name in only]
    points: dict[str, dict[str, list[Point]]] = {name: {view: [] for view in VIEWS} for name in methods}
    assembled = {name: assemble(suite.recipes[name], device=pick_device()) for name in methods}
    updates = {name: comparison_updates(suite, name, assembled[name]) for name in methods}
    hashes = {name: assembly.hashes for name, assembly in assembled.items()}
    for seed in range(seeds or suite.seeds):
        for method in methods:
            wanted = sorted(set(updates[method].values()))
            scored = {count: _point(suite, method, seed, count, root, hashes[method], report) for count in wanted}
            for view in VIEWS:
                points[method][view].append(scored[updates[method][view]])
    return Results(points, _sources(suite, root, report))


def comparison_updates(suite: Suite, method: str, assembly: Assembly) -> dict[str, int]:
    """Updates of a method at each of ``VIEWS``; a method without training has none."""
    recipe = suite.recipes[method]
    if recipe.train.steps == 0:
        return dict.fromkeys(VIEWS, 0)
    calls = assembly.method.expected_calls()
    per_update = recipe.train.batch_size * (calls.rollout + calls.field + 3 * calls.train)
    return {"updates": suite.updates, "compute": updates_within(suite.compute, per_update, method)}


def _point(
    suite: Suite,
    method: str,
    seed: int,
    updates: int,
    root: Path,
    hashes: dict[str, str],
    report: Callable[[str], None],
) -> Point:
    recipe = suite.run_recipe(method, seed=seed, updates=updates, root=root)
    folder = RunFolder(Path(recipe.output))
    file = folder.path / "points" / f"{updates:06d}-{_evaluation_key(recipe)}.json"
    if not file.exists():
        reached = [load_checkpoint_state(path).step for path in checkpoints(folder.checkpoints)]
        if reached and max(reached) > updates:
            raise ComparisonError(
                f"{folder.path} is already at update {max(reached)} and was never scored at {updates}; "
                "remove that folder to train it again"
            )
        report(f"{method}, seed {seed}: to update {updates}")
        train(recipe, resume=True)
        assembly, state = load_run(folder, device=pick_device())
        content = {
            "updates": updates,
            "compute": state.calls["rollout"] + state.calls["field"] + 3 * state.calls["train"],
            "seconds": round(state.seconds, 1),
            "hashes": assembly.hashes,
            "scores": {name: scores.tolist() for name, scores in _score(assembly, "student", recipe)},
        }
        write_text(file, json.dumps(content) + "\n")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["hashes"] != hashes:
        raise ComparisonError(
            f"{file} was made with other sources or data; remove {folder.path} to compare the present ones"
        )
    scores = {name: np.array(values) for name, values in content["scores"].items()}
    return Point(content["updates"], content["compute"], content["seconds"], scores)


def _sources(suite: Suite, root: Path, report: Callable[[str], None]) -> dict[str, dict[str, np.ndarray]]:
    """Every source's own scores on the suite's scenes."""
    recipe = prepare_recipe(suite.recipes[suite.reference], pick_device())
    assembly = assemble(recipe, device=pick_device())
    key = f"{suite.fingerprint(suite.reference)}-{_evaluation_key(recipe)}"
    file = root / f"sources-{key}.json"
    if not file.exists():
        names = [name for name in model_velocities(assembly) if name != "student"]
        report(f"sources: {', '.join(names)}")
        scored = {name: {k: v.tolist() for k, v in _score(assembly, name, recipe)} for name in names}
        write_text(file, json.dumps({"hashes": assembly.hashes, "scores": scored}) + "\n")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if content["hashes"] != assembly.hashes:
        raise ComparisonError(f"{file} was made with other sources; remove {root} to compare the present ones")
    return {
        name: {capability: np.array(values) for capability, values in scores.items()}
        for name, scores in content["scores"].items()
    }


def _score(assembly: Assembly, model: str, recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    velocity = model_velocities(assembly)[model]
    with autocast(pick_device(), assembly.recipe.train.precision):
        for capability in CAPABILITIES:
            scored = score_model(velocity, assembly.family, capability, recipe.evaluate)
            yield capability, scored.scores.round(4)


def _evaluation_key(recipe: Recipe) -> str:
    part = recipe.evaluate
    return f"{part.scenes_per_task}x{part.num_inference_steps}-g{part.guidance_scale:g}-s{part.seed}"
