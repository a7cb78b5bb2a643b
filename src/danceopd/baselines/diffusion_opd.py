"""DiffusionOPD (arXiv 2605.15055): dense matching along the student's rollout, each state weighted by its KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import draw_batches, routed_velocity
from danceopd.distill.losses import UpdateLosses
from danceopd.distill.routing import Route, Router, expected_field_calls
from danceopd.distill.schedule import Grid
from danceopd.distill.sde import divergence_weights, sde_step
from danceopd.distill.solver import euler_step, per_sample
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class DiffusionOPD:
    """loss = sum over all N states of weight_j * mean over elements of (v_student - v_field)^2, mean over samples.

    form:
        ``"ode"``: deterministic rollout, weight_j = dsigma_j^2 / 2 with the grid's TRUE step.
        ``"sde"``: stochastic rollout, weight_j of the per-step Gaussian KL, |dt| (1 + s^2 (1 - sigma) / (2 sigma))^2 /
        (2 s^2); see ``distill.sde``.
    eta: noise of the stochastic form.

    Every update holds all routes, each its exact share (teachers round-robin with one update per cycle, G = M). No
    gradient flows from one state to the next; the pass that trains a state is also the one that leaves it.
    """

    routes: Sequence[Route]
    grid: Grid
    form: Literal["ode", "sde"] = "ode"
    eta: float = 0.7
    device: torch.device | str = "cpu"

    @property
    def router(self) -> Router:
        return Router(tuple(route.weight for route in self.routes), "sample", stratified=True)

    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs."""
        steps = self.grid.steps
        return ExpectedCalls(rollout=0.0, field=steps * expected_field_calls(self.routes), train=steps)

    def step_weights(self) -> Tensor:
        """weight_j: float64 [N]."""
        if self.form == "ode":
            return self.grid.sigmas.double().diff() ** 2 / 2
        return divergence_weights(self.grid, self.eta)

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update; arguments as in ``DanceOPD.step``."""
        chosen = self.router.draw(batch_size, generator) if routes is None else routes
        steps = self.grid.steps
        losses = UpdateLosses(self.routes, batch_size * steps, backward)
        weights, sigmas = (self.step_weights() * steps).tolist(), self.grid.sigmas.to(self.device)
        calls = NetworkCalls()
        for batch in draw_batches(self.routes, chosen, generator, self.device):
            z = torch.randn(len(batch.route), *batch.shape, generator=generator).to(self.device)
            for j in range(steps):
                here, there = sigmas[j].expand(len(z)), sigmas[j + 1].expand(len(z))
                target, field_calls = routed_velocity(self.routes, batch, z, here)
                velocity = student(z, here, batch.condition)
                squared = ((velocity.float() - target) ** 2).flatten(1).mean(1)
                losses.add(batch.route, weights[j] * squared, here)
                calls += NetworkCalls(field=field_calls, train=len(z))
                z = self._advance(z, velocity.detach(), here, there, generator)
        return losses.result(calls)

    def _advance(self, z: Tensor, velocity: Tensor, here: Tensor, there: Tensor, generator: torch.Generator) -> Tensor:
        if self.form == "ode":
            return euler_step(z, velocity, here, there)
        move = sde_step(here, there, self.eta)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        return move.mean(z, velocity) + per_sample(move.std, z) * noise
