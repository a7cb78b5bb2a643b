"""The objective's weights by step: closed forms."""

import pytest
import torch

import danceopd as d
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import low_noise

GRID = d.shifted_grid(steps=8, shift=3.0)


@pytest.mark.parametrize("weighting", ["timestep", "kl"])
def test_objective_weights_have_mean_one_over_the_band(weighting):
    weights = VelocityMSE(weighting).step_weights(GRID, low_noise())
    assert float((weights.double() * low_noise().step_probabilities(GRID)).sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("weighting", "weights"), [("timestep", [0.0, 0.25, 0.5, 0.75]), ("kl", None)])
def test_losses_carry_the_weight_of_each_samples_own_step(weighting, weights):
    """On sigmas 1, 3/4, 1/2, 1/4 with eta = 0.7: |dt| = 1/4, s^2 = 0.49 sigma / (1 - sigma), and 3 * 0.49 at 1 too."""
    grid, band = d.shifted_grid(steps=4, shift=1.0), d.BetaQuery(1, 1)
    squared = torch.tensor([3.0, 3.0, 1.0, 1 / 3]) * 0.49
    raw = torch.tensor(weights) if weights else 0.25 * torch.tensor([1.0, 1.245, 1.245, 1.245]) ** 2 / (2 * squared)
    step = torch.tensor([[3], [0], [1], [2]])
    difference = torch.tensor([1.0, 2.0, 3.0, 0.5])
    field = torch.randn(4, 5)
    losses = VelocityMSE(weighting).losses(
        field + difference[:, None], field, d.Query(step, grid.sigmas[step]), grid, band
    )
    torch.testing.assert_close(losses, (raw / raw.mean())[step[:, 0]] * difference**2, rtol=1e-4, atol=1e-5)


def test_kl_weight_is_the_gaussian_kl_of_one_sde_step():
    """KL between N(mu_S, std^2) and N(mu_T, std^2) of the two fields' SDE steps, from the definition."""
    weights = VelocityMSE("kl").step_weights(GRID, low_noise()).double()
    expected = []
    for k in range(GRID.steps):
        sigma, dt = float(GRID.sigmas[k]), float(GRID.sigmas[k + 1] - GRID.sigmas[k])
        inside = sigma if sigma < 1 else float(GRID.sigmas[1])
        s = 0.7 * (inside / (1 - inside)) ** 0.5
        mean = lambda v, s=s, sigma=sigma, dt=dt: v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt  # noqa: E731
        expected.append((mean(1.0) - mean(0.0)) ** 2 / (2 * s**2 * abs(dt)))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weights / weights[3], expected / expected[3], rtol=1e-4, atol=0)
