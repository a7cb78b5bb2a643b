"""Routers: the share of an update's samples that each route has, fixed or changing from update to update.

How samples are drawn by the shares (per sample or per step, stratified or not) is ``draw_routes``'s, alike for all.

Shares are also the weights of the objective: a sample is drawn from route m with probability q_m, so the expected loss
of an update is sum_m q_m L_m, L_m the mean loss on the route. A router that changes q trains another objective than the
routes' weights w say; only ``GapRouter(reweight=True)`` trains sum_m w_m L_m whatever it draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Router(Protocol):
    """Shares from the routes' weights, and from what it has been told so far.

    adaptive: whether the shares change from update to update; a router that is not carries nothing.
    goes_by_gaps: whether the losses it is told must be distances to the fields.
    """

    adaptive: ClassVar[bool] = False
    goes_by_gaps: ClassVar[bool] = False

    def shares(self, weights: Tensor) -> Tensor:
        """Each route's share of the coming update's samples: float64 [M], > 0, with sum 1. weights: float64 [M], > 0.

        Raises:
            ValueError: if the router does not fit that many routes.
        """
        ...

    def loss_weights(self, weights: Tensor) -> Tensor | None:
        """Factor on the losses of each route's samples in the coming update: float64 [M]; None for 1."""
        return None

    def observe(self, losses: Tensor) -> None:
        """Take note of one update's mean loss on each route: float64 [M], NaN where a route had no samples."""

    def state(self) -> dict[str, Tensor]:
        """All that the next shares depend on besides the weights."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError, KeyError: if that is not a state of this router.
        """
        if tensors:
            raise ValueError(f"{type(self).__name__} carries nothing, found {', '.join(tensors)}")


@dataclass(frozen=True)
class WeightedRouter(Router):
    """Shares in proportion to the routes' weights."""

    def shares(self, weights: Tensor) -> Tensor:
        return weights / weights.sum()


@dataclass(frozen=True)
class UniformRouter(Router):
    """The same share for every route.

    Raises:
        ValueError: from ``shares``, for a weight other than 1, which would do nothing.
    """

    def shares(self, weights: Tensor) -> Tensor:
        if bool((weights != 1).any()):
            raise ValueError(f"a UniformRouter makes no use of weights, found {weights.tolist()}")
        return weights / len(weights)


@dataclass
class GapRouter(Router):
    """More samples for the routes that are further from their field: q_m = floor + (1 - M floor) s_m,

    s_m = w_m gap_m^power / sum_i w_i gap_i^power, with w_m the route's weight and gap_m the exponential average of its
    loss over the updates that held samples of it. Until every route has been seen once, and where none has any gap, the
    shares are the weights' own.

    The gap is the loss itself, not its ratio to the first one measured. A student often starts from one of its sources,
    where that route's first loss is 0 and the ratio means nothing; and the sum of the losses is what is trained. Routes
    whose losses differ by their nature (a guided field's velocities are larger) are balanced by their weights, which
    multiply the gaps. A gap that no training closes, as of a field beyond the student's capacity, goes on drawing
    samples; ``power`` and ``floor`` bound what it takes from the others.

    floor: share that every route keeps, in (0, 1 / M); at 0 a route without a gap would never be measured again.
    power: > 0; 1 is in proportion to the gap, smaller is more even.
    decay: of the average per update, in [0, 1); 0 takes the last loss alone.
    reweight: multiply the loss of route m's samples by w_m / q_m (w with sum 1). The expected gradient is then that of
        the weights' objective, exactly, since q is settled before an update's samples are drawn; only its variance
        changes. (That is least for q_m in proportion to w_m times the root mean square of a sample's gradient, which is
        power 0.5 where the square of the gradient is in proportion to the loss.) Without it q are the routes' weights
        in the objective. Where an update is one route's (per step), the factor scales whole gradients, and gradient
        clipping and optimisers of normalised updates take most of that back.

    Raises:
        ValueError: for a value outside its range; from ``shares``, for too many routes for the floor, or averages of
            other routes.
    """

    adaptive: ClassVar[bool] = True
    goes_by_gaps: ClassVar[bool] = True

    floor: float = 0.05
    power: float = 1.0
    decay: float = 0.9
    reweight: bool = False
    averages: Tensor = field(default_factory=lambda: torch.zeros(0).double(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.floor < 1 and self.power > 0 and 0 <= self.decay < 1):
            raise ValueError(
                "a GapRouter needs floor in (0, 1), power > 0 and decay in [0, 1), found "
                f"{self.floor}, {self.power} and {self.decay}"
            )

    def shares(self, weights: Tensor) -> Tensor:
        count = len(weights)
        if self.floor * count >= 1:
            raise ValueError(f"a floor of {self.floor} leaves {count} routes nothing to share; it must be < 1/{count}")
        if len(self.averages) not in (0, count):
            raise ValueError(f"{count} routes need as many averages, found {len(self.averages)}")
        if len(self.averages) == 0 or bool(self.averages.isnan().any()):
            return weights / weights.sum()
        drawn = weights * self.averages**self.power
        if drawn.sum() == 0:
            return weights / weights.sum()
        return self.floor + (1 - count * self.floor) * drawn / drawn.sum()

    def loss_weights(self, weights: Tensor) -> Tensor | None:
        return weights / weights.sum() / self.shares(weights) if self.reweight else None

    def observe(self, losses: Tensor) -> None:
        before = self.averages if len(self.averages) else torch.full_like(losses, torch.nan)
        moved = torch.where(before.isnan(), losses, self.decay * before + (1 - self.decay) * losses)
        self.averages = torch.where(losses.isnan(), before, moved)

    def state(self) -> dict[str, Tensor]:
        return {"loss_averages": self.averages}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.averages = tensors["loss_averages"]


@dataclass
class CurriculumRouter(Router):
    """Shares that move in a line from the routes' weights to ``end``, there from ``end_step`` updates on.

    end: weights, one for each route in their order, > 0. The update after t others has
        q = (1 - r) w / sum(w) + r end / sum(end), r = min(1, t / end_step).

    Raises:
        ValueError: for a weight or a number of updates that is not positive; from ``shares``, if the routes are not as
            many.
    """

    adaptive: ClassVar[bool] = True

    end: Sequence[float]
    end_step: int
    updates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.end or min(self.end) <= 0 or self.end_step < 1:
            raise ValueError(
                f"a CurriculumRouter needs positive end weights and end_step >= 1, found {self.end} and {self.end_step}"
            )

    def shares(self, weights: Tensor) -> Tensor:
        if len(self.end) != len(weights):
            raise ValueError(f"{len(weights)} routes need as many end weights, found {len(self.end)}")
        end = torch.tensor(self.end, dtype=torch.float64)
        done = min(1.0, self.updates / self.end_step)
        return (1 - done) * weights / weights.sum() + done * end / end.sum()

    def observe(self, losses: Tensor) -> None:
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.updates = int(tensors["updates"])
