"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class EMA:
    """average <- d average + (1 - d) weights, with warm-up d = min(decay, (1 + n) / (10 + n)) after n updates.

    Kept in float32. decay 0 follows the weights exactly.
    """

    def __init__(self, weights: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = [weight.detach().clone().float() for weight in weights]

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.average, weights, strict=True):
            average.lerp_(weight.detach().float(), 1 - decay)
        self.updates += 1
