"""One DanceOPD update (arXiv 2606.27377, algorithm 1): route, query, roll out, match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch
from danceopd.distill.matching import VelocityMatching
from danceopd.distill.query_states import OffPolicySource, StateSource, queried_states
from danceopd.distill.rollout import Rollout
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.states import ExpectedCalls, NetworkCalls, Query, StepResult


@dataclass(frozen=True, kw_only=True)
class DanceOPD(VelocityMatching):
    """The method: frozen fields and their data, the grid, the query band, and how samples are routed.

    states: whose states are matched. ``"student"`` is the method; ``"teacher"`` (the routed field's own rollout) and
    ``"data"`` (a real target noised to the queried sigma) are off-policy.
    off_policy_share: probability that a sample's states are ``off_policy_states`` instead, drawn for each sample. Own
    states show a student only where it goes itself: where a field agrees with a wrong picture once it is begun, some
    that are not its own show it the way that it does not take. Generalized knowledge distillation (Agarwal et al. 2024,
    algorithm 1) mixes so; 0 is DanceOPD's paper. The rest: see ``Method``.

    Raises:
        ValueError: for unknown states, a share outside 0 to 1, or one beside off-policy ``states``. The rest: see
            ``Method``.
    """

    states: StateSource = "student"
    off_policy_share: float = 0.0
    off_policy_states: OffPolicySource = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states not in ("student", "teacher", "data"):
            raise ValueError(f"states are 'student', 'teacher' or 'data', found {self.states!r}")
        if self.off_policy_states not in ("teacher", "data"):
            raise ValueError(f"off-policy states are 'data' or 'teacher', found {self.off_policy_states!r}")
        if not 0 <= self.off_policy_share <= 1:
            raise ValueError(f"off_policy_share is from 0 to 1, found {self.off_policy_share}")
        if self.off_policy_share and self.states != "student":
            raise ValueError(f"off_policy_share is of the student's own states, found states {self.states!r}")

    @property
    def _sources(self) -> dict[StateSource, float]:
        """Whose states are matched, with their shares of the samples."""
        shares: dict[StateSource, float] = {self.states: 1 - self.off_policy_share}
        if self.off_policy_share:
            shares[self.off_policy_states] = self.off_policy_share
        return shares

    def expected_calls(self) -> ExpectedCalls:
        def calls(route: Route, grid: Grid) -> ExpectedCalls:
            query, per_velocity = route.query or self.query, route.field.calls_per_velocity
            per_step: dict[StateSource, int] = {"student": 1, "teacher": per_velocity, "data": 0}
            each_step = sum(share * per_step[source] for source, share in self._sources.items())
            return ExpectedCalls(
                rollout=query.expected_depth(grid) * each_step if each_step else 0.0,
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
        for batch in self.batches(chosen, generator, query=self.query, targets="data" in self._sources):
            band, grid = batch.query or self.query, batch.grid
            query = band.draw(len(batch.route), grid, generator)
            noise = torch.randn(len(batch.route), *batch.shape, generator=generator).to(self.device)
            rolled = self._states(student, batch, noise, query, generator)
            calls += NetworkCalls(rollout=rolled.calls)
            for k in range(band.per_rollout):
                at = Query(query.step[:, k : k + 1], query.sigma[:, k : k + 1])
                matched = self.match(student, batch, rolled.states[:, k], at)
                losses.add(batch.route, matched.losses, query.sigma[:, k], share=1 / band.per_rollout)
                calls += matched.calls
        return losses.result(calls)

    def _states(
        self, student: nn.Module, batch: RoutedBatch, noise: Tensor, query: Query, generator: torch.Generator
    ) -> Rollout:
        """The queried states of a batch, each sample's from the source that it draws."""
        if not self.off_policy_share:
            return queried_states(self.states, student, self.routes, batch, noise, batch.grid, query)
        away = torch.rand(len(batch.route), generator=generator) < self.off_policy_share
        states = noise.new_empty(len(noise), query.step.shape[1], *noise.shape[1:])
        calls = 0
        drawn: list[tuple[StateSource, Tensor]] = [(self.states, ~away), (self.off_policy_states, away)]
        for source, here in drawn:
            rows = here.nonzero().squeeze(1)
            if len(rows):
                there = rows.to(noise.device)
                rolled = queried_states(
                    source, student, self.routes, batch[rows], noise[there], batch.grid, query[rows]
                )
                states[there] = rolled.states
                calls += rolled.calls
        return Rollout(states, calls)


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
