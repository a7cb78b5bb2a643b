"""Joint training: flow matching on the mixed data of all routes. No field is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch, draw_batches
from danceopd.distill.losses import UpdateLosses
from danceopd.distill.routing import Route, Router, router_for
from danceopd.distill.schedule import Grid
from danceopd.distill.solver import per_sample
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class JointTraining:
    """loss = mean |v_student((1 - sigma) x + sigma eps, sigma, c) - (eps - x)|^2 over all routes' data.

    sigma_mean, sigma_std: sigma = sigmoid(N(mean, std^2)), the logit-normal density (Esser et al. 2024, section 3.1).
    grid: only for sampling from the student; training draws sigma anywhere in (0, 1).
    """

    routes: Sequence[Route]
    grid: Grid
    per: Literal["sample", "step"] = "sample"
    stratified: bool = False
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    device: torch.device | str = "cpu"

    @property
    def router(self) -> Router:
        return router_for(self.routes, self.per, self.stratified)

    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs."""
        return ExpectedCalls(rollout=0.0, field=0.0, train=1.0)

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update; arguments as in ``DanceOPD.step``.

        Raises:
            ValueError: if a route's data has no target images.
        """
        chosen = self.router.draw(batch_size, generator) if routes is None else routes
        losses = UpdateLosses(self.routes, batch_size, backward)
        calls = NetworkCalls()
        for batch in draw_batches(self.routes, chosen, generator, self.device, targets=True):
            clean = _targets(self.routes, batch)
            drawn = torch.randn(len(clean), generator=generator) * self.sigma_std + self.sigma_mean
            sigma = torch.sigmoid(drawn).to(self.device)
            noise = torch.randn(clean.shape, generator=generator).to(self.device)
            z = (1 - per_sample(sigma, clean)) * clean + per_sample(sigma, clean) * noise
            velocity = student(z, sigma, batch.condition)
            squared = ((velocity.float() - (noise - clean)) ** 2).flatten(1).mean(1)
            losses.add(batch.route, squared, sigma)
            calls += NetworkCalls(train=len(z))
        return losses.result(calls)


def _targets(routes: Sequence[Route], batch: RoutedBatch) -> Tensor:
    if batch.target is None:
        names = ", ".join(routes[index].name for index in batch.route.unique().tolist())
        raise ValueError(f"joint training needs target images, and the data of route {names} has none")
    return batch.target.float()
