import numpy as np
import pytest
import torch
from closed_forms import GaussianField

from danceopd.comparison.statistics import paired_ratio
from danceopd.distill.schedule import shifted_grid
from danceopd.evaluation.guidance import guidance_sums, student_guidance, unexplained
from danceopd.evaluation.pictures import guided
from danceopd.fields.guidance import GuidedField, linear_guidance
from danceopd.states import Condition


def velocities(count, generator):
    empty, direction = torch.randn(2, count, 3, 4, generator=generator, dtype=torch.float64)
    return empty, empty + direction, direction


def effective_guidance(sums):
    """g as comparisons report it, of one seed and task."""
    return paired_ratio(sums.along[None, None], sums.square[None, None])


def test_a_guided_field_gives_exactly_its_scale(rng):
    empty, conditional, direction = velocities(40, rng)
    for scale in (0.0, 1.0, 3.5, -2.0):
        sums = guidance_sums(empty + scale * direction, empty, conditional)
        estimate = effective_guidance(sums)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((scale, scale, scale), abs=1e-12)
        assert unexplained(sums) == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(effective_guidance(guidance_sums(empty, empty, empty)).value)


def test_noise_leaves_the_interval_with_its_nominal_cover(rng):
    covered, shares = 0, []
    for _ in range(200):
        empty, conditional, direction = velocities(60, rng)
        noise = torch.randn(empty.shape, generator=rng, dtype=torch.float64)
        sums = guidance_sums(empty + 3.5 * direction + 2.0 * noise, empty, conditional)
        estimate = effective_guidance(sums)
        covered += estimate.low <= 3.5 <= estimate.high
        shares.append(unexplained(sums))
    assert 0.89 <= covered / 200 <= 0.99
    assert np.mean(shares) == pytest.approx(4 / (3.5**2 + 4), rel=0.05)  # noise variance over the whole


class Prompts:
    """A family of one number: the prompt's length, and 0 where it is empty."""

    def encode(self, prompts, sources):
        return Condition(prompt_embeds=torch.tensor([[float(len(prompt))] for prompt in prompts]))

    def empty(self, condition):
        return Condition(prompt_embeds=torch.zeros_like(condition.prompt_embeds))

    def guide(self, conditional, empty, guidance_scale):
        return linear_guidance(conditional, empty, guidance_scale)


class Base:
    """v_empty is a Gaussian's exact velocity; a prompt adds a direction that depends on the state."""

    calls_per_velocity = 1

    def __init__(self, scale, drift=0.0):
        self.scale, self.drift, self.plain = scale, drift, GaussianField(0.5, 0.5)

    def __call__(self, z, sigma, condition):
        direction = 0.1 * torch.cos(z)
        asked = condition.prompt_embeds > 0
        empty = self.plain.velocity(z, sigma) + self.drift * direction
        return torch.where(asked, self.plain.velocity(z, sigma) + self.scale * direction, empty)

    velocity = __call__


def test_external_guidance_is_that_of_a_guided_field(rng):
    family, base = Prompts(), Base(1.0)
    at = torch.randn(3, 4, generator=rng), torch.tensor([0.9, 0.5, 0.1]), family.encode(["a", "bb", "c"], None)
    found = guided(base.velocity, family, 3.0)(*at)
    assert torch.equal(found, GuidedField(base, empty=family.empty, guidance_scale=3.0).velocity(*at))
    torch.testing.assert_close(found, Base(3.0)(*at))


@pytest.mark.parametrize(("drift", "acts_as"), [(0.0, {0: 0.0, 1: 3.0, 2: 6.0}), (0.5, {0: 0.5, 1: 3.0, 2: 5.5})])
def test_the_product_law_holds_while_the_empty_output_stays(drift, acts_as):
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    sums = student_guidance(
        Base(3.0, drift),
        Base(1.0),
        Prompts(),
        prompts=["a", "bb", "ccc", "d", "e"],
        noise=noise,
        grid=shifted_grid(steps=4, shift=1.0),
        scales=[1.0, 2.0],
        batch_size=2,
    )
    assert sums[0.0].along.shape == (5, 4)
    for scale, expected in acts_as.items():
        found = effective_guidance(sums[float(scale)].summed(1))
        assert found.value == pytest.approx(expected, abs=1e-4)
        assert found.high - found.low < 1e-4
