"""A student in the forms that diffusers and PEFT load, checked by loading it again before it is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from danceopd.families.probes import Probes
from danceopd.fields.adapters import exact_targets
from danceopd.fields.lora import Lora
from danceopd.fields.weights import PEFT_FILE, PEFT_PREFIX, WeightsError, file_hash, require_free

FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` looks for in a folder."""
CARD = "README.md"

TOLERANCE = 1e-5
"""Largest difference between the velocities of a student and of its reloaded export, as a share of the largest
velocity (or of 1). For networks in float32."""
SHARE_OF_CHANGE = 0.05
"""The same for networks in half precision, as a share of what the student changes of its base: so coarse weights may
round all of a small change away, however small the difference is beside the velocities."""
ROUNDINGS = 4
"""An adapter over a half-precision network, whose own tensors were compared, and float32 weights of a student over such
a network may besides differ by so many roundings of the largest velocity: what the network's sums give in another order
or type."""
FLOAT32 = torch.finfo(torch.float32).eps

ADAPTER_CHECK = "the tensors and their scale were the student's, and "
MERGED_CHECK = "the tensors were those written, bit for bit, and "


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One way to give a student away.

    write: writes it into a folder that is not there yet. reload: the network that a user makes of that folder. what,
    use, checked, is_lora: see ``Exported``. computed_in: the network that the student computes with, or None for the
    base's. remedy: what else to do if half precision cannot hold the student.
    """

    write: Callable[[Path], None]
    reload: Callable[[Path], Any]
    what: str
    use: str
    checked: str
    is_lora: bool
    computed_in: Any = None
    remedy: str = ""


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
        WeightsError: if the folder holds anything, or what was written does not give back the student; nothing is
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
    form = _Form(write=write, reload=reload, what=_what(lora), use=use, checked=ADAPTER_CHECK, is_lora=True)
    return _export(family, student, folder, form, card)


def export_peft(
    family: PipelineFamily, lora: Lora, student: VelocityFunction, folder: Path, *, card: ModelCard | None = None
) -> float:
    """As ``export_lora``, a folder that PEFT's ``PeftModel.from_pretrained`` takes over the base's transformer."""
    loaded = family.loaded

    def write(aside: Path) -> None:
        aside.mkdir(parents=True)
        weights = {f"{PEFT_PREFIX}{name}": weight.contiguous() for name, weight in lora.weights.items()}
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
    form = _Form(write=write, reload=reload, what=_what(lora), use=use, checked=ADAPTER_CHECK, is_lora=True)
    return _export(family, student, folder, form, card)


def export_merged(
    family: PipelineFamily,
    network: Any,
    student: VelocityFunction,
    folder: Path,
    *,
    card: ModelCard | None = None,
    computed_in: Any = None,
) -> float:
    """As ``export_lora``, a whole transformer in a folder that its class's ``from_pretrained`` takes.

    network: a transformer without adapters that holds the student's weights. It is written in its own type, and
        refused where half precision cannot hold the student.
    computed_in: the network that the student computes with, where that is another, of coarser weights.
    """
    cls, name = type(network), type(family.pipeline).__name__

    def reload(aside: Path) -> Any:
        dtype = next(network.parameters()).dtype
        found: Any = cls.from_pretrained(aside, local_files_only=True, use_safetensors=True, dtype=dtype)
        _refuse(_differing(network.state_dict(), found.state_dict(), cast=False), folder)
        return found.to(family.loaded.device).eval()

    use = (
        f"from diffusers import {name}, {cls.__name__}\n\n"
        f'transformer = {cls.__name__}.from_pretrained("THIS FOLDER")\n'
        f"pipe = {name}.from_pretrained(BASE, transformer=transformer)"
    )
    form = _Form(
        write=network.save_pretrained,
        reload=reload,
        what=f"A whole {cls.__name__} in the place of the one of",
        use=use,
        checked=MERGED_CHECK,
        is_lora=False,
        computed_in=network if computed_in is None else computed_in,
        remedy="; what half precision cannot hold, float32 can (--dtype fp32), and of a LoRA student its LoRA",
    )
    return _export(family, student, folder, form, card)


def _export(
    family: PipelineFamily, student: VelocityFunction, folder: Path, form: _Form, card: ModelCard | None
) -> float:
    """Write aside, load again, compare, and only then give the folder its name."""
    folder = folder.absolute()
    require_free(folder)
    aside = folder.with_name(f".unverified-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    side = 4 * family.loaded.size_step
    probes = Probes(family, side, side)
    needed = probes.velocities(student)
    change = float((needed - probes.velocities(family.load_model())).abs().max())
    try:
        form.write(aside)
        network = form.reload(aside)
        found = probes.velocities(family.behind_the_call(network))
        difference = float((found - needed).abs().max())
        largest = max(1.0, float(needed.abs().max()))
        written = _coarseness(network)
        own = _coarseness(family.network if form.computed_in is None else form.computed_in)
        in_half = max(written, own) > FLOAT32
        allowed = SHARE_OF_CHANGE * change if in_half else TOLERANCE * largest
        if in_half and (form.is_lora or written <= FLOAT32):
            allowed = max(allowed, ROUNDINGS * max(written, own) * largest)
        if in_half and not form.is_lora:  # the base itself, were the student forgotten, has all of the change to miss
            allowed = min(allowed, change / 2)
        if not difference <= allowed:
            share = difference / change if change else float("inf")
            raise WeightsError(
                f"the export does not give back the student: velocities differ by {difference:.2g}, which is "
                f"{share:.1%} of what the student changes of its base ({change:.2g}); allowed is {allowed:.2g}"
                f"{form.remedy if written > FLOAT32 else ''}; {folder} was not written"
            )
        if card is not None:
            exported = Exported(
                what=form.what,
                use=form.use,
                call=family.call_options(card.guidance_scale),
                checked=f"{form.checked}velocities for {probes.words}",
                difference=difference,
                change=change,
                digests={path.name: file_hash(path) for path in sorted(aside.glob("*.safetensors"))},
                is_lora=form.is_lora,
                edits=family.can_edit,
            )
            (aside / CARD).write_text(card.render(exported), encoding="utf-8")
        aside.replace(folder)
        return difference
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _coarseness(network: Any) -> float:
    """The rounding of the coarsest of its weights."""
    return max(torch.finfo(parameter.dtype).eps for parameter in network.parameters())


def _config(lora: Lora) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=exact_targets(lora.targets))  # pyright: ignore


def _what(lora: Lora) -> str:
    return f"A LoRA of rank {lora.rank} and alpha {lora.alpha:g} on {len(lora.targets)} modules of"


def fresh_pipeline(loaded: LoadedPipeline) -> Any:
    """A pipeline of the same class with a transformer of its own, and the other parts shared."""
    return type(loaded.pipeline)(**loaded.pipeline.components | {"transformer": loaded.own_network()})


def _require_same(lora: Lora, network: Any, adapter: str, folder: Path) -> None:
    """The loaded adapter has the written tensors, bit for bit, and the same alpha / rank at every layer."""
    wrong = _differing(lora.weights, get_peft_model_state_dict(network, adapter_name=adapter), cast=True)
    for target in lora.targets:
        layer: Any = network.get_submodule(target)
        if abs(layer.scaling[adapter] - lora.alpha / lora.rank) > 1e-6 * lora.alpha / lora.rank:
            wrong.append(f"alpha / rank of {target}")
    _refuse(wrong, folder)


def _differing(needed: Mapping[str, Tensor], found: Mapping[str, Tensor], *, cast: bool) -> list[str]:
    """Names of the tensors that only one side has, or that are not equal bit for bit.

    cast: the loader may have chosen a narrower type, in which they are compared then.
    """

    def same(one: Tensor, other: Tensor) -> bool:
        one = one.to(other.dtype) if cast else one
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())

    unmatched = sorted(set(found) ^ set(needed))
    return unmatched + [name for name in needed if name in found and not same(needed[name], found[name])]


def _refuse(wrong: list[str], folder: Path) -> None:
    if wrong:
        raise WeightsError(
            f"the export, loaded again, differs in {len(wrong)} places, first {wrong[0]!r}; {folder} was not written"
        )
