"""Shares of the routes: closed forms, what they do to the gradient, and what they carry."""

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from safetensors.torch import load, save
from torch import nn

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD

GRID = d.shifted_grid(steps=4, shift=3.0)
WEIGHTS = torch.tensor([1.0, 3.0], dtype=torch.float64)
NEVER = float("nan")


def told(router, *updates):
    for losses in updates:
        router.observe(torch.tensor(losses, dtype=torch.float64))
    return router


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def inputs(count, generator):
    return d.Samples(condition=torch.zeros(count, 2), shape=(4,))


class Constant(nn.Module):
    """velocity = a everywhere."""

    calls_per_velocity = 1

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z, sigma, condition=None):
        return self.a.expand_as(z)

    def velocity(self, z, sigma, condition=None):
        return self(z, sigma).detach()


def two_constants(router, **options):
    """Per sample, the loss on route m is (a - c_m)^2 and its gradient 2 (a - c_m), with c = (1, 2)."""
    routes = [d.Route("one", Constant(1.0), inputs), d.Route("two", Constant(2.0), inputs, weight=3.0)]
    return d.DanceOPD(routes=routes, grid=GRID, router=router, **options)


def gradient(method, student, **options):
    student.zero_grad()
    method.step(student, **options).loss.backward()
    return float(student.a.grad)


@pytest.mark.parametrize(
    ("router", "weights", "shares"),
    [
        (d.WeightedRouter(), WEIGHTS, [0.25, 0.75]),
        (d.UniformRouter(), torch.ones(2).double(), [0.5, 0.5]),
        (told(d.GapRouter(floor=0.1), [1.0, 1.0]), WEIGHTS, [0.3, 0.7]),
        (told(d.CurriculumRouter([1.0, 1.0], end_step=2), [0.0, 0.0]), WEIGHTS, [0.375, 0.625]),
    ],
    ids=["weighted", "uniform", "gap", "curriculum"],
)
@pytest.mark.parametrize(
    "drawing",
    [{"per": "sample"}, {"per": "sample", "stratified": True}, {"per": "step"}],
    ids=["sample", "even", "step"],
)
def test_every_samples_marginal_is_its_routes_share(router, weights, shares, drawing, rng):
    routes = [
        d.Route(name, GaussianField(0, 1), inputs, weight=float(weight))
        for name, weight in zip("ab", weights, strict=True)
    ]
    method = d.DanceOPD(routes=routes, grid=GRID, router=router, **drawing)
    assert_close(method.shares, shares)
    drawn = torch.stack([method.draw_routes(6, rng) for _ in range(2000)])
    torch.testing.assert_close((drawn == 1).double().mean(0), method.shares[1].expand(6), atol=0.045, rtol=0)


def test_gap_shares_follow_the_average_losses_in_closed_form():
    router = d.GapRouter(floor=0.1, power=0.5, decay=0.5)
    assert_close(told(router, [4.0, NEVER]).shares(WEIGHTS), [0.25, 0.75])  # not all seen: the weights
    told(router, [2.0, 1.0], [NEVER, 3.0])  # averages 3 and 2
    drawn = torch.tensor([1 * 3**0.5, 3 * 2**0.5], dtype=torch.float64)
    assert_close(router.shares(WEIGHTS), 0.1 + 0.8 * drawn / drawn.sum())


def test_no_route_starves_and_none_is_favoured_where_there_is_no_gap():
    closed = told(d.GapRouter(floor=0.05), [0.0, 5.0])  # a student that starts from the first route's source
    assert_close(closed.shares(WEIGHTS), [0.05, 0.95])
    tiny = told(d.GapRouter(floor=0.05, power=4.0), [1e-6, 5.0, 1.0])
    assert float(tiny.shares(torch.ones(3).double()).min()) >= 0.05
    assert_close(told(d.GapRouter(), [0.0, 0.0]).shares(WEIGHTS), [0.25, 0.75])


def test_a_curriculum_goes_from_the_weights_to_its_end_and_stays():
    router, path = d.CurriculumRouter([3.0, 3.0], end_step=4), []
    for _ in range(6):
        path.append(router.shares(WEIGHTS)[0])
        told(router, [1.0, NEVER])
    assert [float(share) for share in path] == [0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5]


@pytest.mark.parametrize("reweight", [False, True])
def test_the_objectives_weights_are_the_shares_unless_it_is_reweighted(reweight, rng):
    router = told(d.GapRouter(floor=0.25, reweight=reweight), [9.0, 0.0])
    student, objective = Constant(4.0), 0.25 * 6 + 0.75 * 4
    expected = objective if reweight else 0.75 * 6 + 0.25 * 4
    even = two_constants(router, stratified=True)
    assert_close(even.shares, [0.75, 0.25])
    assert gradient(even, student, batch_size=8, generator=rng) == pytest.approx(expected, rel=1e-6)
    apart = two_constants(router, per="step")
    of_route = [
        gradient(apart, student, batch_size=8, generator=rng, routes=torch.full((8,), route)) for route in range(2)
    ]
    assert sum(s * g for s, g in zip(apart.shares.tolist(), of_route, strict=True)) == pytest.approx(expected, rel=1e-6)


def test_reweighting_leaves_the_losses_that_it_goes_by_alone(rng):
    router = told(d.GapRouter(floor=0.25, decay=0.0, reweight=True), [9.0, 0.0])
    method, parts = two_constants(router, stratified=True), []
    (result,) = method.update(
        Constant(4.0), batch_size=8, micro_batches=1, generator=rng, backward=lambda loss: parts.append(loss.item())
    )
    assert {name: float(route.loss) for name, route in result.routes.items()} == {"one": 9.0, "two": 4.0}
    assert sum(parts) == pytest.approx(float(result.loss)) == pytest.approx(0.25 * 9 + 0.75 * 4)
    method.observe([result])
    assert_close(router.averages, [9.0, 4.0])


def test_parts_of_an_update_count_by_their_samples(rng):
    parts = []
    results = two_constants(d.WeightedRouter()).update(
        Constant(4.0), batch_size=7, micro_batches=3, generator=rng, backward=lambda loss: parts.append(loss.item())
    )
    sizes = [sum(route.samples for route in result.routes.values()) for result in results]
    assert sizes == [3, 3, 1]
    assert sum(parts) == pytest.approx(sum(n * float(r.loss) for n, r in zip(sizes, results, strict=True)) / 7)


def test_a_router_is_told_each_routes_mean_over_all_parts_of_an_update(rng):
    routes = [d.Route("near", GaussianField(0.1, 1.0), inputs), d.Route("far", GaussianField(3.0, 1.0), inputs)]
    router = d.GapRouter(floor=0.1)
    method = d.DanceOPD(routes=routes, grid=GRID, router=router)
    results = method.update(TinyNet(), batch_size=12, micro_batches=3, generator=rng)
    method.observe(results)
    means = []
    for name in ("near", "far"):
        parts = [result.routes[name] for result in results if name in result.routes]
        means.append(sum(float(p.loss.detach()) * p.samples for p in parts) / sum(p.samples for p in parts))
    assert_close(router.averages, means)
    assert_close(method.shares, [0.1 + 0.8 * mean / sum(means) for mean in means])
    assert method.shares[1] > 0.5


def test_a_router_goes_on_where_its_state_was_taken():
    for make in (lambda: d.GapRouter(decay=0.7), lambda: d.CurriculumRouter([1.0, 1.0], end_step=9)):
        router, again = told(make(), [3.0, NEVER], [2.0, 1.0]), make()
        again.load_state(load(save(router.state())))
        for losses in ([1.0, 4.0], [NEVER, 2.0]):
            told(router, losses), told(again, losses)
            assert torch.equal(router.shares(WEIGHTS), again.shares(WEIGHTS))
        with pytest.raises(KeyError):
            make().load_state({})
    with pytest.raises(ValueError, match="WeightedRouter carries nothing, found updates"):
        d.WeightedRouter().load_state(d.CurriculumRouter([1.0], end_step=1).state())


def test_routers_that_do_not_fit_are_refused():
    routes = [d.Route("a", GaussianField(0, 1), inputs), d.Route("b", GaussianField(0, 1), inputs, weight=2.0)]
    for router, message in (
        (d.UniformRouter(), r"makes no use of weights, found \[1.0, 2.0\]"),
        (d.GapRouter(floor=0.5), "a floor of 0.5 leaves 2 routes nothing to share; it must be < 1/2"),
        (d.CurriculumRouter([1.0], end_step=1), "2 routes need as many end weights, found 1"),
    ):
        with pytest.raises(ValueError, match=message):
            d.DanceOPD(routes=routes, grid=GRID, router=router)
    for options in ({"floor": 0.0}, {"floor": 1.0}, {"power": 0.0}, {"decay": 1.0}):
        with pytest.raises(ValueError, match="a GapRouter needs floor in"):
            d.GapRouter(**options)
    for end, end_step in (([], 1), ([1.0, 0.0], 1), ([1.0], 0)):
        with pytest.raises(ValueError, match="positive end weights and end_step >= 1"):
            d.CurriculumRouter(end, end_step)
    with pytest.raises(ValueError, match="goes by the loss of velocity matching, which FlowOPD has not"):
        FlowOPD(routes=routes, grid=GRID, router=d.GapRouter())
    with pytest.raises(ValueError, match="2 routes need as many averages, found 3"):
        d.DanceOPD(routes=routes, grid=GRID, router=d.GapRouter()).load_state({"loss_averages": torch.ones(3).double()})
    with pytest.raises(ValueError, match="plan the pool for shares that stay, and a GapRouter changes the shares"):
        d.StreamingDanceOPD(routes=routes, grid=GRID, router=d.GapRouter(), pool=16, batch_size=4)
    with pytest.raises(ValueError, match="exact share in every update, and a CurriculumRouter changes the shares"):
        DiffusionOPD(routes=routes, grid=GRID, router=d.CurriculumRouter([1.0, 1.0], end_step=3))
