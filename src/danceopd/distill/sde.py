"""The stochastic sampler that keeps (in the limit of many steps) the flow's marginals: Flow-GRPO's and Flow-OPD's SDE.

One step from sigma to sigma' with dt = sigma' - sigma < 0 and s = eta sqrt(sigma / (1 - sigma)) is Gaussian:

    mean = z (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,    std = s sqrt(-dt)

At sigma = 1, where s is infinite, s is taken at sigma'. At a finite number of steps the marginals are NOT the flow's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.distill.schedule import Grid
from danceopd.distill.solver import per_sample


@dataclass(frozen=True)
class SDEStep:
    """One step's coefficients: mean = state_factor z + velocity_factor v, deviation std; each [B]."""

    state_factor: Tensor
    velocity_factor: Tensor
    std: Tensor

    def mean(self, z: Tensor, velocity: Tensor) -> Tensor:
        """Mean of the next state, float32. z, velocity [B, ...]."""
        return per_sample(self.state_factor, z) * z + per_sample(self.velocity_factor, z) * velocity.float()

    def divergence(self, one: Tensor, other: Tensor) -> Tensor:
        """KL between this step's Gaussians of means ``one`` and ``other``, mean over elements: [B].

        mean((one - other)^2) / (2 std^2).
        """
        return ((one - other) ** 2).flatten(1).mean(1) / (2 * self.std**2)

    def log_probability(self, arrived: Tensor, mean: Tensor) -> Tensor:
        """log N(arrived; mean, std^2) without its constant, mean over elements: [B]."""
        return -self.divergence(arrived, mean)


def sde_step(sigma: Tensor, sigma_next: Tensor, eta: float) -> SDEStep:
    """Coefficients of the step sigma -> sigma_next (each [B], sigma_next < sigma).

    Raises:
        ValueError: if eta is not positive, or a step goes from 1 straight to 0, where s has no value.
    """
    if eta <= 0:
        raise ValueError(f"an SDE step needs eta > 0, found {eta}")
    inside = torch.where(sigma >= 1, sigma_next, sigma)
    if bool((inside <= 0).any()):
        raise ValueError("an SDE step cannot go from sigma 1 straight to 0: the grid needs at least two steps")
    squared = eta**2 * inside / (1 - inside)
    dt = sigma_next - sigma
    return SDEStep(
        state_factor=1 + squared / (2 * sigma) * dt,
        velocity_factor=(1 + squared * (1 - sigma) / (2 * sigma)) * dt,
        std=(squared * -dt).sqrt(),
    )


def divergence_weights(grid: Grid, eta: float) -> Tensor:
    """The KL of each step as a factor on mean((v - v')^2): velocity_factor^2 / (2 std^2), float64 [N]."""
    sigmas = grid.sigmas.double()
    step = sde_step(sigmas[:-1], sigmas[1:], eta)
    return step.velocity_factor**2 / (2 * step.std**2)
