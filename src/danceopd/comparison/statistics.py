"""Means over seeds with intervals, and differences, ratios and shares paired by seed and scene."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from danceopd.evaluation.statistics import RESAMPLES, Estimate

NORMAL_95 = 1.959964
POWER_FACTOR = NORMAL_95 + 0.841621
"""Standard errors of an effect that a two-sided 5 % test finds in 80 % of repetitions."""

Draws = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """A paired difference. detectable: the smallest true effect that this comparison would find with 80 % power."""

    estimate: Estimate
    detectable: float


def mean_over_seeds(scores: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Overall (mean of task means) of scores [seeds, tasks, n], seeds and scenes resampled."""
    return _estimate(scores.mean(), _resampled(scores, _draws(scores.shape, rng)))


def paired_difference(scores: np.ndarray, reference: np.ndarray, rng: np.random.Generator) -> Difference:
    """overall(scores) - overall(reference), paired: [seeds, tasks, n] on the same scenes with the same seeds.

    reference: may be [tasks, n], a model that no seed of training touched.
    """
    draws = _draws(scores.shape, rng)
    resampled = _resampled(scores - reference, draws)
    return Difference(_estimate((scores - reference).mean(), resampled), float(POWER_FACTOR * resampled.std(ddof=1)))


def paired_ratio(scores: np.ndarray, reference: np.ndarray, rng: np.random.Generator) -> Estimate:
    """overall(scores) / overall(reference), paired as in ``paired_difference``; NaN where the reference is 0."""
    return _share(scores, np.broadcast_to(reference, scores.shape), rng)


def gap_closed(student: np.ndarray, base: np.ndarray, teacher: np.ndarray, rng: np.random.Generator) -> Estimate:
    """(student - base) / (teacher - base), paired by scene: student [seeds, tasks, n], the others [tasks, n].

    NaN where teacher and base are equal.
    """
    return _share(student - base, np.broadcast_to(teacher - base, student.shape), rng)


def detectable(estimate: Estimate) -> float:
    """The smallest distance from any other value that an interval of this width finds with 80 % power."""
    return POWER_FACTOR * (estimate.high - estimate.low) / (2 * NORMAL_95)


def as_json(value: Estimate | Difference) -> dict[str, float | None]:
    """An estimate, rounded, with None for what has no value."""
    if isinstance(value, Difference):
        return {**as_json(value.estimate), "detectable": round(value.detectable, 4)}
    return {key: None if math.isnan(number) else round(number, 4) for key, number in asdict(value).items()}


def _share(part: np.ndarray, whole: np.ndarray, rng: np.random.Generator) -> Estimate:
    draws = _draws(part.shape, rng)
    below = _resampled(whole, draws)
    value = part.mean() / whole.mean() if whole.mean() != 0 else np.nan
    return _estimate(value, _resampled(part, draws) / np.where(below == 0, np.nan, below))


def _draws(shape: tuple[int, ...], rng: np.random.Generator) -> Draws:
    """Seeds [R, seeds] and scenes [R, tasks, n]: a scene is drawn for all seeds alike, as it is shown to all."""
    seeds, tasks, n = shape
    return rng.integers(0, seeds, (RESAMPLES, seeds)), rng.integers(0, n, (RESAMPLES, tasks, n))


def _resampled(scores: np.ndarray, draws: Draws) -> np.ndarray:
    seeds, scenes = draws
    shares = (seeds[:, :, None] == np.arange(len(scores))).mean(1)  # [R, seeds]
    means = (shares @ scores.reshape(len(scores), -1)).reshape(-1, *scores.shape[1:])
    return np.take_along_axis(means, scenes, axis=2).mean((1, 2))


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    if np.isnan(resampled).all():
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
