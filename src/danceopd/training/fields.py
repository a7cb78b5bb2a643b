"""From a recipe's fields to live ones: what is loaded, once each, and what is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.families.family import Family
from danceopd.fields.adapters import AdapterBackbone, AdapterField, AdapterMismatch
from danceopd.fields.field import VelocityField
from danceopd.fields.hub import Kind, locate
from danceopd.fields.offload import OffloadedField
from danceopd.fields.weights import WeightsError, source_hash
from danceopd.recipe import FieldPart, Recipe, RecipeError

OpenFamily = Callable[[str, str], Family]
"""``open_family(name, base)``."""


class Sources:
    """Every weight source of a run. hashes: by the recipe's reference, of the files and, from the hub, the commit."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    def base(self, reference: str, family: str, open_family: OpenFamily, *, own: bool) -> Family:
        """A family on its base, with every file that its fields rest on. own: the recipe's."""
        path = self._locate(reference, "base")
        opened = open_family(family, path)
        self.hashes[reference] = source_hash(opened.resolve(path))
        for name, file in opened.files.items():
            self.hashes[name if own else f"{reference}: {name}"] = source_hash(file)
        return opened

    def file(self, reference: str, kind: Kind, family: Family) -> Path:
        """The weight file of a checkpoint or a LoRA."""
        path = family.resolve(self._locate(reference, kind))
        self.hashes[reference] = source_hash(path)
        return path

    def _locate(self, reference: str, kind: Kind) -> str:
        found = locate(reference, kind)
        if found.commit is not None:
            self.hashes[f"{reference}: commit"] = found.commit
        return found.reference


@dataclass(frozen=True)
class FieldInput:
    """How a field is told what the user asked for: by its own family's encoders, its trigger words first."""

    family: Family
    prompt_prefix: str = ""

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Any:
        """The field's condition; arguments as in ``Family.encode``."""
        prefix = f"{self.prompt_prefix} " if self.prompt_prefix else ""
        return self.family.encode([prefix + prompt for prompt in prompts], sources)


@dataclass(frozen=True)
class _Network:
    """A loaded network and the backbone that carries its fields' adapters."""

    model: nn.Module
    backbone: AdapterBackbone
    keep_on: str


class FieldLoader:
    """Loads a recipe's fields. Fields over one base, or over one checkpoint, share one copy of its weights.

    family, backbone: the recipe's own, which carries the student and every LoRA over the recipe's base.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        backbone: AdapterBackbone,
        sources: Sources,
        open_family: OpenFamily,
        device: torch.device,
    ) -> None:
        self._sources, self._open_family, self._device = sources, open_family, device
        self._own = recipe.family, recipe.base
        self._families: dict[tuple[str, str], Family] = {self._own: family}
        self._networks: dict[tuple[str, str, str | None], _Network] = {
            (*self._own, None): _Network(family.model, backbone, "accelerator")
        }

    @property
    def models(self) -> list[nn.Module]:
        """Every network held, behind the canonical call."""
        return [family.model for family in self._families.values()] + [
            network.model for network in self._networks.values()
        ]

    @property
    def resident(self) -> list[nn.Module]:
        """Those of them that belong on the accelerator; they wait in main memory until they are moved."""
        return [network.model for network in self._networks.values() if network.keep_on == "accelerator"]

    def input(self, name: str, part: FieldPart) -> FieldInput:
        """How the field is told what the user asked for."""
        return FieldInput(self._family(name, part), part.prompt_prefix)

    def load(self, name: str, part: FieldPart) -> VelocityField:
        """The field, without its guidance.

        Raises:
            RecipeError: if it does not share the student's latent space, or shares a network that is kept elsewhere.
            WeightsError, AdapterMismatch: if a source cannot be had or does not fit.
        """
        try:
            return self._load(name, part)
        except (WeightsError, AdapterMismatch) as error:
            raise type(error)(f"fields.{name}: {error}") from error

    def _load(self, name: str, part: FieldPart) -> VelocityField:
        family, network = self._family(name, part), self._network(name, part)
        adapters = []
        if part.lora is not None:
            lora = family.load_lora(self._sources.file(part.lora, "lora", family))
            adapters.append(f"field_{name}")  # a bare name could be that of a module, or of a method of torch's
            network.backbone.add(adapters[0], lora, scale=part.lora_scale)
        field = AdapterField(network.backbone, network.model, *adapters)
        waits = part.keep_on == "cpu" and self._device.type != "cpu"
        return OffloadedField(field, network.model, self._device) if waits else field

    def _family(self, name: str, part: FieldPart) -> Family:
        base = part.own_base
        if base is None:
            return self._families[self._own]
        key = part.family or self._own[0], base
        if key not in self._families:
            opened = self._sources.base(base, key[0], self._open_family, own=False)
            differences = self._families[self._own].latent_space.differences(opened.latent_space)
            if differences:
                raise RecipeError(
                    f"fields.{name}: {key[0]!r} on {base} has another latent space than the recipe's {self._own[0]!r} "
                    f"on {self._own[1]}, so that neither's velocity means anything to the other: found "
                    f"{'; '.join(differences)}"
                )
            opened.to(self._device, network=False)
            self._families[key] = opened
        return self._families[key]

    def _network(self, name: str, part: FieldPart) -> _Network:
        family = self._family(name, part)
        base = self._own if part.own_base is None else (part.family or self._own[0], part.own_base)
        key = (*base, part.checkpoint)
        if key not in self._networks:
            model = family.model
            if part.checkpoint is not None:
                model = family.load_model(self._sources.file(part.checkpoint, "checkpoint", family))
            backbone = adapter_backbone(model.get_submodule("network"), self._device)
            self._networks[key] = _Network(model, backbone, part.keep_on)
        if self._networks[key].keep_on != part.keep_on:
            raise RecipeError(
                f"fields.{name}.keep_on: found {part.keep_on!r}, but another field over the same weights keeps them on "
                f"{self._networks[key].keep_on!r}; they share one copy"
            )
        return self._networks[key]


def adapter_backbone(network: nn.Module, device: torch.device, *, unfolded: bool = False) -> AdapterBackbone:
    """A backbone that folds where that is faster and loses nothing: float32 weights on a CPU.

    unfolded: never fold. Checkpointed gradients forbid it; compiled graphs would be made again for folded weights.
    """
    is_float32 = next(network.parameters()).dtype == torch.float32
    return AdapterBackbone(network, fold=device.type == "cpu" and is_float32 and not unfolded)
