"""Staleness of streaming rollouts beside quality: how far their states are from fresh ones, and the scores they give.

The figures are the run's own (``StreamingDanceOPD.diagnostics``), measured under the weights of that update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from danceopd.comparison.results import Results
from danceopd.comparison.statistics import as_json, mean_over_seeds
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import WORDS, Plot, Table, score
from danceopd.report.page import figure_png
from danceopd.training.assemble import Assembly
from danceopd.training.run_folder import RunFolder


def take(assembly: Assembly, model: str, suite: Suite) -> dict[str, Any]:
    """What a run logged of its pool; nothing of a run with fresh rollouts.

    staleness: {update: distance}; band_distance: over the whole run.
    """
    recipe = assembly.recipe
    lines = [line for line in RunFolder(Path(recipe.output)).metrics() if line["step"] <= recipe.train.steps]
    measured = {str(line["step"]): round(line["pool/staleness"], 5) for line in lines if "pool/staleness" in line}
    last = next((line for line in reversed(lines) if "pool/band_distance" in line), None)
    return {} if last is None else {"staleness": measured, "band_distance": round(last["pool/band_distance"], 4)}


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Each method's score at equal updates, with the staleness that its runs saw where they streamed."""
    methods: dict[str, Any] = {}
    for method, views in results.views.items():
        points = results.points[method][views["updates"]]
        taken = [point.taken["staleness"] for point in points]
        entry: dict[str, Any] = {
            capability: as_json(mean_over_seeds(results.scores(method, views["updates"], capability)))
            for capability in suite.capabilities
        }
        if all(taken):
            seen = [list(found["staleness"].values()) for found in taken]
            entry["staleness"] = round(float(np.mean([np.mean(values) for values in seen])), 5) if all(seen) else None
            entry["band_distance"] = round(float(np.mean([found["band_distance"] for found in taken])), 4)
        entry["seconds"] = round(float(np.median([point.seconds for point in points])), 1)
        methods[method] = entry
    return {"capabilities": list(suite.capabilities), "methods": methods}


def estimates(suite: Suite) -> dict[str, Any]:
    """See ``Measure``."""
    return {"methods": {method: dict.fromkeys(suite.capabilities) for method in suite.recipes}}


def tables(content: dict[str, Any]) -> list[Table]:
    """One row per method: scores, staleness, distance to the band, seconds."""
    capabilities = content["capabilities"]
    rows = []
    for name, entry in content["methods"].items():
        rows.append(
            [
                name,
                *(score(entry[capability]) for capability in capabilities),
                _figure(entry, "staleness", 4),
                _figure(entry, "band_distance", 3),
                f"{entry['seconds']:.0f}",
            ]
        )
    note = (
        "Staleness: relative distance of a state in the pool to a fresh rollout from the same noise under the weights "
        "of that update, mean over a run. Distance to the band: total variation between the trained steps and the "
        "query band."
    )
    header = ("method", *(WORDS[c] for c in capabilities), "staleness", "distance to the band", "seconds")
    return [Table("Staleness beside quality, at equal updates", header, rows, note)]


def plots(content: dict[str, Any]) -> list[Plot]:
    """Scores against staleness, where there are several to compare."""
    stale = {name: entry for name, entry in content["methods"].items() if entry.get("staleness") is not None}
    if len(stale) < 2:
        return []
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for capability in content["capabilities"]:
        x = [entry["staleness"] for entry in stale.values()]
        value, low, high = (np.array([e[capability][key] for e in stale.values()]) for key in ("value", "low", "high"))
        axes.errorbar(x, value, yerr=[value - low, high - value], fmt="o", capsize=3, label=WORDS[capability])
    axes.set(xlabel="staleness (relative distance to a fresh rollout)", ylabel="score")
    axes.legend(frameon=False)
    return [Plot("Score against staleness", figure_png(figure))]


def _figure(entry: dict[str, Any], key: str, digits: int) -> str:
    value = entry.get(key)
    return "" if value is None else f"{value:.{digits}f}"
