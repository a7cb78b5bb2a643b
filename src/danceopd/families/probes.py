"""The calls on which a student and its export are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.distill.solver import VelocityFunction
from danceopd.families.family import Family

PROMPTS = ("", "a red circle and a blue square")
SIGMAS = (0.9, 0.4)


class Probes:
    """Noise at two sigmas under two prompts: from text alone and, where the family edits, with source images too.

    height, width: of the images, in pixels.
    """

    def __init__(self, family: Family, height: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        sources = list(torch.rand(2, 3, height, width, generator=generator) * 2 - 1)
        self.words = "two prompts, with and without source images" if family.can_edit else "two prompts"
        self._conditions = [family.encode(PROMPTS, None)]
        if family.can_edit:
            self._conditions.append(family.encode(PROMPTS, sources))
        self._z = torch.randn(2, *family.latent_shape(height, width), generator=generator)

    @torch.no_grad()
    def velocities(self, model: VelocityFunction) -> Tensor:
        """The model's answers: float32 [calls, 2, C, h, w]."""
        answers = []
        for condition in self._conditions:
            device = condition.prompt_embeds.device
            answers.append(model(self._z.to(device), torch.tensor(SIGMAS, device=device), condition).float())
        return torch.stack(answers)
