"""Means over seeds with intervals, and differences, ratios and shares paired by seed and scene.

Scores are [seeds, tasks, n]: every seed of training is scored on the same n scenes of each task, so that seeds and
scenes are crossed, and the tasks are fixed. The variance of the overall mean (the mean of task means) is then

    V = V_seeds + V_scenes - V_rest

where V_seeds is that of S seed means, V_scenes that of the scene means within their tasks, and V_rest the part which
each of these two holds once and which is to count once: what is left of a score after its seed's mean in that task and
its scene's mean over seeds are taken away. Intervals are Student's t with Satterthwaite's degrees of freedom: two seeds
that disagree give a wide one. With one seed nothing is known of others, and the interval is of the scenes alone. No
random number is drawn: equal scores give equal figures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import t as student_t

from danceopd.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Effect(Estimate):
    """A value over seeds and scenes with its 95 % interval.

    detectable: the smallest true distance from any other value that would be found with 80 % power.
    """

    detectable: float


def mean_over_seeds(scores: np.ndarray) -> Effect:
    """Overall of scores [seeds, tasks, n] in 0 to 1, which its interval does not leave."""
    found = _effect(scores.mean(), scores)
    return Effect(found.value, max(0.0, found.low), min(1.0, found.high), found.detectable)


def paired_difference(scores: np.ndarray, reference: np.ndarray) -> Effect:
    """overall(scores) - overall(reference), paired: [seeds, tasks, n] on the same scenes with the same seeds.

    reference: may be [tasks, n], a model that no seed of training touched.
    """
    return _effect((scores - reference).mean(), scores - reference)


def paired_ratio(scores: np.ndarray, reference: np.ndarray) -> Effect:
    """overall(scores) / overall(reference), paired as in ``paired_difference``; NaN where the reference is 0.

    The interval is that of the linearised ratio: of (score - ratio * reference) / overall(reference).
    """
    whole = np.broadcast_to(reference, scores.shape)
    if whole.mean() == 0:
        return Effect(math.nan, math.nan, math.nan, math.nan)
    ratio = scores.mean() / whole.mean()
    return _effect(ratio, (scores - ratio * whole) / whole.mean())


def gap_closed(student: np.ndarray, base: np.ndarray, teacher: np.ndarray) -> Effect:
    """(student - base) / (teacher - base), paired by scene: student [seeds, tasks, n], the others [tasks, n].

    NaN where teacher and base are equal.
    """
    return paired_ratio(student - base, teacher - base)


def as_json(value: Effect) -> dict[str, float | None]:
    """An effect, rounded, with None for what has no value."""
    return {key: None if math.isnan(number) else round(number, 4) for key, number in asdict(value).items()}


def _effect(value: float, scores: np.ndarray) -> Effect:
    error, freedom = standard_error(scores)
    reach = float(student_t.ppf(0.975, freedom)) * error
    power = float(student_t.ppf(0.975, freedom) + student_t.ppf(0.8, freedom)) * error
    return Effect(float(value), float(value) - reach, float(value) + reach, power)


def standard_error(scores: np.ndarray) -> tuple[float, float]:
    """sqrt(V) of scores [seeds, tasks, n], n > 1, and its degrees of freedom; see the head of this file.

    A difference V_seeds - V_rest below 0, which chance alone makes, counts as 0.
    """
    seeds, tasks, n = scores.shape
    scene_means = scores.mean(0)  # [tasks, n]
    of_scenes = float(scene_means.var(1, ddof=1).sum()) / (n * tasks**2)
    if seeds == 1:
        return math.sqrt(of_scenes), tasks * (n - 1)
    of_seeds = float(scores.mean((1, 2)).var(ddof=1)) / seeds
    rest = scores - scores.mean(2, keepdims=True) - scene_means + scene_means.mean(1, keepdims=True)
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n * tasks**2)
    if of_seeds <= of_rest:
        return math.sqrt(of_scenes), tasks * (n - 1)
    variance = of_seeds + of_scenes - of_rest
    squares = (
        of_seeds**2 / (seeds - 1) + of_scenes**2 / (tasks * (n - 1)) + of_rest**2 / (tasks * (seeds - 1) * (n - 1))
    )
    return math.sqrt(variance), max(1.0, variance**2 / squares)
