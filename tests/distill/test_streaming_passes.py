"""What a streaming update calls, on whom and with which conditions; its passes; its state."""

from dataclasses import dataclass, replace

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy_streaming import GRID, Elementwise, Numbered, Recorder, plain, streaming

import danceopd as d
from danceopd.distill.pool_plan import spread_steps
from danceopd.distill.query import low_noise


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
    again.load_state(one)
    again.step(student, batch_size=8, generator=rng)
    assert all(torch.equal(one[name], two[name]) for name in one)  # what was loaded is not worked in
    with pytest.raises(ValueError, match=r"found \[16, 16\] trajectories of the routes, needed \[24, 24\]"):
        streaming(*routes, pool=48).load_state(one)
    with pytest.raises(ValueError, match=r"found \[16, 16\] trajectories of the routes, needed \[24, 8\]"):
        streaming(replace(routes[0], weight=3.0), routes[1]).load_state(one)
    with pytest.raises(ValueError, match="another grid or band than this one's 6 steps"):
        streaming(*routes, grid=d.shifted_grid(steps=6, shift=1.0)).load_state(one)
    with pytest.raises(ValueError, match="no condition 'Other' here"):
        streaming(*routes).load_state({name.replace("Kind", "Other"): tensor for name, tensor in one.items()})


def test_a_pool_that_is_still_empty_has_a_state_too():
    method = plain()
    method.load_state(load(save(method.state())))
    assert len(method.trajectories) == 0
    assert method.diagnostics(Elementwise()) == {}


def test_more_samples_of_a_route_than_it_has_in_the_band_are_refused(rng):
    routes = [d.Route(name, GaussianField(0, 1), Numbered()) for name in "ab"]
    with pytest.raises(ValueError, match="8 samples of route 'b' were asked for, and 7 of its 7 trajectories"):
        streaming(*routes, pool=14, batch_size=8).step(
            Elementwise(), batch_size=8, generator=rng, routes=torch.ones(8, dtype=torch.int64)
        )


def test_more_samples_than_the_pool_was_planned_for_are_refused(rng):
    method = streaming(d.Route("a", GaussianField(0, 1), Numbered()), pool=16, batch_size=8)
    with pytest.raises(ValueError, match="pool of 16 was planned for updates of 8 samples, found 9"):
        method.step(Elementwise(), batch_size=9, generator=rng)
    assert len(method.trajectories) == 0


def test_initial_steps_are_even():
    starts = torch.arange(200) / 200
    for start in starts:
        assert torch.equal(spread_steps(16, 8, start).bincount(), torch.full((8,), 2))
        counts = spread_steps(21, 8, start).bincount(minlength=8)
        assert (int(counts.min()), int(counts.max())) == (2, 3)
    assert len({tuple(spread_steps(3, 8, start).tolist()) for start in starts}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": low_noise(over="sigma")}, "need a query band over 'step', found 'sigma'"),
        ({"query": low_noise(per_rollout=2)}, "need per_rollout 1, found 2"),
        ({"own": {"grid": GRID}}, "share one number of steps and one band, and route 'b' has its own"),
        ({"own": {"query": low_noise()}}, "share one number of steps and one band, and route 'b' has its own"),
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
    weight, own = options.pop("weight", 1), options.pop("own", {})
    routes = [
        d.Route("a", GaussianField(0, 1), Numbered(), weight=weight),
        d.Route("b", GaussianField(0, 1), Numbered(), **own),
    ]
    with pytest.raises(ValueError, match=message):
        streaming(*routes, **options)
