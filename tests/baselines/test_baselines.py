"""What all baselines share, and the small ones: joint training, off-policy distillation, soft mixing."""

from dataclasses import replace

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from torch import nn
from toy_routes import GRID, inputs, untargeted

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.off_policy import off_policy
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.distill.objective import OBJECTIVES


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


def test_joint_training_draws_a_logit_normal_sigma(rng):
    student, seen = TinyNet(), []
    student.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    options = {"sigma_mean": 0.8, "sigma_std": 0.5}
    method = JointTraining(routes=[d.Route("one", GaussianField(0.5, 0.5), inputs)], grid=GRID, **options)
    method.step(student, batch_size=20_000, generator=rng)
    (logit,) = (sigma.logit() for sigma in seen)
    assert float(logit.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(logit.std()) == pytest.approx(0.5, abs=0.01)


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
    own = soft_mixing(routes=routes, grid=GRID, weights={"two": 4.0, "one": 1.0})
    expected = 0.2 * one.velocity(z, sigma) + 0.8 * two.velocity(z, sigma)
    torch.testing.assert_close(own.routes[0].field.velocity(z, sigma, None), expected)
    assert [route.weight for route in own.routes] == [3, 1]  # the samples' shares are another matter
    with pytest.raises(ValueError, match="a weight for each of one, two, found one"):
        soft_mixing(routes=routes, grid=GRID, weights={"one": 1.0})


@pytest.mark.parametrize(
    "build",
    [
        lambda **o: JointTraining(**o),
        lambda **o: DiffusionOPD(**o),
        lambda **o: DiffusionOPD(form="sde", **o),
        lambda **o: FlowOPD(group_size=4, **o),
        lambda **o: FlowOPD(group_size=4, gradient="score", **o),
        lambda **o: FlowOPD(group_size=4, gradient="total", **o),
        lambda **o: FlowOPD(group_size=4, gradient="total", anchor=GaussianField(0.0, 1.0), anchor_weight=0.1, **o),
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
