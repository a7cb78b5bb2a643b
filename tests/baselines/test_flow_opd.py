"""Flow-OPD: its gradients against closed forms on a linear-Gaussian chain, groups, advantages, the clip, the anchor."""

import copy

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from torch import nn
from toy_routes import GRID, inputs, untargeted

import danceopd as d
from danceopd.baselines.flow_opd import FlowOPD, clipped_surrogate, group_advantage
from danceopd.distill.sde import sde_step


class Chain(nn.Module):
    """v = a_j z + b_j on the grid's step j: a chain whose states stay Gaussian."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]))
        self.b = nn.Parameter(torch.tensor([0.1, 0.4, -0.3, 0.2]))

    def forward(self, z, sigma, condition=None):
        j = (GRID.sigmas[None] - sigma[:, None]).abs().argmin(1)
        return self.a[j][:, None] * z + self.b[j][:, None]


class LinearField:
    calls_per_velocity = 1

    def __init__(self, slope=0.9, offset=-0.5):
        self.slope, self.offset = slope, offset

    def velocity(self, z, sigma, condition=None):
        return self.slope * z + self.offset


def closed_form(student, *, through_states, cost, eta=0.7, anchor=None, anchor_weight=0.0):
    """Gradient of sum_j cost_j KL_j in a_j, b_j, the Gaussian's moments carried exactly through the chain.

    KL_j is to the ``LinearField``, and to the anchor under its own weight besides.
    """
    a, b = (p.detach().double().requires_grad_(True) for p in (student.a, student.b))
    sigmas = GRID.sigmas.double()
    mean, variance, total = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), 0.0
    for j in range(4):
        move = sde_step(sigmas[j][None], sigmas[j + 1][None], eta)
        keep, gain, std = (float(x) for x in (move.state_factor, move.velocity_factor, move.std))
        m, v = (mean, variance) if through_states else (mean.detach(), variance.detach())
        weight = float(sigmas[j] - sigmas[j + 1]) if cost == "reward" else 1.0
        for field, share in ((LinearField(), weight), (anchor or LinearField(), anchor_weight)):
            slope, offset = a[j] - field.slope, b[j] - field.offset
            squared = slope**2 * (v + m**2) + 2 * slope * offset * m + offset**2
            total = total + share * gain**2 * squared / (2 * std**2)
        mean, variance = (keep + gain * a[j]) * mean + gain * b[j], (keep + gain * a[j]) ** 2 * variance + std**2
    return torch.cat(torch.autograd.grad(total, [a, b]))


def measured(gradient, size, repeats=40, **options):
    """Mean gradient of the summed cost and its standard error, over independent batches of states of ``size`` elements.

    All elements are alike, and costs are means over them: the gradient is the same for any size.
    """
    student, route = Chain(), d.Route("linear", LinearField(), untargeted(size))
    method = FlowOPD(routes=[route], grid=GRID, gradient=gradient, **options)
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(repeats):
        loss = method.step(student, batch_size=4096, generator=generator).loss
        gradients.append(torch.cat(torch.autograd.grad(loss, list(student.parameters()))).double())
    stacked = torch.stack(gradients)
    return student, stacked.mean(0), stacked.std(0) / repeats**0.5


SIZES = pytest.mark.parametrize("size", [1, 4])


def assert_within(mean, error, exact):
    assert bool(((mean - exact).abs() < 4.5 * error + 1e-4).all()), (mean, exact, error)
    assert bool((error < 0.1 * exact.abs().max()).all())  # and the measurement can tell


@SIZES
def test_pathwise_is_the_gradient_at_the_visited_states(size):
    student, mean, error = measured("pathwise", size, eta=0.5)
    assert_within(mean, error, closed_form(student, through_states=False, cost="reward", eta=0.5))


@SIZES
def test_pathwise_and_reward_to_go_are_the_total_gradient(size):
    student, mean, error = measured("total", size)
    total = closed_form(student, through_states=True, cost="reward")
    assert_within(mean, error, total)
    partial = closed_form(student, through_states=False, cost="reward")
    assert float((total - partial).abs().max()) > 10 * float(error.max())  # the second term matters here


def test_the_total_gradient_holds_what_a_step_does_to_later_costs_of_the_anchor():
    options = {"anchor": LinearField(slope=-1.0, offset=1.5), "anchor_weight": 0.2}
    student, mean, error = measured("total", 2, **options)
    exact = closed_form(student, through_states=True, cost="reward", **options)
    assert_within(mean, error, exact)
    partial = closed_form(student, through_states=False, cost="reward", **options)
    without = closed_form(student, through_states=True, cost="reward") - closed_form(
        student, through_states=False, cost="reward"
    )
    assert float((exact - partial - without).abs().max()) > 10 * float(error.max())  # the anchor's own part matters


@SIZES
def test_score_is_the_gradient_of_the_kl(size):
    student, mean, error = measured("score", size, normalize=False, group_size=4)
    assert_within(mean, error, closed_form(student, through_states=False, cost="kl"))


@pytest.mark.parametrize("j", range(4))
def test_the_detached_cost_times_its_own_score_has_mean_zero(j):
    student, generator = Chain(), torch.Generator().manual_seed(0)
    z = torch.randn(400_000, 1, generator=generator)
    here, there = (GRID.sigmas[at : at + 1].expand(len(z)) for at in (j, j + 1))
    move = sde_step(here, there, 0.7)
    mean = move.mean(z, student(z, here))
    cost = move.divergence(mean, move.mean(z, LinearField().velocity(z, here)))
    arrived = mean.detach() + move.std[:, None] * torch.randn(z.shape, generator=generator)
    score = move.log_probability(arrived, mean)
    for parameter in student.parameters():
        zero = float(torch.autograd.grad((cost.detach() * score).mean(), parameter, retain_graph=True)[0][j])
        pathwise = float(torch.autograd.grad(cost.mean(), parameter, retain_graph=True)[0][j])
        assert abs(zero) < 0.02 * abs(pathwise)


def test_a_groups_samples_share_route_and_condition(rng):
    seen = []

    def spy(count, generator):
        condition = torch.randn(count, 2, generator=generator)
        seen.append(condition)
        return d.Samples(condition=condition, shape=(4,))

    student = TinyNet()
    conditions = []
    student.register_forward_pre_hook(lambda module, args: conditions.append(args[2]))
    FlowOPD(routes=[d.Route("one", GaussianField(0.5, 0.5), spy)], grid=GRID, group_size=4).step(
        student, batch_size=8, generator=rng
    )
    assert torch.equal(conditions[0], seen[0].repeat_interleave(4, dim=0))


def test_groups_are_routed_whole_and_stratified_among_themselves():
    """32 samples in groups of 4 are 8 groups, of which two equal routes have 4 each in every update."""
    routes = [d.Route("one", GaussianField(0.5, 0.5), inputs), d.Route("two", GaussianField(-0.5, 0.5), inputs)]
    method = FlowOPD(routes=routes, grid=GRID, group_size=4, stratified=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        drawn = method.draw_routes(32, generator).view(8, 4)
        assert bool((drawn == drawn[:, :1]).all())
        assert int(drawn[:, 0].sum()) == 4
    parts = method.update(TinyNet(), batch_size=32, micro_batches=2, generator=generator)
    assert sum(part.routes[name].samples for part in parts for name in part.routes) == 32
    assert {name: sum(p.routes[name].samples for p in parts if name in p.routes) for name in ("one", "two")} == {
        "one": 16,
        "two": 16,
    }


def test_leave_one_out_advantages():
    reward = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    torch.testing.assert_close(group_advantage(reward, 3, False), torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))
    normalised = group_advantage(reward, 3, True)
    torch.testing.assert_close(normalised[:3], torch.tensor([-3.0, -1.5, 4.5]) / 7**0.5)
    assert float(normalised[3:].abs().max()) == 0.0


def test_normalised_advantages_are_clipped():
    student, field = TinyNet(), GaussianField(0.5, 0.5)
    options = {"gradient": "score", "group_size": 4, "advantage_clip": 0.1}
    method = FlowOPD(routes=[d.Route("one", field, inputs)], grid=GRID, **options)
    generator, same = (torch.Generator().manual_seed(5) for _ in range(2))
    loss = method.step(student, batch_size=8, generator=generator, routes=torch.zeros(8).long()).loss
    noises = torch.randn(5, 8, 4, generator=same)
    z, expected = noises[0], torch.zeros(())
    for j in range(4):
        here, there = GRID.sigmas[j].expand(8), GRID.sigmas[j + 1].expand(8)
        move = sde_step(here, there, 0.7)
        mean, aim = move.mean(z, student(z, here, torch.zeros(8, 2))), move.mean(z, field.velocity(z, here))
        z = mean.detach() + move.std[:, None] * noises[j + 1]
        logp, wanted = (-((z - m) ** 2).mean(1) / (2 * move.std**2) for m in (mean, aim))
        reward = (wanted - logp).detach().view(2, 4)
        advantage = 4 / 3 * (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)
        expected = expected - (advantage.clamp(-0.1, 0.1).flatten() * (logp - logp.detach()).exp()).mean()
    torch.testing.assert_close(loss, expected)
    pairs = zip(*(torch.autograd.grad(one, list(student.parameters())) for one in (loss, expected)), strict=True)
    for found, by_hand in pairs:
        torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize(("advantage", "gradient"), [(1.0, [1.0, 0.0, 0.9048374]), (-1.0, [-1.0, -1.1051709, 0.0])])
def test_ppo_clip_stops_the_gradient_where_the_ratio_has_gone_far_enough(advantage, gradient):
    logp = torch.tensor([0.0, 0.1, -0.1], requires_grad=True)
    clipped_surrogate(logp, torch.zeros(3), torch.full((3,), advantage), 0.05).sum().backward()
    assert logp.grad.tolist() == pytest.approx(gradient)


def test_the_anchor_pulls_towards_its_field(rng):
    student, anchor = TinyNet(), GaussianField(3.0, 0.1)
    routes = [d.Route("self", d.ModelField(copy.deepcopy(student)), inputs)]
    free = FlowOPD(routes=routes, grid=GRID, group_size=2).step(student, batch_size=8, generator=rng)
    held = FlowOPD(routes=routes, grid=GRID, group_size=2, anchor=anchor, anchor_weight=0.5)
    result = held.step(student, batch_size=8, generator=torch.Generator().manual_seed(5))
    assert float(free.loss.detach()) == 0.0
    generator, expected = torch.Generator().manual_seed(5), 0.0
    held.draw_routes(8, generator)
    noises = torch.randn(5, 8, 4, generator=generator)
    z = noises[0]
    for j in range(4):  # by hand: 0.5 KL to the anchor at every step of the student's SDE rollout
        here, there = GRID.sigmas[j].expand(8), GRID.sigmas[j + 1].expand(8)
        move = sde_step(here, there, held.eta)
        mean = move.mean(z, student(z, here, torch.zeros(8, 2)).detach())
        apart = mean - move.mean(z, anchor.velocity(z, here))
        expected += 0.5 * float((apart**2).mean() / (2 * move.std[0] ** 2))
        z = mean + move.std[:, None] * noises[j + 1]
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert result.calls.field == free.calls.field + 8 * 4
    with pytest.raises(ValueError, match="belong together"):
        FlowOPD(routes=routes, grid=GRID, anchor=anchor)


def test_groups_must_divide_the_batch(rng):
    routes = [d.Route("one", GaussianField(0.5, 0.5), inputs)]
    with pytest.raises(ValueError, match="not a multiple of group_size 16"):
        FlowOPD(routes=routes, grid=GRID).step(TinyNet(), batch_size=24, generator=rng)
    with pytest.raises(ValueError, match="groups of 1"):
        FlowOPD(routes=routes, grid=GRID, gradient="score", group_size=1)
