"""What the student is asked for at a queried state: the field's velocity, in plain mean squared error.

The weighted variants exist for the ablation. A weight belongs to a step of the grid (a state between grid points takes
that of the one before), normalised to mean 1 over a single query of the band, so that the learning rate means the same;
the paper does not define its own normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danceopd.distill.query import QueryBand
from danceopd.distill.schedule import Grid
from danceopd.distill.sde import divergence_weights
from danceopd.states import Query

KL_ETA = 0.7


@dataclass(frozen=True)
class VelocityMSE:
    """weight(k) * mean over elements of (v_student - v_field)^2, in float32.

    weighting:
        ``"none"``: 1, the method's own objective (DanceOPD eq. 7).
        ``"timestep"``: 1 - sigma.
        ``"kl"``: |dt| (1 + s^2 (1 - sigma) / (2 sigma))^2 / (2 s^2), s = 0.7 sqrt(sigma / (1 - sigma)), the KL between
        the two fields' SDE steps; dt is the grid's own step, and at sigma = 1 the next sigma stands in s.
    """

    weighting: Literal["none", "timestep", "kl"] = "none"

    def __post_init__(self) -> None:
        if self.weighting not in ("none", "timestep", "kl"):
            raise ValueError(f"a weighting is 'none', 'timestep' or 'kl', found {self.weighting!r}")

    def losses(self, student: Tensor, field: Tensor, query: Query, grid: Grid, band: QueryBand) -> Tensor:
        """Loss per sample, mean over elements: [B]. student, field [B, ...]; query B x 1 of the states compared."""
        squared = ((student.float() - field.detach().float()) ** 2).flatten(1).mean(1)
        if self.weighting == "none":
            return squared
        table = self.step_weights(grid, band).to(squared.device)
        return squared * table[query.step[:, 0].to(table.device)]

    def step_weights(self, grid: Grid, band: QueryBand) -> Tensor:
        """Weight of each step, with mean 1 under the band: float32 [N]."""
        if self.weighting == "none":
            return torch.ones(grid.steps)
        raw = 1 - grid.sigmas.double()[:-1] if self.weighting == "timestep" else divergence_weights(grid, KL_ETA)
        mean = (raw * band.step_probabilities(grid)).sum()
        if mean <= 0:
            raise ValueError(f"the {self.weighting} weight is zero everywhere on this band and grid")
        return (raw / mean).float()


OBJECTIVES = {
    "velocity_mse": VelocityMSE(),
    "velocity_mse_timestep": VelocityMSE("timestep"),
    "velocity_mse_kl": VelocityMSE("kl"),
}
"""The recipe's names for objectives."""
