"""The recipe: what a run is, in one strict, versioned YAML file. Nothing in it is silently ignored."""

from danceopd.recipe.file import (
    dump_recipe,
    evaluate_part,
    load_recipe,
    override,
    parse_recipe,
    read_yaml,
    with_absolute_files,
    with_evaluate,
)
from danceopd.recipe.part import MAX_SEED
from danceopd.recipe.recipe import IDLE, Recipe
from danceopd.recipe.sources import DataPart, FieldPart, RoutePart
from danceopd.recipe.teaching import METHODS
from danceopd.recipe.training import EvaluatePart, TrainPart
from danceopd.recipe.wording import RecipeError

__all__ = [
    "IDLE",
    "MAX_SEED",
    "METHODS",
    "DataPart",
    "EvaluatePart",
    "FieldPart",
    "Recipe",
    "RecipeError",
    "RoutePart",
    "TrainPart",
    "dump_recipe",
    "evaluate_part",
    "load_recipe",
    "override",
    "parse_recipe",
    "read_yaml",
    "with_absolute_files",
    "with_evaluate",
]
