"""Fields with closed-form velocities, and small networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danceopd.distill.solver import per_sample


class GaussianField:
    """Exact velocity for data ~ N(mean, std^2) per element.

    z_sigma is Gaussian with mean (1 - sigma) m and variance r^2 = (1 - sigma)^2 s^2 + sigma^2, so
    v = E[eps - x | z] = -m + (sigma - (1 - sigma) s^2) / r^2 * (z - (1 - sigma) m).
    """

    calls_per_velocity = 1

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def velocity(self, z: Tensor, sigma: Tensor, condition=None) -> Tensor:
        s = per_sample(sigma, z).to(z.dtype)
        variance = (1 - s) ** 2 * self.std**2 + s**2
        return -self.mean + (s - (1 - s) * self.std**2) / variance * (z - (1 - s) * self.mean)

    def flow(self, noise: Tensor, sigma: float) -> Tensor:
        """Exact state at ``sigma`` of the trajectory from ``noise``: mean and deviation are carried along."""
        return (1 - sigma) * self.mean + ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5 * noise


class GaussianMixtureField:
    """Exact velocity for data ~ sum_i w_i N(m_i, s^2), one-dimensional data."""

    calls_per_velocity = 1

    def __init__(self, means: list[float], weights: list[float], std: float) -> None:
        self.parts = [GaussianField(mean, std) for mean in means]
        self.weights, self.std = weights, std

    def velocity(self, z: Tensor, sigma: Tensor, condition=None) -> Tensor:
        s = per_sample(sigma, z).to(z.dtype)
        variance = (1 - s) ** 2 * self.std**2 + s**2
        logs = torch.stack(
            [
                torch.log(torch.tensor(w, dtype=z.dtype)) - (z - (1 - s) * part.mean) ** 2 / (2 * variance)
                for part, w in zip(self.parts, self.weights, strict=True)
            ]
        )
        share = logs.softmax(0)
        return (share * torch.stack([part.velocity(z, sigma) for part in self.parts])).sum(0)


class TinyNet(nn.Module):
    """v = a small MLP of (z, sigma, condition); condition is a [B, 2] tensor or None."""

    def __init__(self, size: int = 4, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.size = size
        self.fc_in = nn.Linear(size + 3, width)
        self.fc_out = nn.Linear(width, size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, z: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        extra = z.new_zeros(len(z), 2) if condition is None else condition
        hidden = torch.cat([z.flatten(1), sigma[:, None].to(z.dtype), extra.to(z.dtype)], dim=1)
        return self.fc_out(torch.tanh(self.fc_in(hidden))).view(z.shape)
