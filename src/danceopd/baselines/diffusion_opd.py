"""DiffusionOPD (arXiv 2605.15055): dense matching along the student's rollout, each state weighted by its KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import routed_velocity
from danceopd.distill.method import Method
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.distill.sde import divergence_weights, sde_step
from danceopd.distill.solver import euler_step, per_sample
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class DiffusionOPD(Method):
    """loss = sum over all N states of weight_j * mean over elements of (v_student - v_field)^2, mean over samples.

    form:
        ``"ode"``: deterministic rollout, weight_j = dsigma_j^2 / 2 with the grid's TRUE step.
        ``"sde"``: stochastic rollout, weight_j of the per-step Gaussian KL, |dt| (1 + s^2 (1 - sigma) / (2 sigma))^2 /
        (2 s^2); see ``distill.sde``.
    eta: noise of the stochastic form.

    Every update holds all routes, each its exact share up to rounding (teachers round-robin with one update per cycle,
    G = M). No gradient flows from one state to the next; the pass that trains a state is also the one that leaves it.

    Raises:
        ValueError: for another form or routing.
    """

    form: Literal["ode", "sde"] = "ode"
    eta: float = 0.7
    stratified: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("ode", "sde"):
            raise ValueError(f"form is 'ode' or 'sde', found {self.form!r}")
        if self.per != "sample" or not self.stratified:
            raise ValueError("DiffusionOPD holds every route in every update: per 'sample', stratified")
        if self.form == "sde":
            self.require_velocities("a stochastic step needs the velocity at its state")
        self.require_static_shares("DiffusionOPD holds every route's exact share in every update")

    def expected_calls(self) -> ExpectedCalls:
        def calls(route: Route, grid: Grid) -> ExpectedCalls:
            return ExpectedCalls(rollout=0.0, field=grid.steps * route.field.calls_per_velocity, train=grid.steps)

        return self.over_routes(calls)

    def step_weights(self, grid: Grid) -> Tensor:
        """weight_j: float64 [N]."""
        if self.form == "ode":
            return grid.sigmas.double().diff() ** 2 / 2
        return divergence_weights(grid, self.eta)

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
        chosen = self.chosen_routes(batch_size, generator, routes)
        losses = self.losses(batch_size, backward)
        calls = NetworkCalls()
        for batch in self.batches(chosen, generator):
            steps, sigmas = batch.grid.steps, batch.grid.sigmas.to(self.device)
            weights = (self.step_weights(batch.grid) * steps).tolist()
            z = torch.randn(len(batch.route), *batch.shape, generator=generator).to(self.device)
            for j in range(steps):
                here, there = sigmas[j].expand(len(z)), sigmas[j + 1].expand(len(z))
                target, field_calls = routed_velocity(self.routes, batch, z, here)
                velocity = student(z, here, batch.condition)
                squared = ((velocity.float() - target) ** 2).flatten(1).mean(1)
                losses.add(batch.route, weights[j] * squared, here, share=1 / steps)
                calls += NetworkCalls(field=field_calls, train=len(z))
                z = self._advance(z, velocity.detach(), here, there, generator)
        return losses.result(calls)

    def _advance(self, z: Tensor, velocity: Tensor, here: Tensor, there: Tensor, generator: torch.Generator) -> Tensor:
        if self.form == "ode":
            return euler_step(z, velocity, here, there)
        move = sde_step(here, there, self.eta)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        return move.mean(z, velocity) + per_sample(move.std, z) * noise
