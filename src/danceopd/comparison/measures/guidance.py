"""Guidance absorption: what external guidance beta does to a student that was taught by a field of guidance alpha.

For each student: the effective guidance g of its field under every beta, against the product law g = alpha * beta
(``evaluation.guidance`` says where that comes from and when it holds); its text-to-image scores under every beta; and
the practical claim: the student without guidance, one network call a step, against its teacher with guidance, two.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from danceopd.comparison.results import Point, Results
from danceopd.comparison.statistics import Effect, as_json, mean_over_seeds, paired_difference, paired_ratio
from danceopd.comparison.suite import Suite
from danceopd.comparison.suite_file import GuidancePart
from danceopd.comparison.tables import Plot, Table, number, score, signed
from danceopd.evaluation.guidance import GuidanceSums, student_guidance, unexplained
from danceopd.evaluation.shapes import scene_noise, score_model
from danceopd.recipe import Recipe
from danceopd.report.page import COLORS, figure_png
from danceopd.training.assemble import Assembly, autocast
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_velocities
from danceopd.world.generator import evaluation_set
from danceopd.world.tasks import T2I_TASKS, TextToImage


def _part(suite: Suite) -> GuidancePart:
    part = suite.measures.guidance
    assert part is not None
    return part


def take(assembly: Assembly, model: str, suite: Suite) -> dict[str, Any]:
    """``sums``: the regression's {scale: {name: [tasks, n]}}, in float32; ``scores``: {scale: [tasks, n]}.

    ``steps``: at scale 1, the sums over all prompts at each step of the rollout, with its ``sigma``: [N] each.

    Scale 0 is the student's empty output; scale 1 is what ``scores`` takes, and is not scored again.
    """
    part, evaluate, family = _part(suite), assembly.recipe.evaluate, assembly.family
    velocity, tasks = model_velocities(assembly)[model], len(T2I_TASKS)
    drawn = evaluation_set(T2I_TASKS, per_task=part.prompts_per_task, seed=evaluate.seed)
    noise = [scene_noise(evaluate.seed, task, part.prompts_per_task) for task in range(tasks)]
    grid = family.grid(evaluate.num_inference_steps, evaluate.shift)
    sums = student_guidance(
        velocity,
        assembly.base.velocity,
        family,
        prompts=[example.prompt for example in drawn if isinstance(example, TextToImage)],
        noise=torch.cat(noise),
        grid=grid,
        scales=part.scales,
        batch_size=evaluate.batch_size,
    )
    scores = {}
    with autocast(pick_device(), assembly.recipe.train.precision):
        for scale in part.scales[1:]:
            scored = score_model(velocity, family, "t2i", evaluate.model_copy(update={"guidance_scale": scale}))
            scores[f"{scale:g}"] = scored.scores.round(4).tolist()
    return {
        "prompt_dropout": assembly.method.routes[0].dropout,
        "sums": {
            f"{scale:g}": {name: rows.reshape(tasks, -1).tolist() for name, rows in asdict(value.summed(1)).items()}
            for scale, value in sums.items()
        },
        "steps": {
            "sigma": grid.sigmas[:-1].tolist(),
            **{name: found.tolist() for name, found in asdict(sums[1.0].summed(0)).items()},
        },
        "scores": scores,
    }


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Per method: alpha, prompt dropout, the empty output's guidance, its teacher, and every external scale.

    ``over_product`` is g / (alpha beta) with its interval, ``over_absorbed`` g / (g_1 beta), g_1 that at beta = 1;
    ``at_step`` holds g_1 at each step of the rollout.
    """
    return {"methods": {method: _method(suite, results, method) for method in results.views}}


def _method(suite: Suite, results: Results, method: str) -> dict[str, Any]:
    recipe, updates = suite.recipes[method], results.views[method]["updates"]
    field, steps = recipe.routes[0].field, recipe.evaluate.num_inference_steps
    alpha = recipe.fields[field].guidance_scale
    points = results.points[method][updates]
    plain = results.scores(method, updates, "t2i")
    entry: dict[str, Any] = {
        "alpha": alpha,
        "prompt_dropout": points[0].taken["guidance"]["prompt_dropout"],
        "empty": as_json(_guidance(points, "0", 1.0)),
        "at_step": _at_step(points),
        "scales": {},
    }
    for scale in _part(suite).scales:
        key = f"{scale:g}"
        scores = plain if scale == 1.0 else np.stack([np.array(p.taken["guidance"]["scores"][key]) for p in points])
        entry["scales"][key] = {
            "product": round(alpha * scale, 4),
            "guidance": as_json(_guidance(points, key, 1.0)),
            "over_product": as_json(_guidance(points, key, alpha * scale)),
            "over_absorbed": as_json(paired_ratio(_sums(points, key).along, scale * _sums(points, "1").along)),
            "unexplained": round(unexplained(_sums(points, key)), 4),
            "score": as_json(mean_over_seeds(scores)),
            "calls": steps * (1 if scale == 1.0 else 2),
        }
    if alpha != 1.0:
        teacher = results.source(field, "t2i")
        entry["teacher"] = {
            "name": field,
            "score": as_json(mean_over_seeds(teacher[None])),
            "calls": 2 * steps,
            "student_minus_teacher": as_json(paired_difference(plain, teacher)),
        }
    return entry


def estimates(suite: Suite) -> dict[str, Any]:
    """See ``Measure``."""
    scales = [f"{scale:g}" for scale in _part(suite).scales]

    def entry(recipe: Recipe) -> dict[str, Any]:
        guided = recipe.fields[recipe.routes[0].field].guidance_scale != 1.0
        kinds = ("guidance", "over_product", "over_absorbed", "score")
        return {
            "empty": None,
            "scales": {scale: dict.fromkeys(kinds) for scale in scales},
            **({"teacher": dict.fromkeys(("score", "student_minus_teacher"))} if guided else {}),
        }

    return {"methods": {method: entry(recipe) for method, recipe in suite.recipes.items()}}


def _sums(points: list[Point], scale: str) -> GuidanceSums:
    """[seeds, tasks, n] each."""
    taken = [point.taken["guidance"]["sums"][scale] for point in points]
    return GuidanceSums(*(np.stack([np.array(one[f.name]) for one in taken]) for f in fields(GuidanceSums)))


def _guidance(points: list[Point], scale: str, unit: float) -> Effect:
    """g / ``unit`` under an external scale."""
    sums = _sums(points, scale)
    return paired_ratio(sums.along, unit * sums.square)


def _at_step(points: list[Point]) -> dict[str, list[float]]:
    """sigma, g over all seeds and prompts, and the share of <d, d> that the step has: [N] each."""
    steps = [point.taken["guidance"]["steps"] for point in points]
    along, square = (np.array([one[name] for one in steps]).sum(0) for name in ("along", "square"))
    return {
        "sigma": [round(sigma, 4) for sigma in steps[0]["sigma"]],
        "guidance": (along / square).round(4).tolist(),
        "weight": (square / square.sum()).round(4).tolist(),
    }


def tables(content: dict[str, Any]) -> list[Table]:
    """The law, the scores as an alpha x beta grid, and the practical claim."""
    methods = content["methods"]
    law = []
    for name, entry in methods.items():
        law.append([name, f"{entry['prompt_dropout']:g}", "0", "0", number(entry["empty"]), "", "", ""])
        for scale, found in entry["scales"].items():
            law.append(
                [
                    name,
                    f"{entry['prompt_dropout']:g}",
                    scale,
                    f"{found['product']:g}",
                    number(found["guidance"]),
                    number(found["over_product"]),
                    number(found["over_absorbed"]),
                    f"{found['unexplained']:.2f}",
                ]
            )
    scales = list(next(iter(methods.values()))["scales"])
    grid = [
        [name, f"{entry['alpha']:g}", *(score(entry["scales"][scale]["score"]) for scale in scales)]
        for name, entry in methods.items()
    ]
    practice = [
        [
            name,
            score(entry["scales"]["1"]["score"]),
            str(entry["scales"]["1"]["calls"]),
            score(entry["teacher"]["score"]),
            str(entry["teacher"]["calls"]),
            signed(entry["teacher"]["student_minus_teacher"]),
        ]
        for name, entry in methods.items()
        if "teacher" in entry
    ]
    return [
        Table(
            "Effective guidance",
            (
                "method",
                "prompt dropout",
                "beta",
                "alpha * beta",
                "g",
                "g / (alpha * beta)",
                "g / (g_1 * beta)",
                "unexplained",
            ),
            law,
            "g is the least-squares slope of the student's field on v_empty + g (v_cond - v_empty) of the frozen base, "
            "over all states of the student's own unguided rollouts on prompts drawn apart; beta = 0 is its output on "
            "the empty prompt, where the product law asks for 0. g_1 is what was absorbed, g at beta = 1. "
            "Unexplained: the share of the squared distance from v_empty that lies off that direction.",
        ),
        Table("Text to image under external guidance", ("method", "alpha", *(f"beta {s}" for s in scales)), grid),
        Table(
            "The student without guidance against its teacher with it",
            ("method", "student", "network calls", "teacher", "network calls", "student - teacher"),
            practice,
            "Network calls of one image.",
        ),
    ]


def plots(content: dict[str, Any]) -> list[Plot]:
    """g against alpha * beta, the law as a line; and at which steps it was absorbed."""
    figure, axes = plt.subplots(figsize=(5.6, 4.6))
    products = [found["product"] for entry in content["methods"].values() for found in entry["scales"].values()]
    axes.plot([0, max(products)], [0, max(products)], color="#999", linewidth=1, label="product law")
    for (name, entry), color in zip(content["methods"].items(), itertools.cycle(COLORS), strict=False):
        found = [{"product": 0.0, "guidance": entry["empty"]}, *entry["scales"].values()]
        style = "o-" if entry["prompt_dropout"] else "s--"
        axes.plot(
            [f["product"] for f in found], [f["guidance"]["value"] for f in found], style, color=color, label=name
        )
    axes.set(xlabel="alpha * beta", ylabel="effective guidance g")
    axes.legend(frameon=False, fontsize=8)
    return [
        Plot("Effective guidance (dashed: no prompt dropout)", figure_png(figure)),
        Plot("Guidance absorbed at each step, beta = 1 (dashed: no prompt dropout)", _absorbed(content["methods"])),
    ]


def _absorbed(methods: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(5.6, 4.6))
    for (name, entry), color in zip(methods.items(), itertools.cycle(COLORS), strict=False):
        style = "o-" if entry["prompt_dropout"] else "s--"
        axes.plot(entry["at_step"]["sigma"], entry["at_step"]["guidance"], style, color=color, label=name)
    axes.invert_xaxis()
    axes.set(xlabel="sigma (noise on the left)", ylabel="g at this step")
    axes.legend(frameon=False, fontsize=8)
    return figure_png(figure)
