"""Hard routing: every sample belongs to exactly one frozen field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danceopd.fields.field import VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.states import Samples

DrawSamples = Callable[[int, torch.Generator], Samples]
"""``draw(count, generator)``: count training inputs of one shape signature. It may keep its own order and state."""

GUIDED_PROMPT_DROPOUT = 0.1


@dataclass(frozen=True)
class Route:
    """One capability: its field, its own data, its share of the samples.

    samples: draws this route's training inputs.
    weight: relative share, > 0.
    prompt_dropout: share of samples whose condition is replaced by the empty one, which teaches the student
        v_empty; default 0.1 on a guided field and 0 elsewhere. Without it a student that absorbed guidance alpha does
        not stay alpha-proportional under external guidance.
    empty: maps a condition to its empty one; default the guided field's own.

    Raises:
        ValueError: if the weight is not positive, the share not in [0, 1], or dropout is asked for without ``empty``.
    """

    name: str
    field: VelocityField
    samples: DrawSamples
    weight: float = 1.0
    prompt_dropout: float | None = None
    empty: Callable | None = None

    def __post_init__(self) -> None:
        guided = self.field if isinstance(self.field, GuidedField) else None
        if self.empty is None and guided is not None:
            object.__setattr__(self, "empty", guided.empty)
        if self.prompt_dropout is None:
            object.__setattr__(self, "prompt_dropout", GUIDED_PROMPT_DROPOUT if guided is not None else 0.0)
        if self.weight <= 0:
            raise ValueError(f"route {self.name!r} needs weight > 0, found {self.weight}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"route {self.name!r} needs prompt_dropout in [0, 1], found {self.prompt_dropout}")
        if self.dropout > 0 and self.empty is None:
            raise ValueError(f"route {self.name!r} has prompt_dropout {self.dropout} but no empty condition")

    @property
    def dropout(self) -> float:
        return self.prompt_dropout or 0.0


@dataclass(frozen=True)
class Router:
    """Draws the route of every sample; all its randomness is the generator's.

    weights: relative shares. per: ``"sample"`` draws each sample's route; ``"step"`` gives a whole optimiser update to
    one route (the paper's G = 1). stratified: per sample, counts are each route's exact share up to rounding, and only
    the rounding and the order are drawn; every sample's marginal stays the same.

    Raises:
        ValueError: if there are no weights, or one is not positive, or ``per`` is unknown.
    """

    weights: tuple[float, ...]
    per: Literal["sample", "step"] = "sample"
    stratified: bool = False

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0:
            raise ValueError(f"a router needs positive weights, found {self.weights}")
        if self.per not in ("sample", "step"):
            raise ValueError(f"routing is per 'sample' or per 'step', found {self.per!r}")

    @property
    def shares(self) -> Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return weights / weights.sum()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Route index of each of ``count`` samples of one optimiser update: int64 [count]."""
        if self.per == "step":
            return torch.multinomial(self.shares, 1, generator=generator).expand(count)
        if not self.stratified:
            return torch.multinomial(self.shares, count, replacement=True, generator=generator)
        # Systematic sampling: one uniform offset, equally spaced points over the cumulated shares.
        points = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
        routes = torch.searchsorted(self.shares.cumsum(0), points).clamp_max(len(self.weights) - 1)
        return routes[torch.randperm(count, generator=generator)]


def router_for(routes: Sequence[Route], per: Literal["sample", "step"], stratified: bool = False) -> Router:
    """A router with the routes' weights.

    Raises:
        ValueError: if two routes have one name, or the router's own reasons.
    """
    names = [route.name for route in routes]
    if len(set(names)) != len(names):
        raise ValueError(f"routes need different names, found {', '.join(names)}")
    return Router(tuple(route.weight for route in routes), per, stratified)


def expected_field_calls(routes: Sequence[Route]) -> float:
    """Network evaluations that one query of the routed fields costs, averaged over the routes' shares."""
    shares = router_for(routes, "sample").shares.tolist()
    return sum(share * route.field.calls_per_velocity for share, route in zip(shares, routes, strict=True))
