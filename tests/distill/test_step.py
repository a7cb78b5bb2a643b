import copy
from dataclasses import replace

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from torch import nn

import danceopd as d
from danceopd.distill.batch import draw_batches
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import low_noise

GRID = d.shifted_grid(steps=8, shift=3.0)


def inputs(count, generator, size=4, condition=0.0):
    return d.Samples(condition=torch.full((count, 2), condition), shape=(size,), target=torch.ones(count, size))


def method(*routes, **options):
    return d.DanceOPD(**{"routes": routes, "grid": GRID, "query": low_noise(), **options})


def test_student_equal_to_its_field_has_loss_exactly_zero(rng):
    student = TinyNet()
    route = d.Route("same", d.ModelField(copy.deepcopy(student)), inputs)
    assert method(route).step(student, batch_size=16, generator=rng).loss.item() == 0.0


def test_and_also_under_autocast(rng):
    student = TinyNet(width=64)
    route = d.Route("same", d.ModelField(copy.deepcopy(student)), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = method(route).step(student, batch_size=16, generator=rng)
    assert result.loss.item() == 0.0
    assert result.loss.dtype == torch.float32


def test_autocast_around_the_step_keeps_the_students_gradient(rng):
    # weights that autocast cast in the no-grad rollout must not serve the student's pass (torch 2.13 keeps them apart)
    student = TinyNet()
    route = d.Route("other", d.ModelField(TinyNet(seed=1)), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        method(route).step(student, batch_size=16, generator=rng).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in student.parameters())


def test_no_gradient_through_rollout_or_field(rng):
    """The gradient equals the one of the last forward alone, at the recorded states and targets."""
    student, teacher = TinyNet(), TinyNet(seed=1)

    class CarelessField:  # its velocity carries a graph: the step itself has to cut it off
        calls_per_velocity = 1

        def velocity(self, z, sigma, condition):
            return teacher(z, sigma, condition)

    seen = []
    hook = student.register_forward_hook(lambda m, args, out: seen.append(args) if torch.is_grad_enabled() else None)
    field = CarelessField()
    result = method(d.Route("other", field, inputs)).step(student, batch_size=16, generator=rng)
    hook.remove()
    result.loss.backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    ((z, sigma, condition),) = seen
    assert not z.requires_grad
    assert all(p.grad is None for p in teacher.parameters())
    ((student(z, sigma, condition) - teacher(z, sigma, condition).detach()) ** 2).mean().backward()
    for a, b in zip(got, (p.grad for p in student.parameters()), strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in teacher.parameters())


class LinearStudent(nn.Module):
    """v = a(k) z + b(k), one pair per grid step: contains the exact field of any Gaussian."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(GRID.steps)), nn.Parameter(torch.zeros(GRID.steps))

    def forward(self, z, sigma, condition=None):
        k = (GRID.sigmas[None] - sigma[:, None]).abs().argmin(1)
        return self.a[k][:, None] * z + self.b[k][:, None]


def test_a_linear_student_converges_to_the_field(rng):
    teacher, student = GaussianField(0.7, 0.5), LinearStudent()
    distil = method(d.Route("gaussian", teacher, inputs), query=d.BetaQuery(1, 1))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(400):
        distil.step(student, batch_size=64, generator=rng).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sigma = GRID.sigmas[:-1]
    variance = (1 - sigma) ** 2 * 0.25 + sigma**2
    slope = (sigma - (1 - sigma) * 0.25) / variance
    torch.testing.assert_close(student.a.detach(), slope, atol=0.02, rtol=0)
    torch.testing.assert_close(student.b.detach(), -0.7 - slope * (1 - sigma) * 0.7, atol=0.02, rtol=0)


def test_two_routes_on_one_batch_give_what_two_separate_runs_give():
    """The gradient of a mixed batch is the sum of two runs in which the other route's field is the student itself."""
    student, one, two = TinyNet(), GaussianField(1.0, 0.5), GaussianField(-1.0, 0.8)
    itself = d.ModelField(copy.deepcopy(student))

    def run(first, second):
        routes = method(d.Route("one", first, inputs), d.Route("two", second, inputs))
        generator = torch.Generator().manual_seed(7)
        chosen = torch.tensor([0] * 8 + [1] * 8)
        result = routes.step(student, batch_size=16, generator=generator, routes=chosen)
        return result, torch.autograd.grad(result.loss, list(student.parameters()))

    (both, gradient), (left, first), (right, second) = run(one, two), run(one, itself), run(itself, two)
    assert left.routes["one"].loss.item() == both.routes["one"].loss.item() > 0
    assert right.routes["two"].loss.item() == both.routes["two"].loss.item() > 0
    assert left.routes["two"].loss.item() == right.routes["one"].loss.item() == 0
    for total, a, b in zip(gradient, first, second, strict=True):
        torch.testing.assert_close(total, a + b)


def test_routes_that_are_none_are_refused(rng):
    routes = [d.Route(name, GaussianField(1.0, 0.5), inputs) for name in ("one", "two")]
    wrong = ([0, 2], [0, -1], [0])
    for chosen in wrong:
        with pytest.raises(ValueError, match=r"routes are 2 numbers from 0 to 1, one for each sample; found \["):
            method(*routes).step(TinyNet(), batch_size=2, generator=rng, routes=torch.tensor(chosen))
    with pytest.raises(ValueError, match="batch_size is at least 1, found 0"):
        method(*routes).step(TinyNet(), batch_size=0, generator=rng)


def test_routes_of_one_shape_share_every_student_call(rng):
    """One with targets, one without: the rollout does not need them, so both are one batch."""

    def bare(count, generator):
        return d.Samples(condition=torch.zeros(count, 2), shape=(4,))

    student, sizes = TinyNet(), []
    student.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    routes = [d.Route("one", GaussianField(1.0, 0.5), inputs), d.Route("two", GaussianField(-1.0, 0.8), bare)]
    chosen = torch.tensor([0] * 8 + [1] * 8)
    method(*routes).step(student, batch_size=16, generator=rng, routes=chosen)
    assert sizes[0] == sizes[-1] == 16
    assert len(sizes) <= GRID.steps + 1


@pytest.mark.parametrize("kind", ["tensor", "condition"])
def test_conditions_and_targets_go_to_the_methods_device(rng, kind):
    def data(count, generator):
        told = torch.zeros(count, 2)
        condition = told if kind == "tensor" else d.Condition(prompt_embeds=told[:, None], source=torch.ones(count, 4))
        return d.Samples(condition=condition, shape=(4,), target=torch.ones(count, 4), field_condition=told)

    routes = [d.Route(name, GaussianField(0.0, 1.0), data) for name in ("one", "two")]
    (batch,) = draw_batches(routes, torch.tensor([0, 1, 1]), rng, "meta", grid=GRID, targets=True)
    condition = batch.condition
    parts = [condition] if kind == "tensor" else [condition.prompt_embeds, condition.source]
    assert {part.device.type for part in [*parts, batch.field_condition, batch.target]} == {"meta"}
    assert batch.route.device.type == "cpu"


def test_misspelt_options_and_equal_names_are_refused():
    route = d.Route("one", GaussianField(0.0, 1.0), inputs)
    with pytest.raises(ValueError, match="found 'studnet'"):
        method(route, states="studnet")
    with pytest.raises(ValueError, match="found 'batch'"):
        method(route, per="batch")
    with pytest.raises(ValueError, match="different names, found one, one"):
        method(route, route)
    with pytest.raises(ValueError, match="at least one route is needed"):
        method()
    with pytest.raises(ValueError, match="found 'KL'"):
        VelocityMSE("KL")
    with pytest.raises(ValueError, match="the timestep weight is zero everywhere on this band and grid"):
        VelocityMSE("timestep").step_weights(d.shifted_grid(steps=1), low_noise())  # noise alone is asked for


def test_shapes_that_differ_run_beside_each_other(rng):
    class AnySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3))

        def forward(self, z, sigma, condition=None):
            return self.a * z

    student = AnySize()
    routes = [
        d.Route("small", GaussianField(0, 1), lambda n, g: inputs(n, g, 2)),
        d.Route("large", GaussianField(0, 1), lambda n, g: inputs(n, g, 6)),
    ]
    result = method(*routes).step(student, batch_size=32, generator=rng)
    assert {name: route.samples for name, route in result.routes.items()}.keys() == {"small", "large"}
    assert sum(route.samples for route in result.routes.values()) == 32
    assert result.calls.train == 32


def test_a_route_may_draw_several_shapes_and_shares_each_with_other_routes(rng):
    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3))
            self.seen = []

        def forward(self, z, sigma, condition=None):
            self.seen.append((len(z), z.shape[1]))
            return self.a * z

    def mixed(count, generator):
        return [inputs(3, generator, 2), inputs(count - 3, generator, 6)]

    student = Sizes()
    routes = [
        d.Route("mixed", GaussianField(1, 1), mixed),
        d.Route("large", GaussianField(-1, 1), lambda n, g: inputs(n, g, 6)),
    ]
    chosen = torch.tensor([0] * 8 + [1] * 4)
    result = method(*routes).step(student, batch_size=12, generator=rng, routes=chosen)
    assert {name: route.samples for name, route in result.routes.items()} == {"mixed": 8, "large": 4}
    assert {size for size in student.seen if size[0] in (3, 9)} == {(3, 2), (9, 6)}
    result.loss.backward()
    assert float(student.a.grad) != 0


@pytest.mark.parametrize("drawn", [lambda n, g: [inputs(2, g, 2)], lambda n, g: inputs(2, g, 2)])
def test_a_route_that_draws_another_number_than_it_was_asked_for_is_refused(rng, drawn):
    with pytest.raises(ValueError, match="'short' was asked for 4 samples and drew 2"):
        method(d.Route("short", GaussianField(1, 1), drawn)).step(LinearStudent(), batch_size=4, generator=rng)


def test_a_route_that_draws_another_number_of_targets_is_refused(rng):
    def drawn(count, generator):
        return replace(inputs(count, generator, 2), target=torch.zeros(1, 2))

    with pytest.raises(ValueError, match="'short' drew 4 conditions and 1 target images"):
        method(d.Route("short", GaussianField(1, 1), drawn), states="data").step(
            LinearStudent(), batch_size=4, generator=rng
        )


def test_calls_are_counted_as_they_happen(rng):
    student, counts = TinyNet(), {"grad": 0, "free": 0}

    def count(module, args, out):
        counts["grad" if torch.is_grad_enabled() else "free"] += len(args[0])

    student.register_forward_hook(count)
    guided = d.GuidedField(d.ModelField(TinyNet(seed=1)), empty=torch.zeros_like, guidance_scale=3.0)
    result = method(d.Route("guided", guided, inputs)).step(student, batch_size=16, generator=rng)
    assert (result.calls.rollout, result.calls.train) == (counts["free"], counts["grad"])
    assert result.calls.field == 32
    assert result.calls.forward_equivalents == counts["free"] + 32 + 48


@pytest.mark.parametrize("count", [2, 8])
def test_several_queries_average_and_free_their_graphs(rng, count):
    student = TinyNet()
    route = d.Route("other", d.ModelField(TinyNet(seed=1)), inputs)
    distil = method(route, query=low_noise(per_rollout=count))
    whole = distil.step(student, batch_size=8, generator=torch.Generator().manual_seed(3))
    whole.loss.backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    freed = []

    def backward(loss):
        loss.backward()
        freed.append(loss)

    part = distil.step(student, batch_size=8, generator=torch.Generator().manual_seed(3), backward=backward)
    assert len(freed) == count  # one graph a state, gone before the next one stands
    torch.testing.assert_close(sum(freed).detach(), whole.loss.detach())
    assert not part.loss.requires_grad
    torch.testing.assert_close(part.loss, whole.loss.detach())
    for a, b in zip(expected, (p.grad for p in student.parameters()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_routes_mean_sigma_is_over_its_own_matched_states(rng):
    student, seen = TinyNet(), []
    student.register_forward_hook(lambda m, args, out: seen.append(args[1:]) if torch.is_grad_enabled() else None)
    data = [lambda n, g, number=number: inputs(n, g, condition=number) for number in (0.0, 1.0)]
    routes = [d.Route(name, GaussianField(0, 1), draw) for name, draw in zip("ab", data, strict=True)]
    chosen = torch.tensor([0, 1, 1, 1])
    found = method(*routes, query=low_noise(per_rollout=2)).step(student, batch_size=4, generator=rng, routes=chosen)
    sigma, condition = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for number, (name, count) in enumerate({"a": 2, "b": 6}.items()):
        of_route = sigma[condition[:, 0] == number]
        assert len(of_route) == count
        assert found.routes[name].mean_sigma == pytest.approx(float(of_route.mean()))


def test_data_states_are_noised_targets_and_need_targets(rng):
    seen = []

    class Recorder(GaussianField):
        def velocity(self, z, sigma, condition=None):
            seen.append((z, sigma))
            return super().velocity(z, sigma, condition)

    distil = method(d.Route("r", Recorder(0, 1), inputs), states="data")
    result = distil.step(TinyNet(), batch_size=4000, generator=rng)
    z, sigma = seen[0]
    residual = (z - (1 - sigma[:, None])) / sigma[:, None]  # targets are ones: what is left is the noise
    assert abs(float(residual.mean())) < 0.05
    assert abs(float(residual.std()) - 1) < 0.05
    assert result.calls.rollout == 0
    empty = d.Route("bare", GaussianField(0, 1), lambda n, g: d.Samples(condition=None, shape=(4,)))
    with pytest.raises(ValueError, match="route bare has none"):
        method(empty, states="data").step(TinyNet(), batch_size=4, generator=rng)


def test_teacher_states_are_each_teachers_rollout_under_what_it_is_told(rng):
    class Told(GaussianField):
        def velocity(self, z, sigma, condition):
            return super().velocity(z, sigma) + condition[:, :1]

    def numbered(first):
        def draw(count, generator):
            told = (first + torch.arange(count).float())[:, None].expand(count, 2) / 10
            return d.Samples(condition=told + 50, shape=(4,), field_condition=told)

        return draw

    seen, student, one, two = [], TinyNet(), Told(0.5, 0.5), Told(-1.0, 0.8)
    student.register_forward_hook(lambda module, args, out: seen.append(args))
    distil = method(d.Route("one", one, numbered(0)), d.Route("two", two, numbered(-40)), states="teacher")
    again = torch.Generator()
    again.set_state(rng.get_state())
    result = distil.step(student, batch_size=64, generator=rng, routes=torch.tensor([1, 0, 1, 1] * 16))
    query = low_noise().draw(64, GRID, again)
    z = torch.randn(64, 4, generator=again)
    told = torch.cat([numbered(0)(16, None).field_condition, numbered(-40)(48, None).field_condition])
    expected = torch.empty_like(z)
    for step, (here, there) in enumerate(GRID.sigmas.unfold(0, 2, 1)):
        asked = query.step[:, 0] == step
        expected[asked] = z[asked]
        sigma = here.expand(64)
        z = z + (there - here) * torch.cat([one.velocity(z, sigma, told)[:16], two.velocity(z, sigma, told)[16:]])
    ((states, sigma, _),) = seen  # the student's only pass is the matching one
    assert torch.equal(sigma, GRID.sigmas[query.step[:, 0]])
    torch.testing.assert_close(states, expected)
    assert result.calls.rollout == int(query.step.sum())


def test_prompt_dropout_replaces_the_right_share(rng):
    seen = []

    class Recorder(GaussianField):
        def velocity(self, z, sigma, condition=None):
            seen.append(condition)
            return super().velocity(z, sigma)

    route = d.Route(
        "r", Recorder(0, 1), lambda n, g: inputs(n, g, condition=1.0), prompt_dropout=0.25, empty=torch.zeros_like
    )
    method(route).step(TinyNet(), batch_size=8000, generator=rng)
    assert abs(float((seen[-1][:, 0] == 0).double().mean()) - 0.25) < 0.02


def test_gradient_cosines_of_opposed_and_equal_fields(rng):
    student = TinyNet()
    routes = [d.Route("a", GaussianField(3.0, 0.3), inputs), d.Route("b", GaussianField(-3.0, 0.3), inputs)]
    result = method(*routes).step(student, batch_size=64, generator=rng)
    cosine = d.route_gradient_cosines(result, list(student.parameters()))[("a", "b")]
    assert cosine < -0.3
    result.loss.backward()  # the graph is still there
    same = [d.Route("a", GaussianField(3.0, 0.3), inputs), d.Route("b", GaussianField(3.0, 0.3), inputs)]
    result = method(*same).step(student, batch_size=64, generator=rng)
    assert d.route_gradient_cosines(result, list(student.parameters()))[("a", "b")] > 0.8
