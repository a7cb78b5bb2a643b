"""What the rest of danceopd needs to know of a model family, and nothing more.

A family translates: prompts and images to conditions, its own conventions to the canonical velocity, latents to
images. No training method is visible from here, and no family is visible from the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from danceopd.data.buckets import Buckets
from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid
from danceopd.families.latents import LatentSpace
from danceopd.fields.lora import Lora
from danceopd.states import Condition, Samples


class Family(Protocol):
    """One model family, loaded."""

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]

    takes_any_prompt: ClassVar[bool]
    """Whether ``encode`` takes every text; without it each prompt has to be tried."""

    size: tuple[int, int]
    """Height and width of the images of examples that bring none of their own."""

    @property
    def can_edit(self) -> bool:
        """Whether ``encode`` takes source images."""
        ...

    @property
    def model(self) -> nn.Module:
        """``model(z, sigma, condition) -> v``, holding ``network``."""
        ...

    @property
    def network(self) -> nn.Module:
        """The module whose weights checkpoints and adapters are about."""
        ...

    @property
    def files(self) -> dict[str, Path]:
        """Weight files that every field rests on besides the base, by what they are."""
        ...

    @property
    def latent_space(self) -> LatentSpace:
        """What its latents mean; families of one latent space can teach each other."""
        ...

    def resolve(self, reference: str) -> Path:
        """The weight file that a recipe's reference (``family:name`` or a path) means."""
        ...

    def generator(self, name: str, *, size: int, seed: int) -> ExampleSource:
        """Generated training inputs, where the family has any."""
        ...

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Condition:
        """Prompts (and source images [3, H, W] in [-1, 1]) as a condition on the family's device."""
        ...

    def empty(self, condition: Condition, negative_prompt: str = "") -> Condition:
        """The condition under the empty (or a negative) prompt; the source image stays."""
        ...

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        """The family's guidance operation."""
        ...

    def load_model(self, path: Path | None = None) -> nn.Module:
        """Another model, sharing nothing with the first: the base's weights, or a full checkpoint's."""
        ...

    def load_lora(self, path: Path) -> Lora:
        """A LoRA for ``network``, from a file in any layout that the family reads."""
        ...

    def samples(self, examples: Sequence[Example], size: tuple[int, int] | None = None) -> Samples:
        """Training inputs of one shape signature, encoded; ``size`` stands in the place of the family's."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent of an image of this size; ValueError if the family has no such images."""
        ...

    def buckets(self, size: tuple[int, int]) -> Buckets | None:
        """The sizes, of about the area of ``size``, that pictures are brought to; None takes them as they are."""
        ...

    def use_cache(self, folder: Path) -> bool:
        """Keep encodings in a folder from here on; False, and nothing, where encoding costs next to nothing, or where
        there are no files to know the encoders by."""
        ...

    def release_encoders(self) -> None:
        """Where a cache stands in for them, move all but the network to the CPU; conditions stay on ``to``'s device."""
        ...

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        """The family's own sigma grid; ``shift`` puts another shift in the place of the family's own.

        shape: of one latent; a family whose shift depends on the size needs it, unless ``shift`` is given.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents as images [B, 3, H, W] in [-1, 1]."""
        ...

    def checkpoint_gradients(self, network: nn.Module) -> None:
        """Let a network of this family recompute activations in its backward pass; ValueError if it cannot."""
        ...

    def compile(self, network: nn.Module) -> None:
        """Compile a network of this family in place, for batches of any size; ValueError if it cannot."""
        ...

    def to(self, device: torch.device, *, network: bool = True) -> None:
        """Move everything to a device, or everything but ``network``."""
        ...
