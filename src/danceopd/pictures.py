"""Pictures of a run: samples on request, a grid now and then in training, every model side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd.data.examples import Example
from danceopd.data.images import ImageFile, check_image, write_image_file
from danceopd.distill.solver import VelocityFunction
from danceopd.errors import nearest
from danceopd.evaluation.pictures import draw, side_by_side
from danceopd.recipe import EvaluatePart, RecipeError, evaluate_part, with_evaluate
from danceopd.training.assemble import Assembly, LoadedModels, autocast
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_velocities
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run, load_run_models

SHOWN = 4
"""Inputs of each route that pictures are drawn of."""


def sample_images(
    folder: RunFolder,
    *,
    prompts: list[str],
    image: Path | None,
    field: str,
    guidance_scale: float | None,
    num_inference_steps: int | None,
    seed: int,
    out: Path,
    size: tuple[int, int] | None = None,
) -> list[Path]:
    """Draw one PNG per prompt with the student or a named field: ``FIELD-SEED-NUMBER.png``, after those in ``out``.

    guidance_scale, num_inference_steps: of the sampler; by default those of the recipe's ``evaluate``.
    size: height and width; by default those that training would bring the image to, or else the family's.

    Raises:
        RecipeError: for a field the run does not have, a prompt, image or size that the family cannot take, or steps
            that the student was not taught.
        ImageError: for an image file that cannot be read.
    """
    device = pick_device()
    picture = None if image is None else check_image(image, str(image))
    recipe = folder.read_recipe()  # before the lock, which would make a folder of a mistyped path
    names = dict.fromkeys(["student", "base", *recipe.fields])
    if field not in names:
        raise RecipeError(f"{folder.path} has no field {field!r}{nearest(field, names)}; it has {', '.join(names)}")
    with folder.owned():
        run, _ = load_run_models(folder, device=device, purpose="sampled")
    models = model_velocities(run) | {name: value.velocity for name, value in run.fields.items()}
    asked: dict[str, Any] = {"seed": seed}
    if guidance_scale is not None:
        asked["guidance_scale"] = guidance_scale
    if num_inference_steps is not None:
        asked["num_inference_steps"] = num_inference_steps
    if field == "student":  # which may have been taught one number of steps alone
        part = with_evaluate(run.recipe, asked, where=str(folder.path)).evaluate
    else:
        part = evaluate_part(run.recipe.evaluate.model_dump() | asked)
    source = None if picture is None else _brought_to_size(picture, run, size)
    examples = [Example(prompt=prompt, source=source) for prompt in prompts]
    try:
        with autocast(device, run.recipe.train.precision):
            images = _draw(run, field, models[field], examples, part, size)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    names = [re.fullmatch(rf"{field}-{seed}-(\d+)\.png", path.name) for path in out.iterdir()]
    first = 1 + max((int(name[1]) for name in names if name is not None), default=-1)
    paths = [out / f"{field}-{seed}-{first + index}.png" for index in range(len(images))]
    for path, drawn in zip(paths, images, strict=True):
        write_image_file(path, drawn)
    return paths


def _brought_to_size(picture: ImageFile, run: LoadedModels, size: tuple[int, int] | None) -> Tensor:
    """A source as training would see it."""
    buckets = run.family.buckets(size or run.family.size)
    try:
        return picture.read(None if buckets is None else buckets.size_for(picture.height, picture.width))
    except ValueError as error:
        raise RecipeError(f"{picture.name}: {error}") from error


def sample_grid_writer(folder: RunFolder) -> Callable[[Assembly, int], None]:
    """Write ``samples/step-N.png``: a row of pictures per route, drawn by the averaged student."""

    def write(assembly: Assembly, step: int) -> None:
        part, student, rows = assembly.recipe.evaluate, assembly.student.model, []
        with autocast(torch.device(assembly.method.device), assembly.recipe.train.precision):
            for examples, size in _shown_examples(assembly):
                rows.append([_draw(assembly, "student", student, [example], part, size)[0] for example in examples])
        folder.samples.mkdir(exist_ok=True)
        write_image_file(folder.samples / f"step-{step:06d}.png", side_by_side(rows))

    return write


def _draw(
    run: LoadedModels,
    name: str,
    velocity: VelocityFunction,
    examples: Sequence[Example],
    part: EvaluatePart,
    size: tuple[int, int] | None,
) -> Tensor:
    """Images by a model of the run, which may hear and be guided as another family does; see ``draw``."""
    field_input = run.inputs.get(name)
    family = run.family if field_input is None else field_input.family
    if size is None and examples[0].source is None:
        size = run.family.size
    return draw(velocity, family, examples, part, size=size, encoder=field_input)


def _shown_examples(assembly: Assembly) -> list[tuple[list[Example], tuple[int, int] | None]]:
    """Each route's first inputs, and the size of those that bring no picture."""
    shown = []
    for part, bucket in zip(assembly.recipe.routes, assembly.buckets.values(), strict=True):
        shown.append(([bucket.source[i] for i in range(min(SHOWN, len(bucket.source)))], part.resolution))
    return shown


def compare_pictures(folder: RunFolder, part: EvaluatePart) -> tuple[Path, list[str], list[str]]:
    """Draw the routes' first inputs with every model; write ``samples/evaluation.png``.

    Returns:
        The file, what its columns show, and the prompt of each row.

    Raises:
        RunFolderBusy: if another process works in the folder, which is held until the file is written.
    """
    folder.read_recipe()  # before the lock, which would make a folder of a mistyped path
    with folder.owned():
        return _compare_pictures(folder, part, pick_device())


def _compare_pictures(folder: RunFolder, part: EvaluatePart, device: torch.device) -> tuple[Path, list[str], list[str]]:
    assembly, _ = load_run(folder, device=device, purpose="drawn")
    models = model_velocities(assembly)
    rows, prompts, edits = [], [], False
    with autocast(device, assembly.recipe.train.precision):
        for examples, size in _shown_examples(assembly):
            for example in examples:
                drawn = [_draw(assembly, name, model, [example], part, size)[0] for name, model in models.items()]
                edits = edits or example.source is not None
                rows.append(([] if example.source is None else [example.source], drawn))
                prompts.append(example.prompt)
    blank = torch.ones(3, 1, 1)
    path = folder.samples / "evaluation.png"
    folder.samples.mkdir(exist_ok=True)
    write_image_file(path, side_by_side([[*(source or [blank] * edits), *drawn] for source, drawn in rows]))
    return path, ["source"] * edits + list(models), prompts
