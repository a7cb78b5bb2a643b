"""The models of a run, by name."""

from __future__ import annotations

from danceopd.distill.solver import VelocityFunction
from danceopd.recipe import Recipe
from danceopd.training.assemble import LoadedModels


def model_velocities(run: LoadedModels) -> dict[str, VelocityFunction]:
    """Every model worth scoring: the base, each field that is not the base itself, the student."""
    models: dict[str, VelocityFunction] = {"base": run.base.velocity}
    for name, part in run.recipe.fields.items():
        if not part.is_base:
            models[name] = run.fields[name].velocity
    return models | {"student": run.student.model}


def model_source(recipe: Recipe, name: str) -> str:
    """In a few words, what a model of ``model_velocities`` is."""
    if name in recipe.fields:
        part = recipe.fields[name]
        what = " over ".join(part.references.values()) or (recipe.base if part.base else " + ".join(part.mixture or ()))
        details = {
            "LoRA scale": f"{part.lora_scale:g}" if part.lora_scale != 1 else "",
            "guidance": f"{part.guidance_scale:g}" if part.guidance_scale != 1 else "",
            "negative prompt": repr(part.negative_prompt) if part.negative_prompt else "",
            "prompt prefix": repr(part.prompt_prefix) if part.prompt_prefix else "",
        }
        return ", ".join([what, *(f"{name} {detail}" for name, detail in details.items() if detail)])
    return recipe.base if name == "base" else "the trained student"
