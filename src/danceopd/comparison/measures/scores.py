"""The scores: text to image and editing, against the sources and against the reference method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from scipy.optimize import isotonic_regression

from danceopd.comparison.results import GROUPS, Results
from danceopd.comparison.statistics import as_json, mean_over_seeds, paired_difference, paired_ratio
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import WORDS, Plot, Table, number, score, signed
from danceopd.evaluation.shapes import CAPABILITIES, score_model
from danceopd.report.page import COLORS, figure_png
from danceopd.training.assemble import LoadedModels, autocast
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_velocities


def settings(suite: Suite) -> list[str]:
    """The kinds of sampling that the suite's capabilities need."""
    wanted = {GROUPS[capability][0] for capability in suite.capabilities}
    return [kind for kind in CAPABILITIES if kind in wanted]


def take(assembly: LoadedModels, model: str, suite: Suite) -> dict[str, Any]:
    """A model's scores {kind: [tasks, n]}, and the realism reward of its text-to-image pictures."""
    velocity, recipe = model_velocities(assembly)[model], assembly.recipe
    taken: dict[str, Any] = {}
    with autocast(pick_device(), recipe.train.precision):
        for kind in settings(suite):
            encoder = assembly.inputs.get(model)
            scored = score_model(velocity, assembly.family, kind, recipe.evaluate, encoder=encoder)
            taken[kind] = scored.scores.round(4).tolist()
            if scored.realism is not None:
                taken["realism"] = scored.realism.round(4).tolist()
    return taken


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Per view and method: overall scores with intervals, differences to the reference, ratios to the best source.

    ``curve`` has every method's scores at all its points, ``runs`` each seed's task means.
    """
    best = {
        capability: max(results.sources, key=lambda name, c=capability: results.source(name, c).mean())
        for capability in suite.capabilities
    }
    content: dict[str, Any] = {
        "reference": suite.reference,
        "best_source": best,
        "paper": None if suite.paper is None else suite.paper.model_dump(),
        "sources": {
            name: {c: as_json(mean_over_seeds(results.source(name, c)[None])) for c in suite.capabilities}
            for name in results.sources
        },
        "views": {view: {} for view in suite.views},
        "curve": {},
        "runs": {},
    }
    for method, views in results.views.items():
        for view, updates in views.items():
            content["views"][view][method] = _entry(results, suite, method, view, updates, best)
        content["curve"][method] = [
            _spent(results, method, updates)
            | {c: as_json(mean_over_seeds(results.scores(method, updates, c))) for c in suite.capabilities}
            for updates in results.points[method]
        ]
        content["runs"][method] = {
            str(updates): {c: results.scores(method, updates, c).mean(2).round(4).tolist() for c in suite.capabilities}
            for updates in results.points[method]
        }
    return content


def estimates(suite: Suite) -> dict[str, Any]:
    """See ``Measure``."""

    def entry(method: str) -> dict[str, Any]:
        kinds = ["overall", "of_best_source", *(["minus_reference"] if method != suite.reference else [])]
        return {
            capability: dict.fromkeys(kinds) | {"tasks": dict.fromkeys(GROUPS[capability][1])}
            for capability in suite.capabilities
        }

    return {"views": {view: {method: entry(method) for method in suite.recipes} for view in suite.views}}


def _spent(results: Results, method: str, updates: int) -> dict[str, Any]:
    points = results.points[method][updates]
    return {
        "updates": updates,
        "compute": round(float(np.mean([point.compute for point in points])), 1),
        "seconds": round(float(np.median([point.seconds for point in points])), 1),
    }


def _entry(
    results: Results,
    suite: Suite,
    method: str,
    view: str,
    updates: int,
    best: dict[str, str],
) -> dict[str, Any]:
    entry = _spent(results, method, updates)
    entry["expected_compute"] = results.expected[method][view]
    for capability in suite.capabilities:
        scores = results.scores(method, updates, capability)
        source = results.source(best[capability], capability)
        entry[capability] = {
            "overall": as_json(mean_over_seeds(scores)),
            "tasks": _tasks(scores, GROUPS[capability][1]),
            "of_best_source": as_json(paired_ratio(scores, source)),
        }
        if suite.reference in results.views and method != suite.reference:
            theirs = results.scores(suite.reference, results.views[suite.reference][view], capability)
            entry[capability]["minus_reference"] = as_json(paired_difference(scores, theirs))
    return entry


def _tasks(scores: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Each task's own mean of scores [seeds, tasks, n], with its interval."""
    return {name: as_json(mean_over_seeds(scores[:, [index]])) for index, name in enumerate(names)}


def tables(content: dict[str, Any]) -> list[Table]:
    """The sources, and a table for each view."""
    capabilities = list(content["best_source"])
    paper = (content["paper"] or {}).get("figures", {})
    rows = [[name, *(score(scores[c]) for c in capabilities)] for name, scores in content["sources"].items()]
    header = ["source", *(WORDS[c] for c in capabilities)]
    made = [_with_paper(Table("Sources", tuple(header), rows), paper)]
    for view, methods in content["views"].items():
        header = ["method", "updates", "forward-equivalents", "predicted", "seconds"]
        for capability in capabilities:
            header += [WORDS[capability], f"of {content['best_source'][capability]}'s", "Δ"]
        rows = []
        for name, entry in methods.items():
            spent = [f"{entry[key]:,.0f}" for key in ("compute", "expected_compute")]
            row = [name, f"{entry['updates']}", *spent, f"{entry['seconds']:.0f}"]
            for capability in capabilities:
                found = entry[capability]
                row += [
                    score(found["overall"]),
                    number(found["of_best_source"]),
                    signed(found.get("minus_reference")),
                ]
            rows.append(row)
        table = Table(
            f"At {WORDS[view]}", tuple(header), rows, _detectable(methods, content), bold=content["reference"]
        )
        made.append(_with_paper(table, paper))
    return made


def _with_paper(table: Table, figures: dict[str, str]) -> Table:
    """The table with the paper's figures as its last column, where there is one for any row."""
    column = [figures.get(row[0], "") for row in table.rows]
    if not any(column):
        return table
    rows = [[*row, figure] for row, figure in zip(table.rows, column, strict=True)]
    return Table(table.title, (*table.header, "paper"), rows, table.note, table.bold)


def _detectable(methods: dict[str, Any], content: dict[str, Any]) -> str:
    found = [
        entry[capability]["minus_reference"]["detectable"]
        for entry in methods.values()
        for capability in content["best_source"]
        if "minus_reference" in entry[capability]
    ]
    if not found:
        return "Nothing was compared with the reference."
    return (
        f"Δ is the paired difference to {content['reference']}, on the same scenes and noise. The smallest difference "
        f"that this would find with 80 % power is {min(found):.3f} to {max(found):.3f}."
    )


AGAINST_COMPUTE = "Score against compute"
PLACED = "points of nearly one cost are drawn a little apart"
"""About the places in ``against_compute``."""


def plots(content: dict[str, Any]) -> list[Plot]:
    """Score against compute, two capabilities as a plane, tasks as bars.

    The plane is of the first two capabilities, and one more of text to image and editing where these are two others.
    """
    made = [Plot(f"{AGAINST_COMPUTE} ({PLACED})", against_compute(content))]
    capabilities = list(content["best_source"])
    planes = [tuple(capabilities[:2])] if len(capabilities) > 1 else []
    if {"t2i", "edit"} <= set(capabilities) and set(capabilities[:2]) != {"t2i", "edit"}:
        planes.append(("t2i", "edit"))
    for first, second in planes:
        title = f"{WORDS[first].capitalize()} and {WORDS[second]}, at {WORDS[_main_view(content)]} (stars: sources)"
        made.append(Plot(title, _plane_plot(content, first, second)))
    return [*made, Plot(f"Tasks, at {WORDS[_main_view(content)]}", _task_plot(content))]


def _main_view(content: dict[str, Any]) -> str:
    """Equal updates, or where a suite has none equal compute."""
    return next(iter(content["views"]))


class Look(NamedTuple):
    """A method's colour, marker (of lines and points) and hatching (of bars)."""

    color: str
    marker: str
    hatch: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A colour for each method, and another marker and hatching once the colours are used up; four rounds of them."""
    rounds = itertools.cycle((("o", ""), ("s", "////"), ("^", "...."), ("D", "xxxx")))
    every = (Look(color, *marks) for marks in rounds for color in COLORS)
    return dict(zip(methods, every, strict=False))


def _axes(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """As many axes, each of this size in inches, in rows of at most ``columns``."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for unused in grid.flat[count:]:
        unused.remove()
    return figure, list(grid.flat[:count])


def against_compute(content: dict[str, Any]) -> bytes:
    """Each method's scores against the network forward-equivalents that they took, by capability: a PNG."""
    methods = looks(content["views"][_main_view(content)])
    size = {"columns": 2, "width": 6.7, "height": 5.0} if len(methods) > _MANY_METHODS else _ROW
    figure, all_axes = _axes(len(content["best_source"]), **size)
    curves = {name: sorted(points, key=lambda point: point["compute"]) for name, points in content["curve"].items()}
    places = apart({name: [point["compute"] for point in points] for name, points in curves.items()})
    for axes, capability in zip(all_axes, content["best_source"], strict=True):
        for name, (color, marker, _) in methods.items():
            points = curves[name]
            if points[-1]["compute"] == 0:  # a method without training has no place on a logarithmic axis
                axes.axhline(points[0][capability]["value"], color=color, linestyle="--", label=name)
                continue
            low, value, high = (np.array([point[capability][key] for point in points]) for key in _LOW_VALUE_HIGH)
            spans = [value - low, high - value]
            axes.errorbar(places[name], value, yerr=spans, marker=marker, color=color, capsize=3, label=name)
        _compute_axis(axes)
        axes.set(xlabel="network forward-equivalents", title=WORDS[capability], ylabel="score")
    figure.tight_layout()
    _legend(figure, all_axes[0])
    return figure_png(figure)


def _compute_axis(axes: Any) -> None:
    """Logarithmic where the points span enough for that, with few and plain numbers."""
    low, high = axes.get_xlim()
    if low > 0 and high < 6 * low:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=8)


_MANY_METHODS = 8  # with more the axes are larger
_ROW = {"columns": 4, "width": 4.8, "height": 3.6}

APART = 1.008
"""Least ratio between the places of two points, whose marks would hide each other."""


def apart(costs: dict[str, list[float]]) -> dict[str, list[float]]:
    """Where the points of these costs are drawn: at least ``APART`` from each other, moved as little as that takes.

    No two change their order. Costs of 0 stay.
    """
    placed = {name: list(of_one) for name, of_one in costs.items()}
    points = [(cost, name, index) for name, of_one in costs.items() for index, cost in enumerate(of_one) if cost]
    ranked = sorted(points, key=lambda point: point[0])
    if ranked:
        spaced = np.arange(len(ranked)) * np.log(APART)
        logs = isotonic_regression(np.log([cost for cost, _, _ in ranked]) - spaced).x + spaced
        for (_, name, index), place in zip(ranked, np.exp(logs), strict=True):
            placed[name][index] = float(place)
    return placed


_LOW_VALUE_HIGH = ("low", "value", "high")


def _legend(figure: Any, axes: Any) -> None:
    """One legend for all axes, below them, where it hides nothing."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False
    )


def _plane_plot(content: dict[str, Any], first: str, second: str) -> bytes:
    figure, axes = plt.subplots(figsize=(5.6, 4.6))
    for name, scores in content["sources"].items():
        place = scores[first]["value"], scores[second]["value"]
        axes.plot(*place, "*", markersize=12, color="#999")
        axes.annotate(name, place, textcoords="offset points", xytext=(6, 4), color="#777", fontsize=8)
    methods = content["views"][_main_view(content)]
    for name, (color, marker, _) in looks(methods).items():
        x, y = (methods[name][capability]["overall"] for capability in (first, second))
        spans = [[[e["value"] - e["low"]], [e["high"] - e["value"]]] for e in (x, y)]
        value = x["value"], y["value"]
        axes.errorbar(*value, xerr=spans[0], yerr=spans[1], fmt=marker, color=color, capsize=2, label=name)
    axes.set(xlabel=WORDS[first], ylabel=WORDS[second])
    _legend(figure, axes)
    return figure_png(figure)


def _task_plot(content: dict[str, Any]) -> bytes:
    methods = content["views"][_main_view(content)]
    figure, all_axes = _axes(len(content["best_source"]), columns=1, width=9.6, height=2.8)
    width = 0.8 / len(methods)
    for axes, capability in zip(all_axes, content["best_source"], strict=True):
        for index, (name, (color, _, hatch)) in enumerate(looks(methods).items()):
            tasks = methods[name][capability]["tasks"]
            places = np.arange(len(tasks)) + (index - len(methods) / 2 + 0.5) * width
            low, value, high = (np.array([task[key] for task in tasks.values()]) for key in _LOW_VALUE_HIGH)
            spans = [value - low, high - value]
            axes.bar(places, value, width, yerr=spans, color=color, hatch=hatch, ecolor="#555", label=name)
            axes.set_xticks(range(len(tasks)), list(tasks), fontsize=8)
        axes.set(ylabel="score", ylim=(0, 1), title=WORDS[capability])
    figure.tight_layout()
    _legend(figure, all_axes[0])
    return figure_png(figure)
