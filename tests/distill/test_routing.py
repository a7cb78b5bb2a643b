import math

import pytest
import torch
from closed_forms import GaussianField

from danceopd.distill.routing import Route, draw_routes, require_routes
from danceopd.fields.guidance import GuidedField


def test_frequencies_follow_the_shares(rng):
    routes = draw_routes(torch.tensor([0.125, 0.375, 0.5]), 40_000, rng)
    torch.testing.assert_close(torch.bincount(routes) / 40_000, torch.tensor([0.125, 0.375, 0.5]), atol=0.01, rtol=0)


def test_per_step_gives_a_whole_update_to_one_route(rng):
    shares = torch.tensor([0.25, 0.75])
    updates = torch.stack([draw_routes(shares, 8, rng, per="step") for _ in range(4000)])
    assert bool((updates == updates[:, :1]).all())
    assert abs(float(updates[:, 0].double().mean()) - 0.75) < 0.03


def test_stratified_counts_are_exact_up_to_rounding_with_the_right_marginals(rng):
    shares = torch.tensor([1 / 3, 2 / 3])
    draws = torch.stack([draw_routes(shares, 10, rng, stratified=True) for _ in range(6000)])
    assert set((draws == 1).sum(1).tolist()) == {6, 7}
    torch.testing.assert_close(
        (draws == 1).double().mean(0), torch.full((10,), 2 / 3, dtype=torch.float64), atol=0.03, rtol=0
    )


def test_a_generator_state_restores_the_routes(rng):
    shares = torch.full((3,), 1 / 3)
    draw_routes(shares, 5, rng)
    state = rng.get_state()
    first = draw_routes(shares, 100, rng)
    rng.set_state(state)
    assert torch.equal(first, draw_routes(shares, 100, rng))


def test_guided_routes_drop_prompts_by_default():
    field = GaussianField(0, 1)
    guided = GuidedField(field, empty=lambda c: c, guidance_scale=2.0)
    draw = lambda n, g: None  # noqa: E731
    assert Route("a", field, draw).dropout == 0.0
    assert Route("b", guided, draw).dropout == 0.1
    assert Route("c", guided, draw, prompt_dropout=0.0).dropout == 0.0


def test_bad_routes_are_refused():
    field = GaussianField(0, 1)
    for weight in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite weight > 0"):
            Route("a", field, lambda n, g: None, weight=weight)
    for dropout in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"needs prompt_dropout in \[0, 1\], found {dropout}"):
            Route("a", field, lambda n, g: None, prompt_dropout=dropout, empty=lambda c: c)
    with pytest.raises(ValueError, match="no empty condition"):
        Route("a", field, lambda n, g: None, prompt_dropout=0.1)
    route = Route("a", field, lambda n, g: None)
    with pytest.raises(ValueError, match="'sample' or per 'step'"):
        require_routes([route], per="epoch")
    with pytest.raises(ValueError, match="at least one route"):
        require_routes([], per="sample")
    with pytest.raises(ValueError, match="different names, found a, a"):
        require_routes([route, route], per="sample")
