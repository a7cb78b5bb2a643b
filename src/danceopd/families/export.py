"""A student's LoRA as the file that diffusers users load, checked by loading it again before it is reported."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from danceopd.distill.solver import VelocityFunction
from danceopd.families.card import ModelCard
from danceopd.families.pipeline import LoadedPipeline
from danceopd.fields.adapters import Lora
from danceopd.fields.teachers import CheckpointError, file_hash
from danceopd.states import Condition

FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for in a folder."""
CARD = "README.md"

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between the student's velocity and its reloaded export's, by the network's dtype. The
written tensors and their scale are compared exactly, so the looser ones only allow for another order of rounding."""


class PipelineFamily(Protocol):
    """The part of a family over a diffusers pipeline that an export needs."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def loaded(self) -> LoadedPipeline: ...

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Condition: ...


def export_lora(
    family: PipelineFamily, lora: Lora, student: VelocityFunction, folder: Path, *, card: ModelCard | None = None
) -> float:
    """Write ``folder/pytorch_lora_weights.safetensors``, load it into a fresh pipeline, and compare with the student.

    The file has the adapter's rank, alpha and targets in its metadata, without which alpha would be lost.

    Args:
        family: a family over a diffusers pipeline, whose base the LoRA is for.
        lora: the student as one LoRA over that base.
        student: ``student(z, sigma, condition) -> v`` as it was trained.
        card: written beside the LoRA as ``README.md``, with what the check found.

    Returns:
        The largest difference between the two velocities.

    Raises:
        CheckpointError: if the folder already holds an export, or what was written does not give back the student;
            nothing is left there then.
    """
    for target in [folder / FILE] + ([] if card is None else [folder / CARD]):
        if target.exists():
            raise CheckpointError(f"{target} exists already; choose another folder, or remove it")
    aside = folder / ".unverified"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(family.loaded, lora, aside)
        difference = _verify(family, lora, student, aside)
        if card is not None:
            text = card.render(
                lora=lora,
                pipeline=type(family.loaded.pipeline).__name__,
                weight_name=FILE,
                digest=file_hash(aside / FILE),
                difference=difference,
            )
            (aside / CARD).write_text(text, encoding="utf-8")
            (aside / CARD).replace(folder / CARD)
        (aside / FILE).replace(folder / FILE)
        return difference
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(loaded: LoadedPipeline, lora: Lora, folder: Path) -> None:
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))  # pyright: ignore
    type(loaded.pipeline).save_lora_weights(
        folder,
        transformer_lora_layers={name: weight.contiguous() for name, weight in lora.weights.items()},
        transformer_lora_adapter_metadata=config.to_dict(),
    )


def fresh_pipeline(loaded: LoadedPipeline) -> Any:
    """A pipeline of the same class with a transformer of its own, and the other parts shared."""
    return type(loaded.pipeline)(**loaded.pipeline.components | {"transformer": loaded.own_network()})


@torch.no_grad()
def _verify(family: PipelineFamily, lora: Lora, student: VelocityFunction, folder: Path) -> float:
    """The largest difference between the student's velocities and those of a fresh pipeline with the file loaded."""
    pipeline = fresh_pipeline(family.loaded)
    pipeline.load_lora_weights(folder, weight_name=FILE, adapter_name="exported")
    network = pipeline.transformer
    _require_same(lora, get_peft_model_state_dict(network, adapter_name="exported"), network, folder)
    reloaded: nn.Module = type(family.model)(network)
    generator = torch.Generator().manual_seed(0)
    scale = 2 * family.loaded.pipeline.vae_scale_factor
    shape = family.loaded.latent_shape(4 * scale, 4 * scale)
    z = torch.randn(2, *shape, generator=generator).to(family.loaded.device)
    sigma = torch.tensor([0.9, 0.4], device=z.device)
    condition = family.encode(["", "a red circle beside a blue square"], None)
    expected = student(z, sigma, condition).float()
    difference = float((reloaded(z, sigma, condition).float() - expected).abs().max())
    allowed = TOLERANCE[next(network.parameters()).dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"the export does not give back the student: velocities differ by {difference:.2g}, allowed is "
            f"{allowed:.2g}; {folder.parent / FILE} was not written"
        )
    return difference


def _require_same(lora: Lora, found: dict[str, Tensor], network: nn.Module, folder: Path) -> None:
    """The loaded adapter has the written tensors, bit for bit, and the same alpha / rank at every layer."""
    wrong = sorted(set(found) ^ set(lora.weights))
    wrong += [
        name
        for name, weight in lora.weights.items()
        if name in found and not torch.equal(found[name].cpu(), weight.to(found[name].dtype).cpu())
    ]
    for target in lora.targets:
        layer: Any = network.get_submodule(target)
        if abs(layer.scaling["exported"] - lora.alpha / lora.rank) > 1e-6 * lora.alpha / lora.rank:
            wrong.append(f"alpha / rank of {target}")
    if wrong:
        raise CheckpointError(
            f"the export, loaded again, differs in {len(wrong)} places, first {wrong[0]!r}; {folder.parent / FILE} "
            "was not written"
        )
