"""One DanceOPD update (arXiv 2606.27377, algorithm 1): route, query, roll out, match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danceopd.distill.matching import VelocityMatching
from danceopd.distill.query_states import StateSource, queried_states
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.states import ExpectedCalls, NetworkCalls, Query, StepResult


@dataclass(frozen=True, kw_only=True)
class DanceOPD(VelocityMatching):
    """The method: frozen fields and their data, the grid, the query band, and how samples are routed.

    states: whose states are matched. ``"student"`` is the method; ``"teacher"`` (the routed field's own rollout) and
    ``"data"`` (a real target noised to the queried sigma) are off-policy. The rest: see ``Method``.
    """

    states: StateSource = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states not in ("student", "teacher", "data"):
            raise ValueError(f"states are 'student', 'teacher' or 'data', found {self.states!r}")

    def expected_calls(self) -> ExpectedCalls:
        def calls(route: Route, grid: Grid) -> ExpectedCalls:
            query, per_velocity = route.query or self.query, route.field.calls_per_velocity
            depth = 0.0 if self.states == "data" else query.expected_depth(grid)
            return ExpectedCalls(
                rollout=depth * (per_velocity if self.states == "teacher" else 1),
                field=query.per_rollout * per_velocity,
                train=query.per_rollout,
            )

        return self.over_routes(calls)

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
        chosen = self.chosen_routes(batch_size, generator, routes)
        losses = self.losses(batch_size, backward)
        calls = NetworkCalls()
        for batch in self.batches(chosen, generator, query=self.query, targets=self.states == "data"):
            band, grid = batch.query or self.query, batch.grid
            query = band.draw(len(batch.route), grid, generator)
            noise = torch.randn(len(batch.route), *batch.shape, generator=generator).to(self.device)
            rolled = queried_states(self.states, student, self.routes, batch, noise, grid, query)
            calls += NetworkCalls(rollout=rolled.calls)
            for k in range(band.per_rollout):
                at = Query(query.step[:, k : k + 1], query.sigma[:, k : k + 1])
                matched = self.match(student, batch, rolled.states[:, k], at)
                losses.add(batch.route, matched.losses, query.sigma[:, k], share=1 / band.per_rollout)
                calls += matched.calls
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
