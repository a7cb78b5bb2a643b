"""Whole jobs over a run folder: check, train, evaluate, sample. The command line only parses and calls these."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from danceopd.data.manifest import read_image_file, write_image_file
from danceopd.distill.solver import VelocityFunction, integrate
from danceopd.evaluation.shapes import CAPABILITIES, condition_of, evaluate_models, guided
from danceopd.families.shapes import SOURCES
from danceopd.fields.field import ModelField
from danceopd.fields.guidance import GuidedField
from danceopd.fields.mixture import MixtureField
from danceopd.fields.teachers import save_lora
from danceopd.files import write_text
from danceopd.recipe import EvaluatePart, Recipe, RecipeError, parse_recipe
from danceopd.report.overview import write_overview
from danceopd.report.page import write_report
from danceopd.training.assemble import Assembly, assemble, autocast
from danceopd.training.checkpoint import CheckpointFailure, checkpoints
from danceopd.training.hardware import keep_freed_memory, pick_device, resolve_precision
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer, load_run, prepare_recipe
from danceopd.world.generator import evaluation_set
from danceopd.world.tasks import EDIT_TASKS, GLOBAL_EDITS, LOCAL_EDITS, T2I_TASKS

console = Console()

EXPORT_TOLERANCE = 1e-4
"""Largest relative difference between a student and its reloaded export, in float32."""


@dataclass(frozen=True)
class Plan:
    """What a recipe will do. routes: a sentence each. The calls are expected ones per update."""

    routes: tuple[str, ...]
    rollout_calls: float
    field_calls: float
    train_calls: float
    trained_parameters: int
    megabytes: float


def plan(assembly: Assembly) -> Plan:
    """Predicted network calls and memory of an assembled recipe."""
    recipe, method = assembly.recipe, assembly.method
    shares = method.router.shares.tolist()
    batch = recipe.train.batch_size
    sentences = []
    for route, share, part in zip(method.routes, shares, recipe.routes, strict=True):
        field = recipe.fields[part.field]
        kind = next(name for name in ("base", "lora", "checkpoint", "mixture") if getattr(field, name))
        what = f"{kind} {'' if kind == 'base' else getattr(field, kind)}".strip()
        guided_words = f", guidance {field.guidance_scale:g}" if isinstance(route.field, GuidedField) else ""
        data = part.data.generator or part.data.manifest
        sentences.append(
            f"{route.name}: {share:.0%} of samples, taught by {what}{guided_words}, on {data} "
            f"({len(assembly.buckets[route.name].source)} inputs), prompt dropout {route.dropout:g}"
        )
    calls = method.expected_calls()
    trained = sum(parameter.numel() for parameter in assembly.student.parameters.values())
    # Trained weights carry a gradient, two Adam moments and an average, all float32.
    return Plan(
        tuple(sentences),
        batch * calls.rollout,
        batch * calls.field,
        batch * calls.train,
        trained,
        (_weight_bytes(assembly) + trained * 16) / 2**20,
    )


def _weight_bytes(assembly: Assembly) -> int:
    """Bytes of all weights held: the family's network, the student's own, and every full-checkpoint field's."""
    modules: list[nn.Module] = [assembly.family.network, assembly.student.network]
    waiting = list(assembly.fields.values())
    while waiting:
        field = waiting.pop()
        if isinstance(field, GuidedField):
            waiting.append(field.field)
        elif isinstance(field, MixtureField):
            waiting += field.fields
        elif isinstance(field, ModelField):
            modules.append(field.model)
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def check(recipe: Recipe) -> Plan:
    """Validate everything before training: files, shapes, routes with data; one real update of each route."""
    assembly = assemble(prepare_recipe(recipe, pick_device()), device=pick_device())
    generator = torch.Generator().manual_seed(recipe.train.seed)
    with autocast(torch.device(assembly.method.device), assembly.recipe.train.precision):
        for index in range(len(assembly.method.routes)):
            chosen = torch.full((2,), index)
            assembly.method.step(assembly.student.model, batch_size=2, generator=generator, routes=chosen)
    return plan(assembly)


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
        trainer = Trainer(assembly, folder, on_samples=_sample_grid_writer(folder))
        trainer.resume()
        trainer.run()
    return folder


def _same_run(recipe: Recipe, recorded: Recipe, folder: RunFolder) -> Recipe:
    """The recorded recipe, allowing only more steps and other evaluation; ``auto`` stays what it was measured as."""
    precision = recorded.train.precision if recipe.train.precision == "auto" else recipe.train.precision
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    free = {"evaluate": recorded.evaluate, "train": asked.train.model_copy(update={"steps": recorded.train.steps})}
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
    return asked


def evaluate(folder: RunFolder, part: EvaluatePart | None = None) -> dict[str, Any]:
    """Score base, every LoRA or checkpoint field and the student; write ``evaluation.json``."""
    device = pick_device()
    keep_freed_memory()
    with folder.owned():
        assembly, state = load_run(folder, device=device)
    recipe = assembly.recipe
    part = part or recipe.evaluate
    models = model_velocities(assembly)
    total = sum(len(tasks) for tasks in CAPABILITIES.values()) * part.scenes_per_task * len(models)
    with Progress(console=console) as progress, autocast(device, recipe.train.precision):
        task = progress.add_task("evaluating", total=total)
        report = evaluate_models(
            models,
            assembly.family,
            part,
            pictures=folder.samples / "evaluation",
            on_batch=lambda count: progress.advance(task, count),
        )
    report["sources"] = {name: model_source(recipe, name) for name in models}
    report["seconds"]["training"] = round(state.seconds, 2)
    report["trained_steps"] = state.step
    report["network_calls"] = state.calls
    report["precision"] = recipe.train.precision
    report["hashes"] = assembly.hashes
    write_text(folder.evaluation_file, json.dumps(report, indent=1) + "\n")
    return report


def model_velocities(assembly: Assembly) -> dict[str, VelocityFunction]:
    """Every model worth scoring: the base, each field that is not the base itself, the student."""
    models: dict[str, VelocityFunction] = {"base": assembly.base.velocity}
    for name, part in assembly.recipe.fields.items():
        if not part.base or part.guidance_scale != 1.0:
            models[name] = assembly.fields[name].velocity
    return models | {"student": assembly.student.model}


def model_source(recipe: Recipe, name: str) -> str:
    """In a few words, what a model of ``model_velocities`` is."""
    if name in recipe.fields:
        part = recipe.fields[name]
        what = part.lora or part.checkpoint or (recipe.base if part.base else " + ".join(part.mixture or ()))
        return what + (f", guidance {part.guidance_scale:g}" if part.guidance_scale != 1 else "")
    return recipe.base if name == "base" else "the trained student"


def quickstart(recipe: Recipe) -> tuple[RunFolder, dict[str, Any]]:
    """Train, evaluate and report; resumes by itself where a folder holds an unfinished run of the same recipe."""
    started = time.monotonic()
    folder = train(recipe, resume=True)
    report = evaluate(folder)
    report["seconds"]["total"] = round(time.monotonic() - started, 2)
    write_text(folder.evaluation_file, json.dumps(report, indent=1) + "\n")
    write_report(folder)
    write_overview(folder)
    return folder, report


def sample_images(
    folder: RunFolder,
    *,
    prompts: list[str],
    image: Path | None,
    field: str,
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
    out: Path,
) -> list[Path]:
    """Draw one PNG per prompt with the student or a named field.

    Raises:
        RecipeError: for a field the run does not have, or a prompt or image that the family cannot take.
        ManifestError: for an image file that cannot be read.
    """
    device = pick_device()
    assembly, _ = load_run(folder, device=device)
    models = model_velocities(assembly) | {name: value.velocity for name, value in assembly.fields.items()}
    if field not in models:
        raise RecipeError(f"{folder.path} has no field {field!r}; it has {', '.join(models)}")
    family = assembly.family
    sources = None if image is None else [read_image_file(image)] * len(prompts)
    try:
        condition = family.encode(prompts, sources)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    noise = torch.randn(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(device)
    with autocast(device, assembly.recipe.train.precision):
        velocity = guided(models[field], family, guidance_scale)
        grid = family.grid(num_inference_steps, assembly.recipe.evaluate.shift)
        latents = integrate(velocity, noise, condition, grid)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, picture in enumerate(family.decode(latents).cpu()):
        paths.append(out / f"{field}-{seed}-{index}.png")
        write_image_file(paths[-1], picture)
    return paths


def export(folder: RunFolder, out: Path) -> float:
    """Write the (averaged) student as one safetensors file against the ORIGINAL base, reload it, and compare.

    A LoRA student becomes one LoRA, whatever it started from (ranks concatenated); a full student a full checkpoint.

    Returns:
        The largest difference between the reloaded model's velocity and the student's own.

    Raises:
        CheckpointFailure: if ``out`` is not a .safetensors file, or the reloaded file does not reproduce the student.
    """
    if out.suffix != ".safetensors":
        raise CheckpointFailure(f"exports are written as safetensors; {out} should end in .safetensors")
    assembly, _ = load_run(folder, device=torch.device("cpu"))
    family, lora = assembly.family, assembly.student.lora()
    out.parent.mkdir(parents=True, exist_ok=True)
    unverified = out.with_name(f".unverified-{out.name}")
    try:
        if lora is not None:
            save_lora(lora, unverified)
            part = {"exported": {"lora": str(unverified)}}
        else:
            save_file(assembly.student.weights(), unverified, {"format": "pt"})
            part = {"exported": {"checkpoint": str(unverified)}}
        whole = assembly.recipe.model_dump(mode="json")
        content = {key: whole[key] for key in ("version", "family", "base", "output")} | {"fields": part}
        content["routes"] = [{"field": "exported", "data": whole["routes"][0]["data"]}]
        reloaded = assemble(parse_recipe(content, where=str(out)), device=torch.device("cpu"))
        noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        sigma, condition = torch.tensor([0.2, 0.5, 0.8, 1.0]), family.encode([""] * 4, None)
        with torch.no_grad():
            expected = assembly.student.model(noise, sigma, condition)
            difference = float((reloaded.fields["exported"].velocity(noise, sigma, condition) - expected).abs().max())
        if not difference <= EXPORT_TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CheckpointFailure(
                f"the export does not reproduce the student: velocities differ by {difference:.2g}; {out} was not "
                "written"
            )
        unverified.replace(out)
        return difference
    finally:
        unverified.unlink(missing_ok=True)


def evaluate_world(part: EvaluatePart, out: Path) -> dict[str, Any]:
    """Score the shipped sources on every task and edit type; write ``out`` (JSON). ``own`` is each on its own tasks."""
    device = pick_device()
    keep_freed_memory()
    sources = {name: {"lora": f"shapes:{name}"} for name in SOURCES if name != "base"}
    content = {
        "version": 1,
        "family": "shapes",
        "base": "shapes:base",
        "fields": sources,
        "routes": [{"field": "edit", "data": {"generator": "shapes/edit"}}],
        "output": "unused",
    }
    assembly = assemble(parse_recipe(content, where="the world"), device=device)
    models = {"base": assembly.base.velocity} | {name: field.velocity for name, field in assembly.fields.items()}
    total = sum(len(tasks) for tasks in CAPABILITIES.values()) * part.scenes_per_task * len(models)
    with Progress(console=console) as progress, autocast(device, resolve_precision("auto", device)):
        task = progress.add_task("evaluating", total=total)
        report = evaluate_models(models, assembly.family, part, on_batch=lambda count: progress.advance(task, count))
    own = {"base": T2I_TASKS, "edit": EDIT_TASKS, "local": LOCAL_EDITS, "global": GLOBAL_EDITS, "realism": T2I_TASKS}
    scores = {name: {**model["t2i"], **model["edit"]} for name, model in report["models"].items()}
    report["own"] = {name: round(sum(scores[name][t] for t in tasks) / len(tasks), 4) for name, tasks in own.items()}
    del report["shown"], report["student_over"]
    report["hashes"] = assembly.hashes
    write_text(out, json.dumps(report, indent=1) + "\n")
    return report


def _sample_grid_writer(folder: RunFolder) -> Callable[[Assembly, int], None]:
    """Write ``samples/step-N.png``: a prompt or edit of every task, drawn by the averaged student."""

    def write(assembly: Assembly, step: int) -> None:
        part, family = assembly.recipe.evaluate, assembly.family
        rows = []
        with autocast(torch.device(assembly.method.device), assembly.recipe.train.precision):
            for tasks in CAPABILITIES.values():
                condition = condition_of(evaluation_set(tasks, per_task=1, seed=part.seed), family)
                noise = torch.randn(len(tasks), 3, 32, 32, generator=torch.Generator().manual_seed(part.seed))
                latents = integrate(
                    assembly.student.model,
                    noise.to(condition.prompt_embeds.device),
                    condition,
                    family.grid(part.num_inference_steps, part.shift),
                )
                rows.append(torch.cat(list(family.decode(latents).cpu()), dim=2))
        folder.samples.mkdir(exist_ok=True)
        write_image_file(folder.samples / f"step-{step:06d}.png", torch.cat(rows, dim=1))

    return write


def require_evaluation(folder: RunFolder) -> None:
    """Raise CheckpointFailure unless the run has been evaluated."""
    if not folder.evaluation_file.exists():
        raise CheckpointFailure(f"{folder.path} has no evaluation.json; run: danceopd evaluate {folder.path}")
