"""The Shapes velocity network: a small transformer over 4 x 4 pixel patches with a convolutional stem and head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from danceopd.world.render import IMAGE_SIZE
from danceopd.world.text import TEXT_WIDTH

PATCH = 4
GRID = IMAGE_SIZE // PATCH
STEM = 16
DATA_STD = 0.75
"""Standard deviation of the world's pixels in [-1, 1]: inputs are scaled to unit variance with it."""
SIGMA_FLOOR = 0.05
"""Below this sigma the velocity is damped instead of dividing by a vanishing number."""

LORA_TARGETS = ("to_qkv", "to_out", "ff_in", "ff_out", "patch_in", "context_in", "pooled_in", "patch_out")
"""Linear layers that adapters train by default."""


class Block(nn.Module):
    """Joint attention and a feed-forward layer, both modulated by (shift, scale, gate) from sigma and the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.ff_in = nn.Linear(width, 3 * width)
        self.ff_out = nn.Linear(3 * width, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, hidden: Tensor, shared: Tensor) -> Tensor:
        """hidden [B, L, D], shared modulation [B, 6, D] -> [B, L, D]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (shared + self.modulation)[:, :, None].unbind(1)
        hidden = torch.addcmul(hidden, gate_a, self._attention(torch.addcmul(shift_a, self.norm(hidden), 1 + scale_a)))
        inner = functional.relu(self.ff_in(torch.addcmul(shift_f, self.norm(hidden), 1 + scale_f)))
        return torch.addcmul(hidden, gate_f, self.ff_out(inner))

    def _attention(self, hidden: Tensor) -> Tensor:
        q, k, v = self.to_qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: on CPUs the fused kernel's backward is the slower one at these lengths.
        weights = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class ShapesTransformer(nn.Module):
    """Velocity network of the Shapes world.

    forward(z [B, 3, 32, 32], sigma [B], tokens [B, 16, 96], pooled [B, 96], source [B, 3, 32, 32] or None) -> v, the
    shape of z. A source image enters as 64 clean tokens appended to the sequence, and its outputs are dropped, as in
    FLUX.1 Kontext.

    Inside, the clean image is predicted and turned into a velocity, v = (z - x) / max(sigma, 0.05), because clean
    images are simpler to predict than noise. At equal training it learnt faster than predicting a preconditioned
    velocity (loss 0.116 against 0.140 after 600 steps of batch 64).
    """

    def __init__(self, width: int = 128, layers: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 3, padding=1), nn.SiLU(), nn.Conv2d(STEM, STEM, 3, padding=1))
        self.patch_in = nn.Linear(STEM * PATCH**2, width)
        self.context_in = nn.Linear(TEXT_WIDTH, width)
        self.pooled_in = nn.Linear(TEXT_WIDTH, width)
        self.sigma_in = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.position = nn.Parameter(torch.randn(GRID**2, width) * 0.3)
        self.text_position = nn.Parameter(torch.randn(16, width) * 0.1)
        self.source_mark = nn.Parameter(torch.randn(width) * 0.3)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, STEM * PATCH**2)
        self.head = nn.Sequential(nn.Conv2d(2 * STEM, STEM, 3, padding=1), nn.SiLU(), nn.Conv2d(STEM, 3, 3, padding=1))
        nn.init.normal_(self.modulation.weight, std=0.02)
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, source: Tensor | None = None) -> Tensor:
        condition = functional.silu(self.sigma_in(_sigma_features(sigma)) + self.pooled_in(pooled))
        shared = self.modulation(condition).unflatten(-1, (6, -1))
        scale = sigma.view(-1, 1, 1, 1).float()
        norm = (scale**2 + ((1 - scale) * DATA_STD) ** 2).sqrt()
        stem = self.stem(z / norm)
        image = self.patch_in(_patchify(stem)) + self.position
        parts = [image, self.context_in(tokens) + self.text_position]
        if source is not None:
            parts.append(self.patch_in(_patchify(self.stem(source / DATA_STD))) + self.position + self.source_mark)
        hidden = torch.cat(parts, dim=1)
        for block in self.blocks:
            hidden = block(hidden, shared)
        shift, gain = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        hidden = self.norm_out(hidden[:, : GRID**2]) * (1 + gain) + shift
        clean = self.head(torch.cat([stem, _unpatchify(self.patch_out(hidden))], dim=1)).float()
        return (z - clean) / scale.clamp_min(SIGMA_FLOOR)


def _sigma_features(sigma: Tensor) -> Tensor:
    """Sinusoidal features [B, 64] of sigma in [0, 1]."""
    frequencies = torch.exp(torch.linspace(0, math.log(200.0), 32, device=sigma.device))
    angles = sigma[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _patchify(features: Tensor) -> Tensor:
    """[B, C, 32, 32] -> [B, 64, C * 16]."""
    return functional.pixel_unshuffle(features, PATCH).flatten(2).transpose(1, 2)


def _unpatchify(tokens: Tensor) -> Tensor:
    """[B, 64, C * 16] -> [B, C, 32, 32]."""
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (GRID, GRID)), PATCH)
