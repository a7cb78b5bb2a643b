"""Streaming rollouts against fresh ones and closed forms."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import danceopd as d
from danceopd.distill.query import high_noise, low_noise, mid_noise, uniform
from danceopd.distill.rollout import rollout
from danceopd.distill.streaming import even_steps

GRID = d.shifted_grid(steps=8, shift=3.0)


class Numbered:
    """A route's data whose conditions [n, 2] are a number of each trajectory's own, and a mark that dropout clears."""

    def __init__(self, size: int = 4, first: int = 0) -> None:
        self.size, self.next = size, first

    def __call__(self, count, generator):
        numbers = torch.arange(self.next, self.next + count).float()
        self.next += count
        return d.Samples(condition=torch.stack([numbers, torch.ones(count)], 1), shape=(self.size,))


class Elementwise(nn.Module):
    """Any size, and a sample's velocity does not depend on its batch to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, sigma, condition=None):
        return self.a * z + 0.1 * sigma[:, None]


class Recorder:
    """The conditions that a student saw in each update, with gradient and without."""

    def __init__(self, student: nn.Module) -> None:
        self.trained: list[Tensor] = []
        self.walked: list[Tensor] = []
        student.register_forward_hook(self._note)

    def _note(self, module, args, out) -> None:
        (self.trained if torch.is_grad_enabled() else self.walked).append(args[2])


def streaming(*routes, **options):
    return d.StreamingDanceOPD(
        **{"routes": routes, "grid": GRID, "stratified": options.get("per") != "step", "pool": 32, "batch_size": 8}
        | options
    )


def plain(field=None, **options):
    return streaming(d.Route("one", field or GaussianField(0.7, 0.5), Numbered()), **options)


def fresh_states(method, student, group):
    step = group.step[:, None]
    return rollout(student, group.noise(), group.batch.condition, GRID, d.Query(step, GRID.sigmas[step])).states[:, 0]


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


def closed_form_gradient(student, mean, std, band):
    """d/da_k, d/db_k of sum_k p_k E((a_k - a*_k) z_k + b_k - b*_k)^2 over the student's own Gaussian states."""
    sigma = GRID.sigmas.double()
    variance = (1 - sigma[:-1]) ** 2 * std**2 + sigma[:-1] ** 2
    slope = (sigma[:-1] - (1 - sigma[:-1]) * std**2) / variance
    off_a = student.a.detach().double() - slope
    off_b = student.b.detach().double() + mean + slope * (1 - sigma[:-1]) * mean
    at, spread, result = 0.0, 1.0, []
    for k, p in enumerate(band.step_probabilities(GRID)):
        result.append(2 * p * torch.stack([off_a[k] * (spread + at**2) + off_b[k] * at, off_a[k] * at + off_b[k]]))
        factor = 1 + (sigma[k + 1] - sigma[k]) * student.a[k].detach()
        at, spread = factor * at + (sigma[k + 1] - sigma[k]) * student.b[k].detach(), factor**2 * spread
    return torch.stack(result, 1).flatten()


def test_the_streaming_gradient_is_the_fresh_one_in_expectation():
    """Pools are independent; the updates of one are not, so an error bar is taken over pools."""
    student, field, band = LinearStudent(), GaussianField(0.7, 0.5), d.BetaQuery(2.5, 1.5)
    expected = closed_form_gradient(student, 0.7, 0.5, band)

    def z_scores(make, updates):
        means = []
        for seed in range(120):
            method, generator = make(), torch.Generator().manual_seed(seed)
            total = sum(method.step(student, batch_size=8, generator=generator).loss for _ in range(updates))
            gradients = torch.autograd.grad(total / updates, [student.a, student.b])
            means.append(torch.cat(gradients).double())
        stacked = torch.stack(means)
        return (stacked.mean(0) - expected) / (stacked.std(0) / len(stacked) ** 0.5)

    routes = [d.Route("one", field, Numbered(size=8))]
    fresh = z_scores(lambda: d.DanceOPD(routes=routes, grid=GRID, query=band), 3)
    streamed = z_scores(lambda: streaming(*routes, query=band), 10)  # more than a trajectory's 8 steps
    assert float(fresh.abs().max()) < 4
    assert float(streamed.abs().max()) < 4


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


def test_a_batch_holds_no_trajectory_twice_though_a_trajectory_is_trained_again(rng):
    student = TinyNet()
    seen, method = Recorder(student), plain(pool=16)
    for _ in range(40):
        method.step(student, batch_size=8, generator=rng)
    assert len(seen.trained) == 40
    assert len(seen.walked) == 40 + 3 + 7  # and the rollouts that filled the pool, to steps 0 to 3 and 4 to 7
    for trained, walked in zip(seen.trained, seen.walked[10:], strict=True):
        numbers = torch.cat([trained, walked])[:, 0]
        assert len(trained) == len(trained[:, 0].unique()) == 8
        assert len(numbers.unique()) == len(numbers)
    assert int(torch.cat(seen.trained)[:, 0].long().bincount().max()) > 1


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


@pytest.mark.parametrize("options", [{}, {"per": "step", "pool": 48}, {"stratified": False, "pool": 48}])
def test_counted_calls_are_those_made_and_those_expected(rng, options):
    student = TinyNet()
    seen = Recorder(student)
    guided = d.GuidedField(d.ModelField(TinyNet(seed=1)), empty=torch.zeros_like, guidance_scale=3.0)
    method = streaming(
        d.Route("plain", GaussianField(0, 1), Numbered()), d.Route("guided", guided, Numbered()), **options
    )
    expected, updates = method.expected_calls(), 160
    first = method.step(student, batch_size=8, generator=rng).calls
    total = d.NetworkCalls()
    for _ in range(updates):
        total += method.step(student, batch_size=8, generator=rng).calls
    assert first.rollout + total.rollout == sum(map(len, seen.walked))
    assert first.train + total.train == sum(map(len, seen.trained)) == 8 * (updates + 1)
    assert first.rollout == pytest.approx(expected.once + 8 * expected.rollout, rel=0.1)
    trained = 8 * updates
    assert total.rollout / trained == pytest.approx(expected.rollout, rel=0.01)
    assert total.field / trained == pytest.approx(expected.field, rel=0.15 if options else 1e-6)


def test_an_update_of_one_route_trains_that_route_and_moves_all(rng):
    student = TinyNet()
    seen = Recorder(student)
    method = streaming(
        d.Route("a", GaussianField(0, 1), Numbered(first=0), weight=3),
        d.Route("b", GaussianField(0, 1), Numbered(first=10_000)),
        per="step",
    )
    assert method.plan.members.tolist() == [16, 16]  # whichever is drawn trains a whole batch, so shares do not matter
    drawn = []
    for _ in range(60):
        before = {int(s): int(j) for g in method.trajectories.groups for s, j in zip(g.seed, g.step, strict=True)}
        result = method.step(student, batch_size=8, generator=rng)
        (name,) = result.routes
        drawn.append(name)
        assert bool(((seen.trained[-1][:, 0] >= 10_000) == (name == "b")).all())
        assert len(seen.trained[-1]) == 8
        after = {int(s): int(j) for g in method.trajectories.groups for s, j in zip(g.seed, g.step, strict=True)}
        assert all(after[seed] == step + 1 for seed, step in before.items() if seed in after)
    assert 30 < drawn.count("a") < 57


def test_routes_keep_their_shares_of_a_mixed_batch(rng):
    method = streaming(
        d.Route("a", GaussianField(0, 1), Numbered(), weight=3), d.Route("b", GaussianField(0, 1), Numbered())
    )
    for _ in range(10):
        result = method.step(Elementwise(), batch_size=8, generator=rng)
        assert {name: route.samples for name, route in result.routes.items()} == {"a": 6, "b": 2}
    chosen = torch.ones(4, dtype=torch.int64)
    assert method.step(Elementwise(), batch_size=4, generator=rng, routes=chosen).routes.keys() == {"b"}


def test_prompt_dropout_is_decided_when_a_trajectory_starts(rng):
    student = TinyNet()
    seen = Recorder(student)
    unmarked = lambda condition: condition * torch.tensor([1.0, 0.0])  # noqa: E731
    route = d.Route("r", GaussianField(0, 1), Numbered(), prompt_dropout=0.25, empty=unmarked)
    method = streaming(route, pool=400, batch_size=100)
    for _ in range(30):
        method.step(student, batch_size=100, generator=rng)
    everything = torch.cat(seen.trained + seen.walked)
    numbers, marks = everything[:, 0].long(), everything[:, 1]
    count = numbers.bincount()
    assert bool((numbers.bincount(weights=marks).long() % count == 0).all())  # always or never
    share = 1 - numbers.bincount(weights=marks) / count
    assert abs(float(share.mean()) - 0.25) < 4 * (0.25 * 0.75 / len(share)) ** 0.5


def test_a_field_is_told_what_its_route_says_of_the_same_trajectories(rng):
    student, told = TinyNet(), []
    seen = Recorder(student)

    class Asked(GaussianField):
        def velocity(self, z, sigma, condition=None):
            told.append(condition)
            return super().velocity(z, sigma)

    class Translated(Numbered):
        def __call__(self, count, generator):
            samples = super().__call__(count, generator)
            return replace(samples, field_condition=-samples.condition)

    routes = [d.Route("a", Asked(0, 1), Translated()), d.Route("b", GaussianField(0, 1), Numbered(first=10_000))]
    method = streaming(*routes)
    for _ in range(12):
        method.step(student, batch_size=8, generator=rng)
    for condition, asked in zip(seen.trained, told, strict=True):
        assert torch.equal(-condition[condition[:, 0] < 10_000], asked)


def test_micro_batches_change_the_passes_and_not_the_update():
    def gradient(count):
        student, sizes = TinyNet(), []
        student.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
        generator = torch.Generator().manual_seed(4)
        method = plain(d.ModelField(TinyNet(seed=1)), largest_pass=8 // count)
        for _ in range(10):
            student.zero_grad()
            options = {"backward": lambda loss: loss.backward(), "micro_batches": count}
            (result,) = method.update(student, batch_size=8, generator=generator, **options)
            assert not result.loss.requires_grad
        (group,) = method.trajectories.groups
        assert max(sizes) == 8 // count  # trained, walking, and of the rollouts that fill the pool
        return [p.grad for p in student.parameters()], group, result

    (one, group, whole), (two, other, parts) = gradient(1), gradient(4)
    with pytest.raises(ValueError, match="4 micro-batches of 8 samples need a largest_pass of 2, found 8"):
        plain().update(TinyNet(), batch_size=8, micro_batches=4, generator=torch.Generator())
    torch.testing.assert_close(one, two)
    assert torch.equal(group.seed, other.seed)
    torch.testing.assert_close(group.z, other.z)
    torch.testing.assert_close(whole.loss, parts.loss)
    assert whole.calls == parts.calls


def test_gradient_checkpointing_changes_no_gradient():
    class Checkpointed(TinyNet):
        def forward(self, z, sigma, condition=None):
            return checkpoint(super().forward, z, sigma, condition, use_reentrant=False)

    gradients = []
    for student in (TinyNet(), Checkpointed()):
        method, generator = plain(), torch.Generator().manual_seed(4)
        for _ in range(4):
            loss = method.step(student, batch_size=8, generator=generator).loss
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    torch.testing.assert_close(*gradients)


@dataclass(frozen=True, kw_only=True)
class Kind(d.Condition):
    extra: Tensor


def test_a_pool_goes_on_exactly_from_its_state(rng):
    class Conditioned(TinyNet):
        def forward(self, z, sigma, condition):
            return super().forward(z, sigma, condition.prompt_embeds + condition.extra)

    def data(count, generator):
        drawn = torch.randn(3, count, 2, generator=generator)
        condition = Kind(prompt_embeds=drawn[0], extra=drawn[1])
        return d.Samples(condition=condition, shape=(4,), field_condition=Kind(prompt_embeds=drawn[2], extra=drawn[1]))

    def bare(count, generator):
        return d.Samples(condition=Kind(prompt_embeds=torch.zeros(count, 2), extra=torch.ones(count, 1)), shape=(4,))

    student = Conditioned()
    routes = [d.Route("a", d.ModelField(Conditioned(seed=1)), data), d.Route("b", GaussianField(0, 1), bare)]
    method, again = streaming(*routes), streaming(*routes)
    for _ in range(9):
        method.step(student, batch_size=8, generator=rng)
    again.load_state(load(save(method.state())))
    for _ in range(9):
        twin = torch.Generator()
        twin.set_state(rng.get_state())
        first = method.step(student, batch_size=8, generator=rng)
        assert torch.equal(first.loss, again.step(student, batch_size=8, generator=twin).loss)
    one, two = method.state(), again.state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="found 32 trajectories, needed 48"):
        streaming(*routes, pool=48).load_state(one)
    with pytest.raises(ValueError, match="no condition 'Other' here"):
        streaming(*routes).load_state({name.replace("Kind", "Other"): tensor for name, tensor in one.items()})


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


def test_no_pass_is_larger_than_told_and_small_groups_share_theirs(rng):
    """Eight shapes of four trajectories: passes of 4, however small the groups, and of what measures staleness too."""
    student = Elementwise()
    sizes = []
    student.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    routes = [d.Route(str(size), GaussianField(0, 1), Numbered(size=size)) for size in range(3, 11)]
    method = streaming(*routes, pool=64, batch_size=16, largest_pass=4, staleness_updates=1)
    method.step(student, batch_size=16, generator=rng)
    sizes.clear()
    method.step(student, batch_size=16, generator=rng)
    assert len(sizes) == 8 + 2 * 8  # two trained states of each shape at once, and six others in twos of three or four
    method.diagnostics(student)
    assert max(sizes) <= 4


def test_a_pool_that_is_still_empty_has_a_state_too():
    method = plain()
    method.load_state(load(save(method.state())))
    assert len(method.trajectories) == 0


def test_initial_steps_are_even(rng):
    assert torch.equal(even_steps(16, 8, rng).bincount(), torch.full((8,), 2))
    counts = even_steps(21, 8, rng).bincount(minlength=8)
    assert (int(counts.min()), int(counts.max())) == (2, 3)
    assert len({tuple(even_steps(3, 8, rng).tolist()) for _ in range(200)}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": low_noise(over="sigma")}, "need a query band over 'step', found 'sigma'"),
        ({"query": low_noise(per_rollout=2)}, "need per_rollout 1, found 2"),
        ({"pool": 7}, "a pool of 7 is too small: an update may train 4 samples of route 'b', which has 3"),
        ({"per": "step", "pool": 15}, "an update may train 8 samples of route 'b', which has 7"),
        ({"stratified": False, "pool": 15}, "may train 8 samples of route 'b', which has 7"),
        ({"stratified": False, "pool": 15}, "; 16 is enough"),
        (
            {"stratified": False, "pool": 16, "weight": 4},
            "'b', which has 3 .*; 40 is enough, 16 with stratified routing",
        ),
        ({"largest_pass": 0}, "largest_pass is at least 1, found 0"),
        ({"per": "step", "pool": 16}, "are 39% from the query band .*; 24 is enough"),
    ],
)
def test_what_cannot_stream_is_refused_by_name(options, message):
    options = dict(options)
    weight = options.pop("weight", 1)
    routes = [
        d.Route("a", GaussianField(0, 1), Numbered(), weight=weight),
        d.Route("b", GaussianField(0, 1), Numbered()),
    ]
    with pytest.raises(ValueError, match=message):
        streaming(*routes, **options)
