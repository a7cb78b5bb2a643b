"""Whole jobs over a run folder: train, evaluate, report. The command line only parses and calls these."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from danceopd.evaluation.scorers import Scorer, scorer
from danceopd.evaluation.shapes import ShapesScorer
from danceopd.families.shapes import SOURCES
from danceopd.files import write_text
from danceopd.pictures import sample_grid_writer
from danceopd.recipe import EvaluatePart, Recipe, RecipeError, parse_recipe
from danceopd.report.overview import write_overview
from danceopd.report.page import write_report
from danceopd.training.assemble import Assembly, assemble, autocast, load_models
from danceopd.training.checkpoint import latest_checkpoint, load_checkpoint_state
from danceopd.training.hardware import keep_freed_memory, pick_device, resolve_precision
from danceopd.training.models import model_source, model_velocities
from danceopd.training.processes import ALONE, Processes
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer, load_run_models, prepare_recipe
from danceopd.world.tasks import EDIT_TASKS, GLOBAL_EDITS, LOCAL_EDITS, T2I_TASKS

console = Console()


def train(recipe: Recipe, *, resume: bool = False, processes: Processes = ALONE) -> RunFolder:
    """Train a recipe into its run folder.

    processes: this process of the run's, which all call this; the first one holds the folder.

    Raises:
        RecipeError: if the folder already holds a run and ``resume`` is off, or holds another recipe, or one that is
            further on.
        FailedElsewhere: if another process could not begin.
    """
    folder = RunFolder(Path(recipe.output))
    device = pick_device()
    with ExitStack() as held:
        processes.on_main(lambda: held.enter_context(folder.owned()))
        (begun, *_) = processes.together(lambda: _begun(recipe, folder, device, resume=resume))
        assembly = _assembled(begun, device, processes)
        trainer = Trainer(assembly, folder, on_samples=sample_grid_writer(folder), processes=processes)
        trainer.resume()
        if trainer.step > begun.train.steps:
            message = f"train.steps: {folder.path} is already at update {trainer.step}, found {begun.train.steps}"
            raise processes.alike(RecipeError(f"{message}; a run goes on, never back"))
        processes.on_main(lambda: folder.write_recipe(begun))
        trainer.run()
    return folder


def _begun(recipe: Recipe, folder: RunFolder, device: torch.device, *, resume: bool) -> Recipe:
    """The recipe as the folder's run has it, or as it is to be run here."""
    if not folder.trained():
        return prepare_recipe(recipe, device)
    if not resume:
        raise RecipeError(
            f"{folder.path} already holds a run; continue it with --resume, or choose another output (--set output=DIR)"
        )
    return _same_run(recipe, folder.read_recipe(), folder)


def _assembled(recipe: Recipe, device: torch.device, processes: Processes) -> Assembly:
    """The recipe made live on the first process and then on all others, which find in the cache what it encoded."""
    made: list[Assembly] = []

    def make() -> None:
        made.append(assemble(recipe, device=device, processes=processes))

    processes.on_main(make)
    processes.together(lambda: None if processes.main else make())
    return made[0]


def _same_run(recipe: Recipe, recorded: Recipe, folder: RunFolder) -> Recipe:
    """The recorded recipe, allowing only other steps (where the learning rate does not depend on them) and evaluation.

    ``auto`` stays what it was measured as.
    """
    precision = recorded.train.precision if recipe.train.precision == "auto" else recipe.train.precision
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    free = {"evaluate": recorded.evaluate, "train": asked.train.model_copy(update={"steps": recorded.train.steps})}
    free["output"] = recorded.output  # this folder, whichever way its path is written
    if asked.model_copy(update=free) != recorded:
        before, now = recorded.model_dump(mode="json"), asked.model_copy(update=free).model_dump(mode="json")
        raise RecipeError(
            f"{folder.path} holds a run of another recipe ({'; '.join(_changes(before, now))}); only train.steps and "
            "evaluate may change when it goes on. Choose another output (--set output=DIR; quickstart: --out DIR)"
        )
    if asked.train.steps != recorded.train.steps and asked.train.lr_scheduler != "constant":
        raise RecipeError(
            f"train.steps: {folder.path} was begun with {recorded.train.steps}, found {asked.train.steps}; its "
            f"{asked.train.lr_scheduler} lr_scheduler depends on the number of updates, so only a run with 'constant' "
            "can be made longer"
        )
    return asked


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two contents of recipes, a sentence for each key."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        parts = [(name, before.get(name), now.get(name)) for name in names]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = [(str(index), *pair) for index, pair in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"{key}: {json.dumps(before)} there, {json.dumps(now)} now"]
    return [change for name, old, new in parts for change in _changes(old, new, f"{key}.{name}" if key else name)]


def evaluate(folder: RunFolder, part: EvaluatePart | None = None) -> dict[str, Any]:
    """Score the base, every field that differs from it and the student; write ``evaluation.json``.

    Raises:
        RecipeError: if the family has no scorer.
        RunFolderBusy: if another process works in the folder, which is held until the scores are written.
    """
    keep_freed_memory()
    judge = scorer(folder.read_recipe().family)  # before the lock, which would make a folder of a mistyped path
    with folder.owned():
        return _evaluate(folder, judge, part, pick_device())


def _evaluate(folder: RunFolder, judge: Scorer, part: EvaluatePart | None, device: torch.device) -> dict[str, Any]:
    run, state = load_run_models(folder, device=device, purpose="evaluated")
    recipe = run.recipe
    part = part or recipe.evaluate
    models = model_velocities(run)
    with Progress(console=console) as progress, autocast(device, recipe.train.precision):
        task = progress.add_task("evaluating", total=judge.images(part) * len(models))
        report = judge.evaluate(
            models,
            run.family,
            part,
            encoders=run.inputs,
            pictures=folder.samples / "evaluation",
            on_batch=lambda count: progress.advance(task, count),
        )
    report["sources"] = {name: model_source(recipe, name) for name in models}
    report["seconds"]["training"] = round(state.seconds, 2)
    report["trained_steps"] = state.step
    report["network_calls"] = state.calls
    report["precision"] = recipe.train.precision
    report["hashes"] = state.hashes
    write_text(folder.evaluation_file, json.dumps(report, indent=1) + "\n")
    return report


def quickstart(recipe: Recipe) -> tuple[RunFolder, dict[str, Any]]:
    """Train, evaluate and report; resumes by itself where a folder holds a run of the same recipe.

    ``seconds.total`` is the time since the start, and the training seconds of earlier invocations: those between a
    kill and the checkpoint before it are lost. ``resumed`` says whether there were any.
    """
    started = time.monotonic()
    earlier = latest_checkpoint(RunFolder(Path(recipe.output)).checkpoints)
    trained = 0.0 if earlier is None else load_checkpoint_state(earlier).seconds
    folder = train(recipe, resume=True)
    report = evaluate(folder)
    report["seconds"]["total"] = round(trained + time.monotonic() - started, 2)
    report["resumed"] = earlier is not None
    with folder.owned():
        write_text(folder.evaluation_file, json.dumps(report, indent=1) + "\n")
        write_report(folder)
        write_overview(folder)
    return folder, report


def evaluate_world(part: EvaluatePart, out: Path, weights: Path | None = None) -> dict[str, Any]:
    """Score sources on every task and edit type; write ``out`` (JSON). ``own`` is each on its own tasks.

    weights: a folder of sources as ``world build`` leaves it; None is the shipped ones.
    """
    device = pick_device()
    keep_freed_memory()
    files = {name: f"shapes:{name}" if weights is None else str(weights / f"{name}.safetensors") for name in SOURCES}
    content = {
        "version": 1,
        "family": "shapes",
        "base": files.pop("base"),
        "fields": {name: {"lora": file} for name, file in files.items()},
        "routes": [{"field": "edit", "data": {"generator": "shapes/edit"}}],
        "output": "unused",
    }
    world = load_models(parse_recipe(content, where="the world"), device=device)
    models = {"base": world.base.velocity} | {name: field.velocity for name, field in world.fields.items()}
    judge, precision = ShapesScorer(), resolve_precision("auto", device)
    with Progress(console=console) as progress, autocast(device, precision):
        task = progress.add_task("evaluating", total=judge.images(part) * len(models))
        report = judge.evaluate(models, world.family, part, on_batch=lambda count: progress.advance(task, count))
    own = {"base": T2I_TASKS, "edit": EDIT_TASKS, "local": LOCAL_EDITS, "global": GLOBAL_EDITS, "realism": T2I_TASKS}
    scores = {name: {**model["t2i"], **model["edit"]} for name, model in report["models"].items()}
    report["own"] = {name: round(sum(scores[name][t] for t in tasks) / len(tasks), 4) for name, tasks in own.items()}
    del report["shown"], report["student_over"]
    report["precision"] = precision
    report["hashes"] = world.hashes
    write_text(out, json.dumps(report, indent=1) + "\n")
    return report
