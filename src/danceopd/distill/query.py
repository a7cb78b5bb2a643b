"""Which state of a rollout is asked for; drawn BEFORE rolling out.

On an N-step grid, u ~ band, k = min(floor(u N), N - 1): k = 0 is pure noise, k = N - 1 the cleanest state that a model
is ever called on (DanceOPD, section 3.3). Because grids are shifted, the same k is another sigma in every family, so a
band can also be laid over sigma = 1 - u, conditioned on the sigmas that lie between the first and the last that a model
is called on; a sigma between grid points is reached by a shortened last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor

from danceopd.distill.schedule import Grid
from danceopd.states import Query


class QueryBand(Protocol):
    """A distribution over a rollout's states. ``per_rollout`` is K; ``over`` is what it is laid over."""

    @property
    def over(self) -> Literal["step", "sigma"]: ...

    @property
    def per_rollout(self) -> int: ...

    def draw(self, batch: int, grid: Grid, generator: torch.Generator) -> Query:
        """K distinct, ordered states for each of ``batch`` rollouts."""
        ...

    def step_probabilities(self, grid: Grid) -> Tensor:
        """Probability of each step 0..N-1 for one query: float64 [N]."""
        ...

    def expected_depth(self, grid: Grid) -> float:
        """Euler steps that a rollout takes to its last query, in expectation."""
        ...


@dataclass(frozen=True)
class BetaQuery:
    """u ~ Beta(a, b): (5, 2) low noise, (5, 5) mid, (2, 5) high noise, (1, 1) uniform.

    Raises:
        ValueError: if a or b is not a positive number, or K < 1.
    """

    a: float = 5.0
    b: float = 2.0
    over: Literal["step", "sigma"] = "step"
    per_rollout: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(f"BetaQuery needs finite a, b > 0, found {self}")
        _check_options(self.over, self.per_rollout)

    def draw(self, batch: int, grid: Grid, generator: torch.Generator) -> Query:
        if self.over == "sigma":
            low, high = self._cdf(_sigma_edges(grid)[[0, -1]])
            probability = low + (high - low) * _uniform(batch, self.per_rollout, generator)
            return _at_sigma(1 - self._inverse_cdf(probability), grid)
        if self.per_rollout == 1:
            u = self._inverse_cdf(_uniform(batch, 1, generator))
            return _at_step((u * grid.steps).long().clamp_max(grid.steps - 1), grid)
        _check_distinct(self.per_rollout, grid)
        # Distinct steps: without replacement, each draw proportional to the band's mass on the steps left.
        mass = self.step_probabilities(grid).clamp_min(1e-12).expand(batch, -1)
        return _at_step(torch.multinomial(mass, self.per_rollout, generator=generator).sort(dim=1).values, grid)

    def step_probabilities(self, grid: Grid) -> Tensor:
        if self.over == "step":
            return self._cdf(torch.arange(grid.steps + 1, dtype=torch.float64) / grid.steps).diff()
        mass = self._cdf(_sigma_edges(grid)).diff()
        return torch.cat([mass / mass.sum(), mass.new_zeros(1)])  # the last sigma alone is a single point

    def expected_depth(self, grid: Grid) -> float:
        return _mean_depth(self, grid)

    def _cdf(self, u: Tensor) -> Tensor:
        return torch.from_numpy(betainc(self.a, self.b, u.numpy()))

    def _inverse_cdf(self, probability: Tensor) -> Tensor:
        return torch.from_numpy(betaincinv(self.a, self.b, probability.numpy()))


@dataclass(frozen=True)
class StratifiedQuery:
    """K states, one in each of K equal parts of the rollout; for K = 1 this is the uniform query."""

    over: Literal["step", "sigma"] = "step"
    per_rollout: int = 1

    def __post_init__(self) -> None:
        _check_options(self.over, self.per_rollout)

    def draw(self, batch: int, grid: Grid, generator: torch.Generator) -> Query:
        inside = _uniform(batch, self.per_rollout, generator)
        if self.over == "sigma":
            u = (torch.arange(self.per_rollout, dtype=torch.float64) + inside) / self.per_rollout
            low, high = _sigma_edges(grid)[[0, -1]]
            return _at_sigma(1 - (low + (high - low) * u), grid)
        edges = self._edges(grid)
        return _at_step((edges[:-1] + inside * edges.diff()).long().minimum(edges[1:] - 1), grid)

    def step_probabilities(self, grid: Grid) -> Tensor:
        if self.over == "sigma":
            return BetaQuery(1.0, 1.0, "sigma").step_probabilities(grid)
        steps = self._edges(grid).diff()
        return (1 / (self.per_rollout * steps.double())).repeat_interleave(steps)

    def _edges(self, grid: Grid) -> Tensor:
        """The parts' first steps, and N: int64 [K + 1], the parts as even as whole numbers allow."""
        _check_distinct(self.per_rollout, grid)
        return torch.linspace(0, grid.steps, self.per_rollout + 1, dtype=torch.float64).round().long()

    def expected_depth(self, grid: Grid) -> float:
        return _mean_depth(self, grid)


def low_noise(**options) -> BetaQuery:
    """Beta(5, 2), the paper's choice: mean step 10.9 of 16."""
    return BetaQuery(5.0, 2.0, **options)


def mid_noise(**options) -> BetaQuery:
    """Beta(5, 5)."""
    return BetaQuery(5.0, 5.0, **options)


def high_noise(**options) -> BetaQuery:
    """Beta(2, 5)."""
    return BetaQuery(2.0, 5.0, **options)


def uniform(**options) -> BetaQuery:
    """Beta(1, 1)."""
    return BetaQuery(1.0, 1.0, **options)


BANDS = {
    "low_noise": low_noise,
    "mid_noise": mid_noise,
    "high_noise": high_noise,
    "uniform": uniform,
    "stratified": StratifiedQuery,
}
"""The recipe's names for query bands."""


def _check_options(over: str, per_rollout: int) -> None:
    if over not in ("step", "sigma") or per_rollout < 1:
        raise ValueError(
            f"a query band needs over 'step' or 'sigma' and per_rollout >= 1, found over {over!r} and "
            f"per_rollout {per_rollout}"
        )


def _mean_depth(band: QueryBand, grid: Grid) -> float:
    """Mean over 4000 drawn queries."""
    drawn = band.draw(4000, grid, torch.Generator().manual_seed(0))
    between = drawn.sigma < grid.sigmas[drawn.step]
    return float((drawn.step + between.long()).amax(dim=1).double().mean())


def _uniform(batch: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, count, generator=generator, dtype=torch.float64)


def _check_distinct(count: int, grid: Grid) -> None:
    if count > grid.steps:
        raise ValueError(f"{count} distinct query steps do not fit a grid of {grid.steps} steps")


def _at_step(step: Tensor, grid: Grid) -> Query:
    return Query(step, grid.sigmas[step])


def _sigma_edges(grid: Grid) -> Tensor:
    """1 - sigma of every grid point that a model is called on: float64 [N], rising."""
    if grid.steps < 2:
        raise ValueError("a band over sigma needs a grid of at least two steps")
    return 1 - grid.sigmas[:-1].double()


def _at_sigma(sigma: Tensor, grid: Grid) -> Query:
    """The grid point at or before each sigma (clamped against rounding to those that a model is called on)."""
    sigma = sigma.sort(dim=1, descending=True).values.float()
    sigma = sigma.clamp(float(grid.sigmas[-2]), float(grid.sigmas[0]))
    step = (grid.sigmas[None, None, :-1] >= sigma[..., None]).sum(-1) - 1
    return Query(step, sigma)
