from itertools import pairwise

import pytest
import torch
from closed_forms import TinyNet

from danceopd.distill.query import BetaQuery
from danceopd.distill.rollout import rollout
from danceopd.distill.schedule import shifted_grid
from danceopd.states import Query

GRID = shifted_grid(steps=16, shift=3.0)


def at(steps: torch.Tensor) -> Query:
    return Query(steps, GRID.sigmas[steps])


def full_states(net, noise, condition):
    """Every grid state of a full rollout, by an Euler loop of the test's own: [B, N, ...]."""
    states, sigmas = [noise], GRID.sigmas.tolist()
    with torch.no_grad():
        for here, there in pairwise(sigmas[:-1]):
            velocity = net(states[-1], torch.full((len(noise),), here), condition)
            states.append(states[-1] + (torch.tensor(there) - torch.tensor(here)) * velocity)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("k", [0, 1, 7, 15])
def test_early_stop_equals_the_full_rollout_bit_for_bit(rng, k):
    net, noise, condition = TinyNet(), torch.randn(8, 4, generator=rng), torch.randn(8, 2, generator=rng)
    early = rollout(net, noise, condition, GRID, at(torch.full((8, 1), k)))
    assert torch.equal(early.states[:, 0], full_states(net, noise, condition)[:, k])
    assert early.calls == 8 * k


@pytest.mark.parametrize("options", [{}, {"over": "sigma", "per_rollout": 2}])
def test_compaction_changes_nothing_but_rounding(rng, options):
    net, noise, condition = TinyNet(), torch.randn(32, 4, generator=rng), torch.randn(32, 2, generator=rng)
    query = BetaQuery(5, 2, **options).draw(32, GRID, rng)
    assert len(query.step.unique()) > 4
    result = rollout(net, noise, condition, GRID, query)
    full = full_states(net, noise, condition)
    for k, (step, sigma) in enumerate(zip(query.step.T, query.sigma.T, strict=True)):
        state, here = full[torch.arange(32), step], GRID.sigmas[step]
        expected = state + (sigma - here)[:, None] * net(state, here, condition)
        torch.testing.assert_close(result.states[:, k], expected, rtol=1e-5, atol=1e-5)
    assert result.calls == int((query.step + (query.sigma < GRID.sigmas[query.step])).amax(1).sum())


def test_nothing_is_computed_after_the_query(rng):
    seen = []

    def network(z, sigma, condition):
        seen.append((float(sigma[0]), len(z)))
        return z

    rollout(network, torch.randn(3, 2, generator=rng), None, GRID, at(torch.tensor([[0], [2], [3]])))
    assert seen == [(float(GRID.sigmas[0]), 2), (float(GRID.sigmas[1]), 2), (float(GRID.sigmas[2]), 1)]


def test_a_sigma_between_grid_points_is_a_shortened_step(rng):
    net, noise = TinyNet(), torch.randn(5, 4, generator=rng)
    sigma = (GRID.sigmas[6] + GRID.sigmas[7]) / 2
    result = rollout(net, noise, None, GRID, Query(torch.full((5, 1), 6), sigma.expand(5, 1)))
    state = full_states(net, noise, None)[:, 6]
    with torch.no_grad():
        expected = state + (sigma - GRID.sigmas[6]) * net(state, GRID.sigmas[6].expand(5), None)
    torch.testing.assert_close(result.states[:, 0], expected, rtol=0, atol=0)
    assert result.calls == 5 * 7


def test_an_earlier_query_between_grid_points_does_not_disturb_the_rollout(rng):
    net, noise = TinyNet(), torch.randn(5, 4, generator=rng)
    between = (GRID.sigmas[3] + GRID.sigmas[4]) / 2
    query = Query(torch.tensor([[3, 9]] * 5), torch.stack([between, GRID.sigmas[9]]).expand(5, 2))
    result = rollout(net, noise, None, GRID, query)
    torch.testing.assert_close(result.states[:, 1], full_states(net, noise, None)[:, 9], rtol=0, atol=0)
    assert result.calls == 5 * 9


def test_no_gradient_flows_through_the_rollout(rng):
    net, noise = TinyNet(), torch.randn(4, 4, generator=rng, requires_grad=True)
    result = rollout(net, noise, None, GRID, at(torch.full((4, 1), 5)))
    assert not result.states.requires_grad


def test_state_is_accumulated_in_float32(rng):
    result = rollout(
        lambda z, s, c: torch.ones_like(z, dtype=torch.bfloat16),
        torch.randn(2, 3).bfloat16(),
        None,
        GRID,
        at(torch.full((2, 1), 4)),
    )
    assert result.states.dtype == torch.float32
