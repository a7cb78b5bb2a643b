"""The sigma grid that rollouts and samplers step along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """sigmas: float32 [N + 1], strictly falling, first in (0, 1], last 0. A model is called at the first N.

    Raises:
        ValueError: if the sigmas are not such a sequence.
    """

    sigmas: Tensor

    def __post_init__(self) -> None:
        s = self.sigmas
        if s.ndim != 1 or len(s) < 2 or not bool((s[1:] < s[:-1]).all()) or s[-1] != 0 or not 0 < s[0] <= 1:
            raise ValueError(f"a grid needs sigmas falling strictly from at most 1 to 0, found {s.tolist()}")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


GridFor = Callable[[tuple[int, ...]], Grid]
"""``grid_for(shape)``: the grid of latents of a shape, where a family's shift depends on their size."""


def grid_of(grid: Grid | GridFor, shape: tuple[int, ...]) -> Grid:
    """The grid that latents of ``shape`` (without the batch axis) step along."""
    return grid if isinstance(grid, Grid) else grid(shape)


def shifted_grid(*, steps: int, shift: float = 1.0) -> Grid:
    """linspace(1, 1/N, N), shifted by s -> shift s / (1 + (shift - 1) s), then 0 (Esser et al. 2024, eq. 23)."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"a grid needs steps >= 1 and shift > 0, found steps {steps} and shift {shift}")
    even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    shifted = shift * even / (1 + (shift - 1) * even)
    return Grid(torch.cat([shifted, shifted.new_zeros(1)]).float())
