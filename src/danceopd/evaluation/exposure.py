"""How far a student is from its field where it goes itself, and where noised data are.

Off-policy methods match the field on noised data, and a student is then sampled on states of its own. If it errs more
there (exposure bias), on-policy states have something to mend; if it does not, they have not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danceopd.distill.rollout import rollout
from danceopd.distill.schedule import Grid
from danceopd.distill.solver import VelocityFunction, noised
from danceopd.states import Query


@dataclass(frozen=True)
class MatchingError:
    """|v_student - v_field|^2 and |v_field|^2, means over elements, at each step of the grid: float64 [n, N] each."""

    error: np.ndarray
    size: np.ndarray


@torch.no_grad()
def matching_error(
    student: VelocityFunction,
    field: VelocityFunction,
    states: Tensor,
    grid: Grid,
    *,
    condition: Any,
    field_condition: Any,
) -> MatchingError:
    """The student against the field at ``states`` [n, N, ...], at the N sigmas that ``grid`` calls a model on."""
    error, size = [], []
    for step in range(grid.steps):
        z, sigma = states[:, step], grid.sigmas[step].to(states.device).expand(len(states))
        own, needed = (v.double().flatten(1) for v in (student(z, sigma, condition), field(z, sigma, field_condition)))
        error.append(((own - needed) ** 2).mean(1))
        size.append((needed**2).mean(1))
    return MatchingError(*(torch.stack(parts, dim=1).cpu().numpy() for parts in (error, size)))


def own_states(student: VelocityFunction, noise: Tensor, condition: Any, grid: Grid) -> Tensor:
    """All states of the student's rollout from noise [n, ...] that it is called on: [n, N, ...]."""
    steps, sigmas = torch.arange(grid.steps), grid.sigmas[:-1]
    every = Query(steps.expand(len(noise), -1), sigmas.expand(len(noise), -1))
    return rollout(student, noise, condition, grid, every).states


def data_states(target: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """(1 - sigma) x + sigma eps of clean latents [n, ...] at the same sigmas: [n, N, ...]."""
    sigmas = grid.sigmas[:-1].to(noise.device)
    return torch.stack([noised(target, noise, sigma.expand(len(noise))) for sigma in sigmas], dim=1)
