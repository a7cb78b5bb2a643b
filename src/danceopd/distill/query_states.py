"""Where the matched states come from: the student's own rollout (the method), or, off-policy, a teacher or data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch
from danceopd.distill.rollout import Rollout, rollout
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.distill.solver import noised
from danceopd.states import Query, select

StateSource = Literal["student", "teacher", "data"]
OffPolicySource = Literal["teacher", "data"]


def queried_states(
    source: StateSource,
    student: nn.Module,
    routes: Sequence[Route],
    batch: RoutedBatch,
    noise: Tensor,
    grid: Grid,
    query: Query,
) -> Rollout:
    """The queried states of a batch, from the given source; only the student's are on-policy."""
    if source == "student":
        return rollout(student, noise, batch.condition, grid, query)
    if source == "teacher":
        return teacher_states(routes, batch, noise, grid, query)
    return data_states(routes, batch, noise, query)


def teacher_states(routes: Sequence[Route], batch: RoutedBatch, noise: Tensor, grid: Grid, query: Query) -> Rollout:
    """States of each routed field's own rollout (off-policy)."""
    states = noise.new_empty(len(noise), query.step.shape[1], *noise.shape[1:])
    calls = 0
    for index in batch.route.unique().tolist():
        rows = (batch.route == index).nonzero().squeeze(1)
        teacher, there = routes[index].field, rows.to(noise.device)
        rolled = rollout(teacher.velocity, noise[there], select(batch.teacher_condition, there), grid, query[rows])
        states[there] = rolled.states
        calls += rolled.calls * teacher.calls_per_velocity
    return Rollout(states, calls)


def data_states(routes: Sequence[Route], batch: RoutedBatch, noise: Tensor, query: Query) -> Rollout:
    """Real targets noised to the queried sigma: (1 - sigma) x + sigma eps (off-policy).

    Raises:
        ValueError: if a route's data has no targets.
    """
    clean = batch.required_target(routes)
    queried = [noised(clean, noise, sigma) for sigma in query.sigma.to(noise.device).unbind(1)]
    return Rollout(torch.stack(queried, dim=1), calls=0)
