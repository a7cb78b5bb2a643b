import numpy as np
import pytest

from danceopd.comparison.statistics import detectable, gap_closed, mean_over_seeds, paired_difference, paired_ratio


def draw(seed=0, effect=0.0, seeds=5, tasks=6, n=50):
    """Paired Bernoulli scores: a scene's difficulty is shared, the effect is added to one side."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0.2, 0.6, (1, tasks, n))
    one = (rng.random((seeds, tasks, n)) < difficulty).astype(float)
    two = (rng.random((seeds, tasks, n)) < difficulty + effect).astype(float)
    return one, two


def test_equal_methods_have_difference_zero_and_no_spread():
    one, _ = draw()
    difference = paired_difference(one, one, np.random.default_rng(0))
    assert (difference.estimate.value, difference.estimate.low, difference.estimate.high) == (0, 0, 0)
    assert difference.detectable == 0


def test_an_effect_is_found_and_its_size_covered():
    covered = found = 0
    for seed in range(40):
        one, two = draw(seed, effect=0.2)
        estimate = paired_difference(two, one, np.random.default_rng(seed)).estimate
        covered += estimate.low <= 0.2 <= estimate.high
        found += estimate.low > 0
    assert found == 40
    assert covered >= 34


def test_no_effect_is_rarely_found():
    wrong = 0
    for seed in range(40):
        one, two = draw(seed)
        estimate = paired_difference(two, one, np.random.default_rng(seed)).estimate
        wrong += estimate.low > 0 or estimate.high < 0
    assert wrong <= 7


def test_the_detectable_effect_is_found_four_times_in_five():
    one, two = draw(1, seeds=5)
    size = paired_difference(two, one, np.random.default_rng(0)).detectable
    hits = 0
    for seed in range(60):
        one, two = draw(100 + seed, effect=size)
        hits += paired_difference(two, one, np.random.default_rng(seed)).estimate.low > 0
    assert 0.6 <= hits / 60 <= 0.97


def test_means_and_ratios():
    one, _ = draw()
    estimate = mean_over_seeds(one, np.random.default_rng(0))
    assert estimate.value == pytest.approx(one.mean())
    assert estimate.low < estimate.value < estimate.high
    source = one.mean(0)
    ratio = paired_ratio(one, source, np.random.default_rng(0))
    assert ratio.value == pytest.approx(1.0)
    assert ratio.low <= 1.0 <= ratio.high
    assert np.isnan(paired_ratio(one, np.zeros_like(source), np.random.default_rng(0)).value)


def test_the_share_of_the_gap_is_exact_where_every_scene_closes_it_alike():
    rng = np.random.default_rng(0)
    base, gap = rng.uniform(0.0, 0.2, (6, 50)), rng.uniform(0.3, 0.6, (6, 50))
    student = np.stack([base + share * gap for share in (0.8, 0.9)])
    estimate = gap_closed(student, base, base + gap, rng)
    assert estimate.value == pytest.approx(0.85)
    assert (estimate.low, estimate.high) == pytest.approx((0.8, 0.9))  # scenes agree: only the two seeds spread
    assert np.isnan(gap_closed(student, base, base, rng).value)


def test_an_intervals_width_and_a_differences_own_power_agree():
    one, two = draw(effect=0.1)
    difference = paired_difference(two, one, np.random.default_rng(0))
    assert detectable(difference.estimate) == pytest.approx(difference.detectable, rel=0.1)
