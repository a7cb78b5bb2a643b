"""Soft mixing: every sample is taught by the average of all fields (the ablation of hard routing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from danceopd.distill.routing import Route
from danceopd.distill.step import DanceOPD
from danceopd.fields.mixture import MixtureField


def soft_mixing(*, routes: Sequence[Route], weights: Mapping[str, float] | None = None, **options) -> DanceOPD:
    """``DanceOPD`` in which each route's data is taught by the average of all routes' fields.

    Every field is given the sample's full condition, source image included.

    weights: of the average, by route name; by default the routes' own, which are also their shares of the samples.
    options: those of ``DanceOPD``.

    Raises:
        ValueError: for weights that are not one positive number for each route.
    """
    chosen = {route.name: route.weight for route in routes} if weights is None else weights
    if chosen.keys() != {route.name for route in routes}:
        raise ValueError(f"needs a weight for each of {', '.join(r.name for r in routes)}, found {', '.join(chosen)}")
    mixture = MixtureField([route.field for route in routes], [chosen[route.name] for route in routes])
    return DanceOPD(routes=[replace(route, field=mixture) for route in routes], **options)
