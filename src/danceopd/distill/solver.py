"""Euler's method in sigma, and plain sampling with it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from danceopd.distill.schedule import Grid

VelocityFunction = Callable[[Tensor, Tensor, Any], Tensor]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values [B] shaped to broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_sigma = (1 - sigma) x + sigma eps. clean, noise [B, ...]; sigma [B]."""
    s = per_sample(sigma, clean)
    return (1 - s) * clean + s * noise


def euler_step(z: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """z + (sigma_next - sigma) v, in float32. z, velocity [B, ...]; sigma, sigma_next [B]."""
    return z + per_sample(sigma_next - sigma, z) * velocity.float()


@torch.no_grad()
def sample(
    velocity: VelocityFunction,
    condition: Any,
    *,
    shape: tuple[int, ...],
    grid: Grid,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Integrate from pure noise to data along the whole grid.

    velocity: a student module or a field's ``velocity``. shape: of the result, batch included. Noise is drawn from the
    (CPU) generator and then moved to ``device``, so that a seed means the same noise everywhere.

    Returns:
        Clean latents, float32, of ``shape``.
    """
    noise = torch.randn(shape, generator=generator).to(device)
    return integrate(velocity, noise, condition, grid)


@torch.no_grad()
def integrate(velocity: VelocityFunction, noise: Tensor, condition: Any, grid: Grid) -> Tensor:
    """Integrate given noise (at the grid's first sigma) to sigma = 0. The state is float32 throughout."""
    z = noise.float()
    sigmas = grid.sigmas.to(z.device)
    for sigma, sigma_next in pairwise(sigmas):
        here, there = sigma.expand(len(z)), sigma_next.expand(len(z))
        z = euler_step(z, velocity(z, here, condition), here, there)
    return z
