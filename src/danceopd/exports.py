"""``danceopd export``: a run's student in a form that others load, reloaded and compared before it is reported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from danceopd.families.card import HUB_ID, ModelCard
from danceopd.families.probes import Probes
from danceopd.families.registry import is_over_a_pipeline
from danceopd.fields.hub import parse_hub_reference
from danceopd.fields.weights import (
    file_hash,
    merge_lora,
    read_safetensors,
    require_free,
    save_lora,
    write_safetensors,
)
from danceopd.recipe import Recipe, RecipeError, dump_recipe, parse_recipe
from danceopd.training.assemble import LoadedModels, load_models
from danceopd.training.checkpoint import RunStateError, TrainingState
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_source
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run_models

Format = Literal["lora", "peft", "merged"]
DType = Literal["fp32", "bf16"]

EXPORT_TOLERANCE = 1e-5
"""Largest difference between the velocities of a student and of its reloaded export, in float32, as a share of the
largest velocity (or of 1)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MADE_BY = {
    "danceopd": "trained by on-policy generative field distillation (DanceOPD, arXiv 2606.27377)",
    "off_policy": "trained by off-policy distillation of several velocity fields",
    "joint": "trained jointly on all of its data by flow matching",
    "weight_merge": "merged from the weights of its sources, without training",
    "diffusion_opd": "trained by on-policy distillation of whole trajectories (DiffusionOPD)",
    "flow_opd": "trained by on-policy distillation with a policy gradient (Flow-OPD)",
    "soft_mixing": "trained by on-policy distillation of the average of its fields (soft mixing)",
}
"""By method, how a model card's first sentence ends."""
TITLES = {"joint": "A model trained on the data of several tasks", "weight_merge": "A merge of several models"}
"""By method, a model card's title, where nothing was distilled."""
FREE_TEXT = {"prompt_prefix", "negative_prompt"}
"""Keys of a recipe whose values may begin like a path and are none."""


def export(
    folder: RunFolder,
    out: Path,
    *,
    form: Format | None = None,
    base_id: str | None = None,
    dtype: DType | None = None,
) -> float:
    """Write the (averaged) student against the ORIGINAL base, reload it, and compare.

    A LoRA student becomes one LoRA, whatever it started from (ranks concatenated). The data it was trained on are not
    needed.

    Args:
        out: a folder for a family over diffusers, else a .safetensors file.
        form: ``"lora"`` as diffusers loads it, ``"peft"``, or ``"merged"``, the whole network; by default lora for a
            LoRA student and merged for a full one.
        base_id: the base's name on the hub, for the model card; the recipe's, or its folder's name, by default.
        dtype: of the merged weights; by default the base's own, and float32 for a student without a LoRA.

    Returns:
        The largest difference between the reloaded model's velocity and the student's own.

    Raises:
        RecipeError: for a form that this student or family cannot take.
        WeightsError, RunStateError: if ``out`` is no place for it, or what was written does not reproduce the
            student; nothing is left there then.
    """
    recipe = folder.read_recipe()
    is_lora = recipe.student.lora is not None
    form = form or ("lora" if is_lora else "merged")
    if form != "merged" and not is_lora:
        raise RecipeError(f"--format {form}: this student is no LoRA, its whole network was trained; use merged")
    if dtype is not None and (form != "merged" or not is_over_a_pipeline(recipe.family)):
        raise RecipeError(
            "--dtype is for merged weights over diffusers; a LoRA is written in float32, as it was trained"
        )
    if base_id is not None and not re.fullmatch(HUB_ID, base_id):
        raise RecipeError(f"--base-id needs the base's id on the hub, ORG/NAME, found {base_id!r}")
    if is_over_a_pipeline(recipe.family):
        require_free(out)
        with folder.owned():
            run, state = load_run_models(folder, device=pick_device(), purpose="exported")
        return _export_folder(run, out, form, dtype, model_card(folder, run, state, base_id))
    if form == "peft" or base_id is not None:
        what = "--format peft" if form == "peft" else "--base-id"
        raise RecipeError(f"{what}: family {recipe.family!r} exports single files, without a model card")
    with folder.owned():
        run, _ = load_run_models(folder, device=torch.device("cpu"), purpose="exported")
    return _export_file(run, out, form)


def _export_folder(run: LoadedModels, out: Path, form: Format, dtype: DType | None, card: ModelCard) -> float:
    from danceopd.families.export import export_lora, export_merged, export_peft  # needs the extra

    family: Any = run.family
    student, lora = run.student.model, run.student.lora()
    if form == "merged" or lora is None:
        computed_in = run.student.network if lora is None else family.network
        merged = _merged(run, DTYPES[dtype] if dtype else None)
        return export_merged(family, merged, student, out, card=card, computed_in=computed_in)
    return (export_lora if form == "lora" else export_peft)(family, lora, student, out, card=card)


def _merged(run: LoadedModels, dtype: torch.dtype | None = None) -> nn.Module:
    """A network without adapters that holds the student's weights. dtype: of the weights, rounded once."""
    lora = run.student.lora()
    if lora is None:
        return run.student.network if dtype is None else deepcopy(run.student.network).to(dtype)
    network = run.family.load_model().get_submodule("network")
    if dtype is not None:
        network.float()
    merge_lora(network, lora)
    return network if dtype is None else network.to(dtype)


def _export_file(run: LoadedModels, out: Path, form: Format) -> float:
    if out.suffix != ".safetensors":
        raise RunStateError(f"exports are written as safetensors; {out} should end in .safetensors")
    family, lora = run.family, run.student.lora()
    recorded = {"text": file_hash(family.files["text encoder"])}  # a base beside another one is refused
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    unverified = out.with_name(f".unverified-{out.name}")
    try:
        if form == "lora" and lora is not None:
            tensors = lora.weights
            save_lora(lora, unverified, recorded)
            part = {"exported": {"lora": str(unverified)}}
        else:
            tensors = dict(_merged(run).state_dict())
            write_safetensors(tensors, unverified, recorded)
            part = {"exported": {"checkpoint": str(unverified)}}
        whole = run.recipe.model_dump(mode="json")
        content = {key: whole[key] for key in ("version", "family", "base", "output")} | {"fields": part}
        content["routes"] = [{"field": "exported", "data": whole["routes"][0]["data"]}]
        reloaded = load_models(parse_recipe(content, where=str(out)), device=torch.device("cpu"))
        probes = Probes(family, *family.size)
        needed = probes.velocities(run.student.model)
        difference = float((probes.velocities(reloaded.fields["exported"].velocity) - needed).abs().max())
        read, _ = read_safetensors(unverified)
        same = read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)
        if not same or not difference <= EXPORT_TOLERANCE * max(1.0, float(needed.abs().max())):
            raise RunStateError(
                f"the export does not reproduce the student: velocities differ by {difference:.2g}"
                f"{'' if same else ', and so do the tensors read back'}; {out} was not written"
            )
        unverified.replace(out)
        return difference
    finally:
        unverified.unlink(missing_ok=True)


def model_card(folder: RunFolder, run: LoadedModels, state: TrainingState, base_id: str | None) -> ModelCard:
    """What the run knows of its student, without the folders of local files."""
    recipe, names = run.recipe, _ShortNames(state.hashes)
    public = parse_recipe(_public(recipe.model_dump(mode="json"), names), where="the model card")
    sizes = {part.name or part.field: part.resolution or run.family.size for part in recipe.routes}
    updates = f"Trained for {state.step} updates of {recipe.train.batch_size} samples by {recipe.method}"
    areas = ", ".join(f"{height} x {width} ({name})" for name, (height, width) in sizes.items())
    limits = [f"{updates}, on images of about the area of {areas} pixels; other sizes were not tried."]
    if recipe.method == "weight_merge":
        limits = ["Nothing was trained: the weights were averaged as they were."]
    fields = "several fields" if len(recipe.routes) > 1 else "one field"
    if recipe.rollout.substeps > 1:
        limits.append(
            f"Taught to sample in {recipe.rollout.num_inference_steps} steps; other numbers of steps were not taught."
        )
    return ModelCard(
        base=base_id or _base_name(recipe.base),
        fields={name: model_source(public, name) for name in public.fields},
        hashes={names.of_source(source): digest for source, digest in state.hashes.items()},
        recipe=dump_recipe(public),
        trained=MADE_BY[recipe.method],
        title=TITLES.get(recipe.method, f"A student distilled from {fields}"),
        size=run.family.size,
        guidance_scale=recipe.evaluate.guidance_scale,
        num_inference_steps=recipe.evaluate.num_inference_steps,
        advice=_advice(recipe),
        scores=_scores(folder),
        limits=limits,
    )


def _advice(recipe: Recipe) -> list[str]:
    """What a user of the student has to know before drawing with it."""
    advice = []
    guided = [name for name, scales in recipe.taught_guidance().items() if set(scales) != {1.0}]
    if guided:
        advice.append(f"It has absorbed guidance ({', '.join(guided)}); guidance of the call multiplies that.")
    asked = recipe.method not in ("joint", "weight_merge")
    if asked and any(recipe.fields[route.field].prompt_prefix for route in recipe.routes):
        advice.append("Prompts need no trigger words: each prompt_prefix was said to its field alone.")
    if recipe.evaluate.shift is not None:
        advice.append(f"In its run the sampler's shift was {recipe.evaluate.shift:g}, not the pipeline's own.")
    return advice


def _base_name(reference: str) -> str:
    hub = None if Path(reference).exists() else parse_hub_reference(reference)
    return Path(reference).name if hub is None else hub.repository


def _scores(folder: RunFolder) -> dict[str, float]:
    """The student's overall scores, where the run was evaluated."""
    if not folder.evaluation_file.exists():
        return {}
    models = folder.evaluation()["models"]
    return {f"{name} overall": scores["overall"] for name, scores in models["student"].items()}


class _ShortNames:
    """Names for absolute paths, without their folders, each of one path alone. taken: names that others have already.

    A name is the path's last two parts, and a number where another has these too.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._names: dict[str, str] = {}

    def of(self, text: str) -> str:
        """The name of a path; any other text as it is."""
        if Path(text).is_absolute() and text not in self._names:
            plain = "/".join(Path(text).parts[-2:])
            names = chain([plain], (f"{plain} ({number})" for number in count(2)))
            self._names[text] = next(name for name in names if name not in self._taken)
            self._taken.add(self._names[text])
        return self._names.get(text, text)

    def of_source(self, source: str) -> str:
        """What a run's hashes are of: a reference, or ``REFERENCE: PART``."""
        reference, colon, part = source.rpartition(": ")
        return self.of(source) if not colon or source in self._names else f"{self.of(reference)}{colon}{part}"


def _public(value: Any, names: _ShortNames, key: str = "") -> Any:
    """A recipe's content with short names for its paths."""
    if isinstance(value, dict):
        return {name: _public(part, names, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part, names) for part in value]
    return names.of(value) if isinstance(value, str) and key not in FREE_TEXT else value
