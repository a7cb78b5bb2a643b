"""Exposure bias: the student's distance from its fields on its own states and on noised data; see
``evaluation.exposure``."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from danceopd.comparison.results import Point, Results
from danceopd.comparison.statistics import as_json, paired_ratio
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import Plot, Table, number, percent
from danceopd.evaluation.exposure import MatchingError, data_states, matching_error, own_states
from danceopd.report.page import COLORS, figure_png
from danceopd.training.assemble import Assembly, autocast
from danceopd.training.hardware import pick_device
from danceopd.training.inputs import encoded
from danceopd.training.models import model_velocities

STATES = ("own", "data")


def take(assembly: Assembly, model: str, suite: Suite) -> dict[str, Any]:
    """``routes``: their names; ``sigma``: the grid's N; for ``own`` and ``data`` states ``error`` and ``size``.

    Those are [routes, n, N], on n inputs of each route that are drawn apart from the training's, from the same noise.
    """
    recipe, family, student = assembly.recipe, assembly.family, model_velocities(assembly)[model]
    wanted = suite.measures.exposure
    assert wanted is not None
    found: dict[str, list[MatchingError]] = {name: [] for name in STATES}
    sigmas: list[float] = []
    for part, route in zip(recipe.routes, assembly.method.routes, strict=True):
        assert part.data.generator is not None
        drawn = family.generator(part.data.generator, size=wanted.inputs_per_route, seed=part.data.seed + 1)
        samples = encoded([drawn[i] for i in range(len(drawn))], family, assembly.inputs.get(part.field))
        assert samples.target is not None
        generator = torch.Generator().manual_seed(recipe.evaluate.seed)
        noise = torch.randn(samples.target.shape, generator=generator).to(samples.target.device)
        grid = family.grid(recipe.evaluate.num_inference_steps, recipe.evaluate.shift, samples.shape)
        sigmas = grid.sigmas[:-1].tolist()
        field_condition = samples.condition if samples.field_condition is None else samples.field_condition
        with autocast(pick_device(), recipe.train.precision):
            states = {
                "own": own_states(student, noise, samples.condition, grid),
                "data": data_states(samples.target, noise, grid),
            }
            for name in STATES:
                found[name].append(
                    matching_error(
                        student,
                        route.field.velocity,
                        states[name],
                        grid,
                        condition=samples.condition,
                        field_condition=field_condition,
                    )
                )
    return {
        "routes": [route.name for route in assembly.method.routes],
        "sigma": [round(sigma, 4) for sigma in sigmas],
        **{
            name: {key: [_short(getattr(one, key)) for one in found[name]] for key in ("error", "size")}
            for name in STATES
        },
    }


def _short(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in values]


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Per method and route: the relative squared error on both kinds of states, and the one over the other."""
    methods, sigma = {}, []
    for method, views in results.views.items():
        points = results.points[method][views["updates"]]
        routes, sigma = (points[0].taken["exposure"][key] for key in ("routes", "sigma"))
        methods[method] = {name: _route(points, index) for index, name in enumerate(routes)}
    return {"sigma": sigma, "methods": methods}


def estimates(suite: Suite) -> dict[str, Any]:
    """See ``Measure``."""
    kinds = (*STATES, "own_over_data")
    return {
        "methods": {
            method: {route.name or route.field: dict.fromkeys(kinds) for route in recipe.routes}
            for method, recipe in suite.recipes.items()
        }
    }


def _route(points: list[Point], index: int) -> dict[str, Any]:
    """own, data: sum of squared errors over that of the field's velocities.

    ``by_seed`` has these of every student, [seeds], and ``at_step`` of every step, [N].
    """

    def taken(states: str, key: str) -> np.ndarray:
        return np.array([point.taken["exposure"][states][key][index] for point in points])  # [seeds, n, N]

    errors = {states: taken(states, "error") for states in STATES}
    sizes = {states: taken(states, "size") for states in STATES}
    entry: dict[str, Any] = {
        states: as_json(paired_ratio(errors[states].mean(2)[:, None], sizes[states].mean(2)[:, None]))
        for states in STATES
    }
    entry["own_over_data"] = as_json(paired_ratio(errors["own"].mean(2)[:, None], errors["data"].mean(2)[:, None]))
    for name, others in (("by_seed", (1, 2)), ("at_step", (0, 1))):
        entry[name] = {
            states: [float(f"{v:.4g}") for v in errors[states].mean(others) / sizes[states].mean(others)]
            for states in STATES
        }
    return entry


def tables(content: dict[str, Any]) -> list[Table]:
    """A row for each method and route."""
    entries = [
        (method, route, entry) for method, routes in content["methods"].items() for route, entry in routes.items()
    ]
    header = ["method", "route", "error on own states", "error on noised data", "own / data"]
    rows = [
        [method, route, percent(entry["own"]), percent(entry["data"]), number(entry["own_over_data"])]
        for method, route, entry in entries
    ]
    if all("by_seed" in entry for *_, entry in entries):  # older results have the means alone
        header.append("each student's on own states, %")
        for row, (*_, entry) in zip(rows, entries, strict=True):
            row.append(", ".join(f"{100 * error:.1f}" for error in entry["by_seed"]["own"]))
    note = (
        "Squared distance from the student's velocity to its route's field, over the field's own square, mean over all "
        "steps, at equal updates: on all states of the student's own rollouts, and on noised data of the same inputs "
        "from the same noise, drawn apart from the training's. Above 1, own / data is exposure bias. Soft mixing has "
        "one field for every route, the average."
    )
    return [Table("Where students stray", tuple(header), rows, note)]


def plots(content: dict[str, Any]) -> list[Plot]:
    """Each route's error on own states (lines) and on noised data (dashed) at each step."""
    routes = list(next(iter(content["methods"].values())))
    figure, axes = plt.subplots(1, len(routes), figsize=(5.2 * len(routes), 4.6), squeeze=False, layout="constrained")
    for axis, route in zip(axes[0], routes, strict=True):
        for (method, found), color in zip(content["methods"].items(), itertools.cycle(COLORS), strict=False):
            for states, style in zip(STATES, ("-", ":"), strict=True):
                label = method if states == "own" else None
                axis.plot(content["sigma"], found[route]["at_step"][states], style, color=color, label=label)
        axis.invert_xaxis()
        axis.set(xlabel="sigma (noise on the left)", ylabel="relative squared error", yscale="log", title=route)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return [Plot("Error at each step, on own states and on noised data (dotted)", figure_png(figure))]
