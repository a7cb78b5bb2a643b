"""The velocity field and its plainest kind: a frozen network."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class VelocityField(Protocol):
    """A frozen capability: the velocity it would move a state with.

    ``calls_per_velocity`` is the number of network evaluations that one ``velocity`` costs per sample.
    """

    calls_per_velocity: int

    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """v(z, sigma, c) = eps - x, the shape of z, without gradient. z [B, ...], sigma [B]."""
        ...


class ModelField:
    """A network of its own, frozen and put in evaluation mode: ``model(z, sigma, condition) -> v``.

    The module is frozen in place: pass a copy of anything that is to be trained.

    Raises:
        TypeError: if ``model`` is not a module.
    """

    calls_per_velocity = 1

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ModelField needs a torch.nn.Module, found {type(model).__name__}")
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.model(z, sigma, condition)
