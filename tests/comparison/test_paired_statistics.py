import numpy as np
import pytest
from scipy.stats import t as student_t

from danceopd.comparison.statistics import gap_closed, mean_over_seeds, paired_difference, paired_ratio, standard_error


def draw(rng, effect=0.0, seeds=5, seed_deviation=0.0, scene_deviation=0.0, tasks=6, n=50):
    """Paired scores, one side better by ``effect``, how much by seed and by scene; scenes differ in difficulty too."""
    difficulty = rng.uniform(0.2, 0.6, (1, tasks, n))
    one, two = difficulty + 0.25 * rng.standard_normal((2, seeds, tasks, n))
    by_scene = scene_deviation * rng.standard_normal((1, tasks, n))
    return one, two + effect + seed_deviation * rng.standard_normal((seeds, 1, 1)) + by_scene


def test_equal_methods_have_difference_zero_and_no_spread():
    one, _ = draw(np.random.default_rng(0))
    difference = paired_difference(one, one)
    assert (difference.value, difference.low, difference.high, difference.detectable) == (0, 0, 0, 0)


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.90), (5, 0.93)])
@pytest.mark.parametrize(("seed_deviation", "scene_deviation"), [(0.0, 0.0), (0.02, 0.1), (0.0, 0.3), (0.1, 0.0)])
def test_a_true_difference_lies_in_nineteen_of_twenty_intervals(seeds, least, seed_deviation, scene_deviation):
    """Whether the seeds, the scenes or the noise of single scores make most of the variance."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(800):
        one, two = draw(rng, 0.2, seeds, seed_deviation, scene_deviation)
        difference = paired_difference(two, one)
        covered += difference.low <= 0.2 <= difference.high
    assert least <= covered / 800 <= 0.98


@pytest.mark.parametrize(
    ("seed_deviation", "scene_deviation", "most"), [(0.0, 0.0, 1.15), (0.05, 0.0, 1.05), (0.02, 0.3, 1.05)]
)
def test_the_standard_error_is_that_of_repetitions(seed_deviation, scene_deviation, most):
    """Where seeds do not differ it is a little larger, for a variance of theirs below 0 counts as 0."""
    rng = np.random.default_rng(0)
    differences = [draw(rng, 0.0, 5, seed_deviation, scene_deviation) for _ in range(1500)]
    true = np.std([(two - one).mean() for one, two in differences])
    found = np.sqrt(np.mean([standard_error(two - one)[0] ** 2 for one, two in differences]))
    assert 0.95 <= found / true <= most


def test_the_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    size = np.mean([paired_difference(*draw(rng, seed_deviation=0.03)).detectable for _ in range(200)])
    hits = 0
    for _ in range(500):
        one, two = draw(rng, effect=size, seed_deviation=0.03)
        hits += paired_difference(two, one).low > 0
    assert 0.75 <= hits / 500 <= 0.9


def test_seeds_alone_and_scenes_alone_give_the_textbook_intervals():
    by_seed = np.array([0.1, 0.2, 0.6])
    scores = np.broadcast_to(by_seed[:, None, None], (3, 2, 4))
    reach = student_t.ppf(0.975, 2) * by_seed.std(ddof=1) / 3**0.5
    difference = paired_difference(scores, np.zeros((2, 4)))
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach))
    by_scene = np.random.default_rng(0).random((1, 2, 4))
    reach = student_t.ppf(0.975, 6) * np.sqrt(by_scene[0].var(1, ddof=1).sum() / 4 / 2**2)
    for seeds in (1, 3):  # seeds that agree everywhere tell no more than one
        difference = paired_difference(np.repeat(by_scene, seeds, 0), np.zeros((2, 4)))
        assert difference.high - difference.value == pytest.approx(reach)


def test_means_stay_between_0_and_1_and_ratios_are_paired():
    rng = np.random.default_rng(0)
    scores = (rng.random((3, 2, 50)) < 0.995).astype(float)
    estimate = mean_over_seeds(scores)
    assert estimate.value == scores.mean()
    assert estimate.low < estimate.value < estimate.high == 1.0
    source = rng.uniform(0.3, 0.9, (2, 50))
    ratio = paired_ratio(np.stack([0.8 * source] * 3), source)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.8, 0.8, 0.8))  # scenes differ, their ratio does not
    assert np.isnan(paired_ratio(scores, np.zeros_like(source)).value)


def test_a_ratio_is_covered_as_often_as_a_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        one, two = draw(rng, 0.1, seed_deviation=0.03)
        ratio = paired_ratio(two, one)
        covered += ratio.low <= 0.5 / 0.4 <= ratio.high
    assert 0.92 <= covered / 500 <= 0.985


def test_the_share_of_the_gap_is_exact_where_every_scene_closes_it_alike():
    rng = np.random.default_rng(0)
    base, gap = rng.uniform(0.0, 0.2, (6, 50)), rng.uniform(0.3, 0.6, (6, 50))
    student = np.stack([base + share * gap for share in (0.8, 0.9)])
    estimate = gap_closed(student, base, base + gap)
    assert estimate.value == pytest.approx(0.85)
    reach = student_t.ppf(0.975, 1) * 0.05  # scenes agree: only the two seeds spread
    assert (estimate.low, estimate.high) == pytest.approx((0.85 - reach, 0.85 + reach), rel=0.01)
    assert np.isnan(gap_closed(student, base, base).value)
