"""One update's samples: each route's own data, gathered by shape, and each sample's own field's velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danceopd.distill.routing import Route
from danceopd.states import concatenate, replace_where, select, signature


@dataclass(frozen=True)
class RoutedBatch:
    """Samples of one shape signature, of any routes. route: int64 [B]; target [B, *shape] or None."""

    route: Tensor
    condition: Any
    shape: tuple[int, ...]
    target: Tensor | None

    def repeated(self, times: int) -> RoutedBatch:
        """Each sample ``times`` over, copies side by side."""
        index = torch.arange(len(self.route)).repeat_interleave(times)
        target = None if self.target is None else self.target[index]
        return RoutedBatch(self.route[index], select(self.condition, index), self.shape, target)


def draw_batches(
    routes: Sequence[Route],
    chosen: Tensor,
    generator: torch.Generator,
    device: torch.device | str,
    *,
    targets: bool = False,
) -> list[RoutedBatch]:
    """Draw each route's data and gather the samples by shape signature, so that one rollout serves many routes.

    targets: keep target images (samples with and without one then go apart); without it they are dropped.
    """
    groups: dict[Any, list[tuple[int, Any, tuple[int, ...], Tensor | None]]] = {}
    for index, route in enumerate(routes):
        count = int((chosen == index).sum())
        if count == 0:
            continue
        samples = route.samples(count, generator)
        condition = samples.condition
        if route.dropout > 0 and route.empty is not None:
            dropped = torch.rand(count, generator=generator) < route.dropout
            condition = replace_where(condition, dropped, route.empty)
        target = samples.target if targets else None
        key = (samples.shape, signature(condition), target is None)
        groups.setdefault(key, []).append((index, condition, samples.shape, target))
    batches = []
    for members in groups.values():
        counts = [int((chosen == index).sum()) for index, *_ in members]
        route = torch.cat([torch.full((n,), member[0]) for n, member in zip(counts, members, strict=True)])
        present = [member[3] for member in members if member[3] is not None]
        target = torch.cat(present).to(device) if present else None
        batches.append(RoutedBatch(route, concatenate([member[1] for member in members]), members[0][2], target))
    return batches


def routed_velocity(routes: Sequence[Route], batch: RoutedBatch, z: Tensor, sigma: Tensor) -> tuple[Tensor, int]:
    """Each sample's own field's velocity at its state: float32, the shape of z; and the network calls it took."""
    velocity = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    calls = 0
    for index in batch.route.unique().tolist():
        rows = (batch.route == index).nonzero().squeeze(1)
        whole = len(rows) == len(z)
        rows = rows.to(z.device)
        inputs = (z, sigma, batch.condition) if whole else (z[rows], sigma[rows], select(batch.condition, rows))
        velocity[rows] = routes[index].field.velocity(*inputs).float()
        calls += len(rows) * routes[index].field.calls_per_velocity
    return velocity, calls
