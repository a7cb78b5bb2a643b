"""Several steps of a field in one: what a student that is to sample in few steps is taught."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danceopd.distill.schedule import Grid, GridFor, grid_of
from danceopd.distill.solver import euler_step
from danceopd.fields.field import VelocityField


class MeanVelocityField:
    """The velocity that in one step of ``grid`` leads where ``substeps`` Euler steps of ``field`` lead.

    From sigma_k to sigma_{k+1} the field takes m even steps; the mean of its m velocities is v. A student that matches
    it takes the N steps of the grid along the path that the field takes in m N (the target of progressive
    distillation, Salimans & Ho 2022, here at the student's own states).

    grid: the rollout's, or a function of one latent's shape that gives it.

    Raises:
        ValueError: if ``substeps`` is below 1.
    """

    def __init__(self, field: VelocityField, *, grid: Grid | GridFor, substeps: int) -> None:
        if substeps < 1:
            raise ValueError(f"substeps are at least 1, found {substeps}")
        self.field = field
        self.grid = grid
        self.substeps = substeps
        self.calls_per_velocity = substeps * field.calls_per_velocity

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """The mean velocity over the step that begins at ``sigma``: float32, the shape of z.

        Raises:
            ValueError: if a sigma is none of the grid's.
        """
        sigmas = grid_of(self.grid, tuple(z.shape[1:])).sigmas.to(sigma)
        step = (sigmas[:-1] - sigma[:, None]).abs().argmin(dim=1)
        if not torch.equal(sigmas[step], sigma):
            raise ValueError(
                f"a mean velocity is of one step of the grid, from one of the sigmas {sigmas[:-1].tolist()}; "
                f"found {sigma.tolist()}"
            )
        length = (sigmas[step + 1] - sigma) / self.substeps
        state, total = z.float(), torch.zeros_like(z, dtype=torch.float32)
        for substep in range(self.substeps):
            here = sigma + substep * length
            velocity = self.field.velocity(state, here, condition).float()
            total += velocity
            state = euler_step(state, velocity, here, here + length)
        return total / self.substeps
