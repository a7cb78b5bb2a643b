"""What is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from danceopd.families.family import Family
from danceopd.fields.adapters import AdapterBackbone, AdapterModel
from danceopd.fields.lora import Lora, combined
from danceopd.fields.weights import merge_lora
from danceopd.recipe import Recipe

STUDENT, START = "student", "student_start"
"""Adapter names on the shared backbone: the trained one, and the frozen one it may stand on."""


@dataclass(frozen=True)
class Start:
    """What a student starts from: the base, or a LoRA over it.

    A student of all weights also a full ``checkpoint``, with or without a LoRA over it, or the ``average`` of several
    networks, weights by name.
    """

    lora: Lora | None = None
    checkpoint: Path | None = None
    average: Mapping[str, Tensor] | None = None


def full_model(family: Family, start: Start) -> nn.Module:
    """A model of its own with the weights that ``start`` is, its ``network`` in float32."""
    model = family.load_model(start.checkpoint)
    network = model.get_submodule("network").float()
    if start.lora is not None:
        merge_lora(network, start.lora)
    if start.average is not None:
        network.load_state_dict(start.average)
    return model


class Student:
    """What is trained, in float32: a LoRA on the fields' own backbone, or a network of its own.

    ``model(z, sigma, condition)`` is the student outside every field's call.
    """

    def __init__(self, recipe: Recipe, family: Family, backbone: AdapterBackbone, begun: Start) -> None:
        part, start = recipe.student, begun.lora
        self.start = start if part.lora is None or part.init_mode == "merged" else None
        """The LoRA that stands, frozen or merged, under what is trained."""
        self._backbone = backbone
        self._lora = part.lora
        self.model: nn.Module
        if part.lora is None:
            self.model = full_model(family, begun)
            self.network = self.model.get_submodule("network")
            self.network.requires_grad_(True)
            self.parameters: dict[str, nn.Parameter] = dict(self.network.named_parameters())
            return
        self.network = family.network
        if self.start is not None:
            backbone.add(START, self.start)
        backbone.create(
            STUDENT,
            rank=part.lora.rank,
            alpha=part.lora.alpha,
            targets=part.lora.targets or family.lora_targets,
            generator=torch.Generator().manual_seed(recipe.train.seed),
            start=start if part.init_mode == "trainable" else None,
        )
        adapters = [STUDENT] if self.start is None else [START, STUDENT]
        backbone.activate(*adapters)
        self.model = AdapterModel(backbone, family.model, *adapters)
        self.parameters = dict(backbone.named_parameters(STUDENT))

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights as they export: a LoRA's under PEFT's keys, or the whole network's."""
        return self._backbone.state(STUDENT) if self._lora is not None else dict(self.network.state_dict())

    def lora(self) -> Lora | None:
        """The student as one LoRA over the ORIGINAL base, whatever it started from; None for a full student."""
        if self._lora is None:
            return None
        own = {name: weight.detach().clone().float().cpu() for name, weight in self.weights().items()}
        trained = Lora(rank=self._lora.rank, alpha=self._lora.alpha, weights=own)
        return trained if self.start is None else combined([(self.start, 1.0), (trained, 1.0)])

    @contextmanager
    def using(self, weights: list[torch.Tensor] | None) -> Iterator[None]:
        """The student under other trained weights (its EMA), put back afterwards."""
        if weights is None:
            yield
            return
        live = [parameter.detach().clone() for parameter in self.parameters.values()]
        _copy(self.parameters, weights)
        try:
            yield
        finally:
            _copy(self.parameters, live)


def _copy(parameters: dict[str, nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), values, strict=True):
            parameter.copy_(value)
