"""From scores to what is said of them: the content of ``comparison.json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from danceopd.comparison.runner import Point, Results
from danceopd.comparison.statistics import Difference, mean_over_seeds, paired_difference, ratio_to_source
from danceopd.comparison.suite import VIEWS, Suite
from danceopd.evaluation.shapes import CAPABILITIES
from danceopd.evaluation.statistics import Estimate


def summarise(suite: Suite, results: Results) -> dict[str, Any]:
    """Per view and method: overall scores with intervals, differences to the reference, ratios to the best source.

    Everything is resampled from one fixed seed, so that equal scores give equal figures.
    """
    rng = np.random.default_rng(0)
    seeds = len(next(iter(results.points.values()))[VIEWS[0]])
    best = {
        capability: max(results.sources, key=lambda name, c=capability: results.sources[name][c].mean())
        for capability in CAPABILITIES
    }
    summary: dict[str, Any] = {
        "suite": suite.name,
        "title": suite.title,
        "reference": suite.reference,
        "seeds": seeds,
        "updates": suite.updates,
        "compute": suite.compute,
        "best_source": best,
        "sources": {
            name: {c: _rounded(mean_over_seeds(scores[c][None], rng)) for c in CAPABILITIES}
            for name, scores in results.sources.items()
        },
        "views": {},
    }
    for view in VIEWS:
        summary["views"][view] = {
            method: _method(points[view], results, suite, view, best, rng) for method, points in results.points.items()
        }
    return summary


def _method(
    points: list[Point], results: Results, suite: Suite, view: str, best: dict[str, str], rng: np.random.Generator
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "updates": points[0].updates,
        "compute": float(np.mean([point.compute for point in points])),
        "seconds": float(np.mean([point.seconds for point in points])),
    }
    reference = results.points.get(suite.reference)
    for capability, tasks in CAPABILITIES.items():
        scores = np.stack([point.scores[capability] for point in points])
        entry[capability] = {
            "overall": _rounded(mean_over_seeds(scores, rng)),
            "tasks": dict(zip(tasks, scores.mean(axis=(0, 2)).round(4).tolist(), strict=True)),
            "of_best_source": _rounded(ratio_to_source(scores, results.sources[best[capability]][capability], rng)),
        }
        if reference is not None:
            theirs = np.stack([point.scores[capability] for point in reference[view]])
            entry[capability]["minus_reference"] = _difference(paired_difference(scores, theirs, rng))
    return entry


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {key: round(value, 4) for key, value in asdict(estimate).items()}


def _difference(difference: Difference) -> dict[str, float]:
    return {**_rounded(difference.estimate), "detectable": round(difference.detectable, 4)}
