"""Soft mixing: the average of several fields. It exists as the ablation that hard routing is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danceopd.fields.field import VelocityField


class MixtureField:
    """v = sum_m w_m v_m, the weights normalised to sum 1; every field is given the sample's full condition.

    Raises:
        ValueError: if there is no field, or weights do not match the fields or are not positive.
    """

    def __init__(self, fields: Sequence[VelocityField], weights: Sequence[float] | None = None) -> None:
        chosen = [1.0] * len(fields) if weights is None else list(weights)
        if not fields or len(chosen) != len(fields) or min(chosen) <= 0:
            raise ValueError(f"a mixture needs fields and one positive weight each, found {len(fields)} and {weights}")
        self.fields = tuple(fields)
        self.weights = tuple(weight / sum(chosen) for weight in chosen)
        self.calls_per_velocity = sum(field.calls_per_velocity for field in fields)

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        parts = [
            weight * field.velocity(z, sigma, condition).float()
            for field, weight in zip(self.fields, self.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)
