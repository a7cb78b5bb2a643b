"""Means of task means, with 95 % intervals; paired comparisons by bootstrap over scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def task_estimate(scores: np.ndarray) -> Estimate:
    """Mean of one task's scores [n] in [0, 1], with the Wilson interval (for graded scores, its conservative use)."""
    n, p, z = len(scores), float(scores.mean()), 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def overall_estimate(scores: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Mean of task means of scores [tasks, n]; scenes are resampled within each task (percentile bootstrap).

    Of few scenes, and near 0 and 1, the interval is too narrow: it has no width where all scores are equal.
    """
    means = _resampled_means(scores, _draws(scores.shape, rng))
    return Estimate(float(scores.mean()), *_percentiles(means))


def ratio_estimate(scores: np.ndarray, reference: np.ndarray, rng: np.random.Generator) -> Estimate | None:
    """overall(scores) / overall(reference), paired by scene; None where the reference is 0."""
    if reference.mean() == 0:
        return None
    draws = _draws(scores.shape, rng)
    below = _resampled_means(reference, draws)
    ratios = _resampled_means(scores, draws) / np.where(below == 0, np.nan, below)
    return Estimate(float(scores.mean() / reference.mean()), *_percentiles(ratios[~np.isnan(ratios)]))


def _draws(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    tasks, n = shape
    return rng.integers(0, n, size=(RESAMPLES, tasks, n))


def _resampled_means(scores: np.ndarray, draws: np.ndarray) -> np.ndarray:
    tasks = np.arange(scores.shape[0])[None, :, None]
    return scores[tasks, draws].mean(axis=(1, 2))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
