"""How large a pool of streaming rollouts is for each route, and how near the steps it trains come to the query band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from danceopd.distill.selection import inclusion_probabilities

NEGLIGIBLE = 0.01
"""Trajectories end where no step to come has this share of an even band's mass."""
MOST_DISTANCE = 0.25
"""Total variation from the query band above which a pool is refused."""
STARTS = (0.125, 0.375, 0.625, 0.875)
"""Where a pool may have begun: the values that stand for the drawn one in ``spread_steps``."""


def spread_steps(count: int, length: int, start: float | Tensor) -> Tensor:
    """Steps of ``count`` trajectories of ``length`` steps, evenly spread: int64 [count]. start: in [0, 1)."""
    return ((torch.arange(count) + start) / count * length).long().clamp_max(length - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolPlan:
    """A pool of ``pool`` trajectories, of which an update trains ``batch_size``.

    band: the query band's mass at each step of the grid, float64 [N].
    shares: of the routes in an update's samples, float64 [M]; per, stratified: see ``draw_routes``.
    """

    pool: int
    batch_size: int
    band: Tensor
    shares: Tensor
    per: Literal["sample", "step"]
    stratified: bool

    @cached_property
    def mass(self) -> Tensor:
        """The band's mass at each step of a trajectory: float64 [T], T <= N."""
        last = (self.band >= NEGLIGIBLE / len(self.band)).nonzero().max()
        return self.band[: int(last) + 1]

    @property
    def length(self) -> int:
        """T: the steps of a trajectory."""
        return len(self.mass)

    @cached_property
    def members(self) -> Tensor:
        """Trajectories of each route: int64 [M], their sum the pool. Per sample by its share, per step all alike."""
        shares = self.shares if self.per == "sample" else torch.ones(len(self.shares)).double()
        return (shares.cumsum(0) / shares.sum() * self.pool).round().long().diff(prepend=torch.zeros(1).long())

    @property
    def steps_in_band(self) -> int:
        return int((self.mass > 0).sum())

    def most_samples(self, route: int) -> int:
        """So many of a route's trajectories are in the band in every update."""
        return int(self.members[route]) * self.steps_in_band // self.length

    def asked(self, route: int) -> int:
        """Samples of a route in an update, at most."""
        if self.per == "step" or not self.stratified:
            return self.batch_size
        return int((self.shares[route] * self.batch_size - 1e-9).ceil())

    def selection(self) -> Tensor:
        """a(j), the chance of each route's trajectories at step j to be trained in an update: float64 [M, T].

        A route's trajectories keep their distances for good, so that the choice of an update is among those steps that
        they stand at; where they are fewer than the steps, that is never the whole band. The mean is over the updates
        of a whole passage, over where the pool began, and where a route's number of samples changes over that number.
        """
        rows = [
            self._chance(share, members)
            for share, members in zip(self.shares.tolist(), self.members.tolist(), strict=True)
        ]
        return torch.stack(rows)

    def _chance(self, share: float, members: int) -> Tensor:
        began = torch.cat([spread_steps(members, self.length, start) for start in STARTS]).view(len(STARTS), 1, members)
        steps = ((began + torch.arange(self.length)[:, None]) % self.length).flatten(0, 1)  # [starts T, members]
        mass = self.mass[steps]
        ready = int((mass > 0).sum(1).min())

        def trained(samples: float) -> Tensor:
            chances = inclusion_probabilities(mass, min(samples, ready))
            at_step = torch.zeros(self.length, dtype=torch.float64).index_add(0, steps.flatten(), chances.flatten())
            return at_step / (members * len(STARTS))  # each of them passes each step once

        if self.per == "step":
            return share * trained(self.batch_size)
        if self.stratified or share == 1.0:
            return trained(share * self.batch_size)
        samples = torch.distributions.Binomial(self.batch_size, torch.tensor(share, dtype=torch.float64))
        odds = samples.log_prob(torch.arange(self.batch_size + 1, dtype=torch.float64)).exp()
        return torch.stack([chance * trained(count) for count, chance in enumerate(odds)]).sum(0)

    def band_distance(self) -> float:
        """Total variation, in [0, 1], between the steps that updates train in expectation and the query band.

        It is more than the mass of the steps that are left out where the minimum in ``selection`` binds.
        """
        trained = (self.selection() * self.members[:, None]).sum(0)
        aimed = self.band[: self.length]
        return float(((trained / trained.sum() - aimed).abs().sum() + self.band[self.length :].sum()) / 2)

    def require_enough(self, names: Sequence[str]) -> None:
        """Refuse a pool that is too small; names: of the routes.

        Raises:
            ValueError: if a route cannot give its samples of some update, or too little of the band is left.
        """
        for route, name in enumerate(names):
            if self.most_samples(route) < self.asked(route):
                raise ValueError(
                    f"a pool of {self.pool} is too small: an update may train {self.asked(route)} samples of route "
                    f"{name!r}, which has {int(self.members[route])} trajectories ({self.steps_in_band} of their "
                    f"{self.length} steps are in the band)" + self._remedy()
                )
        if self.band_distance() > MOST_DISTANCE:
            raise ValueError(
                f"a pool of {self.pool} is too small: so many of its trajectories are trained in every update that the "
                f"trained steps are {self.band_distance():.0%} from the query band (total variation)" + self._remedy()
            )

    def _remedy(self) -> str:
        """What to do about a pool that is too small: the smallest multiple of the batch that is not."""
        enough = self._enough()
        stratified = replace(self, stratified=self.per == "sample")._enough()
        return f"; {enough} is enough" + ("" if stratified == enough else f", {stratified} with stratified routing")

    def _enough(self) -> int:
        plan = replace(self, pool=self.batch_size)
        while not plan._is_enough():
            plan = replace(plan, pool=plan.pool + self.batch_size)
        return plan.pool

    def _is_enough(self) -> bool:
        served = all(self.most_samples(route) >= self.asked(route) for route in range(len(self.shares)))
        return served and self.band_distance() <= MOST_DISTANCE
