"""The effective guidance of a field, and the product law that it is held against.

Guidance moves a prediction along d = v_cond - v_empty of a frozen base. A field v is therefore read as
``v = v_empty + g d + rest``, and its effective guidance g is the least-squares slope <v - v_empty, d> / <d, d>, the
sums over all elements and states.

The product law: a student that absorbed guidance alpha answers the prompt with v_empty + alpha d. External guidance
beta forms s_empty + beta (s_cond - s_empty) from the student's own two outputs. With s_empty = v_empty that is
v_empty + alpha beta d: beta acts as alpha * beta, exactly. Where the student's empty output has drifted to
v_empty + a d, it acts as alpha beta - (beta - 1) a instead. Nothing but the empty-condition samples
(``prompt_dropout``) holds s_empty at v_empty; a itself is the effective guidance at beta = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from danceopd.distill.schedule import Grid
from danceopd.distill.solver import VelocityFunction
from danceopd.evaluation.exposure import own_states
from danceopd.families.family import Family


@dataclass(frozen=True)
class GuidanceSums:
    """What the regression needs of each sample, [n] or [tasks, n]: <v - v_empty, d>, <d, d>, <v - v_empty, itself>.

    A last axis may hold a rollout's steps apart.
    """

    along: np.ndarray
    square: np.ndarray
    whole: np.ndarray

    def summed(self, axis: int) -> GuidanceSums:
        return GuidanceSums(self.along.sum(axis), self.square.sum(axis), self.whole.sum(axis))


def guidance_sums(velocity: Tensor, empty: Tensor, conditional: Tensor) -> GuidanceSums:
    """Sums of a field's velocities against the base's empty and conditional ones, all [n, ...]: [n] each."""
    moved, direction = ((v.double() - empty.double()).flatten(1) for v in (velocity, conditional))
    products = ((moved * direction), direction**2, moved**2)
    return GuidanceSums(*(product.sum(1).cpu().numpy() for product in products))


def unexplained(sums: GuidanceSums) -> float:
    """Share of |v - v_empty|^2 that the direction does not explain, 0 to 1; 0 for a field that is v_empty itself."""
    whole, square = float(sums.whole.sum()), float(sums.square.sum())
    return max(0.0, 1 - float(sums.along.sum()) ** 2 / (square * whole)) if whole * square > 0 else 0.0


@torch.no_grad()
def student_guidance(
    student: VelocityFunction,
    base: VelocityFunction,
    family: Family,
    *,
    prompts: Sequence[str],
    noise: Tensor,
    grid: Grid,
    scales: Sequence[float],
    batch_size: int,
) -> dict[float, GuidanceSums]:
    """Sums of the student under each external scale, and at 0 (its empty output), against the base: [n, N] each.

    The states are the student's own: all N states on which ``grid`` calls a model, from pure noise, of one unguided
    rollout for each prompt and noise [n, ...]. Every state counts alike, in the velocity's own metric.
    """
    found: dict[float, list[GuidanceSums]] = {0.0: [], **{scale: [] for scale in scales}}
    for first in range(0, len(prompts), batch_size):
        condition = family.encode(prompts[first : first + batch_size], None)
        z = noise[first : first + batch_size].to(condition.prompt_embeds.device)
        states = own_states(student, z, condition, grid)
        sums: dict[float, list[GuidanceSums]] = {scale: [] for scale in found}
        empty_condition = family.empty(condition)
        for step in range(grid.steps):
            here, sigma = states[:, step], grid.sigmas[step].to(z.device).expand(len(z))
            own, own_empty, conditional, empty = (
                model(here, sigma, asked).float() for model in (student, base) for asked in (condition, empty_condition)
            )
            for scale, so_far in sums.items():
                guided = family.guide(own, own_empty, scale)
                so_far.append(guidance_sums(guided, empty, conditional))
        for scale, of_steps in sums.items():
            found[scale].append(_each(of_steps, partial(np.stack, axis=1)))
    return {scale: _each(parts, np.concatenate) for scale, parts in found.items()}


def _each(parts: Sequence[GuidanceSums], join: Callable[[Sequence[np.ndarray]], np.ndarray]) -> GuidanceSums:
    return GuidanceSums(*(join([getattr(part, field.name) for part in parts]) for field in fields(GuidanceSums)))
