"""Evaluation on the Shapes world: the six text-to-image tasks, the six edit types and the realism reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danceopd.data.images import write_image_file
from danceopd.distill.solver import VelocityFunction, integrate
from danceopd.evaluation.pictures import Encoder, guided
from danceopd.evaluation.statistics import Estimate, overall_estimate, ratio_estimate, task_estimate
from danceopd.families.family import Family
from danceopd.recipe import EvaluatePart
from danceopd.world.generator import evaluation_set
from danceopd.world.render import render
from danceopd.world.tasks import EDIT_TASKS, T2I_TASKS, Edit, TextToImage
from danceopd.world.verify import realism_reward, score_edit, score_text_to_image

CAPABILITIES: dict[str, tuple[str, ...]] = {"t2i": T2I_TASKS, "edit": EDIT_TASKS}
_NOISE_SEED = 77_000


@dataclass(frozen=True)
class Scored:
    """One model on one capability. scores [tasks, n]; realism [tasks, n] or None; shown: first image of each task.

    non_finite: images whose latents hold infinite values or NaN; they score 0.
    """

    scores: np.ndarray
    realism: np.ndarray | None
    shown: Tensor
    non_finite: int


@torch.no_grad()
def score_model(
    velocity: VelocityFunction,
    family: Family,
    capability: str,
    part: EvaluatePart,
    *,
    encoder: Encoder | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Scored:
    """Sample every evaluation scene of a capability and score it.

    encoder: of a field that is told something else than the student; the family by default.
    Scene j of a task and its noise depend on (``part.seed``, task, j) alone.
    """
    tasks = CAPABILITIES[capability]
    examples = evaluation_set(tasks, per_task=part.scenes_per_task, seed=part.seed)
    noise = torch.cat([scene_noise(part.seed, index, part.scenes_per_task) for index in range(len(tasks))])
    grid = family.grid(part.num_inference_steps, part.shift)
    velocity = guided(velocity, family if encoder is None else encoder.family, part.guidance_scale)
    images, whole = [], []
    for first in range(0, len(examples), part.batch_size):
        chunk = examples[first : first + part.batch_size]
        condition = condition_of(chunk, encoder or family)
        z = noise[first : first + len(chunk)].to(condition.prompt_embeds.device)
        latents = integrate(velocity, z, condition, grid)
        whole += latents.flatten(1).isfinite().all(1).tolist()
        images.append(family.decode(latents).cpu())
        on_batch(len(chunk))
    drawn = torch.cat(images)
    judged = list(zip(whole, drawn.numpy(), examples, strict=True))
    shape = (len(tasks), part.scenes_per_task)
    realism = None
    if capability == "t2i":
        realism = np.array([realism_reward(image) if fine else 0.0 for fine, image, _ in judged]).reshape(shape)
    scores = np.array([_score(image, example) if fine else 0.0 for fine, image, example in judged]).reshape(shape)
    return Scored(scores, realism, drawn[:: part.scenes_per_task].nan_to_num(), non_finite=whole.count(False))


def scene_noise(seed: int, task: int, count: int) -> Tensor:
    """Starting noise of a task's first ``count`` scenes: [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(_NOISE_SEED + 1000 * seed + task)
    return torch.randn(count, 3, 32, 32, generator=generator)


def condition_of(examples: Sequence[TextToImage | Edit], encoder: Encoder | Family):
    """The condition of evaluation examples of one kind."""
    if isinstance(examples[0], TextToImage):
        return encoder.encode([example.prompt for example in examples if isinstance(example, TextToImage)], None)
    edits = [example for example in examples if isinstance(example, Edit)]
    sources = [torch.from_numpy(render(edit.source)) for edit in edits]
    return encoder.encode([edit.instruction for edit in edits], sources)


def _score(image: np.ndarray, example: TextToImage | Edit) -> float:
    if isinstance(example, TextToImage):
        return score_text_to_image(image, example)
    return score_edit(image, example).overall


def evaluate_models(
    models: dict[str, VelocityFunction],
    family: Family,
    part: EvaluatePart,
    *,
    capabilities: Sequence[str] = ("t2i", "edit"),
    encoders: Mapping[str, Encoder] | None = None,
    pictures: Path | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Score every model on every capability; the content of ``evaluation.json``.

    encoders: of models that are told something else than the student, by name.
    ``models.NAME.CAPABILITY`` maps tasks and ``overall`` to scores; ``intervals`` has the same shape with
    [low, high]; ``student_over`` gives the student's overall over each other model's, and ``over_base`` every model's
    over the base's, paired by scene; ``realism_reward`` the mean reward of a model's text-to-image pictures.
    """
    started = time.monotonic()
    rng = np.random.default_rng(part.seed)
    report: dict[str, Any] = {
        "models": {name: {} for name in models},
        "intervals": {name: {} for name in models},
        "student_over": {},
        "over_base": {},
        "realism_reward": {},
        "non_finite_images": {},
        "scenes_per_task": part.scenes_per_task,
        "num_inference_steps": part.num_inference_steps,
        "guidance_scale": part.guidance_scale,
        "seed": part.seed,
        "seconds": {},
    }
    drawn: dict[str, dict[str, Scored]] = {}
    for capability in capabilities:
        tasks = CAPABILITIES[capability]
        scored = {}
        for name, velocity in models.items():
            began = time.monotonic()
            encoder = (encoders or {}).get(name)
            scored[name] = score_model(velocity, family, capability, part, encoder=encoder, on_batch=on_batch)
            report["seconds"][f"{capability}/{name}"] = round(time.monotonic() - began, 2)
            estimates = {task: task_estimate(row) for task, row in zip(tasks, scored[name].scores, strict=True)}
            estimates["overall"] = overall_estimate(scored[name].scores, rng)
            report["models"][name][capability] = {task: round(e.value, 4) for task, e in estimates.items()}
            report["intervals"][name][capability] = {
                task: [round(e.low, 4), round(e.high, 4)] for task, e in estimates.items()
            }
            realism = scored[name].realism
            if realism is not None:
                report["realism_reward"][name] = _rounded(overall_estimate(realism, rng))
            if scored[name].non_finite:
                report["non_finite_images"][f"{capability}/{name}"] = scored[name].non_finite
        for name in models:
            if name != "student" and "student" in models:
                ratio = ratio_estimate(scored["student"].scores, scored[name].scores, rng)
                report["student_over"].setdefault(name, {})[capability] = _rounded(ratio)
            if name != "base" and "base" in models:
                ratio = ratio_estimate(scored[name].scores, scored["base"].scores, rng)
                report["over_base"].setdefault(name, {})[capability] = _rounded(ratio)
        drawn[capability] = scored
    report["seconds"]["evaluation"] = round(time.monotonic() - started, 2)
    report["shown"] = []
    if pictures is not None:  # at the end, so that a stopped evaluation leaves the earlier one's
        for capability, scored in drawn.items():
            report["shown"] += _write_pictures(pictures, capability, scored, part)
    return report


class ShapesScorer:
    """See ``Scorer``."""

    def images(self, part: EvaluatePart) -> int:
        return sum(len(tasks) for tasks in CAPABILITIES.values()) * part.scenes_per_task

    def evaluate(
        self,
        models: dict[str, VelocityFunction],
        family: Family,
        part: EvaluatePart,
        *,
        encoders: Mapping[str, Encoder] | None = None,
        pictures: Path | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        return evaluate_models(models, family, part, encoders=encoders, pictures=pictures, on_batch=on_batch)


def _rounded(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else {key: round(value, 4) for key, value in asdict(estimate).items()}


def _write_pictures(folder: Path, capability: str, scored: dict[str, Scored], part: EvaluatePart) -> list[dict]:
    """The first scene of each task, as every model draws it; where the files are, with the words."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, task in enumerate(CAPABILITIES[capability]):
        example = evaluation_set([task], per_task=1, seed=part.seed)[0]
        files: dict[str, str] = {}
        if isinstance(example, Edit):
            files["source"] = f"{task}-source.png"
            write_image_file(folder / files["source"], torch.from_numpy(render(example.source)))
        for name, result in scored.items():
            files[name] = f"{task}-{name}.png"
            write_image_file(folder / files[name], result.shown[index])
        text = example.instruction if isinstance(example, Edit) else example.prompt
        rows.append({"capability": capability, "task": task, "text": text, "files": files})
    return rows
