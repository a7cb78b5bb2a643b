"""``danceopd export``: a run's student in a form that others load, reloaded and compared before it is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from danceopd.families.card import ModelCard
from danceopd.families.registry import is_over_a_pipeline
from danceopd.fields.hub import parse_hub_reference
from danceopd.fields.teachers import merge_lora, save_lora
from danceopd.recipe import Recipe, RecipeError, parse_recipe
from danceopd.training.assemble import Assembly, LoadedModels, load_models
from danceopd.training.checkpoint import CheckpointFailure, TrainingState
from danceopd.training.hardware import pick_device
from danceopd.training.models import model_source
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run, load_run_models

Format = Literal["lora", "peft", "merged"]

EXPORT_TOLERANCE = 1e-4
"""Largest relative difference between a student and its reloaded export, in float32."""


def export(folder: RunFolder, out: Path, *, form: Format | None = None, base_id: str | None = None) -> float:
    """Write the (averaged) student against the ORIGINAL base, reload it, and compare.

    A LoRA student becomes one LoRA, whatever it started from (ranks concatenated).

    Args:
        out: a folder for a family over diffusers, else a .safetensors file.
        form: ``"lora"`` as diffusers loads it, ``"peft"``, or ``"merged"``, the whole network; by default lora for a
            LoRA student and merged for a full one.
        base_id: the base's name on the hub, for the model card; the recipe's, or its folder's name, by default.

    Returns:
        The largest difference between the reloaded model's velocity and the student's own.

    Raises:
        RecipeError: for a form that this student or family cannot take.
        CheckpointError, CheckpointFailure: if ``out`` is no place for it, or what was written does not reproduce the
            student; nothing is left there then.
    """
    recipe = folder.read_recipe()
    is_lora = recipe.student.lora is not None
    form = form or ("lora" if is_lora else "merged")
    if form != "merged" and not is_lora:
        raise RecipeError(f"--format {form}: this student is no LoRA, its whole network was trained; use merged")
    if is_over_a_pipeline(recipe.family):
        with folder.owned():  # with its data, whose sizes the card names
            assembly, state = load_run(folder, device=pick_device(), purpose="exported")
        return _export_folder(assembly, out, form, model_card(folder, assembly, state, base_id))
    if form == "peft" or base_id is not None:
        what = "--format peft" if form == "peft" else "--base-id"
        raise RecipeError(f"{what}: family {recipe.family!r} exports single files, without a model card")
    with folder.owned():
        run, _ = load_run_models(folder, device=torch.device("cpu"), purpose="exported")
    return _export_file(run, out, form)


def _export_folder(assembly: Assembly, out: Path, form: Format, card: ModelCard) -> float:
    from danceopd.families.export import export_lora, export_merged, export_peft  # needs the extra

    family: Any = assembly.family
    student, lora = assembly.student.model, assembly.student.lora()
    if form == "merged" or lora is None:
        return export_merged(family, _merged(assembly), student, out, card=card)
    return (export_lora if form == "lora" else export_peft)(family, lora, student, out, card=card)


def _merged(run: LoadedModels) -> nn.Module:
    """A network without adapters that holds the student's weights."""
    lora = run.student.lora()
    if lora is None:
        return run.student.network
    network = run.family.load_model().get_submodule("network")
    merge_lora(network, lora)
    return network


def _export_file(run: LoadedModels, out: Path, form: Format) -> float:
    if out.suffix != ".safetensors":
        raise CheckpointFailure(f"exports are written as safetensors; {out} should end in .safetensors")
    family, lora = run.family, run.student.lora()
    out.parent.mkdir(parents=True, exist_ok=True)
    unverified = out.with_name(f".unverified-{out.name}")
    try:
        if form == "lora" and lora is not None:
            save_lora(lora, unverified)
            part = {"exported": {"lora": str(unverified)}}
        else:
            save_file(dict(_merged(run).state_dict()), unverified, {"format": "pt"})
            part = {"exported": {"checkpoint": str(unverified)}}
        whole = run.recipe.model_dump(mode="json")
        content = {key: whole[key] for key in ("version", "family", "base", "output")} | {"fields": part}
        content["routes"] = [{"field": "exported", "data": whole["routes"][0]["data"]}]
        reloaded = load_models(parse_recipe(content, where=str(out)), device=torch.device("cpu"))
        noise = torch.randn(4, *family.latent_shape(*family.size), generator=torch.Generator().manual_seed(0))
        sigma, condition = torch.tensor([0.2, 0.5, 0.8, 1.0]), family.encode([""] * 4, None)
        with torch.no_grad():
            expected = run.student.model(noise, sigma, condition)
            difference = float((reloaded.fields["exported"].velocity(noise, sigma, condition) - expected).abs().max())
        if not difference <= EXPORT_TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CheckpointFailure(
                f"the export does not reproduce the student: velocities differ by {difference:.2g}; {out} was not "
                "written"
            )
        unverified.replace(out)
        return difference
    finally:
        unverified.unlink(missing_ok=True)


def model_card(folder: RunFolder, assembly: Assembly, state: TrainingState, base_id: str | None) -> ModelCard:
    """What the run knows of its student. Local paths are cut to their last two parts."""
    recipe = assembly.recipe
    sizes = {route.name: route.shape for route in assembly.method.routes}
    trained = f"Trained for {state.step} updates of {recipe.train.batch_size} samples by {recipe.method}"
    return ModelCard(
        base=base_id or _base_name(recipe.base),
        fields={name: _without_folders(model_source(recipe, name)) for name in recipe.fields},
        hashes={_without_folders(name): digest for name, digest in assembly.hashes.items()},
        recipe=_public(recipe),
        scores=_scores(folder),
        limits=[
            f"{trained}, on latents of {', '.join(f'{shape} ({name})' for name, shape in sizes.items())}; other sizes "
            "were not tried."
        ],
    )


def _base_name(reference: str) -> str:
    hub = None if Path(reference).exists() else parse_hub_reference(reference)
    return Path(reference).name if hub is None else hub.repository


def _scores(folder: RunFolder) -> dict[str, float]:
    """The student's overall scores, where the run was evaluated."""
    if not folder.evaluation_file.exists():
        return {}
    models = folder.evaluation()["models"]
    return {f"{name} overall": scores["overall"] for name, scores in models["student"].items()}


def _public(recipe: Recipe) -> str:
    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(part) for key, part in value.items()}
        if isinstance(value, list):
            return [public(part) for part in value]
        return _without_folders(value) if isinstance(value, str) else value

    return yaml.safe_dump(public(recipe.model_dump(mode="json")), sort_keys=False)


def _without_folders(text: str) -> str:
    return "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text
