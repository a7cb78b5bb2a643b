"""Per-sample losses of one update as they come in, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from danceopd.distill.routing import Route
from danceopd.states import NetworkCalls, RouteResult, StepResult


class UpdateLosses:
    """Collects [B] losses; the update's loss is the sum of their shares over ``count``, the number of samples in all.

    backward: called on each part of that loss as soon as it stands, so that no two graphs live at once; the losses kept
        are then detached. None keeps the graph.
    weights: factor of each route's losses in the update's loss, [M]; None for 1. A route's own result is without it.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        count: int,
        backward: Callable[[Tensor], None] | None,
        weights: Tensor | None = None,
    ) -> None:
        self._routes, self._count, self._backward = routes, count, backward
        self._weights = torch.ones(len(routes)) if weights is None else weights
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, route: Tensor, losses: Tensor, sigma: Tensor, *, share: float = 1.0) -> None:
        """route: int64 [B], of each sample; losses [B]; sigma [B], of the states compared.

        share: of a sample's whole loss that this one is; 1 / K for one of K states.
        """
        if self._backward is not None:
            self._backward((losses * self._weights[route].to(losses)).sum() * share / self._count)
            losses = losses.detach()
        self._parts.append((route, losses, sigma, torch.full((len(route),), share, dtype=torch.float64)))

    def result(self, calls: NetworkCalls) -> StepResult:
        """The update's loss (weighted mean over samples) and each route's own."""
        route, losses, sigma, share = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        shared = losses * share.to(losses)
        results = {}
        for index in route.unique().tolist():
            rows = (route == index).nonzero().squeeze(1)
            results[self._routes[index].name] = RouteResult(
                loss=shared[rows.to(losses.device)].sum() / float(share[rows].sum()),
                samples=round(float(share[rows].sum())),
                mean_sigma=float(sigma[rows.to(sigma.device)].mean()),
            )
        loss = (shared * self._weights[route].to(losses)).sum() / self._count
        return StepResult(loss=loss, routes=results, calls=calls)
