"""``report.html``: one self-contained page about one run."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.ticker import MaxNLocator

from danceopd.distill.query import BANDS
from danceopd.distill.schedule import shifted_grid
from danceopd.files import write_text
from danceopd.recipe import Recipe
from danceopd.training.run_folder import RunFolder

COLORS = (
    *("#3b6fb6", "#c8553d", "#4f9d69", "#8e6bb0", "#b8860b"),
    *("#5c6b73", "#2aa1b3", "#d9679b", "#7a4b2a", "#9aa632", "#1f1f1f", "#8fb8de"),
)


def write_report(folder: RunFolder) -> Path:
    """Write the page from ``recipe.yaml``, ``metrics.jsonl``, ``evaluation.json`` and ``samples/``."""
    evaluation = folder.evaluation()
    page = Environment(loader=PackageLoader("danceopd.report"), autoescape=select_autoescape()).get_template("run.html")
    html = page.render(
        title=folder.path.name,
        evaluation=evaluation,
        tables=[_table(evaluation, capability) for capability in _capabilities(evaluation)],
        verdicts=_verdicts(evaluation),
        columns=["source", *evaluation["models"]],
        rows=[_picture_row(folder, row) for row in evaluation["shown"]],
        plots=_plots(folder, evaluation),
        recipe=folder.recipe_file.read_text(),
    )
    write_text(folder.report_file, html)
    return folder.report_file


def _capabilities(evaluation: dict[str, Any]) -> list[str]:
    return list(next(iter(evaluation["models"].values())))


def _table(evaluation: dict[str, Any], capability: str) -> dict[str, Any]:
    models = list(evaluation["models"])
    tasks = list(evaluation["models"][models[0]][capability])
    rows = []
    for task in tasks:
        cells = []
        for model in models:
            low, high = evaluation["intervals"][model][capability][task]
            cells.append({"score": evaluation["models"][model][capability][task], "low": low, "high": high})
        rows.append({"task": task, "cells": cells})
    return {"capability": capability, "models": models, "rows": rows}


def _verdicts(evaluation: dict[str, Any]) -> list[str]:
    """What the student keeps of the best source of each capability."""
    words = {"t2i": "Text to image", "edit": "Editing"}
    lines = []
    for capability in _capabilities(evaluation):
        scores = {name: model[capability]["overall"] for name, model in evaluation["models"].items()}
        best = max((name for name in scores if name != "student"), key=lambda name: scores[name])
        ratio = evaluation["student_over"][best][capability]
        if ratio is not None:
            lines.append(
                f"{words[capability]}: the student scores {scores['student']:.3f}, {best} {scores[best]:.3f}; that is "
                f"{ratio['value']:.2f} of it (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}, paired by scene)"
            )
    return lines


def _picture_row(folder: RunFolder, row: dict[str, Any]) -> dict[str, Any]:
    root = folder.samples / "evaluation"
    pictures = {name: data_url((root / file).read_bytes()) for name, file in row["files"].items()}
    return {"task": row["task"], "text": row["text"], "pictures": pictures}


def _plots(folder: RunFolder, evaluation: dict[str, Any]) -> dict[str, str]:
    """What each shows, and the picture."""
    metrics, recipe = folder.metrics(), folder.read_recipe()
    made = {
        "loss per route": _loss_plot(metrics),
        "text-to-image score against edit score": _score_plot(evaluation),
    }
    if recipe.rollout.mode == "streaming" and metrics:
        made["which steps were trained"] = _step_plot(metrics[-1], recipe)
    return made


def _step_plot(last: dict[str, Any], recipe: Recipe) -> str:
    """The share of each step among the states that a pool's trajectories were trained at, beside the query band."""
    band = BANDS[recipe.query.band](over="step", per_rollout=1)
    asked = band.step_probabilities(shifted_grid(steps=recipe.rollout.num_inference_steps)).numpy()
    trained = np.array([last[f"pool/trained_at_step/{step:02d}"] for step in range(len(asked))])
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    axes.bar(range(len(asked)), trained / trained.sum(), color=COLORS[0], label="trained")
    axes.plot(asked, "o", color=COLORS[1], label=f"query band: {recipe.query.band}")
    axes.set(xlabel="step of the rollout (0 is pure noise)", ylabel="share of trained states")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return data_url(figure_png(figure))


def _loss_plot(metrics: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    routes = sorted({key for line in metrics for key in line if key.startswith("loss/")})
    for color, key in zip(itertools.cycle(COLORS), routes, strict=False):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        steps, losses = (np.array(values) for values in zip(*points, strict=True))
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=color, label=key.removeprefix("loss/"))
    positive = all(line[key] > 0 for line in metrics for key in routes if key in line)
    axes.set(xlabel="optimiser update", ylabel="training loss", yscale="log" if positive else "linear")
    axes.legend(frameon=False)
    return data_url(figure_png(figure))


def _score_plot(evaluation: dict[str, Any]) -> str:
    """Text-to-image against editing, every model a point with its intervals."""
    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    for color, (model, scores) in zip(itertools.cycle(COLORS), evaluation["models"].items(), strict=False):
        x, y = scores["t2i"]["overall"], scores["edit"]["overall"]
        spans = [evaluation["intervals"][model][capability]["overall"] for capability in ("t2i", "edit")]
        (x_low, x_high), (y_low, y_high) = spans
        axes.errorbar(
            x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]], fmt="o", color=color, capsize=3
        )
        axes.annotate(model, (x, y), textcoords="offset points", xytext=(6, 6), color=color)
    axes.set(xlabel="text-to-image score", ylabel="edit score", xlim=(-0.03, 1.06), ylim=(-0.03, 1.06))
    return data_url(figure_png(figure))


def figure_png(figure) -> bytes:
    """The figure as a PNG; the figure is closed."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """What an ``img`` takes as its source, so that a page is one file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
