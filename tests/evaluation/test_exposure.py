"""The student's error on its own states and on noised data, where both are known."""

import numpy as np
import torch
from closed_forms import GaussianField

import danceopd as d
from danceopd.evaluation.exposure import data_states, matching_error, own_states

GRID = d.shifted_grid(steps=8, shift=2.0)
FIELD = GaussianField(0.5, 0.7)


def errors(student, states):
    return matching_error(student, FIELD.velocity, states, GRID, condition=None, field_condition=None)


def test_a_student_that_is_its_field_errs_nowhere(rng):
    noise, target = (torch.randn(5, 4, generator=rng) for _ in range(2))
    for states in (own_states(FIELD.velocity, noise, None, GRID), data_states(target, noise, GRID)):
        found = errors(FIELD.velocity, states)
        assert found.error.shape == found.size.shape == (5, 8)
        assert not found.error.any()
        needed = FIELD.velocity(states[:, 3], GRID.sigmas[3].expand(5), None).double()
        np.testing.assert_allclose(found.size[:, 3], (needed**2).mean(1))


def test_a_constant_error_is_the_same_everywhere(rng):
    noise, target = (torch.randn(5, 4, generator=rng) for _ in range(2))

    def student(z, sigma, condition):
        return FIELD.velocity(z, sigma, condition) + 0.1

    own = own_states(student, noise, None, GRID)
    for states in (own, data_states(target, noise, GRID)):
        np.testing.assert_allclose(errors(student, states).error, 0.01, rtol=1e-4)
    assert torch.equal(own[:, 0], noise)
    step = own[:, 1] + (GRID.sigmas[2] - GRID.sigmas[1]) * student(own[:, 1], GRID.sigmas[1].expand(5), None)
    torch.testing.assert_close(own[:, 2], step)


def test_a_student_that_errs_only_where_no_data_are_has_exposure_bias(rng):
    """Data at 0 and noise of one size bound the data's states; a push away from them is seen on own states alone."""
    noise = torch.randn(5, 4, generator=rng).sign()

    def student(z, sigma, condition):
        outside = (z.abs() > sigma[:, None] + 1e-4) | (sigma[:, None] == 1.0)
        return FIELD.velocity(z, sigma, condition) - 3.0 * z * outside

    both = own_states(student, noise, None, GRID), data_states(0 * noise, noise, GRID)
    own, data = (errors(student, states).error for states in both)
    assert np.array_equal(own[:, 0], data[:, 0])
    assert not data[:, 1:].any()
    assert own[:, 1:].all()
