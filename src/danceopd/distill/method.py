"""What DanceOPD and every baseline share, and what a training method is to everything around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch, draw_batches
from danceopd.distill.query import QueryBand
from danceopd.distill.routing import Route, Router, router_for
from danceopd.distill.schedule import Grid, GridFor
from danceopd.states import ExpectedCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The loss of one update, and what it costs.

    routes: the frozen fields and their data. per, stratified: how samples get their route; see ``Router``.
    grid: what rollouts and samplers step along, or a function of one latent's shape that gives it, for families whose
    shift depends on the size.
    device: where the student and the fields live; all drawing happens on the CPU, from the generator passed in.

    Raises:
        ValueError: if there are no routes, two have one name, ``per`` is unknown, or a route has a query of its own
            that the method would make no use of.
    """

    queries: ClassVar[bool] = False
    """Whether the method asks for single states of a rollout."""

    routes: Sequence[Route]
    grid: Grid | GridFor
    per: Literal["sample", "step"] = "sample"
    stratified: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        router_for(self.routes, self.per, self.stratified)
        for route in self.routes:
            if route.query is not None and not self.queries:
                raise ValueError(f"route {route.name!r} has a query of its own; {type(self).__name__} asks for none")

    @property
    def router(self) -> Router:
        return router_for(self.routes, self.per, self.stratified)

    @abstractmethod
    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs, in expectation."""

    def batches(
        self, chosen: Tensor, generator: torch.Generator, *, query: QueryBand | None = None, targets: bool = False
    ) -> list[RoutedBatch]:
        """The data of one update's samples, of which ``chosen`` (int64 [B]) holds the routes; see ``draw_batches``."""
        return draw_batches(self.routes, chosen, generator, self.device, grid=self.grid, query=query, targets=targets)

    def over_routes(self, calls: Callable[[Route, Grid], ExpectedCalls]) -> ExpectedCalls:
        """The mean, over the routes' shares, of what a sample of each route costs on its grid."""
        each = [calls(route, route.typical_grid(self.grid)) for route in self.routes]
        shares = self.router.shares.tolist()
        return ExpectedCalls(
            rollout=sum(share * cost.rollout for share, cost in zip(shares, each, strict=True)),
            field=sum(share * cost.field for share, cost in zip(shares, each, strict=True)),
            train=sum(share * cost.train for share, cost in zip(shares, each, strict=True)),
        )

    @abstractmethod
    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update (or micro-batch) on the live student; see ``DanceOPD.step``."""

    def update(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        micro_batches: int,
        generator: torch.Generator,
        backward: Callable[[Tensor], None] | None = None,
    ) -> list[StepResult]:
        """The losses of one whole update; the update's loss is their mean. ``backward``: as in ``step``."""
        share = 1 / micro_batches
        part = None if backward is None else lambda loss: backward(loss * share)
        return [
            self.step(student, batch_size=len(chosen), generator=generator, routes=chosen, backward=part)
            for chosen in self.router.draw(batch_size, generator).chunk(micro_batches)
        ]

    def state(self) -> dict[str, Tensor]:
        """What the method carries from one update to the next, for checkpoints; most carry nothing."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError, KeyError, TypeError: if that is not a state of this method.
        """
        if tensors:
            raise ValueError(f"{type(self).__name__} carries nothing, found {', '.join(tensors)}")

    def diagnostics(self, student: nn.Module) -> dict[str, float | int]:
        """Figures on what the method carries, for the metrics. Their network calls are not counted."""
        return {}
