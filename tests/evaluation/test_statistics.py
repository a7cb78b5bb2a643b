import numpy as np
import pytest

from danceopd.evaluation.statistics import overall_estimate, ratio_estimate, task_estimate


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.array([0.3, 0.6, 0.8])
    overall = single = 0
    for _ in range(200):
        scores = (rng.random((3, 60)) < truth[:, None]).astype(float)
        estimate = overall_estimate(scores, rng)
        overall += estimate.low <= truth.mean() <= estimate.high
        estimate = task_estimate(scores[0])
        single += estimate.low <= truth[0] <= estimate.high
    assert 0.88 <= overall / 200 <= 0.995
    assert 0.88 <= single / 200 <= 0.995


def test_perfect_and_failed_tasks_keep_sensible_intervals():
    perfect = task_estimate(np.ones(40))
    assert perfect.value == perfect.high == 1.0
    assert 0.88 < perfect.low < 1.0
    failed = task_estimate(np.zeros(40))
    assert failed.value == failed.low == 0.0


def test_ratio_is_paired():
    rng = np.random.default_rng(1)
    reference = (rng.random((6, 50)) < 0.5).astype(float)
    same = ratio_estimate(reference, reference, rng)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    half = ratio_estimate(reference * 0.5, reference, rng)
    assert half.value == pytest.approx(0.5)
    assert half.high - half.low < 1e-9
    assert ratio_estimate(reference, reference * 0, rng) is None
