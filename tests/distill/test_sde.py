from itertools import pairwise

import pytest
import torch
from closed_forms import GaussianField

import danceopd as d
from danceopd.distill.sde import divergence_weights, sde_step

FIELD = GaussianField(mean=0.6, std=0.5)


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


def linear(sigma):
    """The Gaussian field's v = slope z + offset."""
    variance = (1 - sigma) ** 2 * FIELD.std**2 + sigma**2
    slope = (sigma - (1 - sigma) * FIELD.std**2) / variance
    return slope, -FIELD.mean - slope * (1 - sigma) * FIELD.mean


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
def test_one_step_is_euler_plus_langevin_with_the_exact_score(sigma, rng):
    """mean = z + v dt - (s^2 / 2) grad log p(z) dt, std = s sqrt(-dt)."""
    z = torch.randn(7, 1, generator=rng, dtype=torch.float64)
    here, there = at(sigma).expand(7), at(sigma - 0.05).expand(7)
    move = sde_step(here, there, eta=0.7)
    v = FIELD.velocity(z, here)
    variance = (1 - sigma) ** 2 * FIELD.std**2 + sigma**2
    score = -(z - (1 - sigma) * FIELD.mean) / variance
    squared = 0.49 * sigma / (1 - sigma)
    expected = z + v * -0.05 - squared / 2 * score * -0.05
    torch.testing.assert_close(move.mean(z, v), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(move.std, at((squared * 0.05) ** 0.5).expand(7))


def final_moments(steps, eta, start=0.9, end=0.2):
    """Mean and variance at ``end`` of the SDE started on the exact marginal at ``start``, carried in closed form.

    eta 0 is the deterministic rollout.
    """
    sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    mean, variance = (1 - start) * FIELD.mean, (1 - start) ** 2 * FIELD.std**2 + start**2
    for here, there in pairwise(sigmas):
        keep, gain, std = 1.0, float(there - here), 0.0
        if eta:
            move = sde_step(here[None], there[None], eta)
            keep, gain, std = (float(x) for x in (move.state_factor, move.velocity_factor, move.std))
        slope, offset = linear(float(here))
        mean = (keep + gain * slope) * mean + gain * offset
        variance = (keep + gain * slope) ** 2 * variance + std**2
    return mean, variance


def test_marginals_converge_to_the_flows_as_steps_grow():
    exact = 0.8 * FIELD.mean, 0.8**2 * FIELD.std**2 + 0.2**2
    errors = [abs(final_moments(n, 1.5)[1] - exact[1]) for n in (8, 32, 128, 512)]
    assert errors[0] > 0.03  # at few steps they are clearly not the flow's
    for coarse, fine in pairwise(errors[1:]):
        assert 3.7 < coarse / fine < 4.4  # first order: four times the steps, a fourth of the error
    assert final_moments(8, 1.5)[0] == pytest.approx(exact[0])  # the mean is carried exactly


def test_sixteen_steps_keep_neither_the_flows_marginals_nor_the_deterministic_rollouts():
    """From pure noise at Flow-OPD's eta, where the first step takes s at the next sigma."""
    stochastic, deterministic = (final_moments(16, eta, start=1.0, end=0.0)[1] for eta in (0.7, 0.0))
    assert abs(stochastic - FIELD.std**2) > 0.03 * FIELD.std**2
    assert abs(stochastic - deterministic) > 0.1 * FIELD.std**2


def test_small_eta_is_the_deterministic_step(rng):
    z, v = torch.randn(3, 2, generator=rng), torch.randn(3, 2, generator=rng)
    here, there = torch.full((3,), 0.6), torch.full((3,), 0.5)
    move = sde_step(here, there, 1e-4)
    torch.testing.assert_close(move.mean(z, v), z - 0.1 * v, atol=1e-6, rtol=0)
    assert float(move.std.max()) < 1e-3


def test_the_kl_weight_is_the_divergence_of_two_steps(rng):
    """Gaussian KL of equal variances, from torch's own distributions, against weight * (v - v')^2."""
    grid = d.shifted_grid(steps=6, shift=2.0)
    weights = divergence_weights(grid, 0.7)
    z, one, other = (torch.randn(1, 1, generator=rng, dtype=torch.float64) for _ in range(3))
    for j in range(6):
        move = sde_step(grid.sigmas[j : j + 1].double(), grid.sigmas[j + 1 : j + 2].double(), 0.7)
        normal = [torch.distributions.Normal(move.mean(z, v), move.std) for v in (one, other)]
        exact = torch.distributions.kl_divergence(*normal)
        torch.testing.assert_close(weights[j] * (one - other) ** 2, exact, rtol=1e-4, atol=0)


def test_at_pure_noise_s_is_taken_at_the_next_sigma():
    move = sde_step(at(1.0), at(0.8), 0.7)
    assert float(move.std) == pytest.approx((0.49 * 0.8 / 0.2 * 0.2) ** 0.5)
    with pytest.raises(ValueError, match="at least two steps"):
        sde_step(at(1.0), at(0.0), 0.7)
    with pytest.raises(ValueError, match="eta > 0"):
        sde_step(at(0.5), at(0.4), 0.0)
