"""What fresh and streaming rollouts share: a state of the student's, and the student held against its field there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch, routed_velocity
from danceopd.distill.method import Method
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import BetaQuery, QueryBand
from danceopd.states import NetworkCalls, Query


@dataclass(frozen=True)
class Matched:
    """velocity [B, ...] and losses [B] carry the student's graph."""

    velocity: Tensor
    losses: Tensor
    calls: NetworkCalls


@dataclass(frozen=True, kw_only=True)
class VelocityMatching(Method):
    """The objective at states of the query band; where those come from is the subclass's. The rest: see ``Method``."""

    queries: ClassVar[bool] = True

    query: QueryBand = field(default_factory=BetaQuery)
    objective: VelocityMSE = field(default_factory=VelocityMSE)

    def match(self, student: nn.Module, batch: RoutedBatch, z: Tensor, at: Query) -> Matched:
        """The student with gradient and each sample's own field without, at z [B, ...], B x 1 ``at``."""
        sigma = at.sigma[:, 0].to(z.device)
        target, field_calls = routed_velocity(self.routes, batch, z, sigma)
        torch.clear_autocast_cache()  # a guard: weights cast without gradient must not serve the pass below
        velocity = student(z, sigma, batch.condition)
        losses = self.objective.losses(velocity, target, at, batch.grid, batch.query or self.query)
        return Matched(velocity, losses, NetworkCalls(field=field_calls, train=len(z)))
