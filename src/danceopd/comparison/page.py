"""``comparison.md`` and ``comparison.html``, from ``comparison.json`` alone."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from danceopd.report.page import COLORS, figure_url

WORDS = {"t2i": "text to image", "edit": "editing", "updates": "equal updates", "compute": "equal compute"}


def markdown(summary: dict[str, Any]) -> str:
    """Two tables, at equal updates and at equal compute, and what the comparison could have detected."""
    lines = [f"# {summary['title']}", ""]
    lines += [
        f"{summary['seeds']} seed(s); mean (95 % interval, seeds and scenes resampled); Δ is the paired difference to "
        f"{summary['reference']} on the same scenes and noise.",
        "",
    ]
    sources = [
        f"{name} {WORDS[capability]} {_cell(scores[capability])}"
        for name, scores in summary["sources"].items()
        for capability in scores
    ]
    lines += ["Sources: " + "; ".join(sources) + ".", ""]
    for view, methods in summary["views"].items():
        lines += [f"## At {WORDS[view]}", ""]
        lines += [
            "| method | updates | forward-equivalents | text to image | Δ | editing | Δ |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, entry in methods.items():
            cells = [f"{entry['updates']}", f"{entry['compute']:,.0f}"]
            for capability in ("t2i", "edit"):
                cells += [_cell(entry[capability]["overall"]), _delta(name, entry[capability], summary)]
            shown = f"**{name}**" if name == summary["reference"] else name
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
        lines += ["", _detectable(methods, summary), ""]
    return "\n".join(lines)


def html(summary: dict[str, Any]) -> str:
    """One self-contained page: the tables, score against compute, the two capabilities as a plane, tasks as bars."""
    loader = PackageLoader("danceopd.report")
    page = Environment(loader=loader, autoescape=select_autoescape()).get_template("comparison.html")
    return page.render(
        summary=summary,
        words=WORDS,
        compute_plot=_compute_plot(summary),
        plane_plot=_plane_plot(summary),
        task_plot=_task_plot(summary),
    )


def _cell(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.2f}-{estimate['high']:.2f})"


def _delta(name: str, entry: dict[str, Any], summary: dict[str, Any]) -> str:
    if name == summary["reference"] or "minus_reference" not in entry:
        return ""
    difference = entry["minus_reference"]
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def _detectable(methods: dict[str, Any], summary: dict[str, Any]) -> str:
    found = [
        entry[capability]["minus_reference"]["detectable"]
        for name, entry in methods.items()
        for capability in ("t2i", "edit")
        if name != summary["reference"] and "minus_reference" in entry[capability]
    ]
    if not found:
        return "Nothing was compared with the reference."
    return f"The smallest difference that this would find with 80 % power is {min(found):.3f} to {max(found):.3f}."


def _method_colors(summary: dict[str, Any]) -> dict[str, str]:
    return dict(zip(summary["views"]["updates"], itertools.cycle(COLORS), strict=False))


def _compute_plot(summary: dict[str, Any]) -> str:
    figure, all_axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharex=True)
    for axes, capability in zip(all_axes, ("t2i", "edit"), strict=True):
        for name, color in _method_colors(summary).items():
            entries = sorted((view[name] for view in summary["views"].values()), key=lambda entry: entry["compute"])
            compute = [max(entry["compute"], 1.0) for entry in entries]
            overall = [entry[capability]["overall"] for entry in entries]
            low, value, high = (np.array([estimate[key] for estimate in overall]) for key in ("low", "value", "high"))
            axes.errorbar(
                compute, value, yerr=[value - low, high - value], marker="o", color=color, capsize=3, label=name
            )
        axes.set(xscale="log", xlabel="network forward-equivalents", title=WORDS[capability], ylabel="score")
    all_axes[0].legend(frameon=False, fontsize=8)
    return figure_url(figure)


def _plane_plot(summary: dict[str, Any]) -> str:
    figure, all_axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharex=True, sharey=True)
    for axes, (view, methods) in zip(all_axes, summary["views"].items(), strict=True):
        for name, scores in summary["sources"].items():
            axes.plot(scores["t2i"]["value"], scores["edit"]["value"], "*", markersize=12, color="#999")
            axes.annotate(name, (scores["t2i"]["value"], scores["edit"]["value"]), color="#777", fontsize=8)
        for name, color in _method_colors(summary).items():
            x, y = (methods[name][capability]["overall"] for capability in ("t2i", "edit"))
            spans = [[[e["value"] - e["low"]], [e["high"] - e["value"]]] for e in (x, y)]
            axes.errorbar(x["value"], y["value"], xerr=spans[0], yerr=spans[1], fmt="o", color=color, capsize=2)
            axes.annotate(name, (x["value"], y["value"]), textcoords="offset points", xytext=(5, 5), color=color)
        axes.set(xlabel="text-to-image score", ylabel="edit score", title=f"at {WORDS[view]} (stars: sources)")
    return figure_url(figure)


def _task_plot(summary: dict[str, Any]) -> str:
    methods = summary["views"]["updates"]
    figure, all_axes = plt.subplots(2, 1, figsize=(9.6, 5.6))
    width = 0.8 / len(methods)
    for axes, capability in zip(all_axes, ("t2i", "edit"), strict=True):
        for index, (name, color) in enumerate(_method_colors(summary).items()):
            tasks = methods[name][capability]["tasks"]
            places = np.arange(len(tasks)) + (index - len(methods) / 2 + 0.5) * width
            axes.bar(places, list(tasks.values()), width, color=color, label=name)
            axes.set_xticks(range(len(tasks)), list(tasks))
        axes.set(ylabel="score", ylim=(0, 1))
    all_axes[0].legend(frameon=False, fontsize=8, ncols=4)
    return figure_url(figure)
