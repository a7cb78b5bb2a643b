"""Several steps of a field in one, against the steps themselves and the exact flow."""

import math
from itertools import pairwise

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from torch import nn

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.off_policy import off_policy
from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.solver import integrate

GRID = d.shifted_grid(steps=4, shift=3.0)


def finer(grid, substeps):
    """The grid with every step cut into even parts."""
    parts = torch.arange(substeps, dtype=torch.float64) / substeps
    cut = [here + (there - here) * parts for here, there in pairwise(grid.sigmas.double())]
    return d.Grid(torch.cat([*cut, torch.zeros(1, dtype=torch.float64)]).float())


def test_few_steps_along_the_mean_velocity_are_many_along_the_velocity(rng):
    field = GaussianField(0.7, 0.5)
    noise = torch.randn(64, 3, generator=rng)
    mean = MeanVelocityField(field, grid=GRID, substeps=4)
    few, many = integrate(mean.velocity, noise, None, GRID), integrate(field.velocity, noise, None, finer(GRID, 4))
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)
    assert float((few - integrate(field.velocity, noise, None, GRID)).abs().max()) > 0.05  # four plain steps do not


def test_samples_of_one_batch_may_be_at_different_steps(rng):
    mean = MeanVelocityField(TinyField(), grid=lambda shape: GRID, substeps=3)
    z, step, condition = torch.randn(8, 4, generator=rng), torch.arange(8) % 4, torch.randn(8, 2, generator=rng)
    together = mean.velocity(z, GRID.sigmas[step], condition)
    alone = [mean.velocity(z[i : i + 1], GRID.sigmas[step[i : i + 1]], condition[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone))


class TinyField(d.ModelField):
    def __init__(self):
        super().__init__(TinyNet())


def test_one_substep_is_the_field_itself_to_the_last_bit(rng):
    field, z, sigma = TinyField(), torch.randn(4, 4, generator=rng), GRID.sigmas[:4]
    condition = torch.randn(4, 2, generator=rng)
    one = MeanVelocityField(field, grid=GRID, substeps=1)
    assert torch.equal(one.velocity(z, sigma, condition), field.velocity(z, sigma, condition))


def test_more_substeps_approach_the_exact_flow_at_first_order():
    field, noise = GaussianField(0.7, 0.5), torch.linspace(-2, 2, 41).view(-1, 1)
    means = [MeanVelocityField(field, grid=GRID, substeps=substeps) for substeps in (16, 32, 64)]
    errors = [float((integrate(m.velocity, noise, None, GRID) - field.flow(noise, 0.0)).abs().max()) for m in means]
    assert all(0.9 < math.log2(a / b) < 1.1 for a, b in pairwise(errors)), errors


class PerStep(nn.Module):
    """v = a_j z + b_j on the grid's step j: what an exact linear flow's mean velocities are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, z, sigma, condition=None):
        j = (GRID.sigmas[None] - sigma[:, None]).abs().argmin(1)
        return self.a[j][:, None] * z + self.b[j][:, None]


UNIFORM = {"query": d.BetaQuery(1, 1), "stratified": True}


@pytest.mark.parametrize(
    "build",
    [
        lambda **o: d.DanceOPD(**UNIFORM, **o),
        lambda **o: d.StreamingDanceOPD(pool=128, batch_size=64, **UNIFORM, **o),
        lambda **o: off_policy(states="teacher", **UNIFORM, **o),
        lambda **o: DiffusionOPD(**o),
    ],
    ids=["fresh", "streaming", "off_policy", "diffusion_opd"],
)
def test_a_student_learns_to_take_four_steps_where_its_field_takes_sixteen(rng, build):
    def inputs(count, generator):
        return d.Samples(condition=torch.zeros(count, 2), shape=(2,))

    field, student = GaussianField(0.7, 0.5), PerStep()
    route = d.Route("one", MeanVelocityField(field, grid=GRID, substeps=4), inputs)
    method = build(routes=[route], grid=GRID)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(400):
        result = method.step(student, batch_size=64, generator=rng)
        assert result.calls.field == 4 * result.calls.train
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    noise = torch.randn(256, 2, generator=rng)
    taught = integrate(field.velocity, noise, None, finer(GRID, 4))
    torch.testing.assert_close(integrate(student, noise, None, GRID).detach(), taught, rtol=0, atol=1e-3)


def test_a_guided_field_taken_in_several_steps_is_guided_still():
    guided = d.GuidedField(TinyField(), empty=torch.zeros_like, guidance_scale=2.0)
    mean = MeanVelocityField(guided, grid=GRID, substeps=4)
    assert mean.calls_per_velocity == 8
    route = d.Route("guided", mean, lambda count, generator: None)
    assert (route.guidance, route.dropout, route.empty) == (guided, 0.1, torch.zeros_like)


@pytest.mark.parametrize("build", [FlowOPD, lambda **o: DiffusionOPD(form="sde", **o)])
def test_a_stochastic_step_takes_no_mean(build):
    mean = MeanVelocityField(GaussianField(0, 1), grid=GRID, substeps=2)
    with pytest.raises(ValueError, match=r"needs the velocity at its state, and route 'one' is taught a mean"):
        build(routes=[d.Route("one", mean, lambda count, generator: None)], grid=GRID)


def test_what_is_no_step_of_the_grid_is_refused():
    mean = MeanVelocityField(GaussianField(0, 1), grid=GRID, substeps=2)
    with pytest.raises(ValueError, match=r"one of the sigmas \[1.0, .*; found \[0.625\]"):
        mean.velocity(torch.zeros(1, 1), torch.tensor([0.625]), None)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        MeanVelocityField(GaussianField(0, 1), grid=GRID, substeps=0)
