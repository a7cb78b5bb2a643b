"""DiffusionOPD by hand: the ODE's true steps and the SDE's divergences."""

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from toy_routes import GRID, inputs

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD


def test_diffusion_opd_weights_the_true_steps_of_the_grid(rng):
    """By hand: an Euler rollout with the live student, every state's velocity error, weighted by dsigma^2 / 2."""
    student, field = TinyNet(), GaussianField(0.7, 0.5)
    result = DiffusionOPD(routes=[d.Route("one", field, inputs)], grid=GRID).step(student, batch_size=5, generator=rng)
    generator = torch.Generator().manual_seed(0)
    DiffusionOPD(routes=[d.Route("one", field, inputs)], grid=GRID).draw_routes(5, generator)
    z, expected = torch.randn(5, 4, generator=generator), 0.0
    for j in range(4):
        here, size = GRID.sigmas[j].expand(5), float(GRID.sigmas[j + 1] - GRID.sigmas[j])
        v = student(z, here, torch.zeros(5, 2)).detach()
        expected += size**2 / 2 * float(((v - field.velocity(z, here)) ** 2).mean())
        z = z + size * v
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert (result.calls.rollout, result.calls.field, result.calls.train) == (0, 20, 20)


def test_diffusion_opd_weights_the_stochastic_steps_by_their_divergence(rng):
    """By hand: the student's SDE rollout, and at every state the KL between the two Gaussians of that step."""
    student, field = TinyNet(), GaussianField(0.7, 0.5)
    method = DiffusionOPD(routes=[d.Route("one", field, inputs)], grid=GRID, form="sde", eta=0.6)
    result = method.step(student, batch_size=5, generator=rng)
    generator = torch.Generator().manual_seed(0)
    method.draw_routes(5, generator)
    z, expected = torch.randn(5, 4, generator=generator), 0.0
    for j in range(4):
        sigma, after = float(GRID.sigmas[j]), float(GRID.sigmas[j + 1])
        inside = after if sigma == 1 else sigma
        s, dt = 0.6 * (inside / (1 - inside)) ** 0.5, after - sigma
        v, other = (
            student(z, GRID.sigmas[j].expand(5), torch.zeros(5, 2)).detach(),
            field.velocity(z, GRID.sigmas[j].expand(5)),
        )
        mean, aim = (
            z * (1 + s**2 / (2 * sigma) * dt) + u * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt for u in (v, other)
        )
        expected += float(((mean - aim) ** 2).mean()) / (2 * s**2 * -dt)
        z = mean + s * (-dt) ** 0.5 * torch.randn(5, 4, generator=generator)
    assert result.loss.item() == pytest.approx(expected, rel=1e-4)


def test_diffusion_opd_holds_every_route_in_every_update(rng):
    routes = [d.Route("one", GaussianField(0.5, 0.5), inputs), d.Route("two", GaussianField(-0.5, 0.5), inputs)]
    for form in ("ode", "sde"):
        result = DiffusionOPD(routes=routes, grid=GRID, form=form).step(TinyNet(), batch_size=8, generator=rng)
        assert {name: route.samples for name, route in result.routes.items()} == {"one": 4, "two": 4}


def test_sde_rollouts_are_noisy_and_seeded():
    route = d.Route("one", GaussianField(0.5, 0.5), inputs)
    method = DiffusionOPD(routes=[route], grid=GRID, form="sde")
    losses = [
        method.step(TinyNet(), batch_size=8, generator=torch.Generator().manual_seed(seed)).loss.item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
