import math
from itertools import pairwise

import torch
from closed_forms import GaussianField, GaussianMixtureField

from danceopd.distill.schedule import shifted_grid
from danceopd.distill.solver import integrate, sample


def euler_error(field, exact, steps: int, shift: float) -> float:
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1)
    reached = integrate(field.velocity, noise, None, shifted_grid(steps=steps, shift=shift))
    return float((reached - exact(noise)).abs().max())


def test_euler_is_first_order_on_a_gaussian():
    field = GaussianField(0.7, 0.5)
    for shift in (1.0, 3.0):
        errors = [euler_error(field, lambda n: field.flow(n, 0.0), steps, shift) for steps in (32, 64, 128, 256)]
        orders = [math.log2(a / b) for a, b in pairwise(errors)]
        assert all(0.9 < order < 1.1 for order in orders), orders


def test_euler_is_first_order_on_a_gaussian_mixture():
    field = GaussianMixtureField([-1.0, 1.5], [0.4, 0.6], 0.4)
    reference = {}

    def exact(noise):
        if "z" not in reference:
            z, steps = noise.clone(), 20_000
            sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            for here, there in pairwise(sigmas):
                mid = z + (there - here) / 2 * field.velocity(z, here.expand(len(z)))
                z = z + (there - here) * field.velocity(mid, ((here + there) / 2).expand(len(z)))
            reference["z"] = z
        return reference["z"]

    errors = [euler_error(field, exact, steps, 1.0) for steps in (128, 256, 512)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.85 < order < 1.15 for order in orders), orders


def test_sampling_reaches_the_data_distribution(rng):
    field = GaussianField(0.7, 0.5)
    out = sample(field.velocity, None, shape=(20_000, 1), grid=shifted_grid(steps=100), generator=rng)
    assert abs(float(out.mean()) - 0.7) < 0.02
    assert abs(float(out.std()) - 0.5) < 0.02


def test_state_is_float32_even_if_the_network_is_bfloat16(rng):
    out = integrate(
        lambda z, sigma, c: torch.full_like(z, 0.001, dtype=torch.bfloat16),
        torch.ones(1, 1),
        None,
        shifted_grid(steps=100),
    )
    # 100 steps of 1e-5: a bfloat16 state would never move from 1
    assert out.dtype == torch.float32
    assert abs(float(out) - 0.999) < 1e-5
