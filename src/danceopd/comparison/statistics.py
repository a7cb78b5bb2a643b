"""Means over seeds with intervals, and differences to the reference paired by seed and scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from danceopd.evaluation.statistics import Estimate

RESAMPLES = 2000
POWER_FACTOR = 1.959964 + 0.841621
"""Standard errors of an effect that a two-sided 5 % test finds in 80 % of repetitions."""


@dataclass(frozen=True)
class Difference:
    """A paired difference. detectable: the smallest true effect that this comparison would find with 80 % power."""

    estimate: Estimate
    detectable: float


def mean_over_seeds(scores: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Overall (mean of task means) of scores [seeds, tasks, n], seeds and scenes resampled."""
    return _estimate(scores.mean(), _resampled(scores, _draws(scores.shape, rng)))


def paired_difference(scores: np.ndarray, reference: np.ndarray, rng: np.random.Generator) -> Difference:
    """overall(scores) - overall(reference), both [seeds, tasks, n] on the same scenes with the same seeds."""
    draws = _draws(scores.shape, rng)
    resampled = _resampled(scores - reference, draws)
    return Difference(_estimate((scores - reference).mean(), resampled), float(POWER_FACTOR * resampled.std(ddof=1)))


def ratio_to_source(scores: np.ndarray, source: np.ndarray, rng: np.random.Generator) -> Estimate:
    """overall(scores [seeds, tasks, n]) / overall(source [tasks, n]), paired by scene; NaN where the source is 0."""
    draws = _draws(scores.shape, rng)
    below = _resampled(np.broadcast_to(source, scores.shape), draws)
    value = scores.mean() / source.mean() if source.mean() > 0 else np.nan
    return _estimate(value, _resampled(scores, draws) / np.where(below == 0, np.nan, below))


def _draws(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seeds [R, seeds] and scenes [R, tasks, n]: a scene is drawn for all seeds alike, as it is shown to all."""
    seeds, tasks, n = shape
    return rng.integers(0, seeds, (RESAMPLES, seeds)), rng.integers(0, n, (RESAMPLES, tasks, n))


def _resampled(scores: np.ndarray, draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    tasks = np.arange(scores.shape[1])[:, None]
    return np.array([scores[seeds].mean(0)[tasks, scenes].mean() for seeds, scenes in zip(*draws, strict=True)])


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    if np.isnan(resampled).all():
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
