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
        return what + (f", guidance {part.guidance_scale:g}" if part.guidance_scale != 1 else "")
    return recipe.base if name == "base" else "the trained student"
