"""Soft mixing: every sample is taught by the average of all fields (the ablation of hard routing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from danceopd.distill.routing import Route
from danceopd.distill.step import DanceOPD
from danceopd.fields.mixture import MixtureField


def soft_mixing(*, routes: Sequence[Route], **options) -> DanceOPD:
    """``DanceOPD`` in which each route's data is taught by the average of all routes' fields, by the routes' weights.

    Every field is given the sample's full condition, source image included. options: those of ``DanceOPD``.
    """
    mixture = MixtureField([route.field for route in routes], [route.weight for route in routes])
    return DanceOPD(routes=[replace(route, field=mixture) for route in routes], **options)
