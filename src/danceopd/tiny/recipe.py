"""The same recipe on stand-ins: fields, routes, LoRA, guidance, queries, batch and precision stay as they are.

What changes is what the full size is made of: the files, the images' sizes, the number of updates, and how long a run
waits for what it does every so many updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.data.rows import read_table
from danceopd.families.pipeline_folder import INDEX, read_index
from danceopd.families.registry import family_class, is_over_a_pipeline
from danceopd.recipe import FieldPart, Recipe, RecipeError, RoutePart

if TYPE_CHECKING:
    from danceopd.tiny.stand_ins import StandIns

UPDATES = 2
"""What happens every so many updates happens in the last of these."""
LONGEST = 32
"""The longest image side of any route, in pixels."""
FULL_SIZE = (1024, 1024)
"""Height and width that a recipe means when it says none: what SD3.5, FLUX.1 and Z-Image make by themselves."""
FULL_STEP, TINY_STEP = 16, 4
"""What image sides are multiples of: the VAE's scale, 8 or 2, times patches of 2 x 2."""
LORA_RANK = 4
"""Of stand-in LoRAs where the student has none to go by."""


def tiny_recipe(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe on stand-ins, which are written into ``folder``, with a sentence on each of these.

    Raises:
        RecipeError: for a family that is no diffusers pipeline's, a base that is none of the family's, or image sides
            that the full size does not take.
        AdapterMismatch: for a target of the student's LoRA that the family does not have.
        ManifestError: for a manifest that is there and is no table.
    """
    require_pipeline(recipe)
    from danceopd.tiny.stand_ins import StandIns  # needs the extra

    made = StandIns(folder)
    edits = [_holds_edits(route) for route in recipe.routes]
    pipeline = _pipeline_class(recipe.family, recipe.base, edits=any(edits))
    base = made.base(recipe.base, pipeline)
    fields = {}
    for name, part in recipe.fields.items():
        own = [edit for route, edit in zip(recipe.routes, edits, strict=True) if route.field == name]
        fields[name] = _field(recipe, part, pipeline, edits=any(own), made=made)
    needs_targets = recipe.method == "joint" or recipe.query.needs_targets
    sizes = _sizes(recipe)
    routes = tuple(
        route.model_copy(
            update={
                "data": made.data(index, route.data, edits=edits[index], targets=needs_targets),
                "resolution": sizes[index],
            }
        )
        for index, route in enumerate(recipe.routes)
    )
    counts = "steps", "sample_steps", "gradient_cosine_steps"
    train = recipe.train.model_copy(update={key: min(getattr(recipe.train, key), UPDATES) for key in counts})
    staleness = min(recipe.rollout.staleness_steps, UPDATES)
    changes = {
        "base": base,
        "fields": fields,
        "routes": routes,
        "resolution": sizes[-1],
        "train": train,
        "rollout": recipe.rollout.model_copy(update={"staleness_steps": staleness}),
        "data_cache": recipe.data_cache is not False and str(folder / "cache"),
    }
    return recipe.model_copy(update=changes), made.said


def require_pipeline(recipe: Recipe) -> None:
    """Raise RecipeError unless the recipe's family is over a diffusers pipeline, and what it needs is installed."""
    if not is_over_a_pipeline(recipe.family):
        raise RecipeError(f"--tiny: family {recipe.family!r} is tiny already; leave --tiny out")
    family_class(recipe.family)


def _field(recipe: Recipe, part: FieldPart, pipeline: str, *, edits: bool, made: StandIns) -> FieldPart:
    """A field on stand-ins, over the recipe's base or its own."""
    changes = {}
    family = part.family or recipe.family
    lora = recipe.student.lora
    targets = family_class(family).lora_targets
    if lora is not None and lora.targets is not None and family == recipe.family:
        targets = lora.targets
    if part.own_base is not None:
        pipeline = _pipeline_class(family, part.own_base, edits=edits)
        changes["base"] = made.base(part.own_base, pipeline)
    if part.checkpoint is not None:
        changes["checkpoint"] = made.checkpoint(part.checkpoint, pipeline)
    if part.lora is not None:
        changes["lora"] = made.lora(
            part.lora,
            pipeline,
            rank=LORA_RANK if lora is None else lora.rank,
            alpha=LORA_RANK if lora is None else lora.alpha,
            targets=targets,
        )
    return part.model_copy(update=changes)


def _pipeline_class(family: str, reference: str, *, edits: bool) -> str:
    """The class of the pipeline that is meant: a local folder's own; else an editing one where there are edits."""
    cls = family_class(family)
    names = [each.__name__ for each in cls.pipelines]
    if (Path(reference) / INDEX).is_file():
        found = str(read_index(Path(reference)).get("_class_name"))
        if found not in names:
            raise RecipeError(f"{reference} holds a {found}; family {family!r} needs {' or '.join(names)}")
        return found
    editors = [each.__name__ for each in cls.editors]
    return editors[0] if edits and editors else next(name for name in names if name not in editors)


def _holds_edits(route: RoutePart) -> bool:
    """Whether a route's data has source images, as far as can be known: of a manifest that is not there, its
    ``columns`` or the route's ``task`` say so."""
    part = route.data
    if part.manifest is None:
        return part.pack == "edit"
    path = Path(part.manifest)
    if part.columns is not None:
        return "source" in part.columns
    return "source" in read_table(path).columns if path.is_file() else route.task == "edit"


def _sizes(recipe: Recipe) -> list[tuple[int, int] | None]:
    """Each route's ``resolution``, then the recipe's, all made smaller by one factor."""
    whole = recipe.resolution or FULL_SIZE
    given = {f"routes.{index}.resolution": route.resolution for index, route in enumerate(recipe.routes)}
    given["resolution"] = whole
    for place, size in given.items():
        if size is not None and any(side % FULL_STEP for side in size):
            raise RecipeError(
                f"{place}: image sides must be multiples of {FULL_STEP} for family {recipe.family!r}, found "
                f"{size[0]} x {size[1]}"
            )
    longest = max(side for size in given.values() if size is not None for side in size)
    factor = min(1.0, LONGEST / longest)

    def smaller(side: int) -> int:
        return max(TINY_STEP, round(side * factor / TINY_STEP) * TINY_STEP)

    return [None if size is None else (smaller(size[0]), smaller(size[1])) for size in given.values()]
