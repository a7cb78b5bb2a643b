"""Whole jobs over a run folder: check, train, evaluate. The command line only parses and calls these."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from danceopd.evaluation.scorers import Scorer, scorer
from danceopd.evaluation.shapes import ShapesScorer
from danceopd.families.shapes import SOURCES
from danceopd.fields.guidance import GuidedField
from danceopd.files import write_text
from danceopd.pictures import sample_grid_writer
from danceopd.recipe import METHODS, EvaluatePart, FieldPart, Recipe, RecipeError, parse_recipe
from danceopd.report.overview import write_overview
from danceopd.report.page import write_report
from danceopd.training.assemble import Assembly, assemble, autocast, load_models
from danceopd.training.checkpoint import checkpoints, latest_checkpoint, load_checkpoint_state
from danceopd.training.hardware import keep_freed_memory, pick_device, resolve_precision
from danceopd.training.models import model_source, model_velocities
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer, load_run_models, prepare_recipe
from danceopd.world.tasks import EDIT_TASKS, GLOBAL_EDITS, LOCAL_EDITS, T2I_TASKS

console = Console()


@dataclass(frozen=True)
class Plan:
    """What a recipe will do, routes and student in a sentence each. The calls are expected ones per update, and once
    per run."""

    routes: tuple[str, ...]
    student: str
    rollout_calls: float
    field_calls: float
    train_calls: float
    calls_once: float
    trained_parameters: int
    megabytes: float


def plan(assembly: Assembly, asked: Recipe | None = None) -> Plan:
    """Predicted network calls and memory of an assembled recipe.

    asked: the recipe whose references and sizes are named, where stand-ins were assembled in its place.
    """
    recipe, method = asked or assembly.recipe, assembly.method
    shares = method.router.shares.tolist()
    batch = recipe.train.batch_size
    sentences = [_route_sentence(assembly, recipe, index, share) for index, share in enumerate(shares)]
    calls = method.expected_calls()
    trained = sum(parameter.numel() for parameter in assembly.student.parameters.values())
    # Trained weights carry a gradient, two Adam moments and an average, all float32.
    return Plan(
        tuple(sentences),
        _student_sentence(assembly, recipe),
        batch * calls.rollout,
        batch * calls.field,
        batch * calls.train,
        calls.once,
        trained,
        (_weight_bytes(assembly) + trained * 16) / 2**20,
    )


def _route_sentence(assembly: Assembly, recipe: Recipe, index: int, share: float) -> str:
    route, part = assembly.method.routes[index], recipe.routes[index]
    field, data = recipe.fields[part.field], part.data
    words = [f"{route.name}: {share:.0%} of samples, taught by {_taught_by(field)}"]
    if field.prompt_prefix:
        words.append(f'told "{field.prompt_prefix}" first')
    if isinstance(route.field, GuidedField):
        negative = field.negative_prompt if part.negative_prompt is None else part.negative_prompt
        words.append(f"guidance {route.field.guidance_scale:g}" + (f' against "{negative}"' if negative else ""))
    pack = f"pack {data.pack}" + (f" on {data.images}" if data.images else "")
    size = part.resolution or recipe.resolution
    inputs = assembly.buckets[route.name].source
    kind = "text to image" if inputs[0].source is None else "edits"
    words.append(
        f"on {data.generator or data.manifest or pack} ({len(inputs)} inputs, {kind})"
        + (f" at {size[0]} x {size[1]}" if size else "")
    )
    words.append(f"prompt dropout {route.dropout:g}")
    if "query" in METHODS[recipe.method]:
        states, steps = recipe.states_and_steps(part)
        words.append(f"{states} of {steps} steps ({recipe.query.band} over {recipe.query.over})")
    return ", ".join(words)


def _taught_by(field: FieldPart) -> str:
    if field.mixture is not None:
        return f"mixture {field.mixture}"
    scale = "" if field.lora_scale == 1.0 else f" x {field.lora_scale:g}"
    made = [f"{kind} {name}" + (scale if kind == "lora" else "") for kind, name in field.references.items()]
    return " over ".join(made) or "base"


def _student_sentence(assembly: Assembly, recipe: Recipe) -> str:
    part = recipe.student
    init = part.init if isinstance(part.init, str) else " + ".join(f"{w:g} {name}" for name, w in part.init.items())
    if part.lora is None:
        return f"all weights, from {init}"
    targets = ", ".join(part.lora.targets or assembly.family.lora_targets)
    start = "over" if part.init_mode == "merged" else "from"
    return (
        f"LoRA of rank {part.lora.rank} and alpha {part.lora.alpha:g} on {targets} "
        f"({len(assembly.student.parameters) // 2} modules), {start} {init}"
    )


def _weight_bytes(assembly: Assembly) -> int:
    """Bytes of all weights held: every network of the fields, and the student's own."""
    modules: list[nn.Module] = [assembly.student.network, *assembly.models]
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def check(recipe: Recipe, *, asked: Recipe | None = None) -> Plan:
    """Validate everything before training: load all files, and take one small batch of each route through the method.

    asked: see ``plan``.

    The batch runs rollout, fields and loss as training does, without a gradient step; nothing is written.

    Raises:
        RecipeError, CheckpointError, AdapterMismatch, ManifestError: for whatever does not fit.
    """
    assembly = assemble(prepare_recipe(recipe, pick_device()), device=pick_device())
    generator = torch.Generator().manual_seed(recipe.train.seed)
    count = recipe.flow_opd.group_size if recipe.method == "flow_opd" else 2
    with autocast(torch.device(assembly.method.device), assembly.recipe.train.precision):
        for index in range(len(assembly.method.routes)):
            chosen = torch.full((count,), index)
            assembly.method.step(assembly.student.model, batch_size=count, generator=generator, routes=chosen)
    return plan(assembly, asked)


def train(recipe: Recipe, *, resume: bool = False) -> RunFolder:
    """Train a recipe into its run folder.

    Raises:
        RecipeError: if the folder already holds a run and ``resume`` is off, or holds another recipe.
    """
    folder = RunFolder(Path(recipe.output))
    device = pick_device()
    with folder.owned():
        if checkpoints(folder.checkpoints):
            if not resume:
                raise RecipeError(
                    f"{folder.path} already holds a run; continue it with --resume, or choose another output "
                    "(--set output=DIR)"
                )
            recorded = folder.read_recipe()
            recipe = _same_run(recipe, recorded, folder)
        else:
            recipe = prepare_recipe(recipe, device)
        assembly = assemble(recipe, device=device)
        folder.write_recipe(recipe)
        trainer = Trainer(assembly, folder, on_samples=sample_grid_writer(folder))
        trainer.resume()
        trainer.run()
    return folder


def _same_run(recipe: Recipe, recorded: Recipe, folder: RunFolder) -> Recipe:
    """The recorded recipe, allowing only other steps (where the learning rate does not depend on them) and evaluation.

    ``auto`` stays what it was measured as.
    """
    precision = recorded.train.precision if recipe.train.precision == "auto" else recipe.train.precision
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    free = {"evaluate": recorded.evaluate, "train": asked.train.model_copy(update={"steps": recorded.train.steps})}
    free["output"] = recorded.output  # this folder, whichever way its path is written
    if asked.model_copy(update=free) != recorded:
        changed = [
            name
            for name in Recipe.model_fields
            if getattr(asked.model_copy(update=free), name) != getattr(recorded, name)
        ]
        raise RecipeError(
            f"{folder.path} holds a run of another recipe (differing in {', '.join(changed)}); only train.steps and "
            "evaluate may change on --resume"
        )
    if asked.train.steps != recorded.train.steps and asked.train.lr_scheduler != "constant":
        raise RecipeError(
            f"train.steps: {folder.path} was begun with {recorded.train.steps}, found {asked.train.steps}; its "
            f"{asked.train.lr_scheduler} lr_scheduler depends on the number of updates, so only a run with 'constant' "
            "can be made longer"
        )
    return asked


def evaluate(folder: RunFolder, part: EvaluatePart | None = None) -> dict[str, Any]:
    """Score base, every LoRA or checkpoint field and the student; write ``evaluation.json``.

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
