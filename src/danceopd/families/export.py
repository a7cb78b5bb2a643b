"""A student in the forms that diffusers and PEFT load, checked by loading it again before it is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from danceopd.distill.solver import VelocityFunction
from danceopd.families.card import Exported, ModelCard
from danceopd.families.loaded_pipeline import LoadedPipeline
from danceopd.families.pipeline import PipelineFamily
from danceopd.fields.adapters import Lora
from danceopd.fields.teachers import CheckpointError, file_hash

FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for in a folder."""
PEFT_FILE = "adapter_model.safetensors"
CARD = "README.md"

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between the student's velocity and its reloaded export's, by the network's dtype. The
written tensors and their scale are compared exactly, so the looser ones only allow for another order of rounding."""

ADAPTER_CHECK = "the tensors and their scale were the student's, and "


def export_lora(
    family: PipelineFamily, lora: Lora, student: VelocityFunction, folder: Path, *, card: ModelCard | None = None
) -> float:
    """Write a folder that ``pipe.load_lora_weights`` takes, load it into a fresh pipeline, and compare.

    The file has the adapter's rank, alpha and targets in its metadata, without which alpha would be lost.

    Args:
        family: a family over a diffusers pipeline, whose base the LoRA is for.
        lora: the student as one LoRA over that base.
        student: ``student(z, sigma, condition) -> v`` as it was trained.
        folder: absent or empty.
        card: written beside the LoRA as ``README.md``, with what the check found.

    Returns:
        The largest difference between the two velocities.

    Raises:
        CheckpointError: if the folder holds anything, or what was written does not give back the student; nothing is
            left there then.
    """
    loaded = family.loaded

    def write(aside: Path) -> None:
        type(loaded.pipeline).save_lora_weights(
            aside,
            transformer_lora_layers={name: weight.contiguous() for name, weight in lora.weights.items()},
            transformer_lora_adapter_metadata=_config(lora).to_dict(),
        )

    def reload(aside: Path) -> Any:
        pipeline = fresh_pipeline(loaded)
        pipeline.load_lora_weights(aside, weight_name=FILE, adapter_name="exported")
        _require_same(lora, pipeline.transformer, "exported", folder)
        return pipeline.transformer

    name = type(loaded.pipeline).__name__
    use = (
        f"from diffusers import {name}\n\npipe = {name}.from_pretrained(BASE)\n"
        f'pipe.load_lora_weights("THIS FOLDER", weight_name="{FILE}")'
    )
    return _export(family, student, folder, write, reload, card, _what(lora), use, ADAPTER_CHECK)


def export_peft(
    family: PipelineFamily, lora: Lora, student: VelocityFunction, folder: Path, *, card: ModelCard | None = None
) -> float:
    """As ``export_lora``, a folder that PEFT's ``PeftModel.from_pretrained`` takes over the base's transformer."""
    loaded = family.loaded

    def write(aside: Path) -> None:
        aside.mkdir(parents=True)
        weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in lora.weights.items()}
        save_file(weights, aside / PEFT_FILE, {"format": "pt"})
        _config(lora).save_pretrained(str(aside))

    def reload(aside: Path) -> Any:
        adapted = PeftModel.from_pretrained(loaded.own_network(), str(aside), torch_device=str(loaded.device))
        network = adapted.get_base_model()
        _require_same(lora, network, "default", folder)
        return network

    name = type(loaded.pipeline).__name__
    use = (
        f"from diffusers import {name}\nfrom peft import PeftModel\n\npipe = {name}.from_pretrained(BASE)\n"
        'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "THIS FOLDER")'
    )
    return _export(family, student, folder, write, reload, card, _what(lora), use, ADAPTER_CHECK)


def export_merged(
    family: PipelineFamily, network: Any, student: VelocityFunction, folder: Path, *, card: ModelCard | None = None
) -> float:
    """As ``export_lora``, a whole transformer in a folder that its class's ``from_pretrained`` takes.

    network: a transformer without adapters that holds the student's weights.
    """
    cls, name = type(network), type(family.pipeline).__name__

    def reload(aside: Path) -> Any:
        dtype = next(network.parameters()).dtype
        found: Any = cls.from_pretrained(aside, local_files_only=True, use_safetensors=True, dtype=dtype)
        return found.to(family.loaded.device).eval()

    use = (
        f"from diffusers import {name}, {cls.__name__}\n\n"
        f'transformer = {cls.__name__}.from_pretrained("THIS FOLDER")\n'
        f"pipe = {name}.from_pretrained(BASE, transformer=transformer)"
    )
    what = f"A whole {cls.__name__} in the place of the one of"
    return _export(family, student, folder, network.save_pretrained, reload, card, what, use, "")


def _export(
    family: PipelineFamily,
    student: VelocityFunction,
    folder: Path,
    write: Callable[[Path], None],
    reload: Callable[[Path], Any],
    card: ModelCard | None,
    what: str,
    use: str,
    checked: str,
) -> float:
    """Write aside, load again, compare, and only then give the folder its name."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already and is not empty; choose another folder, or remove it")
    aside = folder.with_name(f".unverified-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        difference = _difference(family, reload(aside), student, folder)
        if card is not None:
            digests = {path.name: file_hash(path) for path in sorted(aside.glob("*.safetensors"))}
            text = card.render(
                Exported(
                    what=what,
                    use=use,
                    checked=checked,
                    difference=difference,
                    digests=digests,
                    is_lora=checked == ADAPTER_CHECK,
                )
            )
            (aside / CARD).write_text(text, encoding="utf-8")
        aside.replace(folder)
        return difference
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _config(lora: Lora) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))  # pyright: ignore


def _what(lora: Lora) -> str:
    return f"A LoRA of rank {lora.rank} and alpha {lora.alpha:g} on {len(lora.targets)} modules of"


def fresh_pipeline(loaded: LoadedPipeline) -> Any:
    """A pipeline of the same class with a transformer of its own, and the other parts shared."""
    return type(loaded.pipeline)(**loaded.pipeline.components | {"transformer": loaded.own_network()})


@torch.no_grad()
def _difference(family: PipelineFamily, network: Any, student: VelocityFunction, folder: Path) -> float:
    """The largest difference between the student's velocities and those of ``network``, if it is small enough."""
    generator = torch.Generator().manual_seed(0)
    scale = 2 * family.pipeline.vae_scale_factor
    z = torch.randn(2, *family.latent_shape(4 * scale, 4 * scale), generator=generator).to(family.loaded.device)
    sigma = torch.tensor([0.9, 0.4], device=z.device)
    condition = family.encode(["", "a red circle beside a blue square"], None)
    expected = student(z, sigma, condition).float()
    difference = float((family.behind_the_call(network)(z, sigma, condition).float() - expected).abs().max())
    allowed = TOLERANCE[next(network.parameters()).dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"the export does not give back the student: velocities differ by {difference:.2g}, allowed is "
            f"{allowed:.2g}; {folder} was not written"
        )
    return difference


def _require_same(lora: Lora, network: Any, adapter: str, folder: Path) -> None:
    """The loaded adapter has the written tensors, bit for bit, and the same alpha / rank at every layer."""
    found: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=adapter)
    wrong = sorted(set(found) ^ set(lora.weights))
    wrong += [
        name
        for name, weight in lora.weights.items()
        if name in found and not torch.equal(found[name].cpu(), weight.to(found[name].dtype).cpu())
    ]
    for target in lora.targets:
        layer: Any = network.get_submodule(target)
        if abs(layer.scaling[adapter] - lora.alpha / lora.rank) > 1e-6 * lora.alpha / lora.rank:
            wrong.append(f"alpha / rank of {target}")
    if wrong:
        raise CheckpointError(
            f"the export, loaded again, differs in {len(wrong)} places, first {wrong[0]!r}; {folder} was not written"
        )
