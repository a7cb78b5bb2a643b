import pytest
import torch
from closed_forms import GaussianField, TinyNet

import danceopd as d


def test_model_field_is_frozen_and_gradient_free():
    net = TinyNet()
    field = d.ModelField(net)
    out = field.velocity(torch.ones(2, 4, requires_grad=True), torch.ones(2), None)
    assert not out.requires_grad
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(TypeError, match="found function"):
        d.ModelField(lambda z, s, c: z)


class ByCondition(GaussianField):
    """v = condition, to see guidance's arithmetic."""

    def velocity(self, z, sigma, condition=None):
        return condition[:, :1].expand_as(z)


def test_guidance_is_linear_in_the_difference_to_the_empty_condition():
    guided = d.GuidedField(ByCondition(0, 1), empty=lambda c: c * 0 + 2.0, guidance_scale=3.5)
    out = guided.velocity(torch.zeros(3, 4), torch.ones(3), torch.full((3, 2), 5.0))
    torch.testing.assert_close(out, torch.full((3, 4), 2.0 + 3.5 * 3.0))
    assert guided.calls_per_velocity == 2


def test_guidance_of_one_is_the_field_and_on_the_empty_condition_it_is_v_empty_at_any_scale():
    field = d.ModelField(TinyNet())
    z, sigma, condition = torch.randn(3, 4), torch.rand(3), torch.randn(3, 2)
    for scale in (1.0, 7.0):
        guided = d.GuidedField(field, empty=torch.zeros_like, guidance_scale=scale)
        at = condition if scale == 1.0 else torch.zeros_like(condition)
        torch.testing.assert_close(guided.velocity(z, sigma, at), field.velocity(z, sigma, at))


def test_mixture_is_the_weighted_average_and_counts_its_calls():
    a, b = GaussianField(1.0, 0.5), GaussianField(-1.0, 0.5)
    z, sigma = torch.randn(3, 4), torch.rand(3)
    mixed = d.MixtureField([a, b], weights=[3, 1])
    torch.testing.assert_close(
        mixed.velocity(z, sigma, None), 0.75 * a.velocity(z, sigma) + 0.25 * b.velocity(z, sigma)
    )
    assert mixed.calls_per_velocity == 2
    with pytest.raises(ValueError, match="one positive weight each"):
        d.MixtureField([a, b], weights=[1])


def test_bad_guidance_scales_are_refused():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance_scale"):
            d.GuidedField(GaussianField(0, 1), empty=lambda c: c, guidance_scale=scale)
