import copy
from dataclasses import replace

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from torch import nn

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD, clipped_surrogate, group_advantage
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.merge import merged_loras, merged_weights
from danceopd.baselines.off_policy import off_policy
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.distill.objective import OBJECTIVES
from danceopd.distill.sde import sde_step
from danceopd.fields.lora import Lora

GRID = d.shifted_grid(steps=4, shift=2.0)


def inputs(count, generator, size=4):
    return d.Samples(condition=torch.zeros(count, 2), shape=(size,), target=torch.full((count, size), 0.5))


def untargeted(size):
    return lambda count, generator: d.Samples(condition=torch.zeros(count, 2), shape=(size,))


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
    slope, offset = 0.9, -0.5

    def velocity(self, z, sigma, condition=None):
        return self.slope * z + self.offset


def closed_form(student, *, through_states, cost):
    """Gradient of sum_j cost_j KL_j in a_j, b_j, the Gaussian's moments carried exactly through the chain."""
    a, b = (p.detach().double().requires_grad_(True) for p in (student.a, student.b))
    sigmas = GRID.sigmas.double()
    mean, variance, total = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), 0.0
    for j in range(4):
        move = sde_step(sigmas[j][None], sigmas[j + 1][None], 0.7)
        keep, gain, std = (float(x) for x in (move.state_factor, move.velocity_factor, move.std))
        m, v = (mean, variance) if through_states else (mean.detach(), variance.detach())
        slope, offset = a[j] - LinearField.slope, b[j] - LinearField.offset
        squared = slope**2 * (v + m**2) + 2 * slope * offset * m + offset**2
        weight = float(sigmas[j] - sigmas[j + 1]) if cost == "reward" else 1.0
        total = total + weight * gain**2 * squared / (2 * std**2)
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
    student, mean, error = measured("pathwise", size)
    assert_within(mean, error, closed_form(student, through_states=False, cost="reward"))


@SIZES
def test_pathwise_and_reward_to_go_are_the_total_gradient(size):
    student, mean, error = measured("total", size)
    total = closed_form(student, through_states=True, cost="reward")
    assert_within(mean, error, total)
    partial = closed_form(student, through_states=False, cost="reward")
    assert float((total - partial).abs().max()) > 10 * float(error.max())  # the second term matters here


@SIZES
def test_score_is_the_gradient_of_the_kl(size):
    student, mean, error = measured("score", size, normalize=False, group_size=4)
    assert_within(mean, error, closed_form(student, through_states=False, cost="kl"))


def test_the_detached_cost_times_its_own_score_has_mean_zero():
    student, generator = Chain(), torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, generator=generator)
    here, there = (GRID.sigmas[1:2].expand(len(z)), GRID.sigmas[2:3].expand(len(z)))
    move = sde_step(here, there, 0.7)
    mean = move.mean(z, student(z, here))
    cost = move.divergence(mean, move.mean(z, LinearField().velocity(z, here)))
    arrived = mean.detach() + move.std[:, None] * torch.randn(z.shape, generator=generator)
    score = move.log_probability(arrived, mean)
    zero = float(torch.autograd.grad((cost.detach() * score).mean(), student.b, retain_graph=True)[0][1])
    pathwise = float(torch.autograd.grad(cost.mean(), student.b)[0][1])
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
    assert float(group_advantage(reward, 3, True)[3:].abs().max()) == 0.0


def test_ppo_clip_stops_the_gradient_outside_the_trust_region():
    logp = torch.tensor([0.0, 0.1, -0.1], requires_grad=True)
    clipped_surrogate(logp, torch.zeros(3), torch.ones(3), 0.05).sum().backward()
    assert logp.grad.tolist() == pytest.approx([1.0, 0.0, 0.9048374])


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


def test_misspelt_options_and_equal_names_are_refused():
    route = d.Route("one", GaussianField(0.5, 0.5), inputs)
    with pytest.raises(ValueError, match="found 'odee'"):
        DiffusionOPD(routes=[route], grid=GRID, form="odee")
    with pytest.raises(ValueError, match="every route in every update"):
        DiffusionOPD(routes=[route], grid=GRID, per="step")
    with pytest.raises(ValueError, match="found 'paths'"):
        FlowOPD(routes=[route], grid=GRID, gradient="paths")
    for build in (JointTraining, DiffusionOPD, FlowOPD):
        with pytest.raises(ValueError, match="different names, found one, one"):
            build(routes=[route, route], grid=GRID)


def test_sde_rollouts_are_noisy_and_seeded():
    route = d.Route("one", GaussianField(0.5, 0.5), inputs)
    method = DiffusionOPD(routes=[route], grid=GRID, form="sde")
    losses = [
        float(method.step(TinyNet(), batch_size=8, generator=torch.Generator().manual_seed(seed)).loss)
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


class Constant(nn.Module):
    """v = a z + b at one noise level at a time: enough for joint training's least squares."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, z, sigma, condition=None):
        # Given the data's one value x, v = eps - x = (z - x) / sigma exactly.
        return (z - self.bias) / sigma[:, None]


def test_joint_training_finds_the_data(rng):
    student = Constant()
    method = JointTraining(routes=[d.Route("data", GaussianField(9.0, 1.0), inputs)], grid=GRID)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(200):
        result = method.step(student, batch_size=64, generator=rng)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert float(student.bias.detach()) == pytest.approx(0.5, abs=0.01)  # the data's value, not the field's
    assert (result.calls.field, result.calls.rollout, result.calls.train) == (0, 0, 64)
    with pytest.raises(ValueError, match="data of route bare has none"):
        JointTraining(routes=[d.Route("bare", GaussianField(0.0, 1.0), untargeted(1))], grid=GRID).step(
            student, batch_size=2, generator=rng
        )


def test_off_policy_is_the_same_objective_elsewhere(rng):
    options = {"routes": [d.Route("one", GaussianField(0.5, 0.5), inputs)], "grid": GRID}
    assert off_policy(**options) == d.DanceOPD(states="data", **options)
    assert off_policy(states="data", **options).step(TinyNet(), batch_size=4, generator=rng).calls.rollout == 0
    with pytest.raises(ValueError, match="'data' or 'teacher', found 'student'"):
        off_policy(states="student", **options)


def test_soft_mixing_teaches_the_average_everywhere(rng):
    one, two = GaussianField(1.0, 0.5), GaussianField(-1.0, 0.8)
    routes = [d.Route("one", one, inputs, weight=3), d.Route("two", two, inputs, weight=1)]
    method = soft_mixing(routes=routes, grid=GRID)
    z, sigma = torch.randn(3, 4, generator=rng), torch.full((3,), 0.5)
    expected = 0.75 * one.velocity(z, sigma) + 0.25 * two.velocity(z, sigma)
    for route in method.routes:
        torch.testing.assert_close(route.field.velocity(z, sigma, None), expected)
    assert [route.weight for route in method.routes] == [3, 1]


@pytest.mark.parametrize(
    "build",
    [
        lambda **o: JointTraining(**o),
        lambda **o: DiffusionOPD(**o),
        lambda **o: DiffusionOPD(form="sde", **o),
        lambda **o: FlowOPD(group_size=4, **o),
        lambda **o: FlowOPD(group_size=4, gradient="score", **o),
        lambda **o: FlowOPD(group_size=4, gradient="total", **o),
        lambda **o: off_policy(states="teacher", **o),
        lambda **o: soft_mixing(**o),
        lambda **o: d.DanceOPD(**o),
    ],
)
def test_calls_are_predicted_and_gradients_taken_part_by_part(build):
    routes = [d.Route("one", GaussianField(1.0, 0.5), inputs), d.Route("two", GaussianField(-1.0, 0.8), inputs)]
    method, student = build(routes=routes, grid=GRID), TinyNet()

    def run(backward):
        return method.step(student, batch_size=64, generator=torch.Generator().manual_seed(3), backward=backward)

    whole = run(None)
    whole.loss.backward()
    kept = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    parts = run(lambda loss: loss.backward())
    assert not parts.loss.requires_grad
    assert float(parts.loss) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    for gradient, parameter in zip(kept, student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    expected = method.expected_calls()
    assert (parts.calls.field, parts.calls.train) == (64 * expected.field, 64 * expected.train)
    assert parts.calls.rollout == pytest.approx(64 * expected.rollout, rel=0.2)


class AnySize(nn.Module):
    """v = a z + b sigma, for states of any size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, z, sigma, condition=None):
        return self.a * z + self.b * sigma[:, None]


def sized(size):
    return lambda count, generator: inputs(count, generator, size)


def shifted_by_size(shape):
    return d.shifted_grid(steps=4, shift=float(shape[0]))


ONE, TWO = GaussianField(1.0, 0.5), GaussianField(-1.0, 0.8)
UNLIKE = {
    "shapes": (
        [d.Route("one", ONE, sized(2), shape=(2,)), d.Route("two", TWO, sized(6), shape=(6,))],
        [shifted_by_size((2,)), shifted_by_size((6,))],
    ),
    "grids": (
        [d.Route("one", ONE, inputs), d.Route("two", TWO, inputs, grid=d.shifted_grid(steps=3, shift=5.0))],
        [GRID, d.shifted_grid(steps=3, shift=5.0)],
    ),
}


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: JointTraining(**o),
        lambda **o: DiffusionOPD(**o),
        lambda **o: DiffusionOPD(form="sde", **o),
        lambda **o: FlowOPD(group_size=4, **o),
        lambda **o: FlowOPD(group_size=4, gradient="score", **o),
        lambda **o: FlowOPD(group_size=4, gradient="total", anchor=ONE, anchor_weight=0.5, **o),
        lambda **o: off_policy(**o),
        lambda **o: off_policy(states="teacher", **o),
        lambda **o: d.DanceOPD(query=d.BetaQuery(over="sigma"), objective=OBJECTIVES["velocity_mse_kl"], **o),
    ],
)
def test_routes_on_unlike_grids_give_in_one_update_what_two_updates_give(build, kind):
    routes, grids = UNLIKE[kind]
    student = AnySize()

    def update(method, chosen, generator):
        result = method.step(student, batch_size=len(chosen), generator=generator, routes=chosen)
        return result, torch.stack(torch.autograd.grad(result.loss, list(student.parameters())))

    together = build(routes=routes, grid=shifted_by_size if kind == "shapes" else GRID)
    both, gradient = update(together, torch.tensor([0] * 8 + [1] * 8), torch.Generator().manual_seed(7))
    generator, apart = torch.Generator().manual_seed(7), []
    for route, grid in zip(routes, grids, strict=True):
        apart.append(update(build(routes=[replace(route, grid=None)], grid=grid), torch.zeros(8).long(), generator))
    torch.testing.assert_close(gradient, (apart[0][1] + apart[1][1]) / 2)
    assert both.calls == apart[0][0].calls + apart[1][0].calls
    for route, (alone, _) in zip(routes, apart, strict=True):
        torch.testing.assert_close(both.routes[route.name].loss, alone.loss)
        assert both.routes[route.name].samples == 8
    each = [build(routes=[replace(r, grid=None)], grid=g).expected_calls() for r, g in zip(routes, grids, strict=True)]
    expected = together.expected_calls()
    for kind_of_call in ("rollout", "field", "train"):
        mean = sum(getattr(calls, kind_of_call) for calls in each) / 2
        assert getattr(expected, kind_of_call) == pytest.approx(mean)


def test_a_route_may_ask_for_more_states_and_weighs_no_more_for_it():
    student, dense = AnySize(), d.BetaQuery(1, 1, per_rollout=4)
    routes = [d.Route("one", ONE, inputs), d.Route("two", TWO, inputs, query=dense)]
    method = d.DanceOPD(routes=routes, grid=GRID)
    chosen = torch.tensor([0] * 8 + [1] * 8)
    result = method.step(student, batch_size=16, generator=torch.Generator().manual_seed(7), routes=chosen)
    assert result.calls.train == 8 + 4 * 8
    assert float(result.loss.detach()) == pytest.approx(
        sum(float(route.loss.detach()) for route in result.routes.values()) / 2
    )
    generator = torch.Generator().manual_seed(7)
    for route, query in zip(routes, (method.query, dense), strict=True):
        alone = d.DanceOPD(routes=[replace(route, query=None)], grid=GRID, query=query)
        loss = alone.step(student, batch_size=8, generator=generator, routes=torch.zeros(8).long()).loss
        torch.testing.assert_close(result.routes[route.name].loss, loss)
    with pytest.raises(ValueError, match="route 'two' has a query of its own; DiffusionOPD asks for none"):
        DiffusionOPD(routes=routes, grid=GRID)


def test_a_cost_that_depends_on_an_untold_shape_is_not_guessed():
    method = d.DanceOPD(routes=[d.Route("one", ONE, inputs)], grid=shifted_by_size)
    with pytest.raises(ValueError, match=r"route 'one' depends on its latents' shape: .*Route\(shape="):
        method.expected_calls()


def lora(rank, seed, alpha=4.0):
    generator = torch.Generator().manual_seed(seed)
    return Lora(
        rank=rank,
        alpha=alpha,
        weights={
            "fc.lora_A.weight": torch.randn(rank, 5, generator=generator),
            "fc.lora_B.weight": torch.randn(3, rank, generator=generator),
        },
    )


def delta(item):
    return item.alpha / item.rank * item.weights["fc.lora_B.weight"] @ item.weights["fc.lora_A.weight"]


def test_merging_loras_averages_the_full_weights():
    one, two = lora(2, 0), lora(4, 1, alpha=8.0)
    merged = merged_loras([(one, 1.0), (two, 2.0), (None, 1.0)])  # the base is a source too
    torch.testing.assert_close(delta(merged), 0.25 * delta(one) + 0.5 * delta(two))
    base = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    full = merged_weights([({"fc": base + delta(one)}, 1.0), ({"fc": base + delta(two)}, 2.0), ({"fc": base}, 1.0)])
    torch.testing.assert_close(full["fc"], base + delta(merged))


def test_merges_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one LoRA"):
        merged_loras([(None, 1.0)])
    with pytest.raises(ValueError, match="positive weights"):
        merged_loras([(lora(2, 0), 0.0)])
    with pytest.raises(ValueError, match="'b' is not in all"):
        merged_weights([({"a": torch.ones(1)}, 1.0), ({"a": torch.ones(1), "b": torch.ones(1)}, 1.0)])
    with pytest.raises(ValueError, match=r"at 'a': shapes \(1,\) and \(2,\)"):
        merged_weights([({"a": torch.ones(1)}, 1.0), ({"a": torch.ones(2)}, 1.0)])
