"""One backbone with a frozen LoRA teacher and a LoRA student, for any family."""

from __future__ import annotations

import torch

from danceopd.fields.adapters import AdapterBackbone
from danceopd.fields.lora import Lora

PROMPTS = ["a red circle", "a small blue square beside a green star"]
RANK, ALPHA = 4, 6.0
SHAPE = (4, 8, 12)


def perturb(backbone: AdapterBackbone, name: str, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in backbone.named_parameters(name):
        if "lora_B" in key:
            parameter.data += torch.randn(parameter.shape, generator=generator) * size


def twin_backbone(family, *, fold: bool) -> AdapterBackbone:
    """A backbone with a frozen LoRA teacher and a trainable student that starts as a copy of it, which is active."""
    backbone = AdapterBackbone(family.network, fold=fold)
    backbone.create(
        "source", rank=3, alpha=5.0, targets=family.lora_targets, generator=torch.Generator().manual_seed(5)
    )
    perturb(backbone, "source", 0.5, seed=6)
    weights = {name: weight.detach().clone() for name, weight in backbone.state("source").items()}
    lora = Lora(rank=3, alpha=5.0, weights=weights)
    backbone.add("teacher", lora)
    backbone.create("student", rank=3, alpha=5.0, targets=family.lora_targets, generator=torch.Generator(), start=lora)
    backbone.activate("student")
    return backbone


def shared_backbone(family, *, fold: bool = False) -> AdapterBackbone:
    """A backbone with a frozen LoRA teacher and a trainable student, which is active."""
    backbone = AdapterBackbone(family.network, fold=fold)
    rng = torch.Generator().manual_seed(5)
    backbone.create("teacher", rank=3, alpha=3.0, targets=family.lora_targets, generator=rng)
    perturb(backbone, "teacher", 0.5, seed=6)
    for parameter in backbone.parameters("teacher"):
        parameter.requires_grad_(False)
    backbone.create("student", rank=RANK, alpha=ALPHA, targets=family.lora_targets, generator=rng)
    backbone.activate("student")
    return backbone
