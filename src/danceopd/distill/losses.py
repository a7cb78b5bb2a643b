"""Per-sample losses of one update as they come in, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from danceopd.distill.routing import Route
from danceopd.states import NetworkCalls, RouteResult, StepResult


class UpdateLosses:
    """Collects [B] losses; the update's loss is their sum over ``count``, the number that will come in all.

    backward: called on each part of that loss as soon as it stands, so that no two graphs live at once; the losses kept
        are then detached. None keeps the graph.
    """

    def __init__(self, routes: Sequence[Route], count: int, backward: Callable[[Tensor], None] | None) -> None:
        self._routes, self._count, self._backward = routes, count, backward
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, route: Tensor, losses: Tensor, sigma: Tensor) -> None:
        """route: int64 [B], of each sample; losses [B]; sigma [B], of the states compared."""
        if self._backward is not None:
            self._backward(losses.sum() / self._count)
            losses = losses.detach()
        self._parts.append((route, losses, sigma))

    def result(self, calls: NetworkCalls) -> StepResult:
        """The update's loss (mean over all losses) and each route's own."""
        route, losses, sigma = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        results = {}
        for index in route.unique().tolist():
            rows = (route == index).nonzero().squeeze(1)
            results[self._routes[index].name] = RouteResult(
                loss=losses[rows.to(losses.device)].mean(),
                samples=len(rows),
                mean_sigma=float(sigma[rows.to(sigma.device)].mean()),
            )
        return StepResult(loss=losses.mean(), routes=results, calls=calls)
