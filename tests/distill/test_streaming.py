"""Streaming rollouts against fresh ones and closed forms."""

import copy
from dataclasses import dataclass

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from safetensors.torch import load, save
from torch import nn
from toy_streaming import GRID, Elementwise, Numbered, fresh_states, plain, streaming

import danceopd as d
from danceopd.distill.query import high_noise, low_noise, mid_noise, uniform
from danceopd.errors import NonFiniteValue
from danceopd.states import condition_from, condition_tensors


@pytest.mark.parametrize("band", [low_noise, mid_noise, high_noise, uniform, d.StratifiedQuery])
def test_without_learning_the_pool_is_the_fresh_rollouts_from_the_same_noise(rng, band):
    small, large = Numbered(), Numbered(size=6)
    method = streaming(
        d.Route("small", GaussianField(0, 1), small), d.Route("large", GaussianField(0, 1), large), query=band()
    )
    student = Elementwise()
    for _ in range(2 * method.plan.length + 3):
        method.step(student, batch_size=8, generator=rng)
        assert len(method.trajectories) == 32
        assert sorted(tuple(group.z.shape) for group in method.trajectories.groups) == [(16, 4), (16, 6)]
        for group in method.trajectories.groups:
            assert group.z.dtype == torch.float32
            assert torch.equal(group.z, fresh_states(method, student, group))
    assert small.next > 32  # many came after the first


def test_a_route_may_change_its_shape_from_draw_to_draw(rng):
    class Varying(Numbered):
        def __call__(self, count, generator):
            self.size = 3 + (self.size + 1) % 3
            return super().__call__(count, generator)

    method, student = streaming(d.Route("varying", GaussianField(0, 1), Varying())), Elementwise()
    for _ in range(20):
        assert method.step(student, batch_size=8, generator=rng).calls.train == 8
        assert len(method.trajectories) == 32
        assert len(method.trajectories.groups) > 1
        assert all(torch.equal(group.z, fresh_states(method, student, group)) for group in method.trajectories.groups)
        saved = load(save(method.state()))
        assert all(torch.equal(saved[name], tensor) for name, tensor in method.state().items())


def test_a_network_gives_the_same_to_rounding(rng):
    method, student = plain(), TinyNet()
    for _ in range(20):
        method.step(student, batch_size=8, generator=rng)
        (group,) = method.trajectories.groups
        torch.testing.assert_close(group.z, fresh_states(method, student, group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [32, 16])  # at 16 the minimum binds
def test_every_step_is_held_by_as_many_trajectories_and_trained_as_its_band_says(rng, pool):
    """Counts are exact and choices of different updates independent, so the error of a marginal is a coin's at most."""
    method, updates, each = plain(pool=pool), 600, pool // 8
    for _ in range(updates):
        result = method.step(Elementwise(), batch_size=8, generator=rng)
        assert result.calls.train == result.routes["one"].samples == 8
        (group,) = method.trajectories.groups
        assert torch.equal(group.step.bincount(), torch.full((8,), each))
    expected = method.plan.selection()[0]
    if pool == 32:  # N A / P = 2 queries per trajectory
        assert torch.allclose(expected, 2 * low_noise().step_probabilities(GRID))
    error = (expected * (1 - expected) / (each * updates)).sqrt()
    found = method.trajectories.trained / (each * updates)
    assert bool(((found - expected).abs() <= 4.5 * error + 1e-12).all())
    distance = method.diagnostics(Elementwise())["pool/band_distance"]
    assert distance == pytest.approx(method.plan.band_distance(), abs=0.02)
    assert (method.plan.band_distance() > 0.05) == (pool == 16)


def test_a_routes_changing_number_is_in_its_chances(rng):
    """Unstratified, two equal routes have 8 of 16 samples in the mean; the capped steps are then not always trained."""
    routes = [d.Route(name, GaussianField(0, 1), Numbered()) for name in "ab"]
    method, updates = streaming(*routes, stratified=False, pool=32, batch_size=16), 800
    for _ in range(updates):
        method.step(Elementwise(), batch_size=16, generator=rng)
    expected, at_its_mean = method.plan.selection()[0], streaming(*routes, pool=32, batch_size=16).plan.selection()[0]
    assert float(expected.sum()) * 32 / method.plan.length == pytest.approx(16)
    error = (expected * (1 - expected) / (4 * updates)).sqrt()
    found = method.trajectories.trained / (4 * updates)
    assert bool(((found - expected).abs() < 4.5 * error).all())
    assert bool(((found - at_its_mean).abs() > 4.5 * error).any())  # which would be wrong


def test_fewer_trajectories_than_steps_train_what_they_come_by(rng):
    """They keep their distances, so an update chooses among the steps where they stand, never the whole band."""
    counted = torch.zeros(8)
    for _ in range(300):  # pools that began elsewhere
        method = plain(pool=2, batch_size=1)
        for _ in range(16):
            method.step(Elementwise(), batch_size=1, generator=rng)
        counted += method.trajectories.trained
    expected, band = method.plan.selection()[0] * 2 / 8, low_noise().step_probabilities(GRID)
    assert float(expected.sum()) == pytest.approx(1)
    assert torch.allclose(counted.double() / counted.sum(), expected, atol=0.02)
    assert float((expected - band).abs().max()) > 0.05


def test_an_update_of_one_route_trains_its_steps_as_the_band_says(rng):
    """Per step a route's trajectories are trained in the updates that are its own, three of four here."""
    routes = [d.Route(name, GaussianField(0, 1), Numbered(), weight=w) for name, w in (("a", 3), ("b", 1))]
    method, updates = streaming(*routes, per="step", pool=64), 800
    for _ in range(updates):
        method.step(Elementwise(), batch_size=8, generator=rng)
    expected = (method.plan.selection() * method.plan.members[:, None]).sum(0)
    assert float(expected.sum()) / method.plan.length == pytest.approx(8)
    found = method.trajectories.trained / updates * method.plan.length
    assert torch.allclose(found.double(), expected, rtol=0.1, atol=0.05)


def test_capped_steps_are_always_trained_and_the_others_make_up_for_them():
    method = plain(pool=16)
    chance, band = method.plan.selection()[0], low_noise().step_probabilities(GRID)
    assert bool((chance == 1).any())
    assert float(chance.sum() * 16 / method.plan.length) == pytest.approx(8)
    free = chance < 1
    ratio = chance[free] / band[free]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    assert float(ratio[0]) > 4  # N A / P


def test_trajectories_past_the_band_end_early(rng):
    grid = d.shifted_grid(steps=16)
    method = plain(grid=grid, query=high_noise(), pool=56, batch_size=7)
    assert method.plan.length == 14  # the last two steps hold 0.0002 of Beta(2, 5)
    for _ in range(20):
        method.step(Elementwise(), batch_size=7, generator=rng)
        assert int(max(group.step.max() for group in method.trajectories.groups)) <= 13


class LinearStudent(nn.Module):
    """v = a(k) z + b(k), one pair per grid step: its states are Gaussian, and so is every gradient in closed form."""

    def __init__(self) -> None:
        super().__init__()
        steps = torch.arange(GRID.steps)
        self.a, self.b = nn.Parameter(0.4 + 0.1 * steps.sin()), nn.Parameter(0.3 * steps.cos())

    def forward(self, z, sigma, condition=None):
        k = (GRID.sigmas[None] - sigma[:, None]).abs().argmin(1)
        return self.a[k][:, None] * z + self.b[k][:, None]


def closed_form_gradient(student, mean, std, probabilities):
    """d/da_k, d/db_k of sum_k p_k E((a_k - a*_k) z_k + b_k - b*_k)^2 over the student's own Gaussian states."""
    sigma = GRID.sigmas.double()
    variance = (1 - sigma[:-1]) ** 2 * std**2 + sigma[:-1] ** 2
    slope = (sigma[:-1] - (1 - sigma[:-1]) * std**2) / variance
    off_a = student.a.detach().double() - slope
    off_b = student.b.detach().double() + mean + slope * (1 - sigma[:-1]) * mean
    at, spread, result = 0.0, 1.0, []
    for k, p in enumerate(probabilities):
        result.append(2 * p * torch.stack([off_a[k] * (spread + at**2) + off_b[k] * at, off_a[k] * at + off_b[k]]))
        factor = 1 + (sigma[k + 1] - sigma[k]) * student.a[k].detach()
        at, spread = factor * at + (sigma[k + 1] - sigma[k]) * student.b[k].detach(), factor**2 * spread
    return torch.stack(result, 1).flatten()


def test_the_streaming_gradient_is_the_fresh_one_in_expectation():
    """Pools are independent; the updates of one are not, so an error bar is taken over pools.

    Where the minimum binds, at a pool of 12, the band is that of the selection.
    """
    student, field, band = LinearStudent(), GaussianField(0.7, 0.5), d.BetaQuery(2.5, 1.5)

    def z_scores(make, updates, probabilities):
        expected = closed_form_gradient(student, 0.7, 0.5, probabilities)
        means = []
        for seed in range(120):
            method, generator = make(), torch.Generator().manual_seed(seed)
            total = sum(method.step(student, batch_size=8, generator=generator).loss for _ in range(updates))
            gradients = torch.autograd.grad(total / updates, [student.a, student.b])
            means.append(torch.cat(gradients).double())
        stacked = torch.stack(means)
        return (stacked.mean(0) - expected) / (stacked.std(0) / len(stacked) ** 0.5)

    routes = [d.Route("one", field, Numbered(size=8))]
    asked = band.step_probabilities(GRID)
    (kept,) = streaming(*routes, query=band, pool=12).plan.selection()
    assert float((kept / kept.sum() - asked).abs().sum() / 2) > 0.02
    fresh = z_scores(lambda: d.DanceOPD(routes=routes, grid=GRID, query=band), 3, asked)
    streamed = z_scores(lambda: streaming(*routes, query=band), 10, asked)  # more than a trajectory's 8 steps
    small = z_scores(lambda: streaming(*routes, query=band, pool=12), 10, kept / kept.sum())
    assert float(fresh.abs().max()) < 4
    assert float(streamed.abs().max()) < 4
    assert float(small.abs().max()) < 4


def test_a_linear_student_learns_the_field(rng):
    student, teacher = LinearStudent(), GaussianField(0.7, 0.5)
    method = plain(teacher, query=uniform())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        losses.append(method.step(student, batch_size=8, generator=rng).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(torch.stack(losses[-20:]).detach().mean()) < 1e-3 * float(losses[0].detach())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_field_has_loss_exactly_zero(rng, precision):
    student = TinyNet(width=64)
    method = plain(d.ModelField(copy.deepcopy(student)))
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            result = method.step(student, batch_size=8, generator=rng)
        assert float(result.loss.detach()) == 0.0
    assert all(group.z.dtype == torch.float32 for group in method.trajectories.groups)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_trained_states_alone(rng, precision):
    student, teacher = TinyNet(), TinyNet(seed=1)
    method, kept = plain(d.ModelField(teacher)), []
    student.register_forward_hook(lambda m, args, out: kept.append(args) if torch.is_grad_enabled() else None)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for _ in range(3):
            loss = method.step(student, batch_size=8, generator=rng).loss
        got = torch.autograd.grad(loss, list(student.parameters()))
        z, sigma, condition = kept[-1]
        target = teacher(z, sigma, condition).detach()
        expected = ((student(z, sigma, condition).float() - target.float()) ** 2).mean()
    assert not z.requires_grad
    for one, two in zip(got, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(one, two)
        assert float(one.abs().sum()) > 0


def test_staleness_is_the_distance_to_a_fresh_rollout_under_the_present_weights(rng):
    method, student = plain(staleness_updates=3), Elementwise()
    found = []
    for update in range(12):
        method.step(student, batch_size=8, generator=rng)
        found.append(method.diagnostics(student).get("pool/staleness"))
        assert (found[-1] is None) == bool((update + 1) % 3)
    assert found[2] == found[11] == 0.0
    with torch.no_grad():
        student.a += 0.2
    (group,) = method.trajectories.groups
    past = group.step > 0
    fresh = fresh_states(method, student, group)[past]
    expected = ((group.z[past] - fresh).norm(dim=1) / fresh.norm(dim=1)).mean()
    assert 0.01 < method.diagnostics(student)["pool/staleness"] == pytest.approx(float(expected))
    figures = method.diagnostics(student)
    assert figures["pool/age"] == 3.5  # after more updates than steps, a trajectory is as old as its step
    trained = torch.tensor([figures[f"pool/trained_at_step/{j:02d}"] for j in range(8)]).double()
    assert trained.sum() == 12 * 8
    distance = (trained / 96 - low_noise().step_probabilities(GRID)).abs().sum() / 2
    assert figures["pool/band_distance"] == pytest.approx(float(distance))


def test_a_pool_that_is_all_noise_has_no_staleness(rng):
    method = plain(query=uniform(), pool=1, batch_size=1, staleness_updates=1)
    found = {}
    for _ in range(8):
        method.step(Elementwise(), batch_size=1, generator=rng)
        (group,) = method.trajectories.groups
        found[int(group.step)] = method.diagnostics(Elementwise()).get("pool/staleness")
    assert found == {0: None} | dict.fromkeys(range(1, 8), 0.0)


def test_a_saved_condition_may_be_of_a_kind_of_a_kind():
    @dataclass(frozen=True, kw_only=True)
    class Marked(d.Condition):
        mark: torch.Tensor

    @dataclass(frozen=True, kw_only=True)
    class Own(Marked): ...

    own = Own(prompt_embeds=torch.ones(1, 2, 3), mark=torch.ones(1))
    again = condition_from(condition_tensors(own))
    assert isinstance(again, Own)
    assert torch.equal(again.mark, own.mark)


def test_a_walking_trajectory_that_breaks_ends_the_run_before_it_is_saved(rng):
    class Breaking(Elementwise):
        def forward(self, z, sigma, condition=None):
            walking = torch.tensor(not torch.is_grad_enabled())
            return super().forward(z, sigma) + torch.where(walking & (sigma < 0.8), torch.nan, 0.0)[:, None]

    method, student = plain(), Elementwise()
    method.step(student, batch_size=8, generator=rng)
    before = method.state()
    with pytest.raises(NonFiniteValue, match=r"^non-finite velocity on .* route one .* at step [4-6] of 8$"):
        method.step(Breaking(), batch_size=8, generator=rng)
    after = method.state()
    assert all(torch.equal(after[name], before[name]) for name in before if "trained" not in name)
