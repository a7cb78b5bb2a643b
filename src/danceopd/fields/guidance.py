"""Classifier-free guidance as a field: an operator over another field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danceopd.fields.field import VelocityField
from danceopd.states import concatenate


def linear_guidance(conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
    """v_alpha = v_empty + alpha (v_cond - v_empty) (Ho & Salimans 2022; DanceOPD section 3.2)."""
    return empty + guidance_scale * (conditional - empty)


Combine = Callable[[Tensor, Tensor, float], Tensor]
"""A family's guidance operation, ``(v_cond, v_empty, alpha) -> v``."""


def guided_velocity(
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    z: Tensor,
    sigma: Tensor,
    condition: Any,
    *,
    empty: Callable[[Any], Any],
    guidance_scale: float,
    combine: Combine = linear_guidance,
) -> Tensor:
    """``velocity`` under guidance, float32: the condition and its empty one in one call of twice the samples."""
    both = concatenate([condition, empty(condition)])
    found = velocity(torch.cat([z, z]), torch.cat([sigma, sigma]), both).float()
    conditional, unconditional = found.chunk(2)
    return combine(conditional, unconditional, guidance_scale)


class GuidedField:
    """``field`` under guidance of scale alpha; alpha = 1 is the field itself.

    empty: maps a condition to its empty (or negative) one; an edit's empty condition keeps the source image.
    combine: the family's guidance operation; linear by default.

    Raises:
        ValueError: if the scale is negative or not finite.
    """

    def __init__(
        self,
        field: VelocityField,
        *,
        empty: Callable[[Any], Any],
        guidance_scale: float,
        combine: Combine = linear_guidance,
    ) -> None:
        if not 0.0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a finite number >= 0, found {guidance_scale}")
        self.field = field
        self.empty = empty
        self.guidance_scale = guidance_scale
        self.combine = combine
        self.calls_per_velocity = 2 * field.calls_per_velocity

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return guided_velocity(
            self.field.velocity,
            z,
            sigma,
            condition,
            empty=self.empty,
            guidance_scale=self.guidance_scale,
            combine=self.combine,
        )
