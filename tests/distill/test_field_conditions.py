"""Fields that are told something else than the student: who hears what, through every selection."""

from dataclasses import dataclass

import pytest
import torch
from closed_forms import TinyNet
from torch import Tensor

import danceopd as d
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.distill.batch import draw_batches, routed_velocity
from danceopd.distill.query import low_noise

GRID = d.shifted_grid(steps=6)


class Echo:
    """v = the first number of the condition."""

    calls_per_velocity = 1

    def velocity(self, z, sigma, condition):
        return condition[:, :1].expand_as(z)


def numbered(first, *, told_apart):
    """Sample j of a route is told ``first + j``; its field 100 more, if they are told apart. Its target is that too."""

    def draw(count, generator):
        condition = torch.arange(first, first + count).float()[:, None].expand(count, 2)
        target, field_condition = condition.repeat(1, 2), condition + 100 if told_apart else None
        return d.Samples(condition=condition, shape=(4,), target=target, field_condition=field_condition)

    return draw


def two_routes(**options):
    return [
        d.Route("alike", Echo(), numbered(0.0, told_apart=False), **options),
        d.Route("apart", Echo(), numbered(50.0, told_apart=True), **options),
    ]


def test_each_field_hears_its_own_and_the_student_the_users(rng):
    chosen = torch.tensor([0, 1, 0, 1, 1])
    (batch,) = draw_batches(two_routes(), chosen, rng, "cpu", grid=GRID, targets=True)
    assert batch.condition[:, 0].tolist() == batch.target[:, 0].tolist() == [0, 1, 50, 51, 52]
    heard, calls = routed_velocity(two_routes(), batch, torch.zeros(5, 4), torch.ones(5))
    assert heard[:, 0].tolist() == [0, 1, 150, 151, 152]
    assert calls == 5
    twice, _ = routed_velocity(two_routes(), batch.repeated(2), torch.zeros(10, 4), torch.ones(10))
    assert torch.equal(twice, heard.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("states", ["student", "teacher"])
def test_the_whole_update_keeps_them_apart(rng, states):
    """With v_student = 0 a sample's loss is the square of what its field hears."""
    told = []

    class Silent(torch.nn.Module):
        def forward(self, z, sigma, condition):
            told.extend(condition[:, 0].tolist())
            return z * 0

    method = d.DanceOPD(routes=two_routes(), grid=GRID, query=low_noise(per_rollout=2), states=states)
    result = method.step(Silent(), batch_size=4, generator=rng, routes=torch.tensor([0, 0, 1, 1]))
    assert set(told) == {0, 1, 50, 51}
    assert float(result.routes["alike"].loss) == pytest.approx((0 + 1) / 2)
    assert float(result.routes["apart"].loss) == pytest.approx((150**2 + 151**2) / 2)


def test_groups_of_one_condition_keep_its_fields(rng):
    seen = []

    class Spy(Echo):
        def velocity(self, z, sigma, condition):
            seen.append(condition[:, 0].tolist())
            return super().velocity(z, sigma, condition)

    route = d.Route("apart", Spy(), numbered(50.0, told_apart=True))
    FlowOPD(routes=[route], grid=GRID, group_size=2).step(TinyNet(), batch_size=4, generator=rng)
    assert seen[0] == [150, 150, 151, 151]


def test_dropout_empties_both_of_the_same_samples(rng):
    routes = two_routes(prompt_dropout=0.5, empty=lambda c: c * 0 - 1, field_empty=lambda c: c * 0 - 2)
    (batch,) = draw_batches(routes, torch.ones(200, dtype=torch.int64), rng, "cpu", grid=GRID)
    told, heard = batch.condition[:, 0], batch.teacher_condition[:, 0]
    dropped = told == -1
    assert 60 < int(dropped.sum()) < 140
    assert torch.equal(heard == -2, dropped)
    assert torch.equal(heard[~dropped], told[~dropped] + 100)


def test_a_guided_field_keeps_its_own_empty_condition():
    guided = d.GuidedField(Echo(), empty=lambda c: c * 0 - 2, guidance_scale=3.0)
    route = d.Route("guided", guided, numbered(0.0, told_apart=True), empty=lambda c: c * 0 - 1)
    assert route.empty is not guided.empty
    assert route.field_empty is guided.empty


def test_conditions_of_another_kind_share_no_batch(rng):
    @dataclass(frozen=True, kw_only=True)
    class Other(d.Condition):
        guidance: Tensor | None = None

    class Either(Echo):
        def velocity(self, z, sigma, condition):
            return super().velocity(z, sigma, condition.prompt_embeds)

    def draw(kind):
        def samples(count, generator):
            told = d.Condition(prompt_embeds=torch.ones(count, 2))
            return d.Samples(condition=told, shape=(4,), field_condition=kind(prompt_embeds=torch.ones(count, 2)))

        return samples

    routes = [d.Route("a", Either(), draw(Other)), d.Route("b", Either(), draw(d.Condition))]
    batches = draw_batches(routes, torch.tensor([0, 1, 1]), rng, "cpu", grid=GRID)
    assert [(type(batch.teacher_condition), len(batch.route)) for batch in batches] == [(Other, 1), (d.Condition, 2)]
