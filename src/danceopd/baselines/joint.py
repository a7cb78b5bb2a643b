"""Joint training: flow matching on the mixed data of all routes. No field is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danceopd.distill.method import Method
from danceopd.distill.solver import noised
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class JointTraining(Method):
    """loss = mean |v_student((1 - sigma) x + sigma eps, sigma, c) - (eps - x)|^2 over all routes' data.

    sigma_mean, sigma_std: sigma = sigmoid(N(mean, std^2)), the logit-normal density (Esser et al. 2024, section 3.1).
    grid: only for sampling from the student; training draws sigma anywhere in (0, 1).
    """

    sigma_mean: float = 0.0
    sigma_std: float = 1.0

    def expected_calls(self) -> ExpectedCalls:
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
        chosen = self.chosen_routes(batch_size, generator, routes)
        losses = self.losses(batch_size, backward)
        calls = NetworkCalls()
        for batch in self.batches(chosen, generator, targets=True):
            clean = batch.required_target(self.routes).float()
            drawn = torch.randn(len(clean), generator=generator) * self.sigma_std + self.sigma_mean
            sigma = torch.sigmoid(drawn).to(self.device)
            noise = torch.randn(clean.shape, generator=generator).to(self.device)
            z = noised(clean, noise, sigma)
            velocity = student(z, sigma, batch.condition)
            squared = ((velocity.float() - (noise - clean)) ** 2).flatten(1).mean(1)
            losses.add(batch.route, squared, sigma)
            calls += NetworkCalls(train=len(z))
        return losses.result(calls)
