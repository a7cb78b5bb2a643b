"""Hard routing: every sample belongs to exactly one frozen field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.query import QueryBand
from danceopd.distill.schedule import Grid, GridFor, grid_of
from danceopd.distill.selection import systematic
from danceopd.fields.field import VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.states import Samples

DrawSamples = Callable[[int, torch.Generator], Samples | Sequence[Samples]]
"""``draw(count, generator)``: count training inputs, as one batch, or as one for each of their shape signatures. It may
keep its own order and state."""

GUIDED_PROMPT_DROPOUT = 0.1


@dataclass(frozen=True)
class Route:
    """One capability: its field, its own data, its share of the samples.

    samples: draws this route's training inputs.
    weight: relative share, > 0.
    prompt_dropout: share of samples whose condition is replaced by the empty one, which teaches the student
        v_empty; default 0.1 on a guided field and 0 elsewhere. Without it a student that absorbed guidance alpha does
        not stay alpha-proportional under external guidance.
    empty: maps the student's condition to its empty one; default the guided field's own.
    field_empty: the same for samples' ``field_condition``; default the guided field's own, else ``empty``.
    grid, query: in the place of the method's, for this route's samples.
    shape: of one of this route's latents; what its cost is predicted with where the grid depends on the shape.

    Raises:
        ValueError: if the weight is not positive, the share not in [0, 1], or dropout is asked for without ``empty``.
    """

    name: str
    field: VelocityField
    samples: DrawSamples
    weight: float = 1.0
    prompt_dropout: float | None = None
    empty: Callable | None = None
    field_empty: Callable | None = None
    grid: Grid | GridFor | None = None
    query: QueryBand | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        guided = self.guidance
        if self.field_empty is None and guided is not None:
            object.__setattr__(self, "field_empty", guided.empty)
        if self.empty is None and guided is not None:
            object.__setattr__(self, "empty", guided.empty)
        if self.prompt_dropout is None:
            object.__setattr__(self, "prompt_dropout", GUIDED_PROMPT_DROPOUT if guided is not None else 0.0)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"route {self.name!r} needs a finite weight > 0, found {self.weight}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"route {self.name!r} needs prompt_dropout in [0, 1], found {self.prompt_dropout}")
        if self.dropout > 0 and self.empty is None:
            raise ValueError(f"route {self.name!r} has prompt_dropout {self.dropout} but no empty condition")

    @property
    def guidance(self) -> GuidedField | None:
        """The guided field that teaches, be it in one step or in several."""
        field = self.field.field if isinstance(self.field, MeanVelocityField) else self.field
        return field if isinstance(field, GuidedField) else None

    @property
    def dropout(self) -> float:
        return self.prompt_dropout or 0.0

    def typical_grid(self, default: Grid | GridFor) -> Grid:
        """The grid of a latent of ``shape``.

        Raises:
            ValueError: if the grid depends on a shape that the route does not tell.
        """
        grid = self.grid or default
        if not isinstance(grid, Grid) and self.shape is None:
            raise ValueError(
                f"the grid of route {self.name!r} depends on its latents' shape: its cost can be predicted with "
                "Route(shape=...)"
            )
        return grid_of(grid, self.shape or ())


def draw_routes(
    shares: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    per: Literal["sample", "step"] = "sample",
    stratified: bool = False,
) -> Tensor:
    """Route index of each of ``count`` samples of one optimiser update: int64 [count]; all randomness is the
    generator's.

    shares: of the routes, float64 [M]; every sample's marginal.
    per: ``"sample"`` draws each sample's route; ``"step"`` gives the whole update to one route (the paper's G = 1).
    stratified: per sample, counts are each route's exact share up to rounding, and only the rounding and the order are
        drawn.
    """
    if per == "step":
        return torch.multinomial(shares, 1, generator=generator).expand(count)
    if not stratified:
        return torch.multinomial(shares, count, replacement=True, generator=generator)
    routes = systematic(shares, count, generator)
    return routes[torch.randperm(count, generator=generator)]


def require_routes(routes: Sequence[Route], per: str) -> None:
    """Refuse routes that cannot be drawn.

    Raises:
        ValueError: if there are none, two have one name, or ``per`` is unknown.
    """
    if not routes:
        raise ValueError("at least one route is needed, found none")
    names = [route.name for route in routes]
    if len(set(names)) != len(names):
        raise ValueError(f"routes need different names, found {', '.join(names)}")
    if per not in ("sample", "step"):
        raise ValueError(f"routing is per 'sample' or per 'step', found {per!r}")
