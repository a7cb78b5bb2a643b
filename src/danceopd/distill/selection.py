"""Choosing a fixed number of samples, each with a given probability (systematic sampling)."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(mass: Tensor, count: float) -> Tensor:
    """a_i = min(1, c mass_i), with c such that they sum to ``count``: float64 [..., n]. mass [..., n] >= 0.

    Where the minimum binds, c grows until the others make up for what those at 1 cannot give.

    Raises:
        ValueError: if fewer than ``count`` have any mass.
    """
    mass = mass.double()
    fewest = int((mass > 0).sum(-1).min())
    if fewest < count:
        raise ValueError(f"{count:g} cannot be chosen among {fewest} that have any probability")
    certain = torch.zeros(mass.shape, dtype=torch.bool)
    while True:
        left, shared = count - certain.sum(-1, keepdim=True), mass.where(~certain, 0.0).sum(-1, keepdim=True)
        probability = torch.where(certain, 1.0, mass * (left / shared.clamp_min(1e-300)))
        above = probability > 1
        if not bool(above.any()):
            return probability
        certain |= above


def systematic(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws i with expectation count * sizes_i / sum(sizes) each: int64 [count], rising.

    One uniform offset and equally spaced points over the cumulated sizes [n], so that every i comes as often as
    expected, rounded up or down; where no size exceeds sum / count, at most once.
    """
    cumulated = sizes.double().cumsum(0)
    points = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
    return torch.searchsorted(cumulated, points * cumulated[-1], right=True).clamp_max(len(sizes) - 1)


def choose(mass: Tensor, strata: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Exactly ``count`` of n, each with its inclusion probability: int64 [count].

    strata: int64 [n]; a stratum gets its share of the choice, rounded up or down. Within it the order is drawn, so that
        no two are always chosen together.

    Raises:
        ValueError: if fewer than ``count`` have any mass.
    """
    shuffled = torch.randperm(len(mass), generator=generator)
    order = shuffled[strata[shuffled].argsort(stable=True)]
    return order[systematic(inclusion_probabilities(mass[order], count), count, generator)]
