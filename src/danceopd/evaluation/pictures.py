"""Pictures of any family: drawn from prompts and edits, and put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from danceopd.data.examples import Example
from danceopd.distill.solver import VelocityFunction, integrate
from danceopd.families.family import Family
from danceopd.fields.guidance import guided_velocity
from danceopd.recipe import EvaluatePart


class Encoder(Protocol):
    """How a field is told what a prompt asks for, where not as the student is: by which family, and in which words."""

    @property
    def family(self) -> Family: ...

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Any: ...


def guided(velocity: VelocityFunction, family: Family, guidance_scale: float) -> VelocityFunction:
    """``velocity`` under external guidance; 1 leaves it alone. family: of the conditions that it is told."""
    if guidance_scale == 1.0:
        return velocity
    return partial(guided_velocity, velocity, empty=family.empty, guidance_scale=guidance_scale, combine=family.guide)


@torch.no_grad()
def draw(
    velocity: VelocityFunction,
    family: Family,
    examples: Sequence[Example],
    part: EvaluatePart,
    *,
    size: tuple[int, int] | None = None,
    encoder: Encoder | None = None,
) -> Tensor:
    """Images of prompts, or of edits with sources of one size, from noise of ``part.seed``: [B, 3, H, W] in [-1, 1].

    ``part.batch_size`` of them are drawn at once.

    size: height and width; by default the sources', or else the family's.
    encoder: of a field that is told something else than the student; the family by default.

    Raises:
        ValueError: if the family cannot take a prompt, a source or the size.
    """
    source = examples[0].source
    shape = family.latent_shape(*(size or (family.size if source is None else (source.shape[1], source.shape[2]))))
    noise = torch.randn(len(examples), *shape, generator=torch.Generator().manual_seed(part.seed))
    grid = family.grid(part.num_inference_steps, part.shift, shape)
    velocity, images = guided(velocity, family, part.guidance_scale), []
    for rows in torch.arange(len(examples)).split(part.batch_size):
        batch = [examples[row] for row in rows.tolist()]
        sources = [example.source for example in batch if example.source is not None]
        condition = (encoder or family).encode([example.prompt for example in batch], sources or None)
        z = noise[rows].to(condition.prompt_embeds.device)
        images.append(family.decode(integrate(velocity, z, condition, grid)).cpu())
    return torch.cat(images)


def side_by_side(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Images [3, h, w] in [-1, 1] in rows, each in a white cell as large as the largest: one image."""
    height = max(image.shape[1] for row in rows for image in row)
    width = max(image.shape[2] for row in rows for image in row)
    whole = torch.ones(3, len(rows) * height, max(len(row) for row in rows) * width)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            h, w = image.shape[1:]
            whole[:, y * height : y * height + h, x * width : x * width + w] = image
    return whole
