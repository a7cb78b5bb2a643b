"""One update's samples: each route's own data, gathered by shape, and each sample's own field's velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from danceopd.distill.query import QueryBand
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid, GridFor, grid_of
from danceopd.states import Samples, concatenate, count, replace_where, select, signature, to_device


@dataclass(frozen=True)
class RoutedBatch:
    """Samples of one shape signature, grid and query band, of any routes. route: int64 [B]; target [B, *shape] or None.

    query: None for a method that asks for no single states.
    field_condition: what the samples' fields are told instead of ``condition``; None where all are told the same.
    """

    route: Tensor
    condition: Any
    shape: tuple[int, ...]
    target: Tensor | None
    grid: Grid
    query: QueryBand | None
    field_condition: Any

    @property
    def teacher_condition(self) -> Any:
        """The condition that the fields are asked under: [B]."""
        return self.condition if self.field_condition is None else self.field_condition

    @property
    def signature(self) -> tuple[Any, ...]:
        """Batches of equal signature can become one."""
        conditions = signature(self.condition), signature(self.teacher_condition)
        return self.shape, conditions, self.target is None, tuple(self.grid.sigmas.tolist()), self.query

    def required_target(self, routes: Sequence[Route]) -> Tensor:
        """The target images.

        Raises:
            ValueError: if there are none, naming the routes; noising anything else is not what was asked for.
        """
        if self.target is None:
            names = ", ".join(routes[index].name for index in self.route.unique().tolist())
            raise ValueError(f"noising data needs target images, and the data of route {names} has none")
        return self.target

    def __getitem__(self, index: Tensor) -> RoutedBatch:
        """The samples ``index`` (int64 [b], on the CPU)."""
        target = None if self.target is None else self.target[index.to(self.target.device)]
        condition, field_condition = select(self.condition, index), select(self.field_condition, index)
        return replace(
            self, route=self.route[index], condition=condition, target=target, field_condition=field_condition
        )

    def repeated(self, times: int) -> RoutedBatch:
        """Each sample ``times`` over, copies side by side."""
        return self[torch.arange(len(self.route)).repeat_interleave(times)]


def draw_batches(
    routes: Sequence[Route],
    chosen: Tensor,
    generator: torch.Generator,
    device: torch.device | str,
    *,
    grid: Grid | GridFor,
    query: QueryBand | None = None,
    targets: bool = False,
) -> list[RoutedBatch]:
    """Draw each route's data and gather the samples that can share a rollout, so that one serves many routes: those of
    one shape signature that step along one grid and are asked for states of one band.

    Samples whose fields are told conditions of another kind (another family's) go apart. Prompt dropout empties what
    the student and what the field are told, of the same samples.

    device: where conditions and targets go, wherever a route's data made them; ``route`` stays on the CPU.
    grid, query: the method's; a route's own stand in their place.
    targets: keep target images (samples with and without one then go apart); without it they are dropped.
    """
    groups: dict[Any, list[RoutedBatch]] = {}
    for index, route in enumerate(routes):
        needed = int((chosen == index).sum())
        if needed == 0:
            continue
        for number, samples in _drawn(route, needed, generator):
            condition, field_condition = samples.condition, samples.field_condition
            if route.dropout > 0 and route.empty is not None:
                dropped = torch.rand(number, generator=generator) < route.dropout
                condition = replace_where(condition, dropped, route.empty)
                if field_condition is not None:
                    field_condition = replace_where(field_condition, dropped, route.field_empty or route.empty)
            target = samples.target.to(device) if targets and samples.target is not None else None
            drawn = RoutedBatch(
                route=torch.full((number,), index),
                condition=to_device(condition, device),
                shape=samples.shape,
                target=target,
                grid=grid_of(route.grid or grid, samples.shape),
                query=route.query or query,
                field_condition=to_device(field_condition, device),
            )
            groups.setdefault(drawn.signature, []).append(drawn)
    return [joined(members) for members in groups.values()]


def _drawn(route: Route, needed: int, generator: torch.Generator) -> list[tuple[int, Samples]]:
    """The route's samples, with how many there are of each shape signature."""
    samples = route.samples(needed, generator)
    if isinstance(samples, Samples) and samples.condition is None:
        return [(needed, samples)]
    parts = [samples] if isinstance(samples, Samples) else samples
    counted = [(count(part.condition), part) for part in parts]
    found = sum(number for number, _ in counted)
    if found != needed:
        raise ValueError(f"route {route.name!r} was asked for {needed} samples and drew {found}")
    for number, part in counted:
        if part.target is not None and len(part.target) != number:
            raise ValueError(f"route {route.name!r} drew {number} conditions and {len(part.target)} target images")
    return counted


def joined(batches: Sequence[RoutedBatch]) -> RoutedBatch:
    """Batches of one signature as one."""
    targets = [batch.target for batch in batches if batch.target is not None]
    alike = all(batch.field_condition is None for batch in batches)
    return replace(
        batches[0],
        route=torch.cat([batch.route for batch in batches]),
        condition=concatenate([batch.condition for batch in batches]),
        target=torch.cat(targets) if targets else None,
        field_condition=None if alike else concatenate([batch.teacher_condition for batch in batches]),
    )


def routed_velocity(routes: Sequence[Route], batch: RoutedBatch, z: Tensor, sigma: Tensor) -> tuple[Tensor, int]:
    """Each sample's own field's velocity at its state: float32, the shape of z; and the network calls it took."""
    velocity = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    calls = 0
    for index in batch.route.unique().tolist():
        rows = (batch.route == index).nonzero().squeeze(1)
        whole = len(rows) == len(z)
        rows = rows.to(z.device)
        condition = batch.teacher_condition
        inputs = (z, sigma, condition) if whole else (z[rows], sigma[rows], select(condition, rows))
        velocity[rows] = routes[index].field.velocity(*inputs).float()
        calls += len(rows) * routes[index].field.calls_per_velocity
    return velocity, calls
