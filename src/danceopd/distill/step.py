"""One DanceOPD update (arXiv 2606.27377, algorithm 1): route, query, roll out, match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import draw_batches, routed_velocity
from danceopd.distill.losses import UpdateLosses
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import BetaQuery, QueryBand
from danceopd.distill.query_states import StateSource, queried_states
from danceopd.distill.routing import Route, Router, expected_field_calls, router_for
from danceopd.distill.schedule import Grid
from danceopd.states import ExpectedCalls, NetworkCalls, Query, StepResult


@dataclass(frozen=True, kw_only=True)
class DanceOPD:
    """The method: frozen fields and their data, the grid, the query band, and how samples are routed.

    states: whose states are matched. ``"student"`` is the method; ``"teacher"`` (the routed field's own rollout) and
    ``"data"`` (a real target noised to the queried sigma) are off-policy.
    device: where the student and the fields live; all drawing happens on the CPU, from the generator passed in.
    """

    routes: Sequence[Route]
    grid: Grid
    query: QueryBand = field(default_factory=BetaQuery)
    per: Literal["sample", "step"] = "sample"
    stratified: bool = False
    objective: VelocityMSE = field(default_factory=VelocityMSE)
    states: StateSource = "student"
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.states not in ("student", "teacher", "data"):
            raise ValueError(f"states are 'student', 'teacher' or 'data', found {self.states!r}")
        self.router  # noqa: B018 - checks the routes

    @property
    def router(self) -> Router:
        return router_for(self.routes, self.per, self.stratified)

    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs, in expectation."""
        depth, per_velocity = self.query.expected_depth(self.grid), expected_field_calls(self.routes)
        rollouts = {"student": depth, "teacher": depth * per_velocity, "data": 0.0}[self.states]
        queries = self.query.per_rollout
        return ExpectedCalls(rollout=rollouts, field=queries * per_velocity, train=queries)

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update (or micro-batch) on the live student.

        The loss is the mean over elements, then over the K queries and all samples; no gradient flows through rollout
        or field. Everything runs under the caller's autocast, student and fields alike.

        Args:
            student: ``student(z [B, ...], sigma [B], condition) -> v``.
            routes: int64 [batch_size], drawn beforehand (one update may span several micro-batches).
            backward: called on each part of the loss as soon as it stands, so that no two graphs live at once; the
                result's losses are then detached.
        """
        chosen = self.router.draw(batch_size, generator) if routes is None else routes
        losses = UpdateLosses(self.routes, batch_size * self.query.per_rollout, backward)
        calls = NetworkCalls()
        for batch in draw_batches(self.routes, chosen, generator, self.device, targets=self.states == "data"):
            query = self.query.draw(len(batch.route), self.grid, generator)
            noise = torch.randn(len(batch.route), *batch.shape, generator=generator).to(self.device)
            rolled = queried_states(self.states, student, self.routes, batch, noise, self.grid, query)
            calls += NetworkCalls(rollout=rolled.calls)
            for k in range(self.query.per_rollout):
                z, at = rolled.states[:, k], Query(query.step[:, k : k + 1], query.sigma[:, k : k + 1])
                sigma = at.sigma[:, 0].to(self.device)
                target, field_calls = routed_velocity(self.routes, batch, z, sigma)
                torch.clear_autocast_cache()  # a guard: weights cast without gradient must not serve the pass below
                velocity = student(z, sigma, batch.condition)
                losses.add(batch.route, self.objective.losses(velocity, target, at, self.grid, self.query), sigma)
                calls += NetworkCalls(field=field_calls, train=len(z))
        return losses.result(calls)


def route_gradient_cosines(result: StepResult, parameters: Sequence[Tensor]) -> dict[tuple[str, str], float]:
    """Cosine between the gradients of each pair of routes' losses, over all ``parameters`` as one vector.

    Call before ``backward``; the graph is kept. The claim behind hard routing is that these gradients conflict.
    """
    flat = {}
    for name, route in result.routes.items():
        gradients = torch.autograd.grad(
            route.loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        flat[name] = torch.cat([gradient.flatten().double() for gradient in gradients])
    names = sorted(flat)
    return {
        (a, b): float(torch.nn.functional.cosine_similarity(flat[a], flat[b], dim=0))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
