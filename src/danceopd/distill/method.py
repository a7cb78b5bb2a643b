"""What DanceOPD and every baseline share, and what a training method is to everything around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch, draw_batches
from danceopd.distill.losses import UpdateLosses
from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.query import QueryBand
from danceopd.distill.routers import Router, WeightedRouter
from danceopd.distill.routing import Route, draw_routes, require_routes
from danceopd.distill.schedule import Grid, GridFor
from danceopd.states import ExpectedCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The loss of one update, and what it costs.

    routes: the frozen fields and their data.
    router: which share of the samples a route has; see ``distill.routers``. A router that carries state is one
        method's own. A training loop tells it the losses by ``observe``, or it stays as it is.
    per, stratified: how samples get their route by those shares; see ``draw_routes``.
    grid: what rollouts and samplers step along, or a function of one latent's shape that gives it, for families whose
    shift depends on the size.
    device: where the student and the fields live; all drawing happens on the CPU, from the generator passed in.

    Raises:
        ValueError: if there are no routes, two have one name, ``per`` is unknown, the router does not fit the routes or
            the method, or a route has a query of its own that the method would make no use of.
    """

    queries: ClassVar[bool] = False
    """Whether the method asks for single states of a rollout."""

    draws_apart: ClassVar[bool] = False
    """Whether processes that share an update must each draw their own samples' routes."""

    routes: Sequence[Route]
    grid: Grid | GridFor
    router: Router = field(default_factory=WeightedRouter)
    per: Literal["sample", "step"] = "sample"
    stratified: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        require_routes(self.routes, self.per)
        self.router.shares(self._weights)  # refuses a router that does not fit
        if self.router.goes_by_gaps and not self.queries:
            raise ValueError(
                f"a {type(self.router).__name__} goes by the loss of velocity matching, which {type(self).__name__} "
                "has not"
            )
        for route in self.routes:
            if route.query is not None and not self.queries:
                raise ValueError(f"route {route.name!r} has a query of its own; {type(self).__name__} asks for none")

    @property
    def _weights(self) -> Tensor:
        return torch.tensor([route.weight for route in self.routes], dtype=torch.float64)

    @property
    def shares(self) -> Tensor:
        """Each route's share of the coming update's samples: float64 [M]."""
        return self.router.shares(self._weights)

    def draw_routes(self, count: int, generator: torch.Generator) -> Tensor:
        """Route index of each of ``count`` samples of the coming update: int64 [count]."""
        return draw_routes(self.shares, count, generator, per=self.per, stratified=self.stratified)

    def chosen_routes(self, count: int, generator: torch.Generator, routes: Tensor | None) -> Tensor:
        """``routes`` if there are any, else ``draw_routes``: int64 [count].

        Raises:
            ValueError: if they are not ``count``, at least one, or name a route that is none.
        """
        if count < 1:
            raise ValueError(f"batch_size is at least 1, found {count}")
        if routes is None:
            return self.draw_routes(count, generator)
        if routes.shape != (count,) or not bool(((routes >= 0) & (routes < len(self.routes))).all()):
            raise ValueError(
                f"routes are {count} numbers from 0 to {len(self.routes) - 1}, one for each sample; found "
                f"{routes.tolist()}"
            )
        return routes

    @abstractmethod
    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs, in expectation."""

    def batches(
        self, chosen: Tensor, generator: torch.Generator, *, query: QueryBand | None = None, targets: bool = False
    ) -> list[RoutedBatch]:
        """The data of one update's samples, of which ``chosen`` (int64 [B]) holds the routes; see ``draw_batches``."""
        return draw_batches(self.routes, chosen, generator, self.device, grid=self.grid, query=query, targets=targets)

    def most_samples(self, route: int) -> int | None:
        """Samples of a route that one ``step`` may hold; None for any number."""
        return None

    def over_routes(self, calls: Callable[[Route, Grid], ExpectedCalls]) -> ExpectedCalls:
        """The mean, over the routes' shares in the coming update, of what a sample of each costs on its grid."""
        each = [calls(route, route.typical_grid(self.grid)) for route in self.routes]
        shares = self.shares.tolist()
        return ExpectedCalls(
            rollout=sum(share * cost.rollout for share, cost in zip(shares, each, strict=True)),
            field=sum(share * cost.field for share, cost in zip(shares, each, strict=True)),
            train=sum(share * cost.train for share, cost in zip(shares, each, strict=True)),
        )

    def losses(self, count: int, backward: Callable[[Tensor], None] | None) -> UpdateLosses:
        """What collects the losses of ``count`` samples, weighted as the router asks; ``backward`` as in ``step``."""
        return UpdateLosses(self.routes, count, backward, self.router.loss_weights(self._weights))

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
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> list[StepResult]:
        """The losses of one whole update; the update's loss is their mean, each weighted by its samples.

        micro_batches: parts at most, all as large but the last. ``routes``, ``backward``: as in ``step``.
        """
        results = []
        for chosen in self.chosen_routes(batch_size, generator, routes).chunk(micro_batches):
            part = None if backward is None else partial(_scaled, backward, len(chosen) / batch_size)
            results.append(
                self.step(student, batch_size=len(chosen), generator=generator, routes=chosen, backward=part)
            )
        return results

    def observe(self, results: Sequence[StepResult]) -> None:
        """Tell the router each route's mean loss over one whole update, of which these are all parts."""
        if not self.router.adaptive:
            return
        losses = torch.full((len(self.routes),), torch.nan, dtype=torch.float64)
        for index, route in enumerate(self.routes):
            parts = [result.routes[route.name] for result in results if route.name in result.routes]
            if parts:
                total = sum(float(part.loss.detach()) * part.samples for part in parts)
                losses[index] = total / sum(part.samples for part in parts)
        self.router.observe(losses)

    def require_static_shares(self, reason: str) -> None:
        """Raises a ValueError with the reason if the shares change from update to update."""
        if self.router.adaptive:
            raise ValueError(f"{reason}, and a {type(self.router).__name__} changes the shares")

    def require_velocities(self, reason: str) -> None:
        """Raises a ValueError with the reason if a field's velocity is the mean over a step, not that at a state."""
        for route in self.routes:
            if isinstance(route.field, MeanVelocityField):
                raise ValueError(f"{reason}, and route {route.name!r} is taught a mean over a whole step")

    def state(self) -> dict[str, Tensor]:
        """What the method carries from one update to the next, for checkpoints; most carry nothing."""
        return self.router.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError, KeyError, TypeError: if that is not a state of this method.
        """
        self.router.load_state(tensors)
        self.router.shares(self._weights)  # refuses a state of other routes

    def diagnostics(self, student: nn.Module) -> dict[str, float | int]:
        """Figures on what the method carries, for the metrics. Their network calls are not counted."""
        return {}


def _scaled(backward: Callable[[Tensor], None], share: float, loss: Tensor) -> None:
    backward(loss * share)
