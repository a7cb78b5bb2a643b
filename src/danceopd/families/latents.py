"""What a latent means: the condition under which a field of one family can teach a student of another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

import torch

_BESIDE_THE_POINT = ("force_upcast", "sample_size")
"""Of an autoencoder's configuration, what changes how it is run and not what it computes."""


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Two families share a latent space where all of this is the same.

    channels: C of a latent [C, H, W]. downscale: image sides over latent sides.
    autoencoder: SHA-256 of its configuration and weights, or the name of a space that needs none.
    scaling_factor, shift_factor: a latent is (encoded - shift) * scaling.
    """

    channels: int
    downscale: int
    autoencoder: str
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def differences(self, other: LatentSpace) -> list[str]:
        """What is not the same, in words; empty for one and the same space."""
        return [
            f"{field.name} {str(mine)[:16]} and {str(its)[:16]}"
            for field in fields(self)
            if (mine := getattr(self, field.name)) != (its := getattr(other, field.name))
        ]


def latent_space_of(vae: Any, downscale: int) -> LatentSpace:
    """The space of a diffusers VAE.

    Its weights are compared in bfloat16, so that the same VAE stored in another precision is the same.
    """
    ignored = {"scaling_factor", "shift_factor", *_BESIDE_THE_POINT}
    config = {key: value for key, value in vae.config.items() if not key.startswith("_") and key not in ignored}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return LatentSpace(
        channels=vae.config.latent_channels,
        downscale=downscale,
        autoencoder=digest.hexdigest(),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
    )
