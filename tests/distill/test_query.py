import math

import pytest
import scipy.stats
import torch
from scipy import stats

from danceopd.distill.query import BANDS, BetaQuery, StratifiedQuery, high_noise, low_noise, mid_noise
from danceopd.distill.schedule import Grid, shifted_grid

GRID = shifted_grid(steps=16, shift=3.0)


@pytest.mark.parametrize(("a", "b"), [(5, 2), (5, 5), (2, 5), (1, 1), (0.1, 1.3), (1000, 1000)])
def test_step_frequencies_follow_the_beta_distribution(rng, a, b):
    exact = torch.tensor(stats.beta(a, b).cdf([step / 16 for step in range(17)])).diff()
    query = BetaQuery(a, b)
    torch.testing.assert_close(query.step_probabilities(GRID), exact, atol=1e-12, rtol=0)
    counts = torch.bincount(query.draw(40_000, GRID, rng).step[:, 0], minlength=16) / 40_000
    assert float((counts - exact).abs().max()) < 0.01


def test_paper_figures_for_low_noise(rng):
    step = low_noise().draw(40_000, GRID, rng).step.double()
    assert abs(float(step.mean()) - 10.9) < 0.1
    sigma = low_noise().draw(40_000, GRID, rng).sigma
    assert abs(float(sigma.mean()) - 0.55) < 0.02


def test_low_noise_is_cleaner_than_mid_than_high(rng):
    low, mid, high = (float(band().draw(5000, GRID, rng).sigma.mean()) for band in (low_noise, mid_noise, high_noise))
    assert low < mid < high


def test_over_sigma_draws_the_band_over_sigma(rng):
    query = BetaQuery(5, 2, over="sigma").draw(20_000, GRID, rng)
    # u = 1 - sigma ~ Beta(5, 2), given that sigma is at least the last that a model is called on
    least = float(GRID.sigmas[-2])
    truncated = scipy.stats.beta(5, 2).expect(lambda u: u, ub=1 - least, conditional=True)
    assert float(query.sigma.mean()) == pytest.approx(1 - truncated, abs=0.004)
    assert float(query.sigma.min()) >= least
    before, after = GRID.sigmas[query.step], GRID.sigmas[query.step + 1]
    assert bool(((query.sigma <= before) & (query.sigma > after)).all())
    counts = torch.bincount(query.step[:, 0], minlength=16) / 20_000
    torch.testing.assert_close(
        counts.double(), BetaQuery(5, 2, over="sigma").step_probabilities(GRID), atol=0.015, rtol=0
    )


@pytest.mark.parametrize("band", sorted(BANDS))
def test_several_queries_are_distinct_and_ordered(rng, band):
    for count in (2, 5, 16):
        step = BANDS[band](per_rollout=count).draw(500, GRID, rng).step
        assert step.shape == (500, count)
        assert bool((step.diff(dim=1) > 0).all())


def test_two_queries_are_drawn_one_after_another_from_the_steps_left(rng):
    grid, query = shifted_grid(steps=4), BetaQuery(2, 3, per_rollout=2)
    first, second = query.draw(40_000, grid, rng).step.T
    pairs = torch.bincount(4 * first + second, minlength=16).view(4, 4) / 40_000
    p = query.step_probabilities(grid)
    exact = (p[:, None] * p * (1 / (1 - p[:, None]) + 1 / (1 - p))).triu(1)
    assert float(exact.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(pairs.double(), exact, atol=0.01, rtol=0)


@pytest.mark.parametrize("band", sorted(BANDS))
def test_several_queries_over_sigma_are_distinct_too(rng, band):
    query = BANDS[band](over="sigma", per_rollout=4).draw(2000, GRID, rng)
    assert bool((query.sigma.diff(dim=1) < 0).all())
    probabilities = BANDS[band](over="sigma").step_probabilities(GRID)
    assert float(probabilities.sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least two steps"):
        BANDS[band](over="sigma").draw(2, shifted_grid(steps=1), rng)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="over 'sigmas'"):
        BetaQuery(over="sigmas")
    with pytest.raises(ValueError, match="per_rollout 0"):
        StratifiedQuery(per_rollout=0)


def test_all_steps_is_the_dense_case(rng):
    assert torch.equal(low_noise(per_rollout=16).draw(3, GRID, rng).step, torch.arange(16).expand(3, -1))


def test_stratified_with_one_query_is_uniform(rng):
    step = StratifiedQuery().draw(32_000, GRID, rng).step[:, 0]
    assert float((torch.bincount(step, minlength=16) / 32_000 - 1 / 16).abs().max()) < 0.006


def test_stratified_puts_one_query_in_each_part(rng):
    step = StratifiedQuery(per_rollout=4).draw(200, GRID, rng).step
    assert torch.equal(step // 4, torch.arange(4).expand(200, -1))


def test_stratified_over_sigma_puts_one_query_in_each_part(rng):
    grid = Grid(torch.tensor([0.9, 0.7, 0.4, 0.1, 0.0]))
    sigma = StratifiedQuery(over="sigma", per_rollout=3).draw(200, grid, rng).sigma.double()
    part = 3 * (0.9 - sigma) / (0.9 - 0.1)
    assert 0.49 < float((part - (torch.arange(3) + 0.5)).abs().max()) < 0.5 + 1e-5


@pytest.mark.parametrize("states", [3, 4, 16])
def test_stratified_steps_have_the_probabilities_that_it_states(states, rng):
    query = StratifiedQuery(per_rollout=states)
    step = query.draw(64_000, GRID, rng).step
    assert bool((step.diff(dim=1) > 0).all())
    found = torch.bincount(step.flatten(), minlength=16) / step.numel()
    assert float((found - query.step_probabilities(GRID)).abs().max()) < 0.002


def test_errors_name_what_is_wrong(rng):
    with pytest.raises(ValueError, match="per_rollout >= 1"):
        BetaQuery(5, 2, per_rollout=0)
    with pytest.raises(ValueError, match="17 distinct query steps"):
        BetaQuery(5, 2, per_rollout=17).draw(1, GRID, rng)
    for a, b in ((0.0, 2.0), (5.0, -1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="needs finite a, b > 0"):
            BetaQuery(a, b)
    for sigmas in ([1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.1], [1.1, 0.5, 0.0]):
        with pytest.raises(ValueError, match="falling strictly from at most 1 to 0"):
            Grid(torch.tensor(sigmas))
    with pytest.raises(ValueError, match="found steps 0"):
        shifted_grid(steps=0)


def test_shifted_grid_values():
    torch.testing.assert_close(shifted_grid(steps=4).sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(shifted_grid(steps=2, shift=3.0).sigmas, torch.tensor([1.0, 0.75, 0.0]))
