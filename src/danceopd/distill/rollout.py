"""Rollouts: states of a velocity's own trajectory, each computed only as far as it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danceopd.distill.schedule import Grid
from danceopd.distill.solver import VelocityFunction, euler_step
from danceopd.states import Query, select


@dataclass(frozen=True)
class Rollout:
    """states: float32 [B, K, ...], detached; calls: network evaluations made, of all samples together."""

    states: Tensor
    calls: int


@torch.no_grad()
def rollout(velocity: VelocityFunction, noise: Tensor, condition: Any, grid: Grid, query: Query) -> Rollout:
    """Roll ``velocity`` out from pure noise and keep the queried states.

    A sample leaves the batch once its last query is answered, so the number of calls is exactly the sum over samples
    of the Euler steps needed: ``step``, plus one where the last queried sigma lies between grid points. A state between
    grid points is the shortened Euler step from the one before; an earlier query of that kind costs no extra call.

    Args:
        noise: [B, ...], the state at the grid's first sigma.
        condition: B samples' condition.
        query: B x K states, in the order of the rollout.
    """
    z = noise.float()
    sigmas = grid.sigmas.to(z.device)
    asked_step, asked_sigma = query.step.to(z.device), query.sigma.to(z.device)
    between = asked_sigma < sigmas[asked_step]
    last_call = (asked_step + between.long()).amax(dim=1)
    states = z.new_empty(len(z), asked_step.shape[1], *z.shape[1:])
    active = torch.arange(len(z), device=z.device)
    calls = 0
    for step in range(int(asked_step.max()) + 1):
        rows, columns = (asked_step[active] == step).nonzero(as_tuple=True)
        states[active[rows], columns] = z[rows]
        going = last_call[active] > step
        if not bool(going.all()):
            kept = going.nonzero().squeeze(1)
            z, active, condition = z[kept], active[kept], select(condition, kept)
        if len(active) == 0:
            break
        here = sigmas[step].expand(len(z))
        v = velocity(z, here, condition)
        calls += len(active)
        rows, columns = ((asked_step == step) & between)[active].nonzero(as_tuple=True)
        if len(rows):
            states[active[rows], columns] = euler_step(z[rows], v[rows], here[rows], asked_sigma[active[rows], columns])
        z = euler_step(z, v, here, sigmas[step + 1].expand(len(z)))
    return Rollout(states, calls)
