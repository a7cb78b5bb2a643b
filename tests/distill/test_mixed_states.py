"""A share of the samples at states that are not the student's own."""

import pytest
import torch
from closed_forms import GaussianField, TinyNet
from test_step import inputs, method

import danceopd as d
from danceopd.distill.query import low_noise


def two_alike(source, share):
    """One step with a share of states from elsewhere, and one with all of them from there."""
    route = d.Route("other", GaussianField(0.5, 0.5), inputs)
    return [
        one.step(TinyNet(), batch_size=64, generator=torch.Generator().manual_seed(3))
        for one in (
            method(route, off_policy_share=share, off_policy_states=source),
            method(route, states=source if share == 1 else "student"),
        )
    ]


@pytest.mark.parametrize("source", ["data", "teacher"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_states_from_elsewhere_are_the_on_policy_and_the_off_policy_method(source, share):
    mixed, pure = two_alike(source, share)
    assert mixed.loss.item() == pure.loss.item()
    assert mixed.calls == pure.calls


@pytest.mark.parametrize("source", ["data", "teacher"])
def test_each_sample_has_its_states_from_the_source_that_it_draws(source):
    """From the same noise and queries, a mixed batch's states are some the student's and some the other's, as drawn."""
    routes = [d.Route(name, GaussianField(mean, 0.5), inputs) for name, mean in (("one", 0.5), ("two", -1.0))]
    chosen = torch.tensor([1, 0, 1, 1] * 1000)
    seen = {}

    def states_of(name, **options):
        student, found = TinyNet(), []
        student.register_forward_hook(lambda m, args, out: found.append(args[0]) if torch.is_grad_enabled() else None)
        distil = method(*routes, query=low_noise(per_rollout=2), **options)
        generator = torch.Generator().manual_seed(3)
        result = distil.step(student, batch_size=4000, generator=generator, routes=chosen)
        seen[name] = torch.stack(found, dim=1)  # [B, K, 4]
        return result, distil

    own, _ = states_of("own")
    states_of("other", states=source)
    mixed, distil = states_of("mixed", off_policy_share=0.25, off_policy_states=source)
    away = [torch.isclose(seen["mixed"], seen[name]).flatten(1).all(1) for name in ("other", "own")]
    assert bool((away[0] ^ away[1]).all())  # each sample's two states are both from one of the two
    assert abs(float(away[0].double().mean()) - 0.25) < 0.03
    if source == "data":
        assert mixed.calls.rollout < 0.8 * own.calls.rollout
        assert mixed.calls.rollout / 4000 == pytest.approx(distil.expected_calls().rollout, rel=0.03)


def test_states_of_noised_data_need_targets_though_they_are_few(rng):
    empty = d.Route("bare", GaussianField(0, 1), lambda n, g: d.Samples(condition=None, shape=(4,)))
    with pytest.raises(ValueError, match="route bare has none"):
        method(empty, off_policy_share=0.5).step(TinyNet(), batch_size=16, generator=rng)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_policy_share": 1.5}, "from 0 to 1, found 1.5"),
        ({"off_policy_share": 0.5, "off_policy_states": "student"}, "'data' or 'teacher', found 'student'"),
        ({"off_policy_share": 0.5, "states": "data"}, "the student's own states, found states 'data'"),
    ],
)
def test_states_from_elsewhere_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        method(d.Route("other", GaussianField(0.5, 0.5), inputs), **options)
